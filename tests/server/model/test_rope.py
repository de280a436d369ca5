"""Rotary embeddings whose frequencies follow the longest position of the batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import archs
import pytest
import torch
from stepping import Sequence, Stepper
from torch import Tensor
from transformers import PreTrainedModel

from deltaserve.server.model import UnsupportedModel, load

Save = Callable[[PreTrainedModel], Path]


def reference(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(input_ids=ids[None], use_cache=False).logits[0]
    return found


def test_longrope_stays_short_up_to_the_original_length(saved: Save) -> None:
    plain = archs.build("phi3-longrope")
    folder = saved(plain)
    model = load(folder, dtype=torch.float32)
    assert model.max_length == 64
    ids = torch.randint(3, 256, (64,))
    sequence = Sequence(ids)
    Stepper(model).step([(sequence, 64)])
    want = reference(plain, ids)[sequence.at]
    torch.testing.assert_close(sequence.logits[0], want, rtol=0, atol=1e-4)


def test_longrope_is_long_everywhere_if_more_is_asked_for(saved: Save) -> None:
    plain = archs.build("phi3-longrope")
    model = load(saved(plain), dtype=torch.float32, max_length=200)
    assert model.max_length == 200
    ids = torch.randint(3, 256, (90,))
    want = reference(plain, ids)
    assert (want[:40] - reference(plain, ids[:40])).abs().max() > 1e-2
    long, short = Sequence(ids), Sequence(ids[:40])
    stepper = Stepper(model)
    stepper.step([(short, 40)])
    stepper.step([(long, 90)])
    torch.testing.assert_close(long.logits[0], want[long.at], rtol=0, atol=1e-4)
    torch.testing.assert_close(short.logits[0], want[short.at], rtol=0, atol=1e-4)


def test_dynamic_rope_is_limited_to_the_original_length(saved: Save) -> None:
    folder = saved(archs.build("llama-dynamic"))
    assert load(folder, dtype=torch.float32).max_length == 512
    with pytest.raises(UnsupportedModel, match="1 to 512"):
        load(folder, dtype=torch.float32, max_length=513)


@pytest.mark.parametrize("length", [0, 1000])
def test_lengths_beyond_the_model(length: int, saved: Save) -> None:
    with pytest.raises(UnsupportedModel, match=f"max_length {length}"):
        load(saved(archs.build("llama")), dtype=torch.float32, max_length=length)
