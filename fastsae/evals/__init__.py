"""What a trained SAE keeps of its data, and of the model the data came from."""

from .downstream import CausalEffect, Downstream, EncoderEffect, downstream
from .evaluate import EvalConfig, Evaluation, evaluate, evaluation_table
from .reconstruction import Reconstruction, reconstruction

__all__ = [
    "CausalEffect",
    "Downstream",
    "EncoderEffect",
    "EvalConfig",
    "Evaluation",
    "Reconstruction",
    "downstream",
    "evaluate",
    "evaluation_table",
    "reconstruction",
]
