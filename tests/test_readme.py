"""What the README shows works as it stands."""

import re
from pathlib import Path

import pytest
import torch

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_python_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    block, _ = BLOCKS
    names = {}
    exec(block, names)
    assert names["recon"].shape == (64, 384)
    assert names["codes"].indices.shape == (64, 32)
    names["loss"].loss.backward()
    assert all(p.grad is not None for p in names["sae"].parameters())
    assert (tmp_path / "my-sae" / "sae.safetensors").exists()


@pytest.mark.filterwarnings("ignore")  # of sparsify
def test_the_drop_in_example_runs(tmp_path, monkeypatch):
    sparsify = pytest.importorskip("sparsify")
    monkeypatch.chdir(tmp_path)
    coder = sparsify.SparseCoder(16, sparsify.SparseCoderConfig(num_latents=64, k=4))
    coder.save_to_disk("my-coder")
    _, block = BLOCKS
    names = {}
    exec(block, names)
    x = torch.randn(5, 16)
    assert type(names["coder"]).__name__ == "FastSparseCoder"
    torch.testing.assert_close(names["coder"](x).sae_out, coder(x).sae_out)
    torch.testing.assert_close(names["sae"](x), coder(x).sae_out)


def test_both_commands_are_one_line_each():
    commands = re.findall(r"^python -m venv .*$", README, re.MULTILINE)
    assert [command.split("&& ")[-1] for command in commands] == ["fastsae train", "pytest"]
    assert all("pip install -c constraints.txt -e" in command for command in commands)
