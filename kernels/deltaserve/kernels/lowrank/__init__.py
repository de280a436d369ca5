"""LowRank: ``y += scale * b (a x)``."""
