"""Gives a trained SAE a rational activation, and fine-tunes it (RSAE, arXiv:2606.14990).

    fit          a rational function to the teacher's activation, on a grid
    copy         the teacher's weights
    calibrate    the function to the teacher's own pre-activations, by least squares
    fine-tune    everything

On the path "copy" the fit is to what the teacher's activation does with the latents that it keeps,
which on TopK, BatchTopK and JumpReLU can be exact: the function starts as a copy, and is fine-tuned
without a new penalty. On the path "paper" it is the minimax fit to the whole activation, in
h - threshold, and is fine-tuned with an L1 penalty. The degree 1 0 on either is a control: a
trained scale and shift.

The teacher itself is fine-tuned too, for as many steps on the same batches at the same learning
rate: what the rational activation is worth is the difference to that, not to the teacher.
"""

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fastsae.config import check_choices, to_dict
from fastsae.data import ActivationSource, stored
from fastsae.data.ordinary import MAX_NORM_RATIO
from fastsae.device import choose_device
from fastsae.evals import reconstruction
from fastsae.evals.reconstruction import check_fits
from fastsae.files import write_json
from fastsae.losses import Objective
from fastsae.nn import SAE, ActivationConfig
from fastsae.nn.batchtopk import BatchTopK
from fastsae.nn.jumprelu import JumpReLU
from fastsae.nn.rational import Center, Rational, RationalConfig, Support
from fastsae.nn.rational_fit import GAP, JUMP, RationalFit, calibrate
from fastsae.nn.relu import ReLU
from fastsae.nn.topk import TopK
from fastsae.train import Interrupted, Optimizer, TrainConfig, Trainer
from fastsae.train.columns import Columns
from fastsae.train.optim import Constraint

Start = Literal["copy", "paper"]
CALIBRATION_TOKENS, CALIBRATION_ENTRIES = 2048, 20_000
EVALUATION_TOKENS = 65536
PAPER_L1 = 0.03
"""L1 coefficient of the path "paper", whose own is not known to us: a few percent of the error."""
UNIT = 1e-3
"""Decoder rows whose norms are this close to 1 are kept at 1."""


@dataclass(frozen=True, kw_only=True)
class UpgradeConfig:
    """Settings of an upgrade to a rational activation."""

    data: Path | None = None
    """Activations to calibrate and fine-tune on, as for training (default: those the SAE was
    trained on)."""

    out: Path = Path("runs/upgrade")
    """Run directory for results; it must not hold another run."""

    support: Support = "teacher"
    """teacher: only the latents that the SAE's own rule selects are active. none: all are, so L0 is
    d_sae and decoding is dense."""

    path: Start = "copy"
    """copy: start as close to the SAE's activation on the active latents as possible, and fine-tune
    without a new penalty. paper: start from the minimax fit to the whole activation, centered at
    the gate's threshold, and fine-tune with an L1 penalty."""

    center: Center | None = None
    """Center of the function: the gate's threshold, as in the paper, or zero, where it can start as
    an exact copy of the SAE's activation (default: zero where possible, with support teacher and
    path copy)."""

    degree: tuple[int, int] | None = None
    """Degrees (p, q) of numerator and denominator (default: 3 2 for ReLU, 9 8 for the others). 1 0
    is a trained scale and shift, a control."""

    l1_coef: float | None = None
    """L1 coefficient, relative to the squared error per token (default: none, or 0.03 with path
    paper; for ReLU, the one it was last trained with, adapted to keep its L0)."""

    steps: int = 500
    """Fine-tuning steps."""

    lr: float = 1e-4
    """Peak learning rate."""

    batch_size: int = 4096
    """Tokens per step."""

    seed: int = 0
    """Seed of the calibration sample and of data shuffling."""

    device: str = "auto"
    """Device for fine-tuning: auto (a GPU if available), cpu, cuda, or cuda:N."""

    checkpoint_every: int = 200
    """Steps between checkpoints."""

    log_every: int = 10
    """Steps between log lines (metrics.jsonl)."""

    def __post_init__(self):
        check_choices(self, path=Start)
        if self.path == "paper" and self.center == "zero":
            raise ValueError('center "zero" is for path "copy", got path "paper"')
        self.function({"gate": "topk"})
        self.run()

    def function(self, gate: dict[str, Any]) -> RationalConfig:
        """The settings of the rational function for a gate; ValueError for nonsense."""
        paper = self.path == "paper"
        settings = {"support": self.support, "degree": self.degree, **gate}
        if paper:
            settings.setdefault("l1_coef", PAPER_L1)
        if self.l1_coef is not None:
            settings["l1_coef"] = self.l1_coef
        if self.l1_coef is not None or self.support == "none":
            settings["target_l0"] = None
        center = self.center
        if center is None:
            free = gate["gate"] != "relu" and self.support == "teacher" and not paper
            center = "zero" if free else "gate"
        return RationalConfig(center=center, **settings)

    def run(self, constraint: Constraint = "unit", **settings: Any) -> TrainConfig:
        """The run that fine-tunes; it leaves dead latents alone. ValueError for nonsense."""
        own = "out", "steps", "batch_size", "seed", "device", "checkpoint_every", "log_every"
        return TrainConfig(
            data=self.data,
            objective=Objective(auxk_coef=0.0),
            optimizer=Optimizer(lr=self.lr, constraint=constraint),
            **{name: getattr(self, name) for name in own} | settings,
        )


