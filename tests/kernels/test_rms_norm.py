"""The RMS norm against its formula in float64."""

import pytest
import torch

from deltaserve.kernels.rms_norm import rms_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 64), (1, 7, 100), (300, 333), (1, 5, 3, 17), (1, 0, 8)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_rms_norm(dtype: torch.dtype, shape: tuple[int, ...], scale: float) -> None:
    x = (torch.randn(shape) * scale).to(dtype)
    gain = torch.randn(shape[-1]).to(dtype)
    got = rms_norm(x, gain, 1e-5)
    wide = x.double()
    want = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * gain.double()
    tolerance = 2e-6 if dtype == torch.float32 else 2**-8
    assert got.shape == x.shape and got.dtype == dtype
    assert torch.allclose(got.double(), want, rtol=tolerance, atol=1e-12)


def test_transposed_rows() -> None:
    x = torch.randn(6, 5).T
    gain = torch.ones(6)
    assert torch.allclose(rms_norm(x, gain, 1e-6), torch.rms_norm(x, (6,), gain, 1e-6))
