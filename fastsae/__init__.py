"""Train sparse autoencoders fast."""

from .codes import Codes
from .nn import SAE, AbsTopK, TopK, load

__all__ = ["SAE", "AbsTopK", "Codes", "TopK", "load"]
