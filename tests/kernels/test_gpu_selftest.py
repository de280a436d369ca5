"""A kernel that computes wrongly, or not at all, is found and named before anything is served."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from deltaserve.kernels.attention import gpu as attention
from deltaserve.kernels.attention.step import AttentionSpec
from deltaserve.kernels.attention.variants import variants
from deltaserve.kernels.backend import KernelError
from deltaserve.kernels.gpu import (
    aux,
    gemm,
    inputs,
    layer,
    norm,
    prepared,
    ready,
    rope,
    selftest,
    selftest_layer,
)
from deltaserve.kernels.gpu.base import make_linear
from deltaserve.kernels.gpu.device import default_device
from deltaserve.kernels.gpu.form import Form
from deltaserve.kernels.gpu.launch import launch
from deltaserve.kernels.gpu.layer_variants import LayerSpec, of_layer, of_norm
from deltaserve.kernels.gpu.selftest import self_test
from deltaserve.kernels.gpu.variants import GroupSpec, embedding_variant, of_group, spec_of
from deltaserve.kernels.table import Group

DENSE = Form("dense")
PLAIN = AttentionSpec(4, 2, 32, 32)
LAYER = LayerSpec(
    (
        GroupSpec("qkv", "int8", 64, (64, 32, 32), dtype=torch.float32),
        GroupSpec("o", "int8", 64, (64,), dtype=torch.float32, residual=True),
        GroupSpec("gate up", "int8", 64, (192,), dtype=torch.float32, activation="silu"),
        GroupSpec("down", "int8", 96, (64,), dtype=torch.float32, residual=True),
    ),
    heads=8, kv_heads=2, dim=32, turned=16, block_size=4, windowed=True, head_norms=True,
)  # fmt: skip
SPECIAL = AttentionSpec(4, 1, 32, 16, window=20, softcap=5.0, sinks=True)


def test_right_kernels_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    state = torch.random.get_rng_state()
    self_test(torch.float32, default_device(), [Form("int4", 128)], [SPECIAL], 16)
    assert torch.equal(torch.random.get_rng_state(), state)
    monkeypatch.setattr(selftest, "BUCKETS", (16,))
    self_test(torch.bfloat16, default_device(), [DENSE, Form("fp8")], [PLAIN], 16)
    self_test(torch.float32, default_device(), [Form("w8a8"), Form("w4a8", 64)], [], 16)


@pytest.mark.parametrize(
    "kernel, form, named",
    [
        ("gemm_kernel", DENSE, "base product"),
        ("quantize_kernel", Form("w8a8"), "base product"),
        ("aux_kernel", DENSE, "low rank"),
        ("inputs_kernel", DENSE, "a token without an adapter"),
        ("write_kernel", DENSE, "writing keys"),
        ("decode_kernel", DENSE, "decoding"),
        ("prefill_kernel", DENSE, "reading prompts"),
    ],
)
def test_a_kernel_that_does_nothing(
    kernel: str, form: Form, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def skip(function: Any, *arguments: Any, **named: Any) -> None:
        if function.fn.__name__ != kernel:
            launch(function, *arguments, **named)

    for module in (attention, aux, gemm, inputs):
        monkeypatch.setattr(module, "launch", skip)
    monkeypatch.setattr(selftest, "BUCKETS", (16,))
    with pytest.raises(KernelError, match=f"{named}.* is wrong on the interpreter: its relative"):
        self_test(torch.float32, default_device(), [form], [PLAIN], 16)


def test_layers_are_tested_as_they_are_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A norm, a rotation, an activation or a residual that is wrong is found."""
    monkeypatch.setattr(selftest, "BUCKETS", (6,))
    check = partial(self_test, torch.float32, default_device(), [], [], 4, [LAYER])
    check()
    whole = [replace(group, format="w8a8") for group in LAYER.groups]
    in_8_bits = replace(LAYER, groups=(whole[0], whole[1], whole[2], whole[3]))
    self_test(torch.bfloat16, default_device(), [], [], 4, [in_8_bits])
    for module in (norm, rope):
        with monkeypatch.context() as patch, pytest.raises(KernelError, match="heads of 32, int8"):
            patch.setattr(module, "launch", lambda *_, **__: None)
            check()
    real = layer.Output
    for wrong in ({"activation": "gelu_tanh"}, {"residual": None}):

        def other(wrong: dict[str, Any] = wrong, **how: Any) -> Any:
            return real(**how | {k: v for k, v in wrong.items() if k in how})

        with monkeypatch.context() as patch, pytest.raises(KernelError, match="decoding, the base"):
            patch.setattr(layer, "Output", other)
            check()


