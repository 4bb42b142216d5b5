from .activation import Activation, ActivationConfig
from .batchtopk import BatchTopK, BatchTopKConfig
from .crosscoder import Crosscoder
from .gated import Gated, GatedConfig
from .init import Init, geometric_median, init_from_data
from .jumprelu import JumpReLU, JumpReLUConfig
from .linear import CodesLinear, TopKLinear
from .rational import Rational, RationalConfig
from .relu import ReLU, ReLUConfig
from .sae import SAE
from .topk import AbsTopK, TopK, TopKConfig
from .variational import Variational, VariationalConfig

__all__ = [
    "SAE",
    "AbsTopK",
    "Activation",
    "ActivationConfig",
    "BatchTopK",
    "BatchTopKConfig",
    "CodesLinear",
    "Crosscoder",
    "Gated",
    "GatedConfig",
    "Init",
    "JumpReLU",
    "JumpReLUConfig",
    "Rational",
    "RationalConfig",
    "ReLU",
    "ReLUConfig",
    "TopK",
    "TopKConfig",
    "TopKLinear",
    "Variational",
    "VariationalConfig",
    "geometric_median",
    "init_from_data",
]
