"""Their SAE -> their file -> ours -> the same outputs -> our file -> theirs -> the same outputs."""

import pytest
import torch

from fastsae import interop
from fastsae.interop.inference_rule import rule_of

from .peers import D_IN, PEERS, READERS

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries

HELD = {  # what each library's files can hold
    "sae_lens": {"topk", "abstopk", "batchtopk", "jumprelu", "relu", "gated"},
    "sparsify": {"topk"},
    "dictionary_learning": {"topk", "batchtopk", "jumprelu", "relu", "gated"},
    "llamascopium": {"topk", "batchtopk", "jumprelu", "relu"},
}
NOT_HELD = r"not support (transcoders|layer_norm)| supports .*, not |d_out = d_in (and|only)"
PAIRS = [(name, form) for name in PEERS for form in HELD]


def close(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Within 1e-5 of the largest, or where one is in bfloat16, within its rounding."""
    part = max(1e-5, torch.finfo(got.dtype).eps, torch.finfo(expected.dtype).eps)
    return bool((got - expected).abs().max() <= part * expected.abs().max())


@pytest.mark.parametrize("name", PEERS)
def test_the_same_numbers(name, tmp_path):
    peer = PEERS[name]
    theirs, x = peer.make(), torch.randn(64, D_IN)
    peer.write(theirs, tmp_path / "theirs")
    ours = interop.load(tmp_path / "theirs")
    theirs = peer.read(tmp_path / "theirs")  # as they load it
    x = x.to(ours.W_enc.dtype)
    with torch.no_grad():
        expected = peer.recon(theirs, x)
        assert expected.std() > 0.1
        assert close(ours(x), expected)
        assert close(ours.encode(x).to_dense(), peer.codes(theirs, x))
    ours.save(tmp_path / "ours")
    assert torch.equal(interop.load(tmp_path / "ours")(x), ours(x))


@pytest.mark.parametrize(("name", "form"), PAIRS)
def test_from_one_library_to_another(name, form, tmp_path):
    """Or an error that says what the format does not support."""
    peer, reader = PEERS[name], READERS[form]
    theirs, x = peer.make(), torch.randn(64, D_IN)
    peer.write(theirs, tmp_path / "theirs")
    ours = interop.load(tmp_path / "theirs")
    theirs = peer.read(tmp_path / "theirs")
    x = x.to(ours.W_enc.dtype)
    kind = rule_of(ours).kind
    transcodes = ours.d_out is not None
    fits = kind in HELD[form] and (form == "sae_lens" or not ours.layer_norm)
    if transcodes:
        fits = form == "sparsify" and kind == "topk" and ours.d_out == D_IN
        fits |= form == "sae_lens" and kind in ("relu", "jumprelu")
        fits |= form == "llamascopium" and ours.d_out == D_IN and ours.W_skip is None
    if not fits:
        with pytest.raises(ValueError, match=NOT_HELD):
            interop.save(ours, tmp_path / "out", form)
        assert not (tmp_path / "out").exists()
        return
    interop.save(ours, tmp_path / "out", form)
    with torch.no_grad():
        got, expected = reader.recon(reader.read(tmp_path / "out"), x), peer.recon(theirs, x)
        if got.dtype != expected.dtype:  # dictionary_learning reads bfloat16 weights as float32
            expected = interop.load(tmp_path / "theirs").to(got.dtype)(x.to(got.dtype))
        assert close(got, expected)
    again = interop.load(tmp_path / "out")
    with torch.no_grad():
        assert close(again(x), ours(x))
