"""Teachers trained on planted data get a rational activation: from the call and the command."""

import copy
import json

import numpy as np
import pytest
import torch

import fastsae
from fastsae import SAE, AbsTopK, TopK
from fastsae.cli.upgrade import main
from fastsae.data import ActivationShards, Synthetic
from fastsae.losses import Objective
from fastsae.nn import Rational, TopKConfig
from fastsae.nn.batchtopk import BatchTopK, BatchTopKConfig
from fastsae.nn.gated import Gated
from fastsae.nn.jumprelu import JumpReLUConfig
from fastsae.nn.relu import ReLU, ReLUConfig
from fastsae.train import Optimizer, TrainConfig, Trainer, stored_config
from fastsae.upgrade import UpgradeConfig, upgrade

pytestmark = pytest.mark.usefixtures("undrawn")
TEACHERS = {
    "topk": TopKConfig(k=4),
    "batchtopk": BatchTopKConfig(k=4),
    "jumprelu": JumpReLUConfig(threshold=0.1, bandwidth=0.1, target_l0=4.0),
    "relu": ReLUConfig(l1_coef=0.7),
}
EVERY = pytest.mark.parametrize("teacher", TEACHERS, indirect=True)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """For small matrices: with other processes running, threads mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def few_entries(monkeypatch):
    monkeypatch.setattr("fastsae.upgrade.CALIBRATION_ENTRIES", 2000)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Activations of some size and off center, so that scales and b_dec matter."""
    source = Synthetic(d_in=16, n_latents=40, active=3, noise=0.05, seed=1)
    path = tmp_path_factory.mktemp("data") / "x.npy"
    np.save(path, 5 * source.sample(12_000).numpy() + 1)
    return path


@pytest.fixture(scope="module")
def teachers(data, tmp_path_factory):
    """The folder of a run for each activation, made when it is asked for."""
    folder = tmp_path_factory.mktemp("teachers")

    def trained(name):
        out = folder / name
        if not out.exists():
            config = TrainConfig(
                data=data,
                out=out,
                d_sae=64,
                activation=TEACHERS[name],
                steps=600,
                batch_size=256,
                objective=Objective(error="fvu"),  # leaves more to gain in so few steps
                optimizer=Optimizer(lr=5e-3),
                device="cpu",
            )
            Trainer(config, ActivationShards(data)).fit()
        return out

    return trained


@pytest.fixture
def teacher(request, teachers):
    return teachers(request.param)


def small(data, out, **settings) -> UpgradeConfig:
    settings = {"steps": 100, "batch_size": 256, "lr": 6e-4, "device": "cpu", **settings}
    return UpgradeConfig(data=data, out=out, **settings)


def rows(out) -> dict[str, dict[str, float]]:
    return json.loads((out / "upgrade.json").read_text())["saes"]


@EVERY
def test_an_upgrade(data, teacher, tmp_path):
    """It starts as the teacher and ends better, by no more active latents."""
    before, config = fastsae.load(teacher / "sae"), small(data, tmp_path / "up")
    weights = {name: t.clone() for name, t in before.state_dict().items()}
    sae = upgrade(before, ActivationShards(data), config)
    found = rows(config.out)
    baseline, start, end = (found[n] for n in ("baseline", "rational", "rational, fine-tuned"))
    assert set(found) == {"baseline", "baseline, fine-tuned", "rational", "rational, fine-tuned"}
    assert start["fvu"] == pytest.approx(baseline["fvu"], rel=0.01)
    assert start["l0"] == pytest.approx(baseline["l0"], abs=0.01)
    assert end["fvu"] < baseline["fvu"]
    assert end["l0"] < 1.03 * baseline["l0"]
    if not isinstance(before.activation, ReLU):  # whose latents go out for good
        assert end["l0"] > 0.97 * baseline["l0"]
    assert found["baseline, fine-tuned"]["fvu"] < baseline["fvu"]

    assert all(torch.equal(t, weights[name]) for name, t in before.state_dict().items())
    again, x = fastsae.load(config.out / "sae"), ActivationShards(data).sample(100)
    assert isinstance(again.activation, Rational)
    assert torch.equal(again(x), sae(x))
    error = (x - sae(x)).square().sum() / (x - x.mean(0)).square().sum()
    assert error.item() == pytest.approx(end["fvu"], rel=0.5), "it takes activations as they are"
    own = fastsae.load(config.out / "baseline" / "sae")
    assert type(own.activation) is type(before.activation)
    assert own(x).isfinite().all()
    files = "config.json", "metrics.jsonl", "summary.json", "checkpoints"
    assert all((config.out / name).exists() for name in files)
    summary = json.loads((config.out / "summary.json").read_text())
    assert summary["fvu"] == pytest.approx(end["fvu"])


@pytest.mark.parametrize("teacher", ["topk"], indirect=True)
def test_centered_where_the_gate_opens(data, teacher, tmp_path):
    """As in the paper: the value no longer depends on where the gate opens."""
    config = small(data, tmp_path / "up", center="gate")
    upgrade(fastsae.load(teacher / "sae"), ActivationShards(data), config)
    found = rows(config.out)
    assert found["rational"]["fvu"] == pytest.approx(found["baseline"]["fvu"], rel=0.25)
    assert found["rational"]["l0"] == pytest.approx(found["baseline"]["l0"], abs=0.01)
    assert found["rational, fine-tuned"]["fvu"] < found["rational"]["fvu"]


