from .init import geometric_median, init_from_data
from .sae import SAE, load
from .topk import AbsTopK, TopK, TopKConfig

__all__ = [
    "SAE",
    "AbsTopK",
    "TopK",
    "TopKConfig",
    "geometric_median",
    "init_from_data",
    "load",
]
