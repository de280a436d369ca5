"""What can be wrong with an adapter.

* AdapterError
  x AdapterNotFound          no such file or folder
  x SourceForbidden          the path leaves the allowed roots, or is not a plain file or folder
  x MalformedAdapter         the files are damaged or not what they say (header, JSON, pickle)
  x UnsupportedAdapter       well-formed, but a format, config field or tensor that is not served
  x InvalidAdapter           well-formed and known, but wrong in itself (shapes, ranks, NaN)
  x BaseMismatch             made for another base model

Every message names the file, the field or tensor, what was found and what would be right.
"""

from __future__ import annotations


class AdapterError(Exception):
    """Base of the tree. `field` names the config field or tensor at fault, if there is one."""

    def __init__(self, message: str, *, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class AdapterNotFound(AdapterError):
    """No such file or folder."""


class SourceForbidden(AdapterError):
    """The path leaves the allowed roots, or is not a plain file or folder."""


class MalformedAdapter(AdapterError):
    """The files are damaged or not what their names say."""


class UnsupportedAdapter(AdapterError):
    """A format, config field or tensor that is not served."""


class InvalidAdapter(AdapterError):
    """Wrong in itself: shapes that do not fit each other, rank 0, values that are not finite."""


class BaseMismatch(AdapterError):
    """Made for another base model."""
