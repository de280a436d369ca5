"""Compiles every kernel variant without a GPU and holds its machine code to its budget.

`--update` takes what was measured as the new budgets and prints what changed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

HERE = Path(__file__).parent
sys.path[0] = str(HERE.parent)  # so that the folder is a package and hides no module of its names
os.environ.pop("TRITON_INTERPRET", None)  # the interpreter's kernels cannot be compiled

import triton  # noqa: E402
from aot import compile  # noqa: E402
from aot.budgets import ARCHS, Budgets, compare, limits  # noqa: E402
from aot.compile import Reading, Refusal  # noqa: E402
from aot.table import table  # noqa: E402

BUDGETS = HERE / "budgets.json"
QUICK = (80, 90)

Job = tuple[int, int]


def main() -> int:
    """The exit code: 1 if any variant fails."""
    arguments = _arguments()
    listed = {arch: compile.variants(arguments.variants, arch) for arch in ARCHS}
    names = {v.name for variants in listed.values() for v in variants}
    archs = ARCHS if arguments.all or arguments.update else QUICK
    jobs = [
        (i, arch)
        for arch in archs
        for i, variant in enumerate(listed[arch])
        if arguments.only in variant.name
    ]
    start = time.perf_counter()
    with _cache(arguments.cache):
        results = list(_measure_all(arguments.variants, jobs))
    print(table(results))
    print(f"{len(results)} binaries in {time.perf_counter() - start:.0f} s, {_version()}")
    budgets = Budgets.load(arguments.budgets)
    if arguments.update:
        readings = [r for r in results if isinstance(r, Reading)]
        changes = budgets.update(readings, names, triton.__version__)
        budgets.save(arguments.budgets)
        print("\n".join(["", *(changes or ["no budget changed"])]))
    failures = list(_failures(results, budgets, names))
    if failures:
        print("\n".join(["", f"{len(failures)} failures:", *failures]))
    return 1 if failures else 0


def _failures(
    results: Iterable[Reading | Refusal], budgets: Budgets, names: set[str]
) -> Iterator[str]:
    same = budgets.triton in ("", triton.__version__)
    if not same:
        print(
            f"the budgets are of Triton {budgets.triton}: with {triton.__version__}, only "
            "compilation, local memory and shared memory are checked"
        )
    for result in results:
        if isinstance(result, Refusal):
            yield f"{result.name} sm_{result.arch}: {result.reason}"
            continue
        yield from limits(result)
        if same:
            yield from compare(result, budgets.variants.get(result.name, {}).get(result.arch))
    yield from budgets.orphans(names)


def _measure_all(module: str, jobs: list[Job]) -> Iterator[Reading | Refusal]:
    """The results in the order of the jobs. A compiler that dies takes only its own job along."""
    with _pool(os.cpu_count() or 1) as pool:
        futures = [pool.submit(compile.measure, module, *job) for job in jobs]
        for (index, arch), future in zip(jobs, futures, strict=True):
            try:
                yield future.result()
            except BrokenProcessPool:
                yield _measure_alone(module, index, arch)


def _measure_alone(module: str, index: int, arch: int) -> Reading | Refusal:
    with _pool(1) as pool:
        try:
            return pool.submit(compile.measure, module, index, arch).result()
        except BrokenProcessPool:
            name = compile.variants(module, arch)[index].name
            return Refusal(name, arch, "the compiler crashed")


def _pool(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))


def _cache(reuse: bool) -> AbstractContextManager[object]:
    if reuse:
        return nullcontext()
    folder = tempfile.TemporaryDirectory()
    os.environ["TRITON_CACHE_DIR"] = folder.name
    return folder


def _version() -> str:
    return f"Triton {triton.__version__}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--all", action="store_true", help="also sm_89 and sm_100")
    parser.add_argument("--update", action="store_true", help="write the budgets (implies --all)")
    parser.add_argument("--cache", action="store_true", help="reuse what Triton compiled before")
    parser.add_argument("--only", default="", metavar="TEXT", help="variants with this in the name")
    parser.add_argument("--budgets", type=Path, default=BUDGETS, help="another file of budgets")
    parser.add_argument(
        "--variants",
        default="deltaserve.kernels.gpu.gate",
        metavar="MODULE",
        help="the module whose all_variants() is compiled",
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
