"""Attention over a paged cache: each query belongs to a sequence whose cells lie in blocks."""
