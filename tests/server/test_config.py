"""Every refusal of a setting names its flag."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import pytest

from deltaserve.server.config import (
    AdapterConfig,
    Config,
    ConfigError,
    EngineConfig,
    ModelConfig,
    Patch,
    RpcConfig,
)
from deltaserve.server.flags import (
    child_and_parent,
    http_port,
    max_error,
    name_and_path,
    patch,
    size,
    task,
)

HERE = Path(__file__).parent


def parents(*pairs: tuple[str, str]) -> AdapterConfig:
    return AdapterConfig(preload=(("a", HERE), ("b", HERE)), parents=pairs)


def called(names: tuple[str, ...], **adapters: Any) -> Config:
    base = Path(os.path.relpath(HERE, HERE.parent))
    with contextlib.chdir(HERE.parent):
        return Config(ModelConfig(base, served_names=names), AdapterConfig(**adapters))


@pytest.mark.parametrize(
    ("make", "flag"),
    [
        (lambda: ModelConfig(HERE / "nowhere"), "--base"),
        (lambda: ModelConfig(HERE, dtype="float64"), "--dtype"),
        (lambda: ModelConfig(HERE, quantize="int3"), "--quantize"),
        (lambda: ModelConfig(HERE, activations="int8"), "--activations"),
        (lambda: ModelConfig(HERE, group_size=12), "--group-size"),
        (lambda: ModelConfig(HERE, device="tpu"), "--device"),
        (lambda: ModelConfig(HERE, threads=0), "--threads"),
        (lambda: ModelConfig(HERE, served_names=("a b",)), "--served-model-name a b"),
        (lambda: ModelConfig(HERE, served_names=("a", "a")), "--served-model-name a"),
        (lambda: called(("a",), preload=(("a", HERE),)), f"--adapter a={HERE}: the base"),
        (lambda: called(("x", "a"), registered=(("a", HERE),)), f"--adapter-dir {HERE}: the base"),
        (lambda: called(("a",), patches=(Patch("a", HERE),)), f"--patch a={HERE}: the base"),
        (lambda: called((), preload=((HERE.name, HERE),)), f"--adapter {HERE.name}={HERE}: the"),
        (lambda: AdapterConfig(preload=(("a", HERE / "nowhere"),)), "--adapter"),
        (lambda: AdapterConfig(preload=(("a@b", HERE),)), "--adapter"),
        (lambda: AdapterConfig(preload=(("a", HERE), ("a", HERE))), "--adapter"),
        (lambda: AdapterConfig(roots=(HERE / "nowhere",)), "--adapter-root"),
        (lambda: AdapterConfig(bytes=0), "--adapter-bytes"),
        (lambda: EngineConfig(max_batch_tokens=0), "--max-batch-tokens"),
        (lambda: EngineConfig(block_size=0), "--block-size"),
        (lambda: EngineConfig(max_length=1), "--max-length"),
        (lambda: RpcConfig(port=70_000), "--port"),
        (lambda: RpcConfig(metrics_port=-1), "--metrics-port"),
        (lambda: RpcConfig(max_seconds=float("nan")), "--max-seconds"),
        (lambda: RpcConfig(grace_seconds=-1), "--grace-seconds"),
        (lambda: RpcConfig(tls_key=HERE), "--tls-certificate"),
        (lambda: RpcConfig(tls_key=HERE, tls_certificate=HERE), "--tls-certificate"),
        (lambda: name_and_path("=x"), "--adapter"),
        (lambda: name_and_path("just-a-path"), "--adapter"),
        (lambda: patch("safety"), "--patch"),
        (lambda: patch("safety@half=x"), "--patch"),
        (lambda: patch("safety@nan=x"), "--patch"),
        (lambda: patch("safety@2000=x"), "--patch"),
        (lambda: AdapterConfig(patches=(Patch("a", HERE / "nowhere"),)), "--patch"),
        (lambda: AdapterConfig(preload=(("a", HERE),), patches=(Patch("a", HERE),)), "--adapter"),
        (lambda: AdapterConfig(patches=tuple(Patch(f"{i}", HERE) for i in range(9))), "--patch"),
        (lambda: child_and_parent("a"), "--parent"),
        (lambda: parents(("a", "c")), "--parent"),
        (lambda: task("a"), "--task"),
        (lambda: task("a=-1"), "--task"),
        (lambda: AdapterConfig(tasks=(("a", 1),)), "--task a=1"),
        (lambda: AdapterConfig(preload=(("a", HERE),), tasks=(("a", 1), ("a", 2))), "--task"),
        (lambda: max_error("a=1"), "--max-error"),
        (lambda: max_error("a=nan"), "--max-error"),
        (lambda: max_error("a=x"), "--max-error"),
        (lambda: AdapterConfig(max_errors=(("a", 0.1),)), "--max-error a=0.1"),
        (lambda: parents(("a", "b"), ("b", "a")), "--parent"),
        (lambda: parents(("a", "a")), "--parent"),
        (lambda: parents(("a", "b"), ("a", "b")), "--parent"),
        (lambda: size("--kv-cache-bytes", "12 apples"), "--kv-cache-bytes"),
        (lambda: http_port("on"), "--http-port"),
        (lambda: RpcConfig(http_port=65536), "--http-port"),
    ],
)
def test_refusals(make, flag: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError) as caught:
        make()
    assert str(caught.value).startswith(flag)


def test_sizes_and_pairs() -> None:
    assert size("--x", "auto") is size("--x", None) is None
    assert [size("--x", t) for t in ("10", "2kB", "1.5MiB", "2 GB", "1gib")] == [
        10,
        2000,
        3 * 2**19,
        2 * 10**9,
        2**30,
    ]
    assert name_and_path("a=b=c") == ("a", Path("b=c"))
    assert patch("a=b@0.5=c") == Patch("a", Path("b@0.5=c"), 1.0)
    assert patch("a@-0.5=b") == Patch("a", Path("b"), -0.5)
    found = [http_port(text) for text in (None, "off", "0", "81")]
    assert found == [(8000, False), (None, True), (0, True), (81, True)]
    assert parents(("a", "b")).in_order() == [("b", HERE, ""), ("a", HERE, "b")]
