"""The encoders under the names that YAML files use."""

from ldm.modules.encoders.basic import ClassEmbedder, SpatialRescaler, TransformerEmbedder
from ldm.modules.encoders.bert import BERTEmbedder, BERTTokenizer
from ldm.modules.encoders.clip import FrozenCLIPEmbedder

__all__ = [
    "BERTEmbedder",
    "BERTTokenizer",
    "ClassEmbedder",
    "FrozenCLIPEmbedder",
    "SpatialRescaler",
    "TransformerEmbedder",
]