def upgrade(
    teacher: SAE, source: ActivationSource, config: UpgradeConfig, resume: bool = False
) -> SAE:
    """The teacher with a rational activation, fine-tuned; on the CPU, for activations as they are.

    teacher and source: an autoencoder with ReLU, JumpReLU, TopK or BatchTopK (which is a JumpReLU
    outside training), and such activations as it was trained on. Leaves the folder of a run in
    config.out, with that of the teacher's own fine-tuning in baseline/, and the comparison in
    upgrade.json. Resuming takes the same teacher. ValueError for other activations, and as in
    `Trainer.fit`.
    """
    teacher = copy.deepcopy(teacher).cpu().float().eval()
    start, about = initial(teacher, source, config)
    cfg, out = own_objective(teacher, about["calibration_l0"]), config.out / "baseline"
    own = replace(tuning(teacher, config), activation=cfg, out=out)
    tuner, own_tuner = Trainer(tuning(start, config), source, start), Trainer(own, source, teacher)
    tuned = tuner.fit(resume)
    begun = resume and (out / "config.json").exists()
    try:
        baseline = own_tuner.fit(begun)
    except Interrupted as stop:
        left = f"stopped during the baseline, saved; continue with --resume --out {config.out}"
        raise Interrupted(stop.signum, left) from stop
    saes = {
        "baseline": teacher,
        "baseline, fine-tuned": baseline,
        "rational": start,
        "rational, fine-tuned": tuned,
    }
    write_json(config.out / "upgrade.json", about | comparison(saes, source, config))
    return tuned


def initial(
    teacher: SAE, source: ActivationSource, config: UpgradeConfig
) -> tuple[SAE, dict[str, Any]]:
    """The teacher with a calibrated rational activation, and what there is to say of it.

    All is done as training sees it: for standardized activations, or each normalized.
    """
    if teacher.d_out is not None or teacher.layers > 1:
        raise ValueError("only an autoencoder of one layer can be upgraded")
    check_fits(teacher, source)
    columns = Columns(source, (source.d_in,), False, teacher.layer_norm)
    units = columns.standardization(columns.ordinary(MAX_NORM_RATIO))
    scaled = columns.unfold_(copy.deepcopy(teacher), units)
    x = units(source.sample(CALIBRATION_TOKENS, config.seed).clone())
    x = x[units.ordinary(x)]
    l0 = float(scaled.encode(x).l0())
    settings, threshold = gate_of(scaled, l0)
    activation = Rational(config.function(settings))
    sae = SAE(**teacher.shape(), activation=activation).eval()
    with torch.no_grad():
        for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
            sae.get_parameter(name).copy_(scaled.get_parameter(name))
        if threshold is not None:
            activation.threshold.copy_(threshold)
        fit = calibrated(sae, activation, x, config)
        activation.start_from_(fit)
    about = {
        **to_dict(activation.cfg),
        "path": config.path,
        "degree": list(activation.degree),
        "new_scalars": sum(p.numel() for p in activation.parameters()),
        "calibration_mse": fit.error,
        "calibration_l0": l0,
    }
    return columns.fold_(sae, units), about


