"""Helpers of `gpu.py engine`: a model and adapters made of random numbers, and what is measured."""

PARTS = ("start", "base", "adapters", "loads", "transformers", "floor", "kinds", "bits")
"""In the order in which they are run."""
