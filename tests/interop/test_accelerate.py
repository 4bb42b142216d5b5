"""Accelerated modules of the installed libraries against the same modules as they were."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import fastsae
from fastsae.dropin import SUPPORTED, dense

from .accelerated import KINDS, aux_k, dead_latents, recon_and_codes, with_true_gradients
from .peers import D_IN

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries

TOKENS = [0, 1, 33, 257]


@pytest.fixture(autouse=True)
def always_sparse(monkeypatch):
    """These SAEs are so small that the libraries' own code would run."""
    monkeypatch.setattr(dense, "MIN_TOKENS", 0)
    monkeypatch.setattr(dense.AboveThreshold, "limits", lambda *_: dense.Limits(1.0, 1.0))


def tokens(N: int) -> torch.Tensor:
    return torch.randn(N, D_IN, dtype=torch.float64)


def both(name: str, dtype=torch.float64) -> tuple[Any, Any]:
    """A library's module, and an accelerated copy of it."""
    theirs = KINDS[name].make().to(dtype)
    return theirs, fastsae.accelerate(copy.deepcopy(theirs))


def strided(codes: torch.Tensor) -> torch.Tensor:
    return codes.to_dense() if codes.is_sparse else codes


@pytest.mark.parametrize("N", TOKENS)
@pytest.mark.parametrize("name", KINDS)
def test_the_same_outputs(name, N):
    theirs, x = KINDS[name].make(), tokens(N)
    ours = copy.deepcopy(theirs)
    assert fastsae.accelerate(ours) is ours
    expected = recon_and_codes(theirs, x)
    assert N < 33 or expected[0].std() > 0.1
    assert_close(recon_and_codes(ours, x), expected)
    with torch.inference_mode():
        assert_close(recon_and_codes(ours, x), expected)


@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("N", TOKENS[2:])
@pytest.mark.parametrize("name", KINDS)
def test_the_same_loss_and_true_gradients(name, N, dead):
    theirs, x = KINDS[name].make(), tokens(N).requires_grad_()
    ours = fastsae.accelerate(copy.deepcopy(theirs))
    mask = dead_latents() & torch.tensor(dead)
    if not dead and KINDS[name].loss is aux_k:
        pytest.skip("without dead latents, its loss has no largest of them")
    losses = [KINDS[name].loss(sae, x, mask) for sae in (ours, with_true_gradients(theirs))]
    assert_close(*losses)
    got, expected = (
        torch.autograd.grad(loss, [x, *sae.parameters()], materialize_grads=True, allow_unused=True)
        for loss, sae in zip(losses, (ours, theirs), strict=True)
    )
    assert all(g.abs().max() > 0 for g in expected[1:3])
    assert_close(got, expected)


@pytest.mark.parametrize("limits", [dense.Limits(0.0, 1.0), dense.Limits(1.0, 0.0)])
@pytest.mark.parametrize("name", [name for name in KINDS if "topk" not in name])
def test_while_many_latents_are_active(name, limits, monkeypatch):
    """The library's own code runs; or, if only a few tokens have many, dense matmuls of ours."""
    monkeypatch.setattr(dense.AboveThreshold, "limits", lambda *_: limits)
    theirs, x = KINDS[name].make(), tokens(33).requires_grad_()
    ours = fastsae.accelerate(copy.deepcopy(theirs))
    theirs = with_true_gradients(theirs)
    losses = [KINDS[name].loss(sae, x, dead_latents()) for sae in (ours, theirs)]
    got, expected = (
        torch.autograd.grad(loss, [x, *sae.parameters()], materialize_grads=True, allow_unused=True)
        for loss, sae in zip(losses, (ours, theirs), strict=True)
    )
    assert_close((losses[0], got), (losses[1], expected))
    assert_close(recon_and_codes(ours, x), recon_and_codes(theirs, x))


