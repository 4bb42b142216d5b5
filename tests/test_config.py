import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypedDict

import pytest

from fastsae.config import from_dict, to_dict
from fastsae.nn import ActivationConfig, GatedConfig, RationalConfig
from fastsae.train import TrainConfig
from fastsae.train.summary import read_results


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.5
    names: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Outer:
    size: int
    path: Path | None = None
    mode: Literal["a", "b"] = "a"
    inner: Inner = field(default_factory=Inner)


def test_round_trip():
    config = Outer(size=3, path=Path("x/y"), mode="b", inner=Inner(rate=2, names=("p", "q")))
    assert from_dict(Outer, to_dict(config)) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": 1, "sise": 2}, "Outer has no setting 'sise'; its settings are size, path"),
        ({"size": 1, "inner": {"rat": 1.0}}, r"Outer.inner has no setting 'rat'"),
        ({}, "Outer lacks the setting 'size'"),
        ({"size": "1"}, r"Outer.size must be int, got '1'"),
        ({"size": True}, r"Outer.size must be int, got True"),
        ({"size": 1, "mode": "c"}, r"Outer.mode must be \('a', 'b'\), got 'c'"),
        (
            {"size": 1, "inner": {"rate": "fast"}},
            r"Outer.inner.rate must be a finite number, got 'fast'",
        ),
        ([1], r"Outer must be an object, got \[1\]"),
    ],
)
def test_what_does_not_fit_is_named(values, message):
    with pytest.raises(ValueError, match=message):
        from_dict(Outer, values)


class Row(TypedDict):
    fvu: float
    gamma: tuple[float, ...]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"one": {"fvu": 0.5}}, ": 'one' lacks 'gamma'"),
        ({"one": {"fvu": None, "gamma": []}}, ": 'one': 'fvu' must be a finite number, got None"),
        ({"one": 5}, ": 'one' must be an object, got 5"),
    ],
)
def test_a_record_that_does_not_fit_is_named(rows, message, tmp_path):
    path = tmp_path / "record.json"
    path.write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=f"^{path}{message}$"):
        read_results(dict[str, Row], path)


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (ActivationConfig, {"name": "topk", "l1_coef": 0, "target_l0": 3}, "no setting 'l1_coef'"),
        (ActivationConfig, {"name": []}, r"activation must be one of .*, got '\[\]'"),
        (ActivationConfig, {}, "activation must be one of .*, got 'None'"),
        (TrainConfig, {"optimizer": {"betas": [0.9]}}, r"betas must be tuple.*, got \[0.9\]"),
    ],
)
def test_damaged_settings_are_named(cls, values, message):
    with pytest.raises(ValueError, match=message):
        from_dict(cls, values)


def test_old_names_in_saved_settings():
    stored = {"name": "rational", "gate": "jumprelu", "centre": "zero"}
    assert from_dict(ActivationConfig, stored) == RationalConfig(gate="jumprelu", center="zero")
    stored = {"activation": {"name": "gated", "price_warmup": 0.3}}
    assert from_dict(TrainConfig, stored).activation == GatedConfig(sparsity_warmup=0.3)
