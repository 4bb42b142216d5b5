"""Whole libraries, subclasses and wrapped modules, accelerated."""

import copy
import pickle
import subprocess
import sys
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import fastsae
from fastsae.dropin import SUPPORTED, dense
from fastsae.dropin.classes import supported_classes

from .accelerated import KINDS, dead_latents, recon_and_codes
from .peers import D_IN, D_SAE, K, dictionary_learning, sae_lens, sparsify

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries

MODULES = {"sae_lens": sae_lens, "sparsify": sparsify}
MODULES["dictionary_learning"] = lambda: dictionary_learning("dictionary")
ONE_OF = {
    "sae_lens": "sae_lens batchtopk training",
    "sparsify": "sparsify",
    "dictionary_learning": "dictionary_learning gated",
}
"""A kind of SAE of each library."""


@pytest.fixture(autouse=True)
def always_sparse(monkeypatch):
    monkeypatch.setattr(dense, "MIN_TOKENS", 0)
    monkeypatch.setattr(dense.AboveThreshold, "limits", lambda *_: dense.Limits(1.0, 1.0))


def tokens(N: int) -> torch.Tensor:
    return torch.randn(N, D_IN, dtype=torch.float64)


@pytest.mark.parametrize("library", SUPPORTED)
def test_a_library_creates_accelerated_saes(library):
    MODULES[library]()

    def make():
        torch.manual_seed(0)
        return KINDS[ONE_OF[library]].make()

    before, constructors = make(), [vars(c).get("__init__") for c in supported_classes(library)]
    with fastsae.accelerate(library) as patch:
        inside = make()
        with fastsae.accelerate(library):
            pass
        nested = make()
    assert patch.library == library
    after = make()
    kind = type(before)
    assert type(after) is kind
    assert type(inside) is type(nested) is type(fastsae.accelerate(copy.deepcopy(before)))
    assert isinstance(inside, kind) and type(inside) is not kind
    assert [vars(c).get("__init__") for c in supported_classes(library)] == constructors
    assert_close(dict(inside.state_dict()), dict(before.state_dict()), rtol=0, atol=0)
    x = tokens(33)
    assert_close(recon_and_codes(inside, x), recon_and_codes(before, x))
    assert type(fastsae.restore(inside)) is kind
    fastsae.accelerate(library)
    assert type(make()) is not kind
    fastsae.restore(library)
    assert type(make()) is kind
    with pytest.raises(ValueError, match=r"restore\(\) expects a library that was accelerated"):
        fastsae.restore(library)


def test_a_library_whose_constructor_fails_is_restored():
    saes = sae_lens()
    with pytest.raises(TypeError), fastsae.accelerate("sae_lens"):
        saes.TopKSAE()
    sae = saes.TopKSAE(saes.TopKSAEConfig(d_in=D_IN, d_sae=D_SAE, k=K))
    assert type(sae) is saes.TopKSAE


def test_exact_compat_of_a_library():
    coder = KINDS["sparsify"].make
    sparsify()
    with fastsae.accelerate("sparsify", exact_compat=True):
        assert coder().exact_compat
    with fastsae.accelerate("sparsify"):
        assert not coder().exact_compat
    with pytest.raises(ValueError, match="exact_compat has no effect: gradients of sae_lens"):
        fastsae.accelerate("sae_lens", exact_compat=True)


def test_an_unknown_library():
    with pytest.raises(
        ValueError, match="must be one of sparsify, sae_lens, dictionary_learning, "
    ):
        fastsae.accelerate("saelens")


Library = cast(Any, object)


class Counting(Library):
    """A mixin of what a user's subclass may do: it counts, and changes the codes."""

    calls = 0

    def encode(self, x):
        self.calls += 1
        return 2 * super().encode(x)


class Renamed(Library):
    """A mixin of a subclass that overrides nothing."""

    def norm(self):
        return self.b_dec.norm()


def of(kind: type, mixin: type) -> type:
    return type(f"{mixin.__name__}{kind.__name__}", (mixin, kind), {"__module__": __name__})