def test_norms_of_no_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    check = partial(self_test, torch.bfloat16, default_device(), [], [], 4, norms=[48])
    check()
    with monkeypatch.context() as patch, pytest.raises(KernelError, match="norms of 48: the base"):
        patch.setattr(norm, "launch", lambda *_, **__: None)
        check()
    monkeypatch.setattr(norm, "TUNED", norm.BIASED)
    with pytest.raises(KernelError, match="norms of 48: tuned tokens"):
        check()


@pytest.mark.parametrize("name, named", [("pack_signs", "1 bit"), ("pack_entries", "entries")])
def test_what_is_read_wrongly(name: str, named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One number of a thousand."""
    right = getattr(prepared, name)

    def wrong(*arguments: Any) -> Any:
        if name == "pack_signs":
            words = right(*arguments)
            words.view(-1)[::1000] ^= 1 << 13
            return words
        (entries,), *rest = arguments
        values = entries.values.clone()
        values[::1000] *= -1
        return right([replace(entries, values=values)], *rest)

    monkeypatch.setattr(prepared, name, wrong)
    monkeypatch.setattr(selftest, "BUCKETS", (16,))
    with pytest.raises(KernelError, match=named):
        self_test(torch.float32, default_device(), [DENSE], [], 16)


def test_a_kernel_that_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **named: Any) -> None:
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(gemm, "launch", fail)
    with pytest.raises(KernelError, match=r"int8 linears, 16 tokens: does not run on .*: illegal"):
        self_test(torch.float32, default_device(), [Form("int8")], [], 16)


def test_compiled_and_tested_before_it_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []

    def compile(variants: list[Any], arch: int, progress: Any) -> None:
        compiled.extend(variants)
        for done in range(1, len(variants) + 1):
            progress(done, len(variants), "a kernel")

    monkeypatch.setattr(ready, "interpreted", lambda: False)
    monkeypatch.setattr(ready, "precompile", compile)
    monkeypatch.setattr(selftest, "BUCKETS", (16,))
    base = make_linear(torch.randn(96, 64), torch.randn(96), dtype=torch.float32, quantize="int4")
    spec = spec_of(base, Group(64, (64, 32), torch.float32))
    assert (spec.format, spec.bias, spec.wide_scales, spec.group_size) == ("int4", True, False, 128)
    said: list[tuple[float, str]] = []
    ready.make_ready(
        [spec],
        [PLAIN],
        [LAYER],
        [48],
        [80],
        torch.float32,
        default_device(),
        600,
        16,
        lambda *what: said.append(what),
    )
    shares = [share for share, _ in said]
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] == 1
    assert {what.split(":")[0] for _, what in said} == {"compiling kernels", "testing kernels"}
    identities = {v.identity for v in compiled}
    assert len(identities) == len(compiled)
    for wanted in (
        of_group(spec, (1, 256, 600), 90),
        of_group(selftest.specs([Form("int4", 128)], torch.float32)[0], selftest.BUCKETS, 90),
        [embedding_variant(80, torch.float32)],
        variants(4, 2, 32, 32, 16, torch.float32),
        of_layer(LAYER, (1, 600), 90),
        of_norm(48, torch.float32),
        of_layer(selftest_layer.layer_specs([LAYER], torch.float32)[0], selftest.BUCKETS, 90),
    ):
        assert {v.identity for v in wanted} <= identities


def test_not_ready_with_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "launch", lambda *arguments, **named: None)
    monkeypatch.setattr(selftest, "BUCKETS", (16,))
    base = make_linear(torch.randn(96, 64), None, dtype=torch.float32, quantize="none")
    spec = spec_of(base, Group(64, (96,), torch.float32))
    said: list[float] = []
    with pytest.raises(KernelError, match="the base product is wrong"):
        ready.make_ready(
            [spec],
            [],
            [],
            [],
            [],
            torch.float32,
            default_device(),
            16,
            16,
            lambda share, _: said.append(share),
        )
    assert 1.0 not in said
