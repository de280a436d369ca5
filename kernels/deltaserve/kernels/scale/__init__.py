"""Scale and Bias: factors on the base product, and a vector added to it."""
