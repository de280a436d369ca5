"""The Triton backend: what a mixed batch costs beside the base product, in two launches."""
