"""The base model: transformers' modeling code over our linears, norms and attention."""

from deltaserve.server.model.base_model import BaseModel
from deltaserve.server.model.errors import (
    MalformedModel,
    ModelError,
    ModelNotFound,
    UnsupportedModel,
)
from deltaserve.server.model.loader import load
from deltaserve.server.model.probe import LayerAttention

__all__ = [
    "BaseModel",
    "LayerAttention",
    "MalformedModel",
    "ModelError",
    "ModelNotFound",
    "UnsupportedModel",
    "load",
]
