"""Bit: ``y += sum_p scale[p] * (signs[p] x)``, straight from the packed signs."""
