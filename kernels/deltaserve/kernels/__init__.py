"""The computation: base linears, and what each delta primitive does to the tokens of a step."""
