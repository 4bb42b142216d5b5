"""fastsae harvest: activations of a model, on disk."""

from collections.abc import Sequence

from fastsae.data import HarvestConfig, harvest_each

from .parse import filled, read_words


def main(words: Sequence[str]) -> str:
    found = list(harvest_each(filled(HarvestConfig, read_words(words))).values())
    lines = []
    for shards in found:
        lines.append(f"{shards.n_tokens:,} tokens of width {shards.d_in} in {shards.path}")
        if shards.heldout is not None:
            lines.append(f"{shards.heldout.n_tokens:,} tokens held out in {shards.heldout.path}")
    lines.append(f"next: fastsae train --data {found[0].path}")
    if len(found) > 1:
        other = found[1].path
        lines.append(f"or a transcoder: --target {other}; a crosscoder: --layers {other}")
    return "\n".join(lines)
