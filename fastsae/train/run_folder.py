"""A run's folder: one run at a time writes to it, and one run ever belongs to it."""

import dataclasses
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastsae.checkpoint import list_checkpoints
from fastsae.config import from_dict, to_dict
from fastsae.files import read_json, write_json

from .config import TrainConfig
from .plan import Plan

FORMAT = "fastsae.run.1"


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Hold the folder, made if need be, for one process at a time."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"out must be a folder, {out} is a file")
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is training in {out}") from None
        yield


def begin(config: TrainConfig, plan: Plan, fingerprint: str) -> None:
    """Write config.json to a folder that holds nothing yet; ValueError if it does."""
    out = config.out
    if (out / "config.json").exists():
        raise ValueError(
            f"{out} already holds a run: add --resume to go on with it, or choose another --out"
        )
    if any(path.name != ".lock" for path in out.iterdir()):
        raise ValueError(f"{out} is not empty and holds no run: choose another --out")
    write_json(out / "config.json", {**_document(config, fingerprint), "plan": to_dict(plan)})


def check_same(config: TrainConfig, fingerprint: str) -> None:
    """ValueError unless config.json is that of this run on this data."""
    path = config.out / "config.json"
    found, wanted = read_json(path), _document(config, fingerprint)
    if found.get("fingerprint") != fingerprint:
        raise ValueError(f"{path} was written for other data than {config.data or 'the demo'}")
    changed = [key for key, value in wanted["config"].items() if found["config"].get(key) != value]
    if changed:
        raise ValueError(f"{path} differs from this run in {', '.join(changed)}")


def resumed_config(given: TrainConfig) -> TrainConfig:
    """The settings of the run in given.out.

    Raises ValueError if there is none, or if a setting was given another value than it has there.
    """
    path = given.out / "config.json"
    if not path.exists():
        raise ValueError(f"{given.out} holds no run to resume: {path} does not exist")
    document = read_json(path)
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"{path} is not the config of a {FORMAT} folder")
    stored = from_dict(TrainConfig, document.get("config"), str(path))
    stored = dataclasses.replace(stored, out=given.out)
    if given.data is not None:
        given = dataclasses.replace(given, data=given.data.resolve())
    for field in dataclasses.fields(TrainConfig):
        value, kept = getattr(given, field.name), getattr(stored, field.name)
        if value not in (field.default, kept):
            raise ValueError(
                f"{field.name} = {value} differs from the run to be resumed, "
                f"which has {kept}: leave it out, or choose another --out"
            )
    return stored


def latest(out: Path) -> Path | None:
    """The newest checkpoint of the run, if there is one."""
    checkpoints = list_checkpoints(out / "checkpoints")
    return checkpoints[-1] if checkpoints else None


def _document(config: TrainConfig, fingerprint: str) -> dict[str, Any]:
    settings = to_dict(config)
    del settings["out"]  # the folder may be moved
    if config.data is not None:
        settings["data"] = str(config.data.resolve())
    return {"format": FORMAT, "config": settings, "fingerprint": fingerprint}
