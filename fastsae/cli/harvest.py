"""fastsae harvest: activations of a model, on disk."""

from collections.abc import Sequence

from fastsae.data import HarvestConfig, harvest_each

from .parse import filled, read_words


def main(words: Sequence[str]) -> None:
    found = list(harvest_each(filled(HarvestConfig, read_words(words))).values())
    for shards in found:
        print(f"{shards.n_tokens:,} tokens of width {shards.d_in} in {shards.path}")
        if shards.heldout is not None:
            print(f"{shards.heldout.n_tokens:,} tokens held out in {shards.heldout.path}")
    print(f"next: fastsae train --data {found[0].path}")
    if len(found) > 1:
        print(f"or a transcoder: --target {found[1].path}; a crosscoder: --layers {found[1].path}")