def gate_of(sae: SAE, l0: float) -> tuple[dict[str, Any], Tensor | None]:
    """A rational activation's settings for the gate and the sparsity penalty of an SAE with this
    L0, and the gate's thresholds; ValueError for other SAEs."""
    match activation := sae.activation:
        case ReLU():
            l1_coef = activation.coefficient.value.item()
            return {"gate": "relu", "l1_coef": l1_coef, "target_l0": l0}, None
        case JumpReLU():
            return {"gate": "jumprelu"}, activation.threshold.clamp(min=0)
        case TopK() if not (activation.signed or activation.cfg.corrections):
            return {"gate": "topk", "k": activation.cfg.k}, None
        case BatchTopK() if not activation.signed and activation.threshold >= 0:
            return {"gate": "jumprelu"}, activation.threshold.expand(sae.d_sae)
    raise ValueError(
        "only relu, jumprelu, topk and a trained batchtopk, ranking values, can be upgraded, "
        f"got {activation.cfg.name} ({activation.extra_repr()})"
    )


def calibrated(
    sae: SAE, activation: Rational, x: Float[Tensor, "N d_in"], config: UpgradeConfig
) -> RationalFit:
    """The rational function nearest to its gate's activation on some of the pre-activations of x.

    They are drawn from those that the function is taken of: with the teacher's support the active
    ones, else all. ValueError if there are none.
    """
    found, s = activation.gated(sae.center(sae.tokens(x)), sae.weights())
    taken = found.active if activation.cfg.support == "teacher" else torch.ones_like(found.active)
    h, s, target = (
        values.expand(taken.shape)[taken]
        for values in (found.pre, torch.as_tensor(s), found.pre * found.active)
    )
    if not len(h):
        raise ValueError("the SAE has no active latent on this data")
    some = torch.randperm(len(h), generator=torch.Generator().manual_seed(config.seed))
    h, s, target = (values[some[:CALIBRATION_ENTRIES]] for values in (h, s, target))
    c_in = max(float((h - s).abs().max()), torch.finfo(h.dtype).tiny)
    if not activation.degree[1]:
        c_in *= 2  # the larger activations of other tokens are not to be clamped
    if config.path == "paper":  # of this jump, the minimax fit is known
        fit = activation.fit(JUMP, whole=True)
    else:
        fit = activation.fit(max(float(s.median()) / c_in, GAP))
    return calibrate(h, target, fit.a, fit.b, c_in, c_in, s)


def own_objective(teacher: SAE, l0: float) -> ActivationConfig:
    """The teacher's activation with a sparsity penalty that keeps its L0, from the first step.

    A ReLU's coefficient is adapted from the one it was last trained with. A JumpReLU, whose
    thresholds keep training, gets ten times the default coefficient for missing its L0.
    """
    activation = teacher.activation
    cfg = activation.cfg
    match activation:
        case ReLU():
            l1_coef = activation.coefficient.value.item()
            return replace(cfg, l1_coef=l1_coef or None, target_l0=l0, sparsity_warmup=0.0)
        case JumpReLU():
            return replace(cfg, l0_coef=10.0 * teacher.d_in, target_l0=l0, sparsity_warmup=0.0)
    return cfg


def tuning(sae: SAE, config: UpgradeConfig) -> TrainConfig:
    """The run that fine-tunes an SAE; decoder rows that are not of norm 1 are left free."""
    return config.run(
        constraint_of(sae),
        d_sae=sae.d_sae,
        by_norm=sae.by_norm,
        layer_norm=sae.layer_norm,
        activation=sae.activation.cfg,
    )


def constraint_of(sae: SAE) -> Constraint:
    """The constraint under which an SAE can be trained further as it is. In a transcoder, the scale
    of its targets is folded into the decoder rows."""
    norms = sae.W_dec.norm(dim=1)
    norms = norms if sae.d_out is None else norms / norms.mean()
    unit = not sae.by_norm and (norms - 1).abs().max() < UNIT
    return "unit" if unit else "none"


def comparison(
    saes: dict[str, SAE], source: ActivationSource, config: UpgradeConfig
) -> dict[str, Any]:
    """Each SAE's numbers on held-out data, where there is some."""
    data, device = source.heldout or stored(source), choose_device(config.device)
    rows = {}
    for name, sae in saes.items():
        found = reconstruction(sae, data, max_tokens=EVALUATION_TOKENS, device=device)
        sae.cpu()
        rows[name] = {n: getattr(found, n) for n in ("fvu", "mse", "l0", "dead_fraction")}
    return {
        "evaluated_on": "held-out data" if source.heldout else "training data",
        "evaluated_tokens": min(data.n_tokens, EVALUATION_TOKENS),
        "saes": rows,
    }
