"""fastsae upgrade: a rational activation for a trained SAE."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from fastsae.interop import load
from fastsae.train.summary import read_results
from fastsae.upgrade import UpgradeConfig, upgrade

from .finished import trained_with
from .parse import filled, read_words
from .train import source_of


@dataclass(frozen=True, kw_only=True)
class Upgrade(UpgradeConfig):
    """Give a trained SAE a rational activation (arXiv:2606.14990).

    Fine-tunes it and, as a baseline, the original SAE for the same number of steps on the same
    data. Compare their errors at equal L0.
    """

    teacher: Path
    """Directory of a run or of a saved SAE, from fastsae or another library: ReLU, JumpReLU, TopK
    or BatchTopK."""

    resume: bool = False
    """Resume the upgrade in --out, of the same SAE and with the same settings."""


class Measured(TypedDict):
    fvu: float
    mse: float
    l0: float
    dead_fraction: float


class Upgraded(TypedDict):
    """What the table shows of upgrade.json."""

    support: str
    new_scalars: int
    evaluated_on: str
    evaluated_tokens: int
    saes: dict[str, Measured]


def main(words: Sequence[str]) -> str:
    config = filled(Upgrade, read_words(words), ["teacher"])
    teacher = config.teacher
    sae = load(teacher)
    if config.data is None:
        trained = trained_with(teacher)
        if trained is None:
            raise ValueError(f"{teacher} is not a run's folder: say which --data to fine-tune on")
        if trained.stream is not None:
            raise ValueError(f"{teacher} was trained on a stream: say which --data to fine-tune on")
        config = dataclasses.replace(config, data=trained.data)
    upgrade(sae, source_of(config.run()), config, config.resume)
    return upgrade_table(config.out)


def upgrade_table(out: Path) -> str:
    """The comparison in a folder, a line for each SAE, and where the files are."""
    found = read_results(Upgraded, out / "upgrade.json")
    lines = [f"  {'':<22}{'FVU':>8}{'MSE':>12}{'L0':>8}{'dead':>8}"]
    for name, row in found["saes"].items():
        errors = f"{row['fvu']:>8.4f}{row['mse']:>12.4g}"
        lines.append(f"  {name:<22}{errors}{row['l0']:>8.1f}{row['dead_fraction']:>8.2%}")
    rows = {
        "support": found["support"],
        "scalars": f"{found['new_scalars']}  (of the rational function)",
        "measured": f"on {found['evaluated_tokens']:,} tokens of {found['evaluated_on']}",
        "SAE": f"{out / 'sae'}  (fastsae.load({str(out / 'sae')!r}))",
        "numbers": f"{out / 'upgrade.json'}",
        "next": f"fastsae eval {out}",
    }
    return "\n".join([*lines, "", *(f"  {name:<9} {text}" for name, text in rows.items())])
