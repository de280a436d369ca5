"""`deltaserve serve`: arguments -> Config -> a running server."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from deltaserve.server import config as c
from deltaserve.server import flags
from deltaserve.server.cli.common import BYTES, fail


def serve(
    base: Annotated[Path, typer.Option(help="Checkpoint folder of the base model.")],
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="What requests call the base, instead of its folder; repeatable."
        ),
    ] = None,
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
    host_adapter_bytes: Annotated[
        str,
        typer.Option(help="Host memory for adapters that had to leave the GPU; 0: none."),
    ] = "0",
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
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32 or bfloat16; if left out float32 on a CPU and bfloat16 on a GPU."
        ),
    ] = None,
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
    http_port: Annotated[
        str | None,
        typer.Option(
            metavar="PORT|off",
            help=f"Of OpenAI's API; if left out {c.HTTP_PORT}, if that is free. 0 picks one.",
        ),
    ] = None,
    console: Annotated[bool, typer.Option(help="Serve /console on the HTTP port.")] = True,
    metrics_port: Annotated[
        int | None, typer.Option(help="HTTP port of /metrics; off if left out, 0 picks one.")
    ] = None,
    memory: Annotated[
        str, typer.Option(help="For keys, values and adapters; auto for a share of what is free.")
    ] = "auto",
    adapter_bytes: Annotated[str, typer.Option(help=f"Most of it for adapters. {BYTES}")] = "auto",
    kv_cache_bytes: Annotated[
        str, typer.Option(help=f"Most of it for keys and values. {BYTES}")
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
    enforce_eager: Annotated[
        bool,
        typer.Option(
            "--enforce-eager", help="Launch every step kernel by kernel, without CUDA graphs."
        ),
    ] = False,
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
    tls_client_ca: Annotated[
        Path | None,
        typer.Option(help="PEM file: clients must have a certificate of these authorities."),
    ] = None,
    state: Annotated[
        str,
        typer.Option(
            envvar="DELTASERVE_STATE",
            metavar="PATH|URL|none",
            help="Database that keeps what is registered over the wire.",
        ),
    ] = c.NO_STATE,
    keys: Annotated[
        Path | None,
        typer.Option(envvar="DELTASERVE_KEYS", help="TOML file of API keys and tenants."),
    ] = None,
    log_level: Annotated[str, typer.Option(help="debug, info, warning, error.")] = "info",
) -> None:
    """Serve a base model and its adapters over gRPC and HTTP.

    Prints `listening on HOST:PORT` on stdout when it is ready; everything else goes to stderr.
    """
    try:
        http, http_required = flags.http_port(http_port)
        config = c.Config(
            model=c.ModelConfig(
                base,
                dtype or c.DEVICE_DTYPES.get(device, "float32"),
                quantize,
                group_size,
                activations,
                device,
                threads,
                allow_untested,
                tuple(served_model_name or ()),
            ),
            adapters=c.AdapterConfig(
                preload=tuple(flags.name_and_path(item) for item in adapter or ()),
                roots=tuple(adapter_root or ()),
                bytes=flags.size("--adapter-bytes", adapter_bytes),
                allow_base_mismatch=allow_base_mismatch,
                patches=tuple(flags.patch(item) for item in patch or ()),
                parents=tuple(flags.child_and_parent(item) for item in parent or ()),
                tasks=tuple(flags.task(item) for item in task or ()),
                max_errors=tuple(flags.max_error(item) for item in max_error or ()),
                cache_bytes=flags.size("--adapter-cache", adapter_cache) or 0,
                cache_folder=adapter_cache_dir,
                host_bytes=flags.size("--host-adapter-bytes", host_adapter_bytes) or 0,
                loaders=loaders,
                loader_processes=loader_processes,
                loader_nice=loader_nice,
                loader_cores=flags.cores("--loader-cores", loader_cores),
                registered=tuple(
                    found for folder in adapter_dir or () for found in flags.adapters_in(folder)
                ),
            ),
            engine=c.EngineConfig(
                max_batch_tokens=max_batch_tokens,
                max_sequences=max_sequences,
                kv_cache_bytes=flags.size("--kv-cache-bytes", kv_cache_bytes),
                block_size=block_size,
                prefix_cache=prefix_cache,
                max_length=max_length,
                max_queue=max_queue,
                max_queue_per_flow=max_queue_per_flow,
                max_wait=max_wait,
                inter_token_target=inter_token_target,
                speculate=speculate,
                enforce_eager=enforce_eager,
                memory=flags.size("--memory", memory),
            ),
            rpc=c.RpcConfig(
                host=host,
                port=port,
                http_port=http,
                http_required=http_required,
                console=console,
                metrics_port=metrics_port,
                max_seconds=max_seconds,
                write_seconds=write_seconds,
                grace_seconds=grace_seconds,
                tls_certificate=tls_certificate,
                tls_key=tls_key,
                tls_client_ca=tls_client_ca,
            ),
            log_level=log_level,
            state=state,
            keys=keys,
        )
    except c.ConfigError as error:
        fail(str(error))
    from deltaserve.server.run import StartError, run  # imports torch: not for `--help`

    try:
        code = run(config)
    except (StartError, c.ConfigError) as error:
        fail(str(error))
    raise typer.Exit(code)
