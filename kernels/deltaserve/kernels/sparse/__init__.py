"""Sparse deltas: CSR, whole rows, whole columns, blocks."""