@pytest.mark.parametrize("teacher", ["jumprelu", "relu"], indirect=True)
def test_the_path_of_the_paper(data, teacher, tmp_path):
    """From the fit to the whole activation, in the center of its gate, with an L1 penalty."""
    config = small(data, tmp_path / "up", path="paper", steps=20)
    sae = upgrade(fastsae.load(teacher / "sae"), ActivationShards(data), config)
    found = rows(config.out)
    assert sae.activation.cfg.center == "gate" and sae.activation.cfg.l1_coef > 0
    assert found["rational"]["fvu"] == pytest.approx(found["baseline"]["fvu"], rel=0.05)
    assert found["rational"]["l0"] == pytest.approx(found["baseline"]["l0"], abs=0.01)


@EVERY
def test_a_scale_and_a_shift_as_a_control(data, teacher, tmp_path):
    """It starts as the teacher, and is h times a number plus another on what the gate keeps."""
    config = small(data, tmp_path / "up", degree=(1, 0))
    sae = upgrade(fastsae.load(teacher / "sae"), ActivationShards(data), config)
    found = rows(config.out)
    assert json.loads((config.out / "upgrade.json").read_text())["new_scalars"] == 2
    assert found["rational"]["fvu"] == pytest.approx(found["baseline"]["fvu"], rel=1e-4)
    x = ActivationShards(data).sample(100)
    z = sae.encode(x).to_dense()
    h = (sae.center(sae.tokens(x)) @ sae.W_enc.T + sae.b_enc)[z != 0].double()
    columns = torch.stack([h, torch.ones_like(h)], 1)
    residual = z[z != 0].double() - columns @ torch.linalg.pinv(columns) @ z[z != 0].double()
    assert residual.abs().max() < 1e-4 * z.abs().max()
    assert sae.get_parameter("activation.change").abs().min() > 0


@pytest.mark.parametrize("teacher", ["topk"], indirect=True)
def test_without_support(data, teacher, tmp_path):
    config = small(data, tmp_path / "up", support="none", l1_coef=0.01)
    sae = upgrade(fastsae.load(teacher / "sae"), ActivationShards(data), config)
    found = rows(config.out)
    assert sae.activation.cfg.l1_coef == 0.01
    assert found["rational"]["l0"] == sae.d_sae
    assert found["rational"]["fvu"] == pytest.approx(found["baseline"]["fvu"], rel=0.5)
    assert found["rational, fine-tuned"]["fvu"] < found["rational"]["fvu"]


@pytest.mark.parametrize("teacher", ["topk"], indirect=True)
@pytest.mark.parametrize("by_norm", [False, True])
def test_rows_of_other_norms_stay(data, teacher, tmp_path, by_norm):
    """The same function with decoder rows of norm 2, which training must not bring to 1."""
    before = fastsae.load(teacher / "sae")
    with torch.no_grad():
        before.W_dec.mul_(2)
        for weight in (before.W_enc, before.b_enc):
            weight.div_(2)
    before.by_norm = by_norm
    config = small(data, tmp_path / "up", steps=20)
    sae = upgrade(before, ActivationShards(data), config)
    found = rows(config.out)
    assert found["rational"]["fvu"] == pytest.approx(found["baseline"]["fvu"], rel=0.01)
    assert sae.by_norm == by_norm
    for out in (config.out, config.out / "baseline"):
        norms = fastsae.load(out / "sae").W_dec.norm(dim=1)
        torch.testing.assert_close(norms, torch.full_like(norms, 2.0), rtol=0.05, atol=0.0)


def test_layer_norm_stays(data, tmp_path):
    """The rational activation is calibrated on pre-activations of normalized tokens."""
    out, activation, optimizer = tmp_path / "teacher", TEACHERS["topk"], Optimizer(lr=5e-3)
    teacher = TrainConfig(
        data=data,
        out=out,
        d_sae=64,
        layer_norm=True,
        activation=activation,
        steps=100,
        batch_size=256,
        optimizer=optimizer,
    )
    before = Trainer(teacher, ActivationShards(data)).fit()
    config = small(data, tmp_path / "up", steps=20)
    sae = upgrade(before, ActivationShards(data), config)
    assert sae.layer_norm and fastsae.load(config.out / "baseline" / "sae").layer_norm
    found = rows(config.out)
    assert found["rational"]["fvu"] == pytest.approx(found["baseline"]["fvu"], rel=0.01)


class Stop(Exception):
    pass


