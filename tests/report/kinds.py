"""An SAE of every kind that a report is made of."""

from typing import Any

from fastsae.nn import SAE, ActivationConfig, TopKConfig
from fastsae.nn.batchtopk import BatchTopKConfig
from fastsae.nn.gated import GatedConfig
from fastsae.nn.jumprelu import JumpReLUConfig
from fastsae.nn.rational import RationalConfig
from fastsae.nn.relu import ReLUConfig
from fastsae.nn.variational import VariationalConfig

D_IN, D_OUT, D_SAE, K = 16, 12, 64, 4
TOPK = TopKConfig(k=K)
KINDS: dict[str, tuple[ActivationConfig, dict[str, Any]]] = {
    "topk": (TOPK, {}),
    "abstopk": (TopKConfig(k=K, by="abs"), {}),
    "batchtopk": (BatchTopKConfig(k=K), {}),
    "jumprelu": (JumpReLUConfig(threshold=0.3), {}),
    "relu": (ReLUConfig(), {}),
    "gated": (GatedConfig(), {}),
    "variational": (VariationalConfig(k=K), {}),
    "rational": (RationalConfig(k=K), {}),
    "rational of every latent": (RationalConfig(gate="relu", support="none"), {}),
    "skip transcoder": (TOPK, {"d_out": D_OUT, "skip": True}),
    "crosscoder": (TOPK, {"layers": 2, "by_norm": True}),
    "by norm": (TOPK, {"by_norm": True}),
    "layer norm": (TOPK, {"layer_norm": True}),
}


def build(kind: str) -> SAE:
    activation, options = KINDS[kind]
    return SAE(D_IN, D_SAE, activation.build(), **options).eval()