@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("name", [name for name in KINDS if "sparsify" in name])
def test_exact_compat_has_the_gradients_of_sparsify(name, dead):
    theirs, x = KINDS[name].make(), tokens(33).requires_grad_()
    theirs.encoder.bias.data -= 2.5  # so that latents below 0 are chosen
    ours = fastsae.accelerate(copy.deepcopy(theirs), exact_compat=True)
    mask = dead_latents() & torch.tensor(dead)
    got, expected = (
        torch.autograd.grad(KINDS[name].loss(sae, x, mask), [x, *sae.parameters()])
        for sae in (ours, theirs)
    )
    assert_close(got, expected)
    fastsae.accelerate(ours)
    loss = KINDS[name].loss(ours, x, mask)
    assert not torch.allclose(torch.autograd.grad(loss, x)[0], expected[0])


@pytest.mark.parametrize("name", KINDS)
def test_it_is_the_same_object(name):
    module = KINDS[name].make()
    kind, state = type(module), copy.deepcopy(module.state_dict())
    parameters = [*module.parameters()]
    fastsae.accelerate(module)
    assert isinstance(module, kind) and type(module) is not kind
    assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))
    assert_close(dict(module.state_dict()), dict(state), rtol=0, atol=0)
    assert type(fastsae.accelerate(module)).__bases__[-1] is kind
    x = tokens(5)
    twins = [copy.deepcopy(module)]
    if "sae_lens" not in name:  # which cannot be pickled
        twins.append(pickle.loads(pickle.dumps(module)))
    for twin in twins:
        assert type(twin) is type(module)
        assert_close(recon_and_codes(twin, x), recon_and_codes(module, x))
    assert fastsae.restore(module) is module
    assert type(module) is kind and "exact_compat" not in vars(module)
    with pytest.raises(
        ValueError, match=r"restore\(\) expects a module returned by accelerate\(\)"
    ):
        fastsae.restore(module)


MATRICES = "dictionary_learning jumprelu", "dictionary_learning matryoshka"
WITH_HOOKS = {  # the submodules that users hook
    "sae_lens": ["hook_sae_acts_pre", "hook_sae_acts_post", "hook_sae_recons"],
    "dictionary_learning": ["encoder", "decoder"],
}


@pytest.mark.parametrize(
    "name, hooked",
    [(n, h) for n in KINDS if n not in MATRICES for h in WITH_HOOKS.get(n.split()[0], [])],
)
def test_hooks_see_and_change_the_same_tensors(name, hooked):
    theirs, ours, x = *both(name), tokens(33)
    found = []
    for sae in (theirs, ours):
        seen = []

        def overwrite(_, inputs, output, seen=seen):
            output = strided(output)
            seen.append(output.clone())
            output[..., 3] = 2  # in place
            return output

        sae.get_submodule(hooked).register_forward_hook(overwrite)
        found.append([recon_and_codes(sae, x), *seen])
    assert len(found[0]) > 1
    assert_close(*found)


@pytest.mark.parametrize("name", [name for name in KINDS if "sparsify" not in name])
def test_codes_that_were_written_into_are_decoded_as_they_are(name):
    theirs, ours, x = *both(name), tokens(33)
    found = []
    with torch.no_grad():
        for sae in (theirs, ours):
            codes = strided(sae.encode(x))
            codes[:, 7] = 3
            found.append(sae.decode(codes))
    assert_close(*found)


@pytest.mark.parametrize("name", [name for name in KINDS if "sparsify" not in name])
def test_activations_have_the_gradient_of_every_latent(name):
    theirs, ours, x = *both(name), tokens(33)
    found = []
    for sae in (theirs, ours):
        acts = sae.encode(x)
        if acts.is_sparse:
            pytest.skip("SAELens has no backward pass of sparse activations")
        found.append(torch.autograd.grad(sae.decode(acts).square().sum(), acts)[0])
        with torch.no_grad():
            acts = sae.encode(x)
        acts.requires_grad_()  # which must make no difference
        found.append(torch.autograd.grad(sae.decode(acts).square().sum(), acts)[0])
    assert (found[0] != 0).all()
    for gradient in found[1:]:
        assert_close(gradient, found[0])


