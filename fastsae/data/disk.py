"""Keeps a harvest from filling the disk."""

import shutil
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fastsae.data.harvest_config import HarvestConfig
from fastsae.data.writer import LABEL_BYTES, ShardWriter
from fastsae.progress import say

RESERVE = 1 << 26
"""Bytes that are left free."""


def check_space(config: HarvestConfig, widths: Mapping[str, int], progress: bool) -> None:
    """Say how large a harvest of `max_tokens` becomes; ValueError if the disk lacks the space.

    widths: of the rows at each hookpoint. What a killed harvest left is about to be overwritten.
    """
    if config.max_tokens is None:
        return
    entry = getattr(torch, config.dtype).itemsize
    row = sum(width * entry + LABEL_BYTES for width in widths.values())
    size = round(config.max_tokens / (1 - config.heldout_fraction) * row)
    folders = [config.folders[name] / part for name in widths for part in ("", "heldout")]
    shards = [shard for folder in folders for shard in folder.glob("shard-*.safetensors")]
    free = shutil.disk_usage(config.out).free + sum(shard.stat().st_size for shard in shards)
    if size + RESERVE > free:
        raise ValueError(
            f"{config.max_tokens:,} tokens in {config.dtype} take about {_text(size)} and the disk "
            f"of {config.out} has {_text(free)} free: lower --max-tokens or choose another --out"
        )
    if progress:
        say(f"{config.max_tokens:,} tokens in {config.dtype}: about {_text(size)} on disk")


def nearly_full(
    config: HarvestConfig, writers: Iterable[ShardWriter], rows: Iterable[Tensor]
) -> str | None:
    """Why no more rows can be written, if the disk cannot hold these and those that wait."""
    wanted = sum(writer.pending_bytes for writer in writers)
    wanted += sum(x.nbytes + LABEL_BYTES * len(x) for x in rows)
    free = shutil.disk_usage(config.out).free
    return f"the disk of {config.out} is nearly full" if wanted + RESERVE > free else None


def _text(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.0f} MB"
