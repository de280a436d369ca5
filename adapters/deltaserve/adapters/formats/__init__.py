"""One file per adapter format: detecting it, and lowering it to primitives."""