@pytest.mark.parametrize("teacher", ["jumprelu"], indirect=True)
def test_resuming_changes_no_bit(data, teacher, tmp_path, monkeypatch):
    """Whether it stops in its own fine-tuning or in the baseline's."""
    before, source = fastsae.load(teacher / "sae"), ActivationShards(data)
    settings = {"steps": 20, "checkpoint_every": 3}
    whole, broken = (small(data, tmp_path / n, **settings) for n in ("whole", "broken"))
    upgrade(before, source, whole)
    step, left = Trainer.step, [0]

    def stopping(self, *arguments):
        if not left[0]:
            raise Stop
        left[0] -= 1
        return step(self, *arguments)

    monkeypatch.setattr(Trainer, "step", stopping)
    for number, steps in enumerate([2, 10, 20]):
        left[0] = steps
        with pytest.raises(Stop):
            upgrade(before, source, broken, resume=number > 0)
    assert (broken.out / "baseline" / "checkpoints").exists()
    other = copy.deepcopy(before)
    with torch.no_grad():
        other.W_dec[0, 0] += 1e-3
    with pytest.raises(ValueError, match="a run that began from another SAE"):
        upgrade(other, source, broken, resume=True)
    left[0] = 1000
    upgrade(before, source, broken, resume=True)
    for name in ("sae/sae.safetensors", "baseline/sae/sae.safetensors", "upgrade.json"):
        assert (broken.out / name).read_bytes() == (whole.out / name).read_bytes()


def test_its_folder_can_be_resumed_as_a_run(data, teachers, tmp_path, monkeypatch):
    """From the first step on: the weights that it starts from are in a checkpoint."""
    before, source = fastsae.load(teachers("topk") / "sae"), ActivationShards(data)
    config = small(data, tmp_path / "up", steps=5)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "advance", lambda *arguments: (_ for _ in ()).throw(Stop))
        with pytest.raises(Stop):
            upgrade(before, source, config)
    sae = Trainer(stored_config(config.out), source).fit(resume=True)
    torch.testing.assert_close(sae.W_enc, before.W_enc, rtol=0.0, atol=0.01)


@pytest.mark.parametrize(
    ("activation", "message"),
    [
        (Gated(), "only relu, jumprelu, topk and a trained batchtopk.*, got gated"),
        (AbsTopK(k=4), "got topk .*by='abs'"),
        (BatchTopK(k=4), "got batchtopk"),
        (Rational(k=4), "got rational"),
    ],
)
def test_other_activations_are_refused(data, tmp_path, activation, message):
    config = small(data, tmp_path / "up")
    with pytest.raises(ValueError, match=message):
        upgrade(SAE(16, 64, activation), ActivationShards(data), config)
    assert not config.out.exists()


def test_other_saes_are_refused(data, tmp_path):
    config, source = small(data, tmp_path / "up"), ActivationShards(data)
    for other in (SAE(16, 64, TopK(4), d_out=3), SAE(16, 64, TopK(4), layers=2)):
        with pytest.raises(ValueError, match="only an autoencoder of one layer"):
            upgrade(other, source, config)
    with pytest.raises(ValueError, match="d_in = 8, the data has rows of 16"):
        upgrade(SAE(8, 64, TopK(4)), source, config)
    silent = SAE(16, 64, TopK(4))
    with torch.no_grad():
        silent.b_enc.fill_(-1000)
    with pytest.raises(ValueError, match="no active latent on this data"):
        upgrade(silent, source, config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"lr": 0.0}, "lr must be above 0, got 0.0"),
        ({"degree": (0, 0)}, "degree must be two numbers from 0 to 64, not both 0"),
        ({"path": "paper", "center": "zero"}, 'center "zero" is for path "copy"'),
        ({"l1_coef": -1.0}, "l1_coef must be at least 0, got -1.0"),
        ({"support": "none", "center": "zero"}, 'center "zero" is for'),
    ],
)
def test_nonsense_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        UpgradeConfig(**settings)


def command(*words) -> str:
    return main([str(word) for word in words])


FEW = "--steps", 10, "--batch-size", 256, "--device", "cpu"


def test_the_command(data, teachers, tmp_path):
    """On the data of the teacher's run, unless others are given; and never over another run."""
    run, out = teachers("topk"), tmp_path / "up"
    printed = command(run, "--out", out, *FEW)
    for word in ("FVU", "L0", "dead", "rational, fine-tuned", str(out / "sae")):
        assert word in printed
    assert json.loads((out / "config.json").read_text())["config"]["data"] == str(data)
    with pytest.raises(ValueError, match="already holds a run"):
        command(run, "--out", out, *FEW)
    assert command(run, "--out", out, "--resume", *FEW) == printed
    with pytest.raises(ValueError, match="got rational"):
        command(out, "--out", tmp_path / "again", *FEW)


def test_errors_of_the_command(data, teachers, tmp_path):
    run, out = teachers("topk"), tmp_path / "up"
    (tmp_path / "foreign").mkdir()
    with pytest.raises(ValueError, match="foreign holds no SAE: it must have"):
        command(tmp_path / "foreign", "--data", data, "--out", out)
    with pytest.raises(ValueError, match="is not a run's folder: say which --data"):
        command(run / "sae", "--out", out)
    with pytest.raises(ValueError, match="nowhere does not exist"):
        command(run, "--data", tmp_path / "nowhere", "--out", out)
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        command(run, "--out", tmp_path, *FEW)
