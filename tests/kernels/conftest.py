"""Lets the tests here import their neighbours, which pytest's importlib mode does not."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
