"""fastsae harvest: activations of a model, on disk."""

from collections.abc import Sequence

from fastsae.data import ActivationShards, HarvestConfig, harvest_each

from .parse import filled, read_words


def main(words: Sequence[str]) -> str:
    found = list(harvest_each(filled(HarvestConfig, read_words(words))).values())
    lines = []
    for shards in found:
        lines.append(f"{shards.n_tokens:,} tokens of width {shards.d_in} in {shards.path}")
        if shards.heldout is not None:
            lines.append(f"{shards.heldout.n_tokens:,} tokens held out in {shards.heldout.path}")
        else:
            lines.append("nothing is held out: SAEs will be evaluated on their training data")
        lines.append(norms(shards))
    if found[0].skipped_rows:
        lines.append(f"{found[0].skipped_rows:,} rows without text were skipped")
    lines.append(f"next: fastsae train --data {found[0].path}")
    if len(found) > 1:
        other = found[1].path
        lines.append(f"or a transcoder: --target {other}; a crosscoder: --layers {other}")
    return "\n".join(lines)


def norms(shards: ActivationShards) -> str:
    """What the norms of the tokens are like, in one line."""
    norm = shards.norm
    if norm.median is None or norm.huge_fraction is None:  # harvested by an older version
        return f"mean norm {norm.mean:.4g}"
    text = f"median norm {norm.median:.4g}, {norm.huge_fraction:.2%} of tokens above 10 times that"
    if norm.huge_fraction and not shards.harvest.get("drop_first"):
        text += "; often first positions, which --drop-first leaves out"
    return text
