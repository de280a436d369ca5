"""A kernel that computes wrongly, or not at all, is found and named before anything is served."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from deltaserve.kernels.attention import gpu as attention
from deltaserve.kernels.attention.step import AttentionSpec
from deltaserve.kernels.attention.variants import variants
from deltaserve.kernels.backend import KernelError
from deltaserve.kernels.gpu import aux, gemm, inputs, prepared, ready, selftest
from deltaserve.kernels.gpu.base import make_linear
from deltaserve.kernels.gpu.device import default_device
from deltaserve.kernels.gpu.form import Form
from deltaserve.kernels.gpu.launch import launch
from deltaserve.kernels.gpu.selftest import self_test
from deltaserve.kernels.gpu.variants import of_group, spec_of
from deltaserve.kernels.table import Group

DENSE = Form("dense")
PLAIN = AttentionSpec(4, 2, 32, 32)
SPECIAL = AttentionSpec(4, 1, 32, 16, window=20, softcap=5.0, sinks=True)


def test_right_kernels_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    state = torch.random.get_rng_state()
    self_test(torch.float32, default_device(), [Form("int4", 128)], [SPECIAL], 16)
    assert torch.equal(torch.random.get_rng_state(), state)
    monkeypatch.setattr(selftest, "BUCKETS", (16,))
    self_test(torch.bfloat16, default_device(), [DENSE, Form("fp8")], [PLAIN], 16)


@pytest.mark.parametrize(
    "kernel, named",
    [
        ("gemm_kernel", "base product"),
        ("aux_kernel", "low rank"),
        ("inputs_kernel", "a token without an adapter"),
        ("write_kernel", "writing keys"),
        ("decode_kernel", "decoding"),
        ("prefill_kernel", "reading prompts"),
    ],
)
def test_a_kernel_that_does_nothing(
    kernel: str, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def skip(function: Any, *arguments: Any, **named: Any) -> None:
        if function.fn.__name__ != kernel:
            launch(function, *arguments, **named)

    for module in (attention, aux, gemm, inputs):
        monkeypatch.setattr(module, "launch", skip)
    monkeypatch.setattr(selftest, "BUCKETS", (16,))
    with pytest.raises(KernelError, match=f"{named}.* is wrong on the interpreter: its relative"):
        self_test(torch.float32, default_device(), [DENSE], [PLAIN], 16)


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
        [spec], [PLAIN], torch.float32, default_device(), 600, 16, lambda *what: said.append(what)
    )
    shares = [share for share, _ in said]
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] == 1
    assert {what.split(":")[0] for _, what in said} == {"compiling kernels", "testing kernels"}
    identities = {v.identity for v in compiled}
    assert len(identities) == len(compiled)
    for wanted in (
        of_group(spec, (1, 256, 600), 90),
        of_group(selftest.specs([Form("int4", 128)], torch.float32)[0], selftest.BUCKETS, 90),
        variants(4, 2, 32, 32, 16, torch.float32),
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
            [spec], [], torch.float32, default_device(), 16, 16, lambda share, _: said.append(share)
        )
    assert 1.0 not in said
