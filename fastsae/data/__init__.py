"""Activations: harvested from a model, stored in shards, drawn in shuffled batches."""

from fastsae.data.anything import as_source, open_path
from fastsae.data.arrays import ActivationArray
from fastsae.data.demo import demo_shards
from fastsae.data.harvest import harvest, harvest_each
from fastsae.data.harvest_config import HarvestConfig
from fastsae.data.iterables import IterableProducer
from fastsae.data.joined import Joined
from fastsae.data.prefetch import Batch, Batches
from fastsae.data.producer import Group, ModelProducer, Place, Producer
from fastsae.data.shards import ActivationShards, Contexts
from fastsae.data.shuffle import Cursor
from fastsae.data.source import ActivationSource, StoredActivations
from fastsae.data.stream import Stream, check_evaluable, stored
from fastsae.data.stream_config import StreamConfig
from fastsae.data.synthetic import Synthetic
from fastsae.data.vllm import VllmHiddenStates
from fastsae.data.writer import ShardWriter

__all__ = [
    "ActivationArray",
    "ActivationShards",
    "ActivationSource",
    "Batch",
    "Batches",
    "Contexts",
    "Cursor",
    "Group",
    "HarvestConfig",
    "IterableProducer",
    "Joined",
    "ModelProducer",
    "Place",
    "Producer",
    "ShardWriter",
    "StoredActivations",
    "Stream",
    "StreamConfig",
    "Synthetic",
    "VllmHiddenStates",
    "as_source",
    "check_evaluable",
    "demo_shards",
    "harvest",
    "harvest_each",
    "open_path",
    "stored",
]
