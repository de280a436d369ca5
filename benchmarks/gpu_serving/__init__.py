"""Helpers of `gpu.py engine`: a model and adapters made of random numbers, and what is measured."""

PARTS = ("start", "base", "adapters", "floor", "loads", "bits", "kinds", "transformers")
"""In the order in which they are run."""
