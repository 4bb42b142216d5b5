"""Train sparse autoencoders fast."""

from .codes import Codes
from .nn import SAE, AbsTopK, Crosscoder, TopK, load

__all__ = ["SAE", "AbsTopK", "Codes", "Crosscoder", "TopK", "load"]