@pytest.mark.parametrize("name", ["sae_lens topk", "sae_lens standard training", "sae_lens gated"])
@pytest.mark.parametrize("mixin", [Counting, Renamed])
def test_subclasses(name, mixin):
    theirs, x = KINDS[name].make(), tokens(33).requires_grad_()
    kind = of(type(theirs), mixin)
    theirs.__class__ = kind
    ours = fastsae.accelerate(copy.deepcopy(theirs))
    assert isinstance(ours, kind) and type(ours) is not kind
    assert_close(recon_and_codes(ours, x), recon_and_codes(theirs, x))
    losses = [KINDS[name].loss(sae, x, dead_latents()) for sae in (ours, theirs)]
    assert_close(*(torch.autograd.grad(loss, x) for loss in losses))
    if mixin is Counting:
        assert ours.calls == theirs.calls > 0
    else:
        assert_close(ours.norm(), theirs.norm())
    twin = copy.deepcopy(ours)
    assert type(twin) is type(ours)
    assert_close(recon_and_codes(twin, x), recon_and_codes(theirs, x))
    assert type(fastsae.restore(ours)) is kind


def test_a_pickled_subclass():
    kind = of(dictionary_learning("trainers.top_k").AutoEncoderTopK, Renamed)
    globals()[kind.__name__] = kind
    ours, x = fastsae.accelerate(kind(D_IN, D_SAE, K)), tokens(33).float()
    twin = pickle.loads(pickle.dumps(ours))
    assert type(twin) is type(ours)
    assert_close(twin(x), ours(x))


def test_saes_within_modules():
    saes = {name: KINDS[name].make() for name in ("sae_lens topk", "sae_lens jumprelu")}
    x = tokens(33)
    expected = [recon_and_codes(sae, x) for sae in saes.values()]
    modules = nn.ModuleDict({f"layer{n}": sae for n, sae in enumerate(saes.values())})
    modules["head"] = nn.Linear(2, 3)
    assert fastsae.accelerate(modules) is modules
    assert [type(m).__name__ for m in saes.values()] == ["FastTopKSAE", "FastJumpReLUSAE"]
    assert type(modules["head"]) is nn.Linear
    assert_close([recon_and_codes(sae, x) for sae in saes.values()], expected)
    fastsae.restore(modules)
    assert [type(m).__name__ for m in saes.values()] == ["TopKSAE", "JumpReLUSAE"]


COMPILED = """
import copy, torch, fastsae
from sae_lens.saes import StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig
from fastsae.dropin import dense

dense.MIN_TOKENS = 0
dense.AboveThreshold.limits = lambda *_: dense.Limits(1.0, 1.0)
torch.manual_seed(0)
x = torch.randn(33, 12, requires_grad=True)
for sae in (TopKSAE(TopKSAEConfig(d_in=12, d_sae=40, k=5)), StandardSAE(StandardSAEConfig(12, 40))):
    parameters, compiled = [x, *sae.parameters()], torch.compile(sae, backend="aot_eager")
    expected = torch.autograd.grad((recon := sae(x)).square().sum(), parameters)
    torch.testing.assert_close(compiled(x), recon)
    assert fastsae.accelerate(compiled) is compiled
    assert type(sae).__name__.startswith("Fast")
    torch.testing.assert_close(found := compiled(x), recon)
    gradients = torch.autograd.grad(found.square().sum(), parameters)
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-5)
print("the same")
"""


def test_compiled_modules():
    """In a process of their own, where nnsight 0.3 has not changed what torch.compile needs."""
    sae_lens()
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)
    assert done.stdout.endswith("the same\n"), done.stderr


SCRIPT = """
import sys
from dictionary_learning.trainers.top_k import AutoEncoderTopK
print(type(AutoEncoderTopK(4, 8, 2)).__name__, sys.argv[1:], sys.path[0], __name__)
"""


def test_a_program_runs_with_an_accelerated_library(tmp_path):
    dictionary_learning("dictionary")
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    command = [
        sys.executable,
        "-m",
        "fastsae.dropin",
        "dictionary_learning",
        str(script),
        "-m",
        "x",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == (
        f"FastAutoEncoderTopK ['-m', 'x'] {tmp_path.resolve()} __main__"
    )


@pytest.mark.parametrize(
    ("words", "message"), [(["other"], "invalid choice: 'other'"), (["sparsify"], "nothing to run")]
)
def test_a_program_that_cannot_run(words, message, monkeypatch, capsys):
    from fastsae.dropin.__main__ import main

    monkeypatch.setattr(sys, "argv", ["dropin", *words])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert message in capsys.readouterr().err
