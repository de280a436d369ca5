"""Whether a tensor holds numbers only."""

from __future__ import annotations

import math

from torch import Tensor


def finite(value: Tensor) -> bool:
    """No infinity and nothing that is not a number in a floating-point tensor. One pass that makes
    no tensor of its size: several times faster than ``isfinite(value).all()``."""
    if not value.numel():
        return True
    if value.element_size() == 1:
        value = value.float()  # torch does not compare floats of 8 bits
    least, most = value.aminmax()  # both are NaN if anything is
    return math.isfinite(least.item()) and math.isfinite(most.item())
