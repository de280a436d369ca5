"""The command `deltaserve`: arguments -> Config -> serve, and the client's commands."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from deltaserve.clients.cli import AsJson
from deltaserve.clients.cli import app as clients_app
from deltaserve.server import config as c

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Serve every fine-tune of a base model from one copy of that base, in one mixed batch.",
)

_BYTES = "Bytes, e.g. 512MiB; auto for no such limit."


@app.command()
def serve(
    base: Annotated[Path, typer.Option(help="Checkpoint folder of the base model.")],
    adapter: Annotated[
        list[str] | None, typer.Option(metavar="NAME=PATH", help="Load before serving; repeatable.")
    ] = None,
    adapter_dir: Annotated[
        list[Path] | None,
        typer.Option(help="Its sub-folders are adapters, loaded when asked for; repeatable."),
    ] = None,
    parent: Annotated[
        list[str] | None,
        typer.Option(metavar="CHILD=PARENT", help="One --adapter is relative to another."),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=ID", help="Which task of an --adapter that holds several."),
    ] = None,
    max_error: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=X",
            help="Relative error that smaller forms of an --adapter's weights may have.",
        ),
    ] = None,
    patch: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[@STRENGTH]=PATH", help="An adapter in every request; repeatable."
        ),
    ] = None,
    adapter_root: Annotated[
        list[Path] | None,
        typer.Option(help="Folder that adapters may be loaded from over the wire; repeatable."),
    ] = None,
    adapter_cache: Annotated[
        str, typer.Option(help="Bytes on disk for adapters that are slow to lower; 0: none.")
    ] = "2GiB",
    adapter_cache_dir: Annotated[
        Path | None, typer.Option(help="Where; in the user's cache folder if left out.")
    ] = None,
    loaders: Annotated[int, typer.Option(help="Adapters that are loaded at once.")] = 2,
    loader_processes: Annotated[
        bool, typer.Option(help="Load in processes of their own (Linux).")
    ] = sys.platform == "linux",
    loader_nice: Annotated[
        int, typer.Option(help="How far loading gives way to computing, 0 to 19.")
    ] = 10,
    loader_cores: Annotated[
        str, typer.Option(metavar="0,3", help="Processors that loading keeps to; any if left out.")
    ] = "",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    quantize: Annotated[str, typer.Option(help="The base's weights: none, int8, int4.")] = "none",
    group_size: Annotated[int, typer.Option(help="Inputs that share an int4 scale.")] = 64,
    activations: Annotated[
        str, typer.Option(help="float, or int8: faster, slightly less exact.")
    ] = "float",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="Threads that compute.")] = None,
    host: Annotated[
        str, typer.Option(envvar="DELTASERVE_HOST", help="Address to listen on.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 picks a free one.")] = 50051,
    metrics_port: Annotated[
        int | None, typer.Option(help="HTTP port of /metrics; off if left out, 0 picks one.")
    ] = None,
    memory: Annotated[
        str, typer.Option(help="For keys, values and adapters; auto for a share of what is free.")
    ] = "auto",
    adapter_bytes: Annotated[str, typer.Option(help=f"Most of it for adapters. {_BYTES}")] = "auto",
    kv_cache_bytes: Annotated[
        str, typer.Option(help=f"Most of it for keys and values. {_BYTES}")
    ] = "auto",
    block_size: Annotated[int, typer.Option(help="Tokens in a block of the KV cache.")] = 16,
    prefix_cache: Annotated[bool, typer.Option(help="Reuse keys and values of prompts.")] = True,
    max_batch_tokens: Annotated[int, typer.Option(help="Tokens of one step.")] = 512,
    max_sequences: Annotated[int, typer.Option(help="Requests in one step.")] = 256,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens of a request; the model's limit if left out.")
    ] = None,
    max_queue: Annotated[
        int, typer.Option(help="Requests in flight; beyond it some are turned away.")
    ] = 4096,
    max_queue_per_flow: Annotated[
        int | None, typer.Option(help="Requests that wait, of one user for one adapter.")
    ] = None,
    max_wait: Annotated[
        float | None,
        typer.Option(help="Seconds to the first token, of requests that do not say themselves."),
    ] = None,
    inter_token_target: Annotated[
        float | None,
        typer.Option(help="Seconds between tokens; prompts are cut shorter to keep to it."),
    ] = None,
    speculate: Annotated[
        int, typer.Option(help="Most tokens drafted by prompt lookup in a step; 0 is off.")
    ] = 0,
    max_seconds: Annotated[float, typer.Option(help="Longest life of a request.")] = 3600.0,
    write_seconds: Annotated[
        float, typer.Option(help="A stream that nobody reads for so long is ended.")
    ] = 30.0,
    grace_seconds: Annotated[
        float, typer.Option(help="Running requests may go on for so long after SIGTERM.")
    ] = 30.0,
    allow_untested: Annotated[
        bool, typer.Option(help="Also architectures that the test suite does not cover.")
    ] = False,
    allow_base_mismatch: Annotated[
        bool, typer.Option(help="Take adapters made for another base of the same shapes.")
    ] = False,
    tls_certificate: Annotated[Path | None, typer.Option(help="PEM file.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM file.")] = None,
    log_level: Annotated[str, typer.Option(help="debug, info, warning, error.")] = "info",
) -> None:
    """Serve a base model and its adapters over gRPC.

    Prints `listening on HOST:PORT` on stdout when it is ready; everything else goes to stderr.
    """
    try:
        config = c.Config(
            model=c.ModelConfig(
                base, dtype, quantize, group_size, activations, device, threads, allow_untested
            ),
            adapters=c.AdapterConfig(
                preload=tuple(c.name_and_path(item) for item in adapter or ()),
                roots=tuple(adapter_root or ()),
                bytes=c.size("--adapter-bytes", adapter_bytes),
                allow_base_mismatch=allow_base_mismatch,
                patches=tuple(c.patch(item) for item in patch or ()),
                parents=tuple(c.child_and_parent(item) for item in parent or ()),
                tasks=tuple(c.task(item) for item in task or ()),
                max_errors=tuple(c.max_error(item) for item in max_error or ()),
                cache_bytes=c.size("--adapter-cache", adapter_cache) or 0,
                cache_folder=adapter_cache_dir,
                loaders=loaders,
                loader_processes=loader_processes,
                loader_nice=loader_nice,
                loader_cores=c.cores("--loader-cores", loader_cores),
                registered=tuple(
                    found for folder in adapter_dir or () for found in c.adapters_in(folder)
                ),
            ),
            engine=c.EngineConfig(
                max_batch_tokens=max_batch_tokens,
                max_sequences=max_sequences,
                kv_cache_bytes=c.size("--kv-cache-bytes", kv_cache_bytes),
                block_size=block_size,
                prefix_cache=prefix_cache,
                max_length=max_length,
                max_queue=max_queue,
                max_queue_per_flow=max_queue_per_flow,
                max_wait=max_wait,
                inter_token_target=inter_token_target,
                speculate=speculate,
                memory=c.size("--memory", memory),
            ),
            rpc=c.RpcConfig(
                host=host,
                port=port,
                metrics_port=metrics_port,
                max_seconds=max_seconds,
                write_seconds=write_seconds,
                grace_seconds=grace_seconds,
                tls_certificate=tls_certificate,
                tls_key=tls_key,
            ),
            log_level=log_level,
        )
    except c.ConfigError as error:
        _fail(str(error))
    from deltaserve.server.run import StartError, run  # imports torch: not for `--help`

    try:
        code = run(config)
    except (StartError, c.ConfigError) as error:
        _fail(str(error))
    raise typer.Exit(code)


@app.command()
def plan(
    base: Annotated[Path, typer.Option(help="Checkpoint folder of the base model.")],
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    quantize: Annotated[str, typer.Option(help="The base's weights: none, int8, int4.")] = "none",
    group_size: Annotated[int, typer.Option(help="Inputs that share an int4 scale.")] = 64,
    free: Annotated[
        str, typer.Option(help="Bytes free before the base is loaded; auto for this machine's.")
    ] = "auto",
    memory: Annotated[
        str, typer.Option(help="For keys, values and adapters; auto for a share of what is free.")
    ] = "auto",
    adapter_bytes: Annotated[str, typer.Option(help=f"Most of it for adapters. {_BYTES}")] = "auto",
    kv_cache_bytes: Annotated[
        str, typer.Option(help=f"Most of it for keys and values. {_BYTES}")
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
            c.ModelConfig(base, dtype, quantize, group_size, allow_untested=allow_untested),
            c.EngineConfig(
                max_batch_tokens=max_batch_tokens,
                max_sequences=max_sequences,
                kv_cache_bytes=c.size("--kv-cache-bytes", kv_cache_bytes),
                block_size=block_size,
                max_length=max_length,
                memory=c.size("--memory", memory),
            ),
            c.AdapterConfig(bytes=c.size("--adapter-bytes", adapter_bytes)),
            c.size("--free", free),
        )
    except (c.ConfigError, ModelError) as error:
        _fail(str(error))
    if as_json:
        print(json.dumps(planner.report(found)))
    else:
        planner.show(found, Console())


@app.command()
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
        _fail(f"{path}: no such file or folder")
    if not 0 <= max_error < 1:
        _fail(f"--max-error {max_error:g}: must be at least 0 and below 1")
    from deltaserve.adapters.options import LoadOptions
    from deltaserve.server.inspect import inspect, show
    from deltaserve.server.model.errors import ModelError

    try:
        options = LoadOptions(allow_base_mismatch, task_id, max_error)
        report = inspect(path, base, options, parent or ())
    except (ModelError, OSError) as error:
        _fail(f"--base {base}: {error}")
    if as_json:
        print(json.dumps(report))
    else:
        show(report)
    if report["refusal"] is not None:
        raise typer.Exit(1)


@app.command()
def tune(
    base: Annotated[Path, typer.Option(help="Checkpoint folder of the base model.")],
    dtype: Annotated[str, typer.Option(help="bfloat16 or float16.")] = "bfloat16",
    quantize: Annotated[str, typer.Option(help="The base's weights: none, int8, int4.")] = "int4",
    group_size: Annotated[int, typer.Option(help="Inputs that share an int4 scale.")] = 128,
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
        run(base, dtype, quantize, group_size, tokens, out, allow_untested)
    except (TuneError, ModelError) as error:
        _fail(str(error))


@app.command()
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
            budget=c.size("--budget", budget),
            quality=quality,
            calibration=calibration,
            tokens=tokens,
            distil=distil,
        )
        with Bar() as bar:
            report = run(settings, bar)
    except (c.ConfigError, CompressError, AdapterError, ModelError) as error:
        _fail(str(error))
    if as_json:
        print(json.dumps(report.content()))
    else:
        print(report.summary())


def _fail(message: str) -> NoReturn:
    """Say what is wrong and exit with code 2."""
    print(f"deltaserve: {message}", file=sys.stderr)
    raise typer.Exit(2)


app.add_typer(clients_app)


def main() -> None:
    """Entry point."""
    app()
