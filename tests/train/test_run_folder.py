"""config.json of a run, as other versions wrote it."""

import json

import pytest

from fastsae import TrainConfig
from fastsae.config import to_dict
from fastsae.train.config import read_config
from fastsae.train.plan import Plan
from fastsae.train.run_folder import begin, check_same, stored_config

from .conftest import train_config


@pytest.fixture
def edited(tmp_path):
    """Write a run's config.json, with its settings passed through a function."""

    def write(edit) -> tuple[TrainConfig, Plan]:
        config = TrainConfig(out=tmp_path, device="cpu", steps=10, seed=1)
        plan = Plan.of(config, 64, 1000)
        begin(config, plan, "data", None)
        path = tmp_path / "config.json"
        document = json.loads(path.read_text())
        edit(document["config"])
        document["version"] = "9.1"
        path.write_text(json.dumps(document))
        return config, plan

    return write


def test_an_absent_setting_has_its_default(edited):
    """A run of a version without CUDA graphs can be resumed."""
    config, plan = edited(lambda settings: settings.pop("cuda_graph"))
    assert stored_config(config.out) == config
    check_same(config, plan, "data", None)


def test_an_absent_setting_is_not_any_value(edited):
    config, plan = edited(lambda settings: settings.pop("seed"))
    with pytest.raises(ValueError, match="differs from this run in seed"):
        check_same(config, plan, "data", None)


def test_an_unknown_setting_is_an_error(edited):
    config, plan = edited(lambda settings: settings.update(of_the_future=1))
    with pytest.raises(ValueError, match=r"no setting 'of_the_future'.* \(written by fastsae"):
        check_same(config, plan, "data", None)


@pytest.mark.parametrize(
    ("activation", "constraint", "encoder"),
    [("topk", "unit", "fitted"), ("topk", "aligned", "tied"), ("relu", "unit", "tied")],
)
def test_an_encoder_that_an_older_version_left_open(activation, constraint, encoder):
    """It chose by the activation, and wrote null."""
    given = train_config(activation=activation, constraint=constraint, data="x", out="run")
    stored = to_dict(given)
    stored["init"]["encoder"] = None
    assert read_config(stored, "config.json").init.encoder == encoder
