"""Lets the tests here import their neighbours and tests/archs.py, which pytest's importlib mode
does not; checkpoints of the small models."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel
from transformers.utils import logging

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[PreTrainedModel], Path]:
    """Writes a model's checkpoint and returns the folder."""

    def save(model: PreTrainedModel) -> Path:
        model.save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    return save
