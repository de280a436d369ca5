"""What can be wrong with a base model.

* ModelError
  x ModelNotFound        no such folder, or no config.json in it
  x MalformedModel       damaged files, missing or misshapen tensors
  x UnsupportedModel     a well-formed model that cannot be served exactly; the message says why
"""

from __future__ import annotations


class ModelError(Exception):
    """Base of the tree."""


class ModelNotFound(ModelError):
    """No such folder, or no config.json in it."""


class MalformedModel(ModelError):
    """The files are damaged, or tensors are missing or of the wrong shape."""


class UnsupportedModel(ModelError):
    """Well-formed, but it cannot be served exactly as it is."""
