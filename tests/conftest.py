"""Where there is no GPU, the GPU's kernels run in Triton's interpreter, which has to be chosen
before any of them is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
