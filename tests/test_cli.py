"""The command line as its user meets it: real signals, files, exit codes and one-line errors.

What is about processes runs in some of its own; the rest calls `main`, without their start.
"""

import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from io import StringIO
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._C._distributed_c10d import TCPStore

from fastsae import SAE, AbsTopK, TopK
from fastsae.cli import main
from fastsae.cli.help import COMMANDS
from fastsae.data import ActivationShards, ShardWriter
from fastsae.files import claimed
from fastsae.train.log import read_lines

pytestmark = pytest.mark.usefixtures("undrawn")
COMMAND = [sys.executable, "-c", "from fastsae.cli import main; main()"]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["fastsae.cli.train"])
FORKED = """
import os, sys
from fastsae.cli import main
os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
sys.argv = ["fastsae", *words]
main()
"""
SMALL = ["--d-sae", "512", "--k", "8", "--batch-size", "256", "--lr", "0.003", "--log-every", "1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder of shards: 3000 activations of width 32."""
    path = tmp_path_factory.mktemp("shards") / "data"
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3000, 8, generator=generator) @ torch.randn(8, 32, generator=generator)
    labels = torch.zeros(3, 3000, dtype=torch.int32)
    writer = ShardWriter(path, 32, dtype="float32", shard_bytes=100_000)
    writer.append(x, *labels)
    writer.finish()
    return path


def in_process(*arguments, **options) -> subprocess.CompletedProcess:
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def fastsae(*arguments) -> subprocess.CompletedProcess:
    """What a process of its own would do, in this one."""
    words, out, errors, code = ["fastsae", *map(str, arguments)], StringIO(), StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(errors):
        patch.setattr(sys, "argv", words)
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    return subprocess.CompletedProcess(words, code, out.getvalue(), errors.getvalue())


def sae_files(out: Path, name: str = "sae") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((out / name).iterdir())}


def forked(errors: Path, arguments: Sequence[str]) -> BaseProcess:
    """A process that runs the command, forked from one that has imported torch already."""
    process = FORKS.Process(target=exec, args=(FORKED, {"errors": errors, "words": arguments}))
    process.start()
    return process


def wait_for(process: BaseProcess, happened: Callable[[], bool]) -> None:
    """Until it has happened, or the process has ended."""
    while process.exitcode is None and not happened():
        time.sleep(0.002)


def wait_for_lines(process: BaseProcess, out: Path, lines: int) -> None:
    wait_for(process, lambda: len(read_lines(out / "metrics.jsonl")) >= lines)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    out, errors = folder / "run", folder / "errors"
    words = ["train", "--data", data, "--out", out, "--steps", 120, *SMALL]
    process = forked(errors, [str(word) for word in words])
    process.join(timeout=120)
    assert process.exitcode == 0, errors.read_text()
    return out


def test_killed_or_asked_to_stop_it_ends_with_the_same_bytes(data, whole, tmp_path):
    """A kill leaves the last checkpoint, if there is one yet; a signal saves before it exits."""
    out = tmp_path / "run"
    settings = ["--steps", "120", "--checkpoint-every", "2", *SMALL]
    arguments = ["train", "--data", str(data), "--out", str(out), *settings]
    moments = random.Random(7)
    stops = {0: signal.SIGKILL, 15: signal.SIGTERM, 45: signal.SIGKILL, 80: signal.SIGINT}
    for line, signum in stops.items():
        process = forked(tmp_path / "errors", arguments)
        wait_for(process, lambda: (out / ".lock").exists())
        wait_for_lines(process, out, line)
        time.sleep(moments.random() * 0.03)
        assert process.pid is not None
        os.kill(process.pid, signum)
        process.join(timeout=60)
        if signum == signal.SIGKILL:
            assert process.exitcode == -signum, "the run must have been under way"
        else:
            assert process.exitcode == 128 + signum
            message = (tmp_path / "errors").read_text().splitlines()[-1]
            step = int(message.split("stopped at step ")[1].split()[0])
            assert (out / "checkpoints" / f"step-{step:08d}").is_dir()
            assert f"--resume --out {out}" in message
        if (out / "config.json").exists():
            arguments = ["train", "--resume", "--out", str(out)]
    process = forked(tmp_path / "errors", arguments)
    process.join(timeout=120)
    assert process.exitcode == 0, (tmp_path / "errors").read_text()
    assert sae_files(out) == sae_files(whole)


def test_a_finished_run_can_be_resumed_and_says_the_same(whole):
    before = sae_files(whole)
    again = fastsae("train", "--resume", "--out", whole)
    assert again.returncode == 0
    assert "FVU" in again.stdout and str(whole / "sae") in again.stdout
    assert sae_files(whole) == before


