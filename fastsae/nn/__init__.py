from .activation import Activation, ActivationConfig
from .crosscoder import Crosscoder
from .init import Init, geometric_median, init_from_data
from .rational import Rational, RationalConfig
from .sae import SAE, load
from .topk import AbsTopK, TopK, TopKConfig

__all__ = [
    "SAE",
    "AbsTopK",
    "Activation",
    "ActivationConfig",
    "Crosscoder",
    "Init",
    "Rational",
    "RationalConfig",
    "TopK",
    "TopKConfig",
    "geometric_median",
    "init_from_data",
    "load",
]
