"""Choosing by measurement, with a clock of the test's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from triton.runtime.errors import OutOfResources

from deltaserve.kernels.gpu import tune
from deltaserve.kernels.gpu.config import GemmConfig, GroupKey, gemm_config
from deltaserve.kernels.gpu.device import default_device
from deltaserve.kernels.gpu.variants import GroupSpec

SPEC = GroupSpec("tune", "int4", 256, (64, 64), dtype=torch.float16)


@pytest.mark.parametrize("format", ("int4", "int8", "fp8", "dense", "w4a8", "w8a8"))
@pytest.mark.parametrize("gated", (False, True))
@pytest.mark.parametrize("tokens", (1, 16, 64, 256))
def test_candidates_are_many_distinct_and_fit(format: str, gated: bool, tokens: int) -> None:
    key = GroupKey(format, 128, 4096, 28672, gated)
    for arch in (80, 89, 90):
        found = list(tune.candidates(key, tokens, arch))
        assert found[0] == gemm_config(key, tokens, arch)
        assert len(set(found)) == len(found) > 8
        bits = {"int4": 4, "w4a8": 4, "dense": 16}.get(format, 8)
        of_x = 1 if format.endswith("a8") else 2
        for c in found[1:]:
            stages = c.num_stages * c.bk * (of_x * c.bm + c.bn * bits / 8)
            assert stages <= {80: 163, 89: 99, 90: 227}[arch] * 1024


def test_the_fastest_right_one_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is faster still gives something else, and is left out, and so is one that the GPU
    has no memory for."""
    configs = [
        GemmConfig(16, 64, 128),
        GemmConfig(16, 64, 64),
        GemmConfig(16, 128, 128),
        GemmConfig(16, 32, 128),
        GemmConfig(16, 256, 128),
    ]
    speed = dict(zip(configs, (5.0, 3.0, 4.0, 1.0, 0.5), strict=True))
    monkeypatch.setattr(tune, "candidates", lambda *_: iter(configs))
    genuine, used = tune.run_gemm, []

    def run_gemm(*arguments: object) -> torch.Tensor:
        used.append(arguments[6])
        if arguments[6] == configs[4]:
            raise OutOfResources(240000, 232448, "shared memory")
        y: torch.Tensor = genuine(*arguments)  # type: ignore[arg-type]
        return y * 1.1 if arguments[6] == configs[3] else y

    def timer(launch: Callable[[int], object], copies: int) -> float:
        assert copies == 1 or torch.cuda.is_available()
        launch(copies - 1)
        config = used[-1]
        assert isinstance(config, GemmConfig)
        return speed[config]

    monkeypatch.setattr(tune, "run_gemm", run_gemm)
    (found,) = tune.tune([SPEC], [16], default_device(), timer=timer, compile=False)
    assert (found.config, found.us, found.rule_us) == (configs[1], 3.0, 5.0)
    assert (found.spec, found.tokens) == (SPEC, 16)


def test_it_measures_or_says_that_it_cannot() -> None:
    with pytest.raises(RuntimeError, match="needs a CUDA device"):
        list(tune.tune([SPEC], [16], torch.device("cpu")))