@pytest.mark.parametrize("name", [name for name in KINDS if "training" in name])
def test_hooks_see_the_gradient_of_every_latent(name):
    if "sparse" in name:
        pytest.skip("SAELens has no backward pass of sparse activations")
    theirs, ours, x = *both(name), tokens(33)
    found = []
    for sae in (theirs, ours):
        seen = []

        def see_gradient(_, inputs, output, seen=seen):
            output.register_hook(seen.append)

        sae.hook_sae_acts_post.register_forward_hook(see_gradient)
        KINDS[name].loss(sae, x, dead_latents()).backward()
        found.append(seen)
    assert len(found[0]) == 1
    assert_close(*found)


@pytest.mark.parametrize("name", [n for n in KINDS if "sae_lens" in n or n.endswith(" topk")])
def test_tokens_in_sequences(name):
    theirs, ours, x = *both(name), tokens(24).view(2, 3, 4, D_IN)
    if "layer norm" in name or "sparsify" in name:
        x = x.flatten(0, 2)
    assert_close(recon_and_codes(ours, x), recon_and_codes(theirs, x))


def test_in_bfloat16():
    theirs, ours = both("dictionary_learning topk", torch.bfloat16)
    x = tokens(33).bfloat16()
    recon, codes = recon_and_codes(ours, x)
    assert recon.dtype == codes.dtype == torch.bfloat16
    assert_close((recon, codes), recon_and_codes(theirs, x))


@pytest.mark.parametrize("name", KINDS)
def test_a_replaced_method_is_called(name):
    ours, calls = fastsae.accelerate(KINDS[name].make()), []
    encode = ours.encode

    def patched(x):
        calls.append(x)
        return encode(x)

    ours.encode = patched
    ours(tokens(33))
    assert len(calls) == 1


@pytest.mark.parametrize("name", KINDS)
def test_few_tokens_use_the_librarys_own_code(name, monkeypatch):
    monkeypatch.setattr(dense, "MIN_TOKENS", 64)
    theirs, ours, x = *both(name), tokens(33)
    assert_close(recon_and_codes(ours, x), recon_and_codes(theirs, x))


@pytest.mark.parametrize("name", [name for name in KINDS if "sparsify" not in name])
def test_under_autocast(name):
    theirs, ours, x = *both(name, torch.float32), tokens(33).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(recon_and_codes(ours, x), recon_and_codes(theirs, x))


def test_saved_activations_are_plain_tensors(tmp_path):
    ours = fastsae.accelerate(KINDS["sae_lens topk"].make())
    with torch.no_grad():
        acts = ours.encode(tokens(33))
    torch.save(acts, tmp_path / "acts.pt")
    assert torch.equal(torch.load(tmp_path / "acts.pt", weights_only=True), acts)


def test_latents_that_are_not_active_are_not_listed():
    """Because sparsify's trainer counts every listed latent as fired."""
    kind, x = KINDS["sparsify"], tokens(65)
    ours = fastsae.accelerate(kind.make())
    ours.encoder.bias.data -= 6
    for found in (ours.encode(x), ours(x)):
        values, indices = found[:2] if hasattr(found, "top_acts") else found[1:3]
        assert (values > 0).sum() < len(x)
        spare = indices[values <= 0], indices[:, :1].expand_as(indices)[values <= 0]
        assert torch.equal(*spare)


def test_an_unsupported_module_is_refused():
    with pytest.raises(ValueError) as error:
        fastsae.accelerate(nn.Sequential(nn.Linear(2, 3)))
    assert "got torch's Sequential. For a model of your own, use" in str(error.value)
    assert all(name in str(error.value) for names in SUPPORTED.values() for name in names)


def test_exact_compat_where_gradients_are_true():
    module = KINDS["dictionary_learning topk"].make()
    with pytest.raises(ValueError, match="gradients of AutoEncoderTopK are exact"):
        fastsae.accelerate(module, exact_compat=True)
    assert type(module).__name__ == "AutoEncoderTopK"
