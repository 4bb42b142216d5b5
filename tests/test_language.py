"""The words of the field in all that a person reads: no spelling or phrase of its own."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
AVOIDED = {
    "at a price": "with a sparsity penalty",
    "price_warmup": "sparsity_warmup",
    "wager": "idea",
    "goes on bit for bit": "continues bit-for-bit",
    "amid the data": "at the median of the data",
    "the encoder's product": "the encoder GEMM",
    "put to the test": "replicated",
    "picture of": "plot of",
    "training_pass": "penalized",
    "opens_at": "activation_threshold",
    "settle_": "flush_",
    "lists_every_latent": "Codes.indices is None",
    "written_out": "to_dense",
    "anew": "again",
    "centre": "center",
    "normalis": "normaliz",
    "initialis": "initializ",
    "minimis": "minimiz",
    "colour": "color",
    "behaviour": "behavior",
    "neighbour": "neighbor",
}
OLD_NAMES = {"fastsae/config.py", "tests/test_config.py", "tests/test_options.py", "CHANGELOG.md"}
"""Where settings' former names are still read, or told."""


@pytest.mark.parametrize("phrase", AVOIDED)
def test_the_fields_words(phrase):
    listed = subprocess.check_output(["git", "ls-files", "*.py", "*.md", "*.toml"], cwd=ROOT)
    own = {*OLD_NAMES, f"tests/{Path(__file__).name}"}
    for name in {*listed.decode().split()} - own:
        found = re.search(rf"\b{phrase}", (ROOT / name).read_text(encoding="utf-8"), re.IGNORECASE)
        assert found is None, f"{name}: write {AVOIDED[phrase]!r}, not {phrase!r}"
