"""How options and files on the command line are read, and what help prints about them."""

import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch

from fastsae import __version__
from fastsae.cli import run
from fastsae.cli.convert import Convert
from fastsae.cli.help import COMMANDS, command_help
from fastsae.cli.parse import Given, filled, read_words, types_in
from fastsae.cli.sweep import read_sweep
from fastsae.cli.train import read_train
from fastsae.data import HarvestConfig
from fastsae.data.ordinary import MAX_NORM_RATIO
from fastsae.device import choose_device
from fastsae.interop import WRITABLE
from fastsae.nn import JumpReLUConfig, TopKConfig
from fastsae.nn.activations import CHOICES
from fastsae.train import RECIPES, TrainConfig

HARVEST = ["--model", "m", "--out", "o", "--text", "a", "b"]
TOML = """
steps = 50
layer-norm = true
betas = [0.5, 0.75]

[activation]
name = "jumprelu"
target_l0 = 16
"""


def shown(*words: str) -> str:
    """What the command line prints if it may not import torch."""
    code = "import sys; sys.modules['torch'] = None; sys.argv[0] = 'fastsae'"
    command = [sys.executable, "-c", f"{code}; from fastsae.cli import main; main()", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_help_needs_no_torch():
    assert shown() == shown("--help")
    assert shown("--version") == f"fastsae {__version__}\n"
    assert "--help-all" in shown("train", "--help")


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_every_option_and_fits(command, columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    run([command, "--help"])
    brief = capsys.readouterr().out
    run([command, "--help-all"])
    whole = capsys.readouterr().out
    assert max(map(len, (brief + whole).splitlines())) <= columns
    assert len(brief.splitlines()) < 70
    if command in ("train", "sweep"):
        assert all(
            f"  --{name.replace('_', '-')} " in f"{whole} "
            for name in types_in(TrainConfig, vars(TrainConfig()))
        )
        assert all(name in brief for name in RECIPES)
    if command == "train":
        assert all(name in brief for name in CHOICES)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_the_values_of_defaults(command):
    """Not the names of constants."""
    shown = " ".join(command_help(command, ["--help-all"]).split())
    assert not re.search(r"\(default: [A-Z_]+\b", shown)
    if command == "train":
        assert f"(default: {MAX_NORM_RATIO})" in shown.partition("--max-norm-ratio")[2][:400]


def test_python_m():
    command = [sys.executable, "-m", "fastsae", "train", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == command_help("train", []) + "\n"


def test_a_star_imports_what_is_public():
    names: dict[str, object] = {}
    exec("from fastsae import *", names)
    assert {"SAE", "TopK", "load", "accelerate"} <= names.keys() and "import_module" not in names


def test_without_an_output():
    command = f"{sys.executable} -m fastsae --help >&-"
    done = subprocess.run(command, shell=True, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_reader_that_has_enough():
    words = ["-m", "fastsae", "train", "--help-all"]
    process = subprocess.Popen(
        [sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141
    process.stderr.close()


def test_flags_override_a_file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(TOML)
    config = read_train(["--config", str(path), "--steps", "60"]).config
    assert config.activation == JumpReLUConfig(target_l0=16.0)
    assert (config.steps, config.layer_norm, config.optimizer.betas) == (60, True, (0.5, 0.75))
    command, _ = read_sweep(["--config", str(path), "relu:target_l0=8"])
    assert command.saes == ("relu:target_l0=8",)
    (tmp_path / "more.toml").write_text("steps = 70")
    words = ["--config", str(path), "--lr", "0.5", "--config", str(tmp_path / "more.toml")]
    config = read_train(words).config
    assert (config.steps, config.layer_norm, config.optimizer.lr) == (70, True, 0.5)
    path.write_text("stepz = 3")
    with pytest.raises(ValueError, match="unknown option --stepz; did you mean --step or --steps"):
        read_train(["--config", str(path)])
    path.write_text("steps 3")
    with pytest.raises(ValueError, match=r"run.toml is not a TOML file"):
        read_train([f"--config={path}"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('name = "jumprelu"', "unknown option --name"),
        ('"" = 1', "'' is no setting's name"),
        ("lr = 0.1\n[train]\nlr = 0.2", "'lr' is given twice"),
        ("lr = [0.1, 0.2]", "lr must be one value, got '0.1 0.2' in the file"),
        ('steps = [10, "topk"]', "steps must be one value"),
        ("layer_norm = []", "layer_norm must be true or false"),
        ('layer_norm = "yes"', "layer_norm must be true or false, got 'yes'"),
        ("no_layer_norm = true", "unknown option --no-layer-norm"),
        ("betas = [0.9]", "betas must be 2 values"),
        ("x = " + "[" * 3000, "is not a TOML file"),
    ],
)
def test_mistakes_in_a_file(text, message, tmp_path):
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_sweep(["relu", "--config", str(tmp_path / "run.toml")])


def test_positional_words_keep_their_order(tmp_path):
    (tmp_path / "to.toml").write_text('to = "sae_lens"')
    path = str(tmp_path / "to.toml")
    for words in (
        ["a", "--to", "sparsify", "b"],
        ["--to", "sparsify", "a", "--config", path, "b"],
        ["a", "--config", path, "--to", "sparsify", "b"],
    ):
        found = filled(Convert, read_words(words), ["source", "out"])
        assert (found.source, found.out, found.to) == ("a", Path("b"), "sparsify")
    words = ["--k", "4", "topk", "--k", "8", "relu", "--layer-norm", "gated"]
    command, configs = read_sweep(words)
    assert command.saes == ("topk", "relu", "gated")
    assert configs["topk"].activation == TopKConfig(k=8)
    for words in (["topk", "--", "relu"], ["topk", "--config"], ["topk", "--out="]):
        with pytest.raises(ValueError, match="unexpected argument '--'|needs a value"):
            read_sweep(words)


def test_words_after_an_option_that_takes_fewer():
    command, _ = read_sweep(["--layer-norm", "relu", "--steps", "3", "topk"])
    assert command.saes == ("relu", "topk")
    config = read_train(["--no-layer-norm", "--wandb", "none", "--dead-after=9"]).config
    assert (config.layer_norm, config.wandb, config.dead_after) == (False, None, 9)


@pytest.mark.parametrize(
    ("words", "hookpoint"), [(["layers.1"], "layers.1"), (["a", "b"], ("a", "b"))]
)
def test_one_or_several_hookpoints(words, hookpoint):
    given = read_words([*HARVEST, "--hookpoint", *words])
    assert filled(HarvestConfig, given).hookpoint == hookpoint


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--kk 3", "unknown option --kk; did you mean --k?"),
        ("--d_sea 64", "unknown option --d-sea; did you mean --d-sae"),
        ("--learning-rate 1", "unknown option --learning-rate; did you mean --lr?"),
        ("--expansion-factor 4", "unknown option --expansion-factor; did you mean --d-sae?"),
        ("--l1 4", r"did you mean --l1-coef\? \(for --activation gated, rational, relu\)"),
        ("--target-l0 4", r"unknown option --target-l0 \(for --activation gated, jumprelu"),
        ("--activation relu --centre zero", "did you mean --center"),
        ("--k", "--k needs a value"),
        ("--k 1.5", "--k must be a whole number, got '1.5'"),
        ("--lr fast", "--lr must be a finite number, got 'fast'"),
        ("--lr 1e999", "--lr must be a finite number, got '1e999'"),
        ("--betas 0.9 nan", "--betas must be a finite number, got 'nan'"),
        (f"--seed {2**64}", f"--seed must be a whole number of at most 64 bits, got '{2**64}'"),
        ("--data-seed -5", "data_seed must be from 0 to .*, got -5"),
        ("--betas", "--betas takes 2 values, got 0"),
        ("--layers --d-sae 64", "--layers needs a value"),
        ("--prefixes", "--prefixes needs a value"),
        ("--betas 0.9", "--betas takes 2 values, got 1"),
        ("--step quick", "--step must be one of auto, fused, autograd, got 'quick'"),
        ("--device gpu", "device must be auto, cpu, cuda or cuda:N, got 'gpu'"),
        ("runs/sae", "unexpected argument 'runs/sae'"),
    ],
)
def test_mistakes(words, message):
    with pytest.raises(ValueError, match=message):
        read_train(words.split())


def test_options_override_a_recipe_before_anything_is_checked():
    """The recipe's k of 32 would not fit."""
    for recipe in RECIPES:
        words = ["--recipe", recipe, "--d-sae", "16", "--k", "4", "--batch-size", "8"]
        config = read_train(words).config
        assert (config.activation, config.d_sae, config.batch_size) == (TopKConfig(k=4), 16, 8)
    assert read_train(["--recipe", "none"]) == read_train([])


def test_what_is_required():
    given: Given = read_words(HARVEST)
    with pytest.raises(ValueError, match="--hookpoint is required"):
        filled(HarvestConfig, given)


def test_paths_are_paths():
    assert read_train(["--layers", "a", "b"]).config.layers == (Path("a"), Path("b"))


def test_every_library_that_is_written():
    assert typing.get_args(typing.get_type_hints(Convert)["to"]) == WRITABLE


def test_one_of_several_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert [choose_device(name) for name in ("auto", "cuda", "cuda:1")] == [
        "cuda",
        "cuda",
        "cuda:1",
    ]
    assert chosen == ["cuda:1"]
    with pytest.raises(ValueError, match="device must be below cuda:2"):
        choose_device("cuda:2")
