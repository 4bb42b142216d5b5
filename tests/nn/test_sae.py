import json

import pytest
import torch

import fastsae
from fastsae import SAE, AbsTopK, TopK
from fastsae.losses import training_loss


@pytest.mark.parametrize("activation", [TopK(3), AbsTopK(3)], ids=["topk", "abstopk"])
@pytest.mark.parametrize("d_out", [None, 5])
def test_save_and_load(tmp_path, activation, d_out):
    sae = SAE(8, 16, activation, d_out)
    sae.save(tmp_path)
    again = fastsae.load(tmp_path)
    x = torch.randn(4, 8)
    assert again.activation.cfg == activation.cfg
    assert torch.equal(again(x), sae(x))


def test_leading_dimensions_are_kept():
    sae = SAE(8, 16, TopK(3))
    x = torch.randn(2, 3, 8)
    assert sae(x).shape == (2, 3, 8)
    assert torch.equal(sae(x).view(-1, 8), sae(x.view(-1, 8)))
    assert sae(x[:, :0]).shape == (2, 0, 8)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tokens", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "options", [{}, {"d_out": 5, "skip": True}, {"layer_norm": True}, {"by_norm": True}], ids=str
)
def test_tokens_are_taken_in_the_dtype_of_the_weights(options, tokens, weights):
    """Whatever their own is; in the loss too."""
    sae = SAE(8, 16, TopK(3), **options).to(weights)
    x = torch.randn(6, 8).to(tokens)
    target = torch.randn(6, 5).to(tokens) if "d_out" in options else None
    assert sae(x).dtype == sae.encode(x).values.dtype == weights
    assert torch.equal(sae(x), sae(x.to(weights)))
    assert torch.equal(sae.decode(sae.encode(x), x), sae(x))
    assert training_loss(sae, x, target=target).loss.dtype == weights


def test_codes_agree_with_their_dense_form():
    sae = SAE(8, 16, AbsTopK(3))
    codes = sae.encode(torch.randn(10, 8))
    dense = codes.to_dense()
    torch.testing.assert_close(dense @ sae.W_dec + sae.b_dec, sae.decode(codes))
    assert codes.l0() == 3
    assert (dense < 0).any()
    assert torch.equal(codes.fired(), (dense != 0).any(0))


def test_folded_scale():
    sae, scale = SAE(8, 16, TopK(3)).double(), 0.3
    with torch.no_grad():
        sae.b_enc.normal_()
        sae.b_dec.normal_()
    x = torch.randn(10, 8).double()
    expected = sae(scale * x) / scale
    torch.testing.assert_close(sae.fold_scale_(scale)(x), expected)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SAE(8, 16, TopK(17)), "k must be between 1 and d_sae = 16, got 17"),
        (lambda: TopK(0), "k must be at least 1, got 0"),
        (lambda: SAE(0, 16, TopK(1)), "d_in must be at least 1, got 0"),
        (
            lambda: SAE(8, 16, TopK(1)).encode(torch.ones(2, 7)),
            r"x must end in d_in = 8, got shape",
        ),
    ],
)
def test_nonsense_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "is not the config of a fastsae.sae.1 file"),
        ({"d_sea": 3}, "config.json has no setting 'd_sea'"),
        ({"d_sae": 17}, "W_enc must be \\[17, 8\\], got \\[16, 8\\]"),
        ({"d_in": "8"}, "d_in must be of type int, got '8'"),
        ({"d_in": None}, "d_in must be of type int, got None"),
        ({"by_norm": "x"}, "by_norm must be of type bool, got 'x'"),
        ({"activation": {"name": "softmax"}}, "activation must be one of .*, got 'softmax'"),
        ({"activation": {"name": "topk", "by": "size"}}, "topk.by must be"),
        ({"activation": {"name": "topk", "kk": 3}}, "topk has no setting 'kk'"),
    ],
)
def test_a_foreign_config_is_refused(tmp_path, change, message):
    SAE(8, 16, TopK(3)).save(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        fastsae.load(tmp_path)


def test_every_flipped_bit_is_refused(tmp_path):
    SAE(3, 4, TopK(2)).save(tmp_path)
    for path in tmp_path.iterdir():
        content = path.read_bytes()
        for place in range(0, len(content), 5):
            flipped = bytearray(content)
            flipped[place] ^= 1 << place % 8
            path.write_bytes(flipped)
            with pytest.raises(ValueError, match=str(tmp_path)):
                fastsae.load(tmp_path)
        path.write_bytes(content)
    fastsae.load(tmp_path)


def test_files_of_other_versions_load_or_name_the_version(tmp_path):
    sae = SAE(3, 4, TopK(2))
    sae.save(tmp_path)
    path = tmp_path / "config.json"
    current = json.loads(path.read_text())
    older = {name: current[name] for name in ("format", "d_in", "d_sae")}
    path.write_text(json.dumps({**older, "activation": {"name": "topk", "k": 2}}))
    assert fastsae.load(tmp_path).config() == sae.config()
    for newer in ({"of_the_future": 1}, {"activation": {**current["activation"], "future": 1}}):
        path.write_text(json.dumps({**current, **newer, "version": "9.1"}))
        message = r"has no setting '(of_the_)?future'.* \(written by fastsae '9.1', this is"
        with pytest.raises(ValueError, match=message):
            fastsae.load(tmp_path)
