"""What the README shows works as it stands."""

import re
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_python_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(block, names)
    assert names["recon"].shape == (64, 384)
    assert names["codes"].indices.shape == (64, 32)
    names["loss"].loss.backward()
    assert all(p.grad is not None for p in names["sae"].parameters())
    assert (tmp_path / "my-sae" / "sae.safetensors").exists()


def test_both_commands_are_one_line_each():
    commands = re.findall(r"^python -m venv .*$", README, re.MULTILINE)
    assert [command.split("&& ")[-1] for command in commands] == ["fastsae train", "pytest"]
    assert all("pip install -c constraints.txt -e" in command for command in commands)
