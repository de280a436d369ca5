"""Helpers of benchmarks/gpu.py: shapes, timing, ceilings, cases, and the peers beside us."""
