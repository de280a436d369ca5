"""The commands that need no server: plan, inspect, tune, compress."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from deltaserve.clients.cli_common import AsJson
from deltaserve.server import config as c
from deltaserve.server import flags
from deltaserve.server.cli.common import BYTES, fail


def plan(
    base: Annotated[Path, typer.Option(help="Checkpoint folder of the base model.")],
    dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16; as `serve` has it if left out.")
    ] = None,
    quantize: Annotated[str, typer.Option(help="The base's weights: none, int8, int4.")] = "none",
    group_size: Annotated[int, typer.Option(help="Inputs that share an int4 scale.")] = 64,
    device: Annotated[
        str, typer.Option(help="cpu or cuda, also where there is none (then give --free).")
    ] = "cpu",
    free: Annotated[
        str, typer.Option(help="Bytes free before the base is loaded; auto for this machine's.")
    ] = "auto",
    memory: Annotated[
        str, typer.Option(help="For keys, values and adapters; auto for a share of what is free.")
    ] = "auto",
    adapter_bytes: Annotated[str, typer.Option(help=f"Most of it for adapters. {BYTES}")] = "auto",
    kv_cache_bytes: Annotated[
        str, typer.Option(help=f"Most of it for keys and values. {BYTES}")
    ] = "auto",
    block_size: Annotated[int, typer.Option(help="Tokens in a block of the KV cache.")] = 16,
    max_batch_tokens: Annotated[int, typer.Option(help="Tokens of one step.")] = 512,
    max_sequences: Annotated[int, typer.Option(help="Requests in one step.")] = 256,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens of a request; the model's limit if left out.")
    ] = None,
    allow_untested: Annotated[
        bool, typer.Option(help="Also architectures that the test suite does not cover.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """What fits into the memory beside a base: tokens, and adapters of each kind.

    No weight is read. Exit code 2 if `serve` would refuse to start with these.
    """
    from rich.console import Console

    from deltaserve.server import planner
    from deltaserve.server.model.errors import ModelError

    try:
        found = planner.plan(
            c.ModelConfig(
                base,
                dtype or c.DEVICE_DTYPES.get(device, "float32"),
                quantize,
                group_size,
                device=device,
                allow_untested=allow_untested,
            ),
            c.EngineConfig(
                max_batch_tokens=max_batch_tokens,
                max_sequences=max_sequences,
                kv_cache_bytes=flags.size("--kv-cache-bytes", kv_cache_bytes),
                block_size=block_size,
                max_length=max_length,
                memory=flags.size("--memory", memory),
            ),
            c.AdapterConfig(bytes=flags.size("--adapter-bytes", adapter_bytes)),
            flags.size("--free", free),
        )
    except (c.ConfigError, ModelError) as error:
        fail(str(error))
    if as_json:
        print(json.dumps(planner.report(found)))
    else:
        planner.show(found, Console())


def inspect(
    path: Annotated[Path, typer.Argument(help="Folder or safetensors file of an adapter.")],
    base: Annotated[
        Path | None, typer.Option(help="Checkpoint folder: say how this base would serve it.")
    ] = None,
    parent: Annotated[
        list[Path] | None,
        typer.Option(
            help="What its files are relative to; several: the nearest to the base first."
        ),
    ] = None,
    task_id: Annotated[
        int | None, typer.Option(min=0, help="Which task of an adapter that holds several.")
    ] = None,
    max_error: Annotated[
        float, typer.Option(help="Largest relative error of a smaller form; 0: exact forms only.")
    ] = 0.0,
    allow_base_mismatch: Annotated[
        bool, typer.Option(help="Also if it was made for another base of the same shapes.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """What an adapter is, and whether and how a base would serve it; no server is needed.

    Exit code 1 if it would be refused.
    """
    if not path.exists():
        fail(f"{path}: no such file or folder")
    if not 0 <= max_error < 1:
        fail(f"--max-error {max_error:g}: must be at least 0 and below 1")
    from deltaserve.adapters.options import LoadOptions
    from deltaserve.server.inspect import inspect, show
    from deltaserve.server.model.errors import ModelError

    try:
        options = LoadOptions(allow_base_mismatch, task_id, max_error)
        report = inspect(path, base, options, parent or ())
    except (ModelError, OSError) as error:
        fail(f"--base {base}: {error}")
    if as_json:
        print(json.dumps(report))
    else:
        show(report)
    if report["refusal"] is not None:
        raise typer.Exit(1)


def tune(
    base: Annotated[Path, typer.Option(help="Checkpoint folder of the base model.")],
    dtype: Annotated[str, typer.Option(help="bfloat16 or float16.")] = "bfloat16",
    quantize: Annotated[str, typer.Option(help="The base's weights: none, int8, int4.")] = "int4",
    group_size: Annotated[int, typer.Option(help="Inputs that share an int4 scale.")] = 128,
    activations: Annotated[str, typer.Option(help="float or int8, as the server's.")] = "float",
    tokens: Annotated[
        str, typer.Option(help="Numbers of tokens in a step, or all.")
    ] = "1,8,16,32,64,128,256",
    out: Annotated[
        Path | None, typer.Option(help="Folder of the table; the user's cache if left out.")
    ] = None,
    allow_untested: Annotated[
        bool, typer.Option(help="Also architectures that the test suite does not cover.")
    ] = False,
) -> None:
    """Measure how to cut the base's products on this GPU; serving uses what is found.

    No weights are read: random ones of the model's shapes take as long.
    """
    from deltaserve.server.model.errors import ModelError
    from deltaserve.server.tune import TuneError, run

    try:
        run(base, dtype, quantize, group_size, activations, tokens, out, allow_untested)
    except (TuneError, ModelError) as error:
        fail(str(error))


def compress(
    base: Annotated[Path, typer.Option(help="Checkpoint folder of the base model.")],
    tuned: Annotated[Path, typer.Option(help="Checkpoint folder of the fine-tune.")],
    out: Annotated[Path, typer.Option(help="Folder of the delta; must be new.")],
    budget: Annotated[
        str | None, typer.Option(metavar="BYTES", help="Bytes of the delta, e.g. 500MB.")
    ] = None,
    quality: Annotated[
        float | None,
        typer.Option(metavar="NATS", help="Largest mean KL a token; the smallest that meets it."),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help='Text, or .jsonl of "text" or "prompt" and "answer"; best what it is for.'
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Calibration tokens to judge by.")] = 8192,
    distil: Annotated[bool, typer.Option(help="Fit the scales to the tuned model.")] = False,
    dtype: Annotated[
        str, typer.Option(help="As it will be served: float32, bfloat16.")
    ] = "float32",
    quantize: Annotated[str, typer.Option(help="As it will be: none, int8, int4.")] = "none",
    group_size: Annotated[int, typer.Option(help="Inputs that share an int4 scale.")] = 64,
    threads: Annotated[int | None, typer.Option(help="Threads that compute.")] = None,
    allow_untested: Annotated[
        bool, typer.Option(help="Also architectures that the test suite does not cover.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Turn a whole fine-tune into a delta of the base.

    What each parameter becomes is measured and judged by what the model then says; without --budget
    and --quality the delta takes about one bit a weight. An interrupted run is taken up again by
    the same command. OUT also holds report.html and report.json.
    """
    from deltaserve.adapters.errors import AdapterError
    from deltaserve.server.compress.errors import CompressError
    from deltaserve.server.compress.run import run
    from deltaserve.server.compress.settings import Settings
    from deltaserve.server.model.errors import ModelError
    from deltaserve.server.progress import Bar

    try:
        settings = Settings(
            served=c.ModelConfig(
                base,
                dtype,
                quantize,
                group_size,
                threads=threads,
                allow_untested=allow_untested,
            ),
            tuned=tuned,
            out=out,
            budget=flags.size("--budget", budget),
            quality=quality,
            calibration=calibration,
            tokens=tokens,
            distil=distil,
        )
        with Bar() as bar:
            report = run(settings, bar)
    except (c.ConfigError, CompressError, AdapterError, ModelError) as error:
        fail(str(error))
    if as_json:
        print(json.dumps(report.content()))
    else:
        print(report.summary())
