"""A run's folder: one run at a time writes to it, and one run ever belongs to it."""

import dataclasses
import hashlib
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from fastsae.config import to_dict
from fastsae.environment import environment
from fastsae.files import claimed, read_json, shown, write_json
from fastsae.meeting import on_first
from fastsae.nn import SAE
from fastsae.progress import say
from fastsae.shards import ONE_PROCESS, Shards
from fastsae.version import __version__, written_by

from .config import TrainConfig, read_config
from .plan import Plan

FORMAT = "fastsae.run.1"
FROM_STEPS = ("steps", "lr", "warmup", "dead_after", "dead_every")
"""What is planned from the number of steps, unless it is given."""


@contextmanager
def claimed_run(out: Path, shards: Shards = ONE_PROCESS) -> Iterator[None]:
    """Hold the folder, made if need be, for one run; ValueError if another one has it."""
    with ExitStack() as stack:

        def claim() -> None:
            if not stack.enter_context(claimed(out)):
                raise ValueError(f"another process is training in {out}")

        on_first(shards, claim)
        yield


def begin(config: TrainConfig, plan: Plan, fingerprint: str, start_from: SAE | None) -> None:
    """Write config.json to a folder that holds nothing yet; ValueError if it does."""
    out = config.out
    if (out / "config.json").exists():
        raise ValueError(
            f"{out} already holds a run: add --resume to continue it, or choose another --out"
        )
    if any(not path.name.startswith(".") for path in out.iterdir()):
        raise ValueError(f"{out} is not empty and holds no run: choose another --out")
    document = {**_document(config, fingerprint), "plan": to_dict(plan)}
    document["threads"] = torch.get_num_threads()
    document["environment"] = environment(torch.device(plan.device))
    if start_from is not None:
        document["start_from"] = weights_digest(start_from)
    write_json(out / "config.json", document)


def check_same(config: TrainConfig, plan: Plan, fingerprint: str, start_from: SAE | None) -> None:
    """ValueError unless config.json is that of this run, on this data, planned as it is here, and
    from the weights given, if any are. The number of steps may be another one."""
    path = config.out / "config.json"
    found, wanted = _read(config.out), _document(config, fingerprint)
    if found.get("fingerprint") != fingerprint:
        raise ValueError(f"{path} was written for other data: {named_data(config)} differ")
    if start_from is not None and found.get("start_from") != weights_digest(start_from):
        raise ValueError(f"{path} was written for a run that began from another SAE")
    # A setting that the run's version did not have yet has its default.
    kept = _settings(to_dict(resolved(stored_config(config.out)))) | {"steps": config.steps}
    changed = [n for n, value in _settings(wanted["config"]).items() if kept.get(n) != value]
    if changed:
        raise ValueError(f"{path} differs from this run in {', '.join(changed)}")
    longer = found["plan"].get("steps") != plan.steps
    for name, value in to_dict(plan).items():
        kept = found["plan"].get(name)
        if kept != value and not (longer and name in FROM_STEPS):
            raise ValueError(
                f"{path} was planned with {name} = {shown(kept)}, here it would be {value}"
                f"{written_by(found.get('version'))}"
            )
    threads = torch.get_num_threads()
    if plan.device == "cpu" and (began := found.get("threads", threads)) != threads:
        began = shown(began)
        say(
            f"this run began with {began} threads and now has {threads}: last bits may differ",
            logging.WARNING,
        )


def check_start(out: Path) -> None:
    """ValueError for a run that began from an SAE, and stopped before its first checkpoint."""
    if "start_from" in _read(out):
        raise ValueError(
            f"{out} began from another SAE and stopped before it was saved: remove it, start again"
        )


def set_length(config: TrainConfig, plan: Plan, done: int) -> None:
    """Write the number of steps of a run, of which some are done, to its config.json, with what is
    planned from it; ValueError for fewer steps than are done."""
    if plan.steps < done:
        raise ValueError(
            f"steps must be at least {done}, as many as {config.out} has done, got {plan.steps}"
        )
    document = _read(config.out)
    if document["plan"] != to_dict(plan):
        document["config"]["steps"], document["plan"] = config.steps, to_dict(plan)
        write_json(config.out / "config.json", document)


def stored_config(out: Path) -> TrainConfig:
    """The settings of the run in a folder; ValueError if there is none, or they are damaged."""
    document = _read(out)
    try:
        stored = read_config(document["config"], str(out / "config.json"))
    except ValueError as error:
        raise ValueError(f"{error}{written_by(document.get('version'))}") from None
    return dataclasses.replace(stored, out=out)


def stored_fingerprint(out: Path) -> str:
    """The fingerprint of the data of the run in a folder."""
    return str(_read(out).get("fingerprint"))


def _read(out: Path) -> dict[str, Any]:
    path = out / "config.json"
    if not path.exists():
        raise ValueError(f"{out} holds no run to resume: {path} does not exist")
    document = read_json(path)
    parts = document if isinstance(document, dict) else {}
    whole = all(isinstance(parts.get(name), dict) for name in ("config", "plan"))
    if parts.get("format") != FORMAT or not whole:
        by = written_by(parts.get("version"))
        raise ValueError(f"{path} is not the config of a {FORMAT} folder{by}")
    return parts


def resumed_config(given: TrainConfig) -> TrainConfig:
    """The settings of the run in given.out, with the steps given; ValueError for another setting
    that has another value there."""
    stored = dataclasses.replace(stored_config(given.out), steps=given.steps)
    found = _settings(to_dict(resolved(stored)))
    for name, value in _settings(to_dict(resolved(given))).items():
        kept = found.get(name)
        if value != kept:
            raise ValueError(
                f"{name} = {value} differs from the run to be resumed, "
                f"which has {kept}: leave it out, or choose another --out"
            )
    return stored


def _settings(tree: dict[str, Any]) -> dict[str, Any]:
    """The leaves of a config's tree by their names, which no two share."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            leaves |= _settings({name if key == "name" else key: v for key, v in value.items()})
        else:
            leaves[name] = value
    return leaves


def resolved(config: TrainConfig) -> TrainConfig:
    """The same with the paths of its data written out."""
    if config.stream is not None:
        return dataclasses.replace(config, stream=config.stream.resolved())
    data, target = (path and path.resolve() for path in (config.data, config.target))
    layers = tuple(path.resolve() for path in config.layers)
    return dataclasses.replace(config, data=data, target=target, layers=layers)


def named_data(config: TrainConfig) -> str:
    """What a run is trained on, for messages."""
    if config.stream is not None:
        return f"the text or settings of {config.stream.model}"
    return f"those in {config.data}" if config.data else "these activations"


def weights_digest(sae: SAE) -> str:
    """A hash of an SAE's weights. What an activation has besides may be fitted, and be off by a
    rounding."""
    found = hashlib.blake2b(digest_size=16)
    for weight in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec):
        found.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()


def _document(config: TrainConfig, fingerprint: str) -> dict[str, Any]:
    settings = to_dict(resolved(config))
    del settings["out"]  # the folder may be moved
    about = {"format": FORMAT, "version": __version__}
    return {**about, "config": settings, "fingerprint": fingerprint}