def one_line_error(*arguments, run=fastsae) -> str:
    done = run(*arguments)
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("fastsae: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return lines[0]


def damaged(data: Path, tmp_path: Path, change) -> Path:
    """A copy of the data folder after change(copy)."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in data.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    change(copy)
    return copy


def truncate(folder: Path) -> None:
    shard = sorted(folder.glob("shard-*"))[1]
    shard.write_bytes(shard.read_bytes()[:-8])


def edit(folder: Path) -> None:
    shard = sorted(folder.glob("shard-*"))[1]
    content = bytearray(shard.read_bytes())
    content[-20000] ^= 1
    shard.write_bytes(content)


def drop_index(folder: Path) -> None:
    (folder / "index.json").unlink()


def empty_index(folder: Path) -> None:
    (folder / "index.json").write_text("{}")


def nan_row(folder: Path) -> None:
    x = ActivationShards(folder).rows(torch.arange(3000))
    for path in folder.iterdir():
        path.unlink()
    x[77, 3] = torch.nan
    np.save(folder / "x.npy", x.numpy())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (truncate, "shard-00001.safetensors"),
        (edit, "shard-00001.safetensors"),
        (drop_index, "shard-00000.safetensors"),
        (empty_index, "index.json"),
    ],
)
def test_bad_data(data, tmp_path, change, message):
    folder = damaged(data, tmp_path, change)
    out = tmp_path / "run"
    assert message in one_line_error("train", "--data", folder, "--out", out, "--steps", 40, *SMALL)


def test_a_bad_row(data, tmp_path):
    """In a process without type checks: these read the data's mean square before anyone else."""
    folder, out = damaged(data, tmp_path, nan_row), tmp_path / "run"
    arguments = ["train", "--data", folder, "--out", out, "--steps", 40, *SMALL]
    assert "row 77" in one_line_error(*arguments, run=in_process)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--k", "513"], "k must be between 1 and d_sae = 512, got 513"),
        (["--k", "0"], "k must be at least 1, got 0"),
        (["--data", "nowhere"], "nowhere does not exist"),
        (["--out", "/sys/fastsae-run"], "/sys/fastsae-run"),
        (["--resume"], "holds no run to resume"),
        (
            ["--batch-size", "3000001"],
            "at most 1000 times the 3000 tokens of the data, got 3",
        ),
    ],
)
def test_bad_settings(data, tmp_path, settings, message):
    out = tmp_path / "run"
    assert message in one_line_error("train", "--data", data, "--out", out, *SMALL, *settings)
    assert not (out / "config.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu(data, tmp_path):
    arguments = ["--data", data, "--out", tmp_path / "run", "--device", "cuda"]
    assert "there is no CUDA GPU here" in one_line_error("train", *arguments)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_another_run(data, whole):
    before = sae_files(whole)
    message = one_line_error("train", "--data", data, "--out", whole, *SMALL)
    assert "already holds a run" in message
    assert "--resume" in message
    assert sae_files(whole) == before


def test_a_folder_that_holds_something_else(data, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    message = one_line_error("train", "--data", data, "--out", tmp_path, *SMALL)
    assert "is not empty and holds no run" in message
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_resuming_with_other_settings(whole):
    for k in (9, 32):  # 32 is the default: it must not go unnoticed
        message = one_line_error("train", "--resume", "--out", whole, "--k", k)
        assert f"k = {k} differs from the run to be resumed, which has 8" in message
    message = one_line_error("train", "--resume", "--out", whole, "--recipe", "openai")
    assert "--resume takes the settings of" in message


def test_resuming_on_other_data(whole, tmp_path, data):
    config = json.loads((whole / "config.json").read_text())
    other = tmp_path / "other.npy"
    np.save(other, np.random.randn(3000, 32).astype("f4"))
    out = tmp_path / "run"
    out.mkdir()
    config["config"]["data"] = str(other)
    (out / "config.json").write_text(json.dumps(config))
    assert "other data" in one_line_error("train", "--resume", "--out", out)


def test_an_unknown_key_in_a_config(whole, tmp_path):
    config = json.loads((whole / "config.json").read_text())
    config["config"]["learning_rate"] = 0.1
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.json").write_text(json.dumps(config))
    assert "no setting 'learning_rate'" in one_line_error("train", "--resume", "--out", out)


def limit_file_size() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))


def test_a_disk_that_takes_no_more(data, tmp_path):
    """Every write beyond 150 kB fails, as on a full disk: a checkpoint does not fit."""
    out = tmp_path / "run"
    arguments = ["train", "--data", data, "--out", out, "--checkpoint-every", 5, "--steps", 40]
    limited = partial(in_process, preexec_fn=limit_file_size)
    message = one_line_error(*arguments, *SMALL, run=limited)
    assert "state.safetensors" in message
    assert not list((out / "checkpoints").iterdir()), "nothing half-written may be left"
    assert fastsae("train", "--resume", "--out", out).returncode == 0


def test_a_folder_that_another_process_has(data, tmp_path):
    with claimed(tmp_path / "run"):
        message = one_line_error("train", "--data", data, "--out", tmp_path / "run", *SMALL)
    assert "another process" in message


