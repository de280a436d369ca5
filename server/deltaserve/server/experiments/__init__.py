"""The mathematics of A/B tests: who gets which arm, and what the outcomes say. Pure functions."""
