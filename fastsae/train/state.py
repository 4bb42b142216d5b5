"""Everything a run needs to go on as if it had never stopped."""

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastsae.data import Batch, Cursor
from fastsae.losses import TrainingLoss
from fastsae.nn import SAE

from .optim import Adam
from .standardization import Standardization


def names_per_latent(weights: Collection[str]) -> list[str]:
    """Names of the tensors of a state that have one row per latent, if they exist, from those of
    the SAE."""
    kinds = "sae", "adam.first", "adam.second", "adam.average"
    counters = "adam.updated", "tokens_since_fired", "dead"
    return [*(f"{kind}.{name}" for kind in kinds for name in weights), *counters]


@dataclass
class TrainState:
    """The weights, the optimizer, the counters, and where in the data the run stands."""

    sae: SAE
    adam: Adam
    tokens_since_fired: Tensor
    """int64 [d_sae]: tokens seen since each latent was last active."""
    dead: Tensor
    """int64 [n_dead]: the latents that count as dead, rising; where processes share the latents,
    numbers among this one's."""
    units: Standardization
    """What is done to activations before training."""
    left_out: Tensor
    """int64 []: tokens left out so far because of their norm."""
    n_dead: int = 0
    """The number of dead latents of all processes."""
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    """Time spent on steps and on waiting for their data, over all runs."""
    cursor: Cursor = field(default_factory=Cursor)
    sums: Tensor = field(default_factory=lambda: torch.zeros(6))
    """[6], or [7] with a downstream term: of loss, FVU, aux-k, penalty, L0 and that term since the
    last logged line, and their number."""
    logged: tuple[int, float] = (0, 0.0)
    """Tokens and seconds at the last logged line."""
    stopped: tuple[str, int] | None = None
    """Why a callback ended the run, and how many steps were planned then."""

    @classmethod
    def fresh(
        cls, sae: SAE, adam: Adam, units: Standardization, downstream: bool = False
    ) -> "TrainState":
        counters = torch.zeros(len(sae.W_enc), dtype=torch.int64, device=sae.W_enc.device)
        sums = torch.zeros(6 + downstream, device=counters.device)
        return cls(sae, adam, counters, counters[:0], units, counters.new_zeros(()), sums=sums)

    def find_dead(self, dead_after: int) -> None:
        """Update the set of dead latents; this waits for a GPU."""
        self.dead = (self.tokens_since_fired >= dead_after).nonzero()[:, 0]
        self.n_dead = sum(self.sae.shards.counts(len(self.dead)))

    def advance(self, result: TrainingLoss, batch: Batch) -> None:
        """Count a step that has been made."""
        self.step += 1
        self.tokens += len(batch.x)
        if batch.kept is not None:
            self.left_out += (~batch.kept).sum()
        self.cursor = batch.cursor
        self.tokens_since_fired += len(batch.x)
        assert result.fired is not None, "training steps report which latents fired"
        self.tokens_since_fired.masked_fill_(result.fired, 0)
        downstream = [] if result.downstream is None else [result.downstream]
        self.sums += torch.stack([*result[:5], *downstream, torch.ones_like(result.loss)])

    def metrics(self, dead_after: int) -> dict[str, float | int]:
        """The averages since the last call, as one line for the log."""
        loss, fvu, auxk, penalty, l0, *downstream, count = self.sums.tolist()
        self.sums.zero_()
        tokens, seconds = self.tokens - self.logged[0], self.seconds - self.logged[1]
        self.logged = self.tokens, self.seconds
        dead = self.sae.shards.counts(int((self.tokens_since_fired >= dead_after).sum()))
        return {
            "step": self.step,
            "tokens": self.tokens,
            "loss": loss / count,
            "fvu": fvu / count,
            "auxk": auxk / count,
            "penalty": penalty / count,
            "l0": l0 / count,
            **({"downstream": downstream[0] / count} if downstream else {}),
            "dead_fraction": sum(dead) / self.sae.d_sae,
            "lr": self.adam.at.lr,
            "tokens_per_second": tokens / seconds,
            "seconds": self.seconds,
        }

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps in safetensors."""
        return {
            **{f"sae.{name}": t for name, t in self.sae.state_dict().items()},
            **{f"adam.{name}": t for name, t in self.adam.state_dict().items()},
            "tokens_since_fired": self.tokens_since_fired,
            "dead": torch.zeros_like(self.tokens_since_fired, dtype=torch.bool).index_fill_(
                0, self.dead, True
            ),
            "sums": self.sums,
            "mean": self.units.mean,
            "limits": torch.tensor(self.units.limits, dtype=torch.float64),
            "left_out": self.left_out,
            # Where processes share the latents, no activation draws numbers in training.
            **({"rng": torch.get_rng_state()} if self.sae.shards.size == 1 else {}),
        }

    def meta(self) -> dict[str, Any]:
        """What a checkpoint keeps in JSON."""
        return {
            "tokens": self.tokens,
            "seconds": self.seconds,
            "logged": self.logged,
            "stopped": self.stopped,
            "scales": self.units.scales,
            "cursor": self.cursor._asdict(),
        }

    def restore(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Take over a checkpoint; ValueError if it is of other shapes."""
        if "limits" not in tensors:  # of a version that only scaled activations
            limits = torch.full((len(self.units.limits),), math.inf, dtype=torch.float64)
            mean = torch.zeros_like(self.units.mean)
            tensors = tensors | {"mean": mean, "limits": limits, "left_out": self.left_out}
        for name, target in self.tensors().items():
            if name == "rng" and name not in tensors:  # of many processes
                continue
            source = tensors.get(name)
            if source is None or source.shape != target.shape:
                found = "nothing" if source is None else list(source.shape)
                raise ValueError(
                    f"the checkpoint must hold {name} of shape {list(target.shape)}, got {found}"
                )
            if name not in ("rng", "dead"):
                target.copy_(source)
        try:
            torch.set_rng_state(tensors.get("rng", torch.get_rng_state()))
            self.dead = tensors["dead"].to(self.dead.device).nonzero()[:, 0]
            self.n_dead = sum(self.sae.shards.counts(len(self.dead)))
            self.adam.restored(meta["step"])
            self.step, self.tokens, self.seconds = meta["step"], meta["tokens"], meta["seconds"]
            self.units.scales = tuple(meta["scales"])
            self.units.limits = tuple(tensors["limits"].tolist())
            self.cursor = Cursor(
                **meta["cursor"] | {"place": tuple(meta["cursor"].get("place", ()))}
            )
            self.logged = tuple(meta["logged"])
            self.stopped = meta.get("stopped") and tuple(meta["stopped"])
        except (KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"the checkpoint is damaged: {error!r}") from None
