"""Replace and ReplaceRows: another weight, or other rows of it."""
