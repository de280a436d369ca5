"""Native CPU kernels: C, compiled once on first use, called with raw pointers."""

from deltaserve.kernels.native.library import library

__all__ = ["library"]
