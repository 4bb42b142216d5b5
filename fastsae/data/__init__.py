"""Activations: harvest them from a model, keep them in shards, draw shuffled batches."""

from fastsae.data.prefetch import Batch, Batches
from fastsae.data.shards import ActivationShards, Contexts
from fastsae.data.shuffle import Cursor
from fastsae.data.source import ActivationSource
from fastsae.data.writer import ShardWriter

__all__ = [
    "ActivationShards",
    "ActivationSource",
    "Batch",
    "Batches",
    "Contexts",
    "Cursor",
    "ShardWriter",
]
