"""Helpers of `gpu.py engine`: a model and adapters made of random numbers, and what is measured."""

PARTS = ("start", "base", "adapters", "loads", "kinds", "bits", "transformers", "floor")
"""In the order in which they are run, but that `floor` looks at launches, which a graph hides."""
