"""What the documentation shows runs as it stands.

The code of a page runs in order, in one folder: its python blocks in one namespace, the lines of
its bash blocks as fastsae commands. An sh block is a command of the README, a text block a
formula. Example scripts are shown whole, and have tests of their own.
"""

import logging
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import pytest
import torch

from fastsae.cli import run

pytestmark = pytest.mark.usefixtures("undrawn")
ROOT = Path(__file__).parents[1]
DOCS, README = ROOT / "docs", (ROOT / "README.md").read_text()
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
FENCE = re.compile(r"^```(.*?)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SHOWN = re.compile(r'--8<-- "docs/examples/(\w+)\.py"\n')
PEERS = {
    "sparsify",
    "sae_lens",
    "dictionary_learning",
    "gguf",
    "transformer_lens",
    "nnsight",
    "mlflow",
}
EXAMPLES = {
    "train_on_your_activations": "--batches 4 --steps 20",
    "transformer_lens_stream": "--batches 40 --steps 20",
    "nnsight_stream": "--batches 40 --steps 20",
    "mlflow_logger": "--steps 20",
    "accelerate_sparsify": "--tokens 128 --d-in 32 --latents 256 --k 8 --rounds 1",
    "rational_upgrade": "--steps 30 --tuning-steps 10",
    "what_a_latent_means": "--max-tokens 3000 --steps 30 --latents 2",
}


@pytest.fixture(autouse=True)
def small_and_offline(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more would only wait for each other
    logger = logging.getLogger("fastsae")
    yield
    torch.set_num_threads(threads)
    for handler in [h for h in logger.handlers if type(h) is logging.FileHandler]:
        logger.removeHandler(handler)
        handler.close()


@contextmanager
def skipping_what_is_not_installed() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in PEERS:
            raise
        pytest.skip(f"{error.name} is not installed")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what other libraries import
@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(page):
    names = {"__name__": "__main__"}
    for kind, block in FENCE.findall((DOCS / page).read_text()):
        match kind:
            case "python":
                with skipping_what_is_not_installed():
                    exec(compile(block, page, "exec"), names)
            case "bash":
                for line in block.replace("\\\n", " ").splitlines():
                    program, *arguments = shlex.split(line)
                    assert program == "fastsae"
                    run(arguments)
            case "sh":
                assert block in README
            case _:
                assert kind == "text" or SHOWN.fullmatch(block), f"{page}: {kind!r} is not run"


def test_every_example_is_shown_and_tested():
    shown = SHOWN.findall((DOCS / "examples/index.md").read_text())
    scripts = {path.stem for path in (DOCS / "examples").glob("*.py")}
    assert sorted(shown) == sorted(scripts) == sorted(EXAMPLES)


def printed_by(example: str, capsys, monkeypatch) -> str:
    """What an example prints at a small size."""
    path = DOCS / "examples" / f"{example}.py"
    monkeypatch.setattr(sys, "argv", [str(path), *EXAMPLES[example].split()])
    with skipping_what_is_not_installed():
        runpy.run_path(str(path), run_name="__main__")
    return capsys.readouterr().out


def test_train_on_your_activations(capsys, monkeypatch):
    printed = printed_by("train_on_your_activations", capsys, monkeypatch)
    found = re.fullmatch(r"FVU (\S+), L0 8.0 on 1024 tokens; see (\S+)\n", printed)
    assert found and 0 < float(found[1]) < 1
    assert (Path(found[2]) / "sae" / "sae.safetensors").exists()


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
def test_transformer_lens_stream(capsys, monkeypatch):
    printed = printed_by("transformer_lens_stream", capsys, monkeypatch)
    found = re.fullmatch(r"FVU (\S+), L0 8.0 on 1024 tokens; see \S+\n", printed)
    assert found and 0 < float(found[1]) < 1


def test_nnsight_stream(capsys, monkeypatch):
    with skipping_what_is_not_installed():
        version = metadata.version("nnsight")
    if version.startswith("0.3."):
        pytest.skip(f"nnsight {version}, which dictionary-learning needs, traces in another way")
    printed = printed_by("nnsight_stream", capsys, monkeypatch)
    found = re.fullmatch(r"FVU (\S+), L0 8.0 on 1024 tokens; see \S+\n", printed)
    assert found and 0 < float(found[1]) < 1


@pytest.mark.filterwarnings("ignore")  # of MLflow's
def test_mlflow_logger(capsys, monkeypatch):
    printed = printed_by("mlflow_logger", capsys, monkeypatch)
    assert re.fullmatch(r"final FVU 0\.\d{4} in MLflow's run mlflow\n", printed)


def test_accelerate_sparsify(capsys, monkeypatch):
    printed = printed_by("accelerate_sparsify", capsys, monkeypatch)
    outputs, gradients = re.findall(r"difference of \w+ +(\S+)", printed)
    assert float(outputs) < 1e-5 and float(gradients) < 1e-5
    assert "same active latents              100.0000%" in printed
    assert len(re.findall(r"\d+ ms per step", printed)) == 2


def test_rational_upgrade(capsys, monkeypatch):
    printed = printed_by("rational_upgrade", capsys, monkeypatch)
    fvu = {name.strip(): float(value) for name, value in re.findall(r"(.+)FVU (\S+)", printed)}
    assert len(fvu) == 4
    assert fvu["rational, fine-tuned"] < min(fvu["baseline"], fvu["baseline, fine-tuned"])


def test_what_a_latent_means(capsys, monkeypatch):
    printed = printed_by("what_a_latent_means", capsys, monkeypatch)
    about = re.split(r"\nlatent \d+, active on \d+ tokens; towards: ", printed)[1:]
    assert len(about) == 2
    for text in about:
        words, *contexts = text.splitlines()
        assert len(words.split(" | ")) == 6
        assert len(contexts) == 4 and all("[" in line and "]" in line for line in contexts)
