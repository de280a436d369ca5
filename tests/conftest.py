"""Where there is no GPU, the GPU's kernels run in Triton's interpreter, which has to be chosen
before any of them is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from deltaserve.server.engine import looks

looks.APART = 0  # every time that an engine has nothing to do, its books are looked at
