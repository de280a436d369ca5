"""Compiles a small group of linears as a server does before it serves, and then serves it: every
kernel must come out of Triton's cache. It needs no GPU. `tests/aot/asked.py` compares what is asked
for with what is made for everything else; this shows that a form that was made is found."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

sys.path[0] = str(Path(__file__).parent.parent)  # so that the folder is a package
os.environ.pop("TRITON_INTERPRET", None)  # the interpreter's kernels cannot be compiled

import torch  # noqa: E402
from aot.serving import ARCH, Group, be_served  # noqa: E402

from deltaserve.kernels.gpu.precompile import precompile  # noqa: E402
from deltaserve.kernels.gpu.variants import of_group, spec_of  # noqa: E402


def main() -> int:
    """The exit code: 1 if a kernel was compiled while serving."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        own = Group(256, (128, 64), torch.bfloat16, quantize="int4")
        precompile(list(of_group(spec_of(own.base, own.deltas.group), (1, 16), ARCH)), ARCH)
        before = _compiled(folder)
        be_served()
        for tokens in (1, 9, 16):
            own.serve(tokens)
        during = _compiled(folder) - before
        own.serve(17)  # a size that nothing was compiled for
        unforeseen = _compiled(folder) - before - during
    print(f"{before} kernels compiled at the start, {during} while serving")
    if unforeseen == 0:
        print("a step of an unforeseen size compiled nothing: the count is wrong")
    return int(during > 0 or before == 0 or unforeseen == 0)


def _compiled(folder: str) -> int:
    return sum(name.endswith(".cubin") for _, _, files in os.walk(folder) for name in files)


if __name__ == "__main__":
    sys.exit(main())
