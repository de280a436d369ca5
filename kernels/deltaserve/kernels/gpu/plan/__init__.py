"""Planning a step: from segments and installed adapters to the tables that the launches read."""

from deltaserve.kernels.gpu.plan.adapters import Adapters
from deltaserve.kernels.gpu.plan.tables import Tables, Uses, build
from deltaserve.kernels.gpu.plan.tiling import Tiling

__all__ = ["Adapters", "Tables", "Tiling", "Uses", "build"]