def test_eval_of_data_of_another_width(data, tmp_path):
    SAE(16, 64, TopK(4)).save(tmp_path / "sae")
    message = one_line_error("eval", tmp_path / "sae", "--data", data)
    assert "d_in = 16" in message
    assert "32" in message


def test_eval_writes_its_numbers(data, whole, tmp_path):
    done = fastsae("eval", whole, "--data", data)
    assert done.returncode == 0, done.stderr
    found = json.loads((whole / "eval.json").read_text())["reconstruction"]
    summary = json.loads((whole / "summary.json").read_text())
    assert found["fvu"] == pytest.approx(summary["fvu"])
    assert "FVU" in done.stdout
    assert f"{whole} on {data}, its training data:" in done.stdout
    (tmp_path / "link").symlink_to(data)
    done = fastsae("eval", whole, "--data", tmp_path / "link")
    assert "its training data:" in done.stdout, done.stderr


def test_a_sweep_is_compared_and_its_runs_are_runs(data, tmp_path):
    out = tmp_path / "sweep"
    shared = ["--data", data, "--out", out, "--steps", 20, *SMALL[:2], *SMALL[4:]]
    done = fastsae(
        "sweep", "topk:k=8", "jumprelu:target_l0=8,by_norm=true,constraint=none", *shared
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((out / "comparison.json").read_text())
    assert list(found) == ["topk-k=8", "jumprelu-target_l0=8-by_norm=true-constraint=none"]
    assert all(name in done.stdout for name in found)
    assert "\n  evaluated on training data\n" in done.stdout
    again = fastsae("sweep", "--resume", "--out", out)
    assert again.stdout == done.stdout, "nothing is left to train"
    for more in (["topk"], ["--steps", 20], ["--seeds", 1], ["--batch-size", 4096]):
        message = one_line_error("sweep", "--resume", "--out", out, *more)
        assert "--resume takes the SAEs and settings of" in message
        assert "give nothing but --out, --mesh and --report" in message
    assert "already holds a sweep" in one_line_error("sweep", "topk", *shared)
    assert fastsae("eval", out / "topk-k=8", "--data", data).returncode == 0


@pytest.mark.parametrize(
    ("saes", "message"),
    [
        ([], "name the SAEs to train"),
        (["topp"], "activation must be one of batchtopk, "),
        (["topk:k"], "'k' must be setting=value"),
        (["topk:k=4", "topk:k=4"], "topk:k=4 with seed 0 is given twice"),
        (["topk:k=9999"], "k must be between 1 and d_sae = 512, got 9999"),
    ],
)
def test_a_bad_sweep(data, tmp_path, saes, message):
    shared = ["--data", data, "--out", tmp_path / "sweep", "--steps", 20, "--d-sae", 512]
    assert message in one_line_error("sweep", *saes, *shared)
    assert not (tmp_path / "sweep").exists()


def test_what_cannot_be_upgraded(data, tmp_path):
    SAE(32, 64, AbsTopK(4)).save(tmp_path / "sae")
    arguments = [tmp_path / "sae", "--data", data, "--out", tmp_path / "run"]
    assert "can be upgraded, got topk" in one_line_error("upgrade", *arguments)
    assert "nowhere" in one_line_error("upgrade", tmp_path / "nowhere", "--data", data)


def test_convert(whole, tmp_path):
    for form in ("sae_lens", "fastsae"):
        done = fastsae("convert", whole, tmp_path / form, "--to", form)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("512 latents of width 32, topk: ")
    back = fastsae("convert", tmp_path / "sae_lens", tmp_path / "back", "--to", "fastsae")
    assert back.returncode == 0, back.stderr
    assert sae_files(tmp_path, "back") == sae_files(tmp_path, "fastsae")
    assert sae_files(whole, "sae_lens") == sae_files(tmp_path, "sae_lens")
    message = one_line_error("convert", whole, tmp_path / "back", "--to", "sae_lens")
    assert "is not an empty directory" in message
    message = one_line_error("convert", tmp_path, tmp_path / "out", "--to", "sae_lens")
    assert "holds no SAE" in message and not (tmp_path / "out").exists()
    message = one_line_error("convert", tmp_path / "nowhere", tmp_path / "out", "--to", "sae_lens")
    assert "nowhere does not exist" in message


def test_an_unknown_command():
    choices = ", ".join(COMMANDS)
    message = one_line_error("fly", run=in_process)
    assert f"must be one of {choices}, got 'fly'" in message


def test_what_runs_in_one_process_refuses_many(monkeypatch, tmp_path):
    store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    many = {"WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in (many | address).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RANK", "0")
    assert "--to is required" in one_line_error("convert", tmp_path, tmp_path / "out")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    message = one_line_error("convert", tmp_path, tmp_path / "out")
    assert "fastsae convert runs in one process, got 2: leave out torchrun" in message
    monkeypatch.setenv("RANK", "1")
    other = fastsae("convert", tmp_path, tmp_path / "out")
    assert (other.returncode, other.stderr) == (2, "")
