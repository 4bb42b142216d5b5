"""Evaluation of trained SAEs: reconstruction, downstream effect on the model, probing."""

from .downstream import CausalEffect, Downstream, EncoderEffect, downstream
from .evaluate import (
    EvalConfig,
    Evaluation,
    evaluate,
    evaluation_rows,
    evaluation_table,
    read_evaluation,
)
from .probing import Probing, sparse_probing
from .reconstruction import Reconstruction, reconstruction

__all__ = [
    "CausalEffect",
    "Downstream",
    "EncoderEffect",
    "EvalConfig",
    "Evaluation",
    "Probing",
    "Reconstruction",
    "downstream",
    "evaluate",
    "evaluation_rows",
    "evaluation_table",
    "read_evaluation",
    "reconstruction",
    "sparse_probing",
]
