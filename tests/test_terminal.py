"""What reaches the terminal, and what happens to a run when the terminal is gone."""

import logging
import os
import signal
import sys
import warnings
from io import StringIO
from typing import Any

import numpy as np
import pytest
import torch

from fastsae.checkpoint import newest_intact, save_checkpoint
from fastsae.cli import main, out_of_memory
from fastsae.data import Synthetic
from fastsae.progress import printable
from fastsae.train import Trainer
from fastsae.train.comparison import comparison_table
from fastsae.train.interrupt import Interrupts
from fastsae.train.log import Log
from fastsae.train.loggers import Loggers

from .train.conftest import train_config

pytestmark = pytest.mark.usefixtures("undrawn")
ESCAPE = "\x1b]0;title\x07"


def command(monkeypatch, *words) -> int:
    """The exit code of a command line."""
    monkeypatch.setattr(sys, "argv", ["fastsae", *map(str, words)])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def closed() -> None:
    return None


def full():
    return open("/dev/full", "w", buffering=1)


def left():
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w", buffering=1)


@pytest.fixture
def arguments(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((500, 8), dtype="f4"))
    sizes = ["--d-sae", 16, "--k", 2, "--batch-size", 50, "--steps", 6, "--log-every", 1]
    return ["train", "--data", tmp_path / "x.npy", "--out", tmp_path / "run", *sizes]


@pytest.mark.parametrize("stream", [closed, full, left])
def test_a_run_outlives_its_stderr(stream, arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", stream())
    assert command(monkeypatch, *arguments) == 0
    sys.stderr.close()
    assert (tmp_path / "run" / "summary.json").exists() and "FVU" in capsys.readouterr().out


def test_lines_of_a_run_go_where_python_logging_sends_them(tmp_path, capsys):
    source = Synthetic(d_in=8, n_latents=16, active=2, n_tokens=500)
    lines, logger = StringIO(), logging.getLogger("fastsae")
    before, own = logger.handlers, logging.StreamHandler(lines)
    own.setFormatter(logging.Formatter("%(name)s %(levelname)s: %(message)s"))

    def run(name: str, progress: bool = True) -> str:
        settings = {"d_sae": 16, "k": 2, "batch_size": 50, "steps": 2, "out": str(tmp_path / name)}
        Trainer(train_config(**settings), source, progress=progress).fit()
        return capsys.readouterr().err

    assert len(run("default").splitlines()) == 4
    try:
        logger.handlers = [own]
        assert run("own") == "" and len(lines.getvalue().splitlines()) == 4
        assert lines.getvalue().startswith("fastsae INFO: topk (k = 2), 16 latents of width 8")
    finally:
        logger.handlers = before
    assert run("silent", progress=False) == ""


def test_a_damaged_checkpoint_is_passed_over_without_a_stderr(tmp_path, monkeypatch):
    for step in (1, 2):
        path = save_checkpoint(tmp_path, step, {"w": torch.zeros(2)}, {}, keep=2)
    (path / "state.safetensors").write_bytes(b"")
    monkeypatch.setattr(sys, "stderr", StringIO())
    sys.stderr.close()
    ((_, meta),) = newest_intact({tmp_path: ()}) or []
    assert meta["step"] == 1


@pytest.mark.parametrize(("stream", "code"), [(closed, 0), (full, 2), (left, 141)])
def test_a_result_that_cannot_be_printed(stream, code, arguments, tmp_path, monkeypatch, capsys):
    """Only the exit code says so: the run has finished."""
    monkeypatch.setattr(sys, "stdout", stream())
    assert command(monkeypatch, *arguments) == code
    sys.stdout.close()
    assert (tmp_path / "run" / "summary.json").exists()
    assert ("cannot be printed: No space" in capsys.readouterr().err) == (code == 2)


def test_a_full_disk_names_the_metrics(tmp_path):
    with Log(tmp_path, 10, 0, shown=False, loggers=Loggers([])) as log:
        log.path.unlink()
        log.path.symlink_to("/dev/full")
        with pytest.raises(OSError, match=r"metrics.jsonl cannot be written: No space left"):
            log.write({"step": 1, "tokens": 1})


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_noted_once_and_a_hangup_at_any_time(signum):
    received = []
    before = {s: signal.signal(s, lambda s, _: received.append(s)) for s in (1, 2, 15)}
    try:
        with Interrupts() as interrupts:
            for one in (signum, signal.SIGHUP, signal.SIGTERM):
                os.kill(os.getpid(), one)
        assert (interrupts.signum, received) == (signum, [signal.SIGTERM] * (signum != 1))
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup starts a process
        with Interrupts() as interrupts:
            os.kill(os.getpid(), signal.SIGHUP)
        assert interrupts.signum is None
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("FVU  é 漢 \\", "FVU  é 漢 \\"),
        (ESCAPE, "\\x1b]0;title\\x07"),
        ("\x9b2J\r\n\t", "\\x9b2J\\r\\n\\t"),  # C1: a CSI of one character
        ("txt.\u202eexe\u2066\udcff", "txt.\\u202eexe\\u2066\\udcff"),  # bidi, not UTF-8
    ],
)
def test_what_is_printable(text, shown):
    assert printable(text) == shown


