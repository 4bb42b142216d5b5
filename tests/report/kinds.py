"""An SAE of each kind that a report shows in its own way."""

from typing import Any

from fastsae.nn import SAE, ActivationConfig, TopKConfig
from fastsae.nn.jumprelu import JumpReLUConfig
from fastsae.nn.rational import RationalConfig
from fastsae.nn.relu import ReLUConfig

D_IN, D_OUT, D_SAE, K = 16, 12, 64, 4
TOPK = TopKConfig(k=K)
KINDS: dict[str, tuple[ActivationConfig, dict[str, Any]]] = {
    "topk": (TOPK, {}),
    "abstopk": (TopKConfig(k=K, by="abs"), {}),
    "jumprelu": (JumpReLUConfig(threshold=0.3), {}),
    "relu": (ReLUConfig(), {}),
    "rational of every latent": (RationalConfig(gate="relu", support="none"), {}),
    "skip transcoder": (TOPK, {"d_out": D_OUT, "skip": True}),
    "crosscoder": (TOPK, {"layers": 2, "by_norm": True}),
    "layer norm": (TOPK, {"layer_norm": True}),
}


def build(kind: str) -> SAE:
    activation, options = KINDS[kind]
    return SAE(D_IN, D_SAE, activation.build(), **options).eval()
