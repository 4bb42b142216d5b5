"""The spliced model: known limits, a splice written out by hand, and real MiniLM."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity, cross_entropy, normalize

from bench.study.measure import CrossEntropy
from fastsae.data import ActivationShards
from fastsae.data.model import load_model, load_tokenizer
from fastsae.data.ordinary import SAMPLE_TOKENS, Ordinary
from fastsae.evals import CausalEffect, Downstream, EncoderEffect, downstream
from fastsae.evals.windows import stored_batches
from fastsae.nn import SAE, TopK, init_from_data

from .conftest import identity

D = 16


def constant(row: torch.Tensor) -> SAE:
    """Reconstructs everything as one row."""
    sae = SAE(D, 8, TopK(1))
    with torch.no_grad():
        sae.W_dec.zero_()
        sae.b_dec.copy_(row)
    return sae


def by_hand(sae, data, module_of, judge) -> list:
    """What judge returns for each window, run alone and without padding."""
    model = load_model(data.model)
    found = []
    for batch in stored_batches(data, load_tokenizer(data.model), None, 1):
        keep = batch.keep[0]

        def hook(module, args, output, keep=keep):
            out = output[0] if isinstance(output, tuple) else output
            new = out.clone()
            new[0, keep] = sae(out[0, keep])
            return (new, *output[1:]) if isinstance(output, tuple) else new

        run: Any = model.encoder if hasattr(model, "decoder") else model
        with torch.no_grad():
            clean = run(batch.input_ids)
            handle = module_of(model).register_forward_hook(hook)
            spliced = run(batch.input_ids)
            handle.remove()
        found.append(judge(clean, spliced, batch.input_ids[0], keep))
    return found


def test_causal_identity(gpt2_data):
    found = downstream(identity(D), gpt2_data)
    assert isinstance(found, CausalEffect)
    assert found.ce == pytest.approx(found.ce_clean, rel=1e-6)
    assert found.kl == pytest.approx(0, abs=1e-9)
    assert found.recovered_zero == pytest.approx(1, abs=1e-5)
    assert found.recovered_mean == pytest.approx(1, abs=1e-5)
    assert found.ce_clean < min(found.ce_zero, found.ce_mean)


def ablated(data) -> tuple[Downstream | None, Downstream | None]:
    """The effect of SAEs that reconstruct everything as zero, and as the mean."""
    zero = downstream(constant(torch.zeros(D)), data, batch_size=3, progress=True)
    return zero, downstream(constant(Ordinary.of(data.sample(SAMPLE_TOKENS), 10.0).mean), data)


def test_causal_ablations(gpt2_data):
    zero, mean = ablated(gpt2_data)
    assert isinstance(zero, CausalEffect) and isinstance(mean, CausalEffect)
    assert (zero.ce, zero.recovered_zero) == (zero.ce_zero, 0)
    assert (mean.ce, mean.recovered_mean) == (mean.ce_mean, 0)
    assert mean.ce_zero == pytest.approx(zero.ce_zero, rel=1e-6)


def test_the_studys_cross_entropy_is_the_same(gpt2_data):
    sae = init_from_data(SAE(D, 64, TopK(2)), gpt2_data.sample(100))
    found, effect = downstream(sae, gpt2_data, max_windows=3), CrossEntropy(gpt2_data, 3)
    assert isinstance(found, CausalEffect)
    assert effect.clean == pytest.approx(found.ce_clean, rel=1e-12)
    assert effect.ablated == pytest.approx(found.ce_mean, rel=1e-12)
    assert effect.recovered(sae) == pytest.approx(found.recovered_mean, rel=1e-9)


def test_causal_by_hand(gpt2_data):
    """Cross-entropy over text tokens only, the KL, and how many of them there are."""
    sae = init_from_data(SAE(D, 64, TopK(2)), gpt2_data.sample(100))

    def losses(clean, spliced, ids, keep):
        ce = cross_entropy(spliced.logits[0, :-1], ids[1:], reduction="none")[keep[1:]]
        p, q = (out.logits[0, :-1].double().softmax(-1)[keep[1:]] for out in (clean, spliced))
        return ce.tolist(), (p * (p / q).log()).sum(-1).tolist()

    windows = by_hand(sae, gpt2_data, lambda model: model.transformer.h[0], losses)
    ce, kl = (np.concatenate(part) for part in zip(*windows, strict=True))
    found = downstream(sae, gpt2_data)
    assert isinstance(found, CausalEffect)
    assert found.tokens == len(ce)
    assert found.ce == pytest.approx(ce.mean(), rel=1e-5)
    assert found.kl == pytest.approx(kl.mean(), rel=1e-4)
    share = (found.ce_zero - found.ce) / (found.ce_zero - found.ce_clean)
    assert found.recovered_zero == pytest.approx(share)


def test_tokens_of_extreme_norm_keep_their_activations(gpt2_data):
    """Without any ordinary one, nothing is replaced."""
    sae = init_from_data(SAE(D, 64, TopK(2)), gpt2_data.sample(100))
    ratios = (None, 1.0, 1e-9)
    every, half, none = (downstream(sae, gpt2_data, max_norm_ratio=ratio) for ratio in ratios)
    assert isinstance(every, CausalEffect) and isinstance(half, CausalEffect)
    assert isinstance(none, CausalEffect)
    assert every.ce == every.ce_all == half.ce_all == none.ce_all
    assert none.ce == none.ce_zero == none.ce_mean == none.ce_clean
    assert len({every.ce, half.ce, none.ce}) == 3 and len({every.ce_zero, half.ce_zero}) == 2


def test_encoder_identity(bert_data):
    found = downstream(identity(D), bert_data)
    assert isinstance(found, EncoderEffect)
    assert found.tokens == bert_data.n_tokens
    for value in (found.cosine, found.recovered_zero, found.recovered_mean):
        assert value == pytest.approx(1, abs=1e-6)


def test_encoder_ablations(bert_data):
    zero, mean = ablated(bert_data)
    assert isinstance(zero, EncoderEffect) and isinstance(mean, EncoderEffect)
    assert (zero.cosine, zero.recovered_zero) == (zero.cosine_zero, 0)
    assert (mean.cosine, mean.recovered_mean) == (mean.cosine_mean, 0)


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_encoder_by_hand(name, request):
    """Of a model that also has a decoder, the encoder runs alone."""
    data = request.getfixturevalue(f"{name}_data")
    sae = init_from_data(SAE(D, 64, TopK(2)), data.sample(100))

    def cosine(clean, spliced, ids, keep):
        a, b = (output.last_hidden_state[0].mean(0) for output in (clean, spliced))
        return float(cosine_similarity(a, b, dim=0))

    def block(model):
        return model.encoder.layer[0] if name == "bert" else model.encoder.block[0]

    cosines = by_hand(sae, data, block, cosine)
    found = downstream(sae, data)
    assert isinstance(found, EncoderEffect)
    assert found.windows == len(cosines)
    assert found.cosine == pytest.approx(np.mean(cosines), rel=1e-5)


def test_minilm(minilm_data):
    """Memorizing its few tokens, an SAE of real activations changes the embeddings little."""
    x = minilm_data.rows(torch.arange(minilm_data.n_tokens))
    sae = SAE(384, len(x), TopK(1))
    with torch.no_grad():  # a latent for each token
        sae.b_dec.copy_(minilm_data.mean)
        sae.W_enc.copy_(normalize(x - sae.b_dec))
        sae.W_dec.copy_(sae.W_enc)
    found = downstream(sae, minilm_data, max_windows=16)
    assert isinstance(found, EncoderEffect)
    assert found.cosine > 0.999 > found.cosine_mean > found.cosine_zero
    assert found.recovered_zero is not None and found.recovered_zero > 0.99


def test_plain_data_has_no_model(tmp_path):
    np.save(tmp_path / "x.npy", np.eye(D, dtype=np.float32))
    assert downstream(identity(D), ActivationShards(tmp_path / "x.npy")) is None


@pytest.mark.parametrize("change", [{"max_windows": 0}, {"batch_size": 0}])
def test_bad_counts(change, gpt2_data):
    with pytest.raises(ValueError, match="at least 1"):
        downstream(identity(D), gpt2_data, **change)


def test_wrong_width(gpt2_data):
    with pytest.raises(ValueError, match="d_in = 17"):
        downstream(SAE(17, 32, TopK(1)), gpt2_data)