def test_names_are_harmless_and_short(tmp_path, monkeypatch):
    """In errors, in lines of a run, in tables; a million characters are cut."""
    for name in (ESCAPE, ESCAPE * 100_000):
        out, errors = StringIO(), StringIO()
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", errors)
        assert command(monkeypatch, "convert", f"org/{name}", tmp_path / "o", "--to", "x") == 2
        assert command(monkeypatch, "train", f"--{name}") == 2
        assert command(monkeypatch, name) == 2
        lines = errors.getvalue().splitlines()
        assert len(lines) == 3 and max(map(len, lines)) < 2100
        assert "\x1b" not in errors.getvalue() + out.getvalue()
    row: Any = dict(fvu=0.1, l0=2.0, dead_fraction=0.0, tokens_per_second=1.0, seconds=1.0)
    row |= dict(evaluated_on="held-out data")
    table = comparison_table({ESCAPE: row, "\n" * 5000: row})
    assert "\x1b" not in table and len(table.splitlines()) == 3


def test_what_other_libraries_say_is_harmless(monkeypatch, caplog, capsys):
    def run(words):
        warnings.warn(f"{ESCAPE}\nindeed", stacklevel=1)
        logger = logging.getLogger("other.library")
        logger.warning("%s\n\x1b[1mbold\x1b[0m", ESCAPE)
        logged = compile("logger.exception('failed', stack_info=True)", ESCAPE, "exec")
        try:
            raise OSError(ESCAPE)
        except OSError:
            exec(logged, {"logger": logger})

    monkeypatch.setattr("fastsae.cli.run", run)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert command(monkeypatch) == 0
    assert capsys.readouterr().err.splitlines()[-1] == r"UserWarning: \x1b]0;title\x07 indeed"
    assert caplog.messages == ["\\x1b]0;title\\x07\nbold", "failed"]
    error, _, stack = logging.Formatter().format(caplog.records[-1]).partition("Stack (most recent")
    assert r"OSError: \x1b]0;title\x07" in error and r'File "\x1b]0;title\x07", line 1' in stack
    assert "\x1b" not in error + stack


def test_a_traceback_is_harmless(monkeypatch, capsys):
    def run(words):
        raise RuntimeError(f"cannot read {ESCAPE}\nat all")

    monkeypatch.setattr("fastsae.cli.run", run)
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    with pytest.raises(RuntimeError) as escaped:
        command(monkeypatch)
    sys.excepthook(escaped.type, escaped.value, escaped.tb)
    first, *_, one, two = capsys.readouterr().err.splitlines()
    assert first.startswith("Traceback") and two == "at all"
    assert one == r"RuntimeError: cannot read \x1b]0;title\x07"


def test_a_failed_allocation_is_one_line(arguments, monkeypatch, capsys):
    monkeypatch.setattr("fastsae.nn.sae.LARGEST", 2**60)  # smaller ones might be allocated
    monkeypatch.setattr("fastsae.train.trainer.check_fits", lambda forecasts: None)
    sizes = ["--d-sae", "99999999999999"]
    assert command(monkeypatch, *arguments, *sizes) == 2
    text = capsys.readouterr().err
    assert text.startswith("fastsae: out of memory: cannot allocate 2,980,232.2 GiB; try a smaller")
    for allocate, size in {
        lambda: np.empty(2**58): "2.00 EiB",
        lambda: torch.empty(2**62, 4): "a tensor of sizes=[4611686018427387904, 4]",
        lambda: bytearray(2**62): None,
    }.items():
        with pytest.raises((MemoryError, RuntimeError)) as failed:
            allocate()
        tried = f": cannot allocate {size}" if size else ""
        assert out_of_memory(str(failed.value)).startswith(f"out of memory{tried}; try")
