"""Adapter files: where they come from, reading, checking and lowering them to primitives."""
