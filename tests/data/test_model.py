"""Reading and replacing hidden states, and cutting text, on tiny models of both kinds."""

from pathlib import Path

import pytest
import torch

from fastsae.data.model import (
    TextWindows,
    hidden_at,
    load_model,
    load_tokenizer,
    module_at,
    splice,
)

TEXT = "It was the worst of times, it was the best of times.\n" * 5


@pytest.mark.parametrize(
    ("name", "path"), [("gpt2", "transformer.h.1"), ("bert", "encoder.layer.1")]
)
def test_hidden_states_are_the_models_own(name: str, path: str, request: pytest.FixtureRequest):
    folder = str(request.getfixturevalue(name))
    model = load_model(folder)
    windows = TextWindows(load_tokenizer(folder), 20, model)
    batch = windows.batch(windows.cut(TEXT))
    hidden = hidden_at(model, module_at(model, path), batch)
    out = model(batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True)
    assert torch.equal(hidden, out.hidden_states[2])
    assert not hidden.requires_grad and not model.training


def test_layers_after_the_hookpoint_do_not_run(gpt2: Path):
    model = load_model(str(gpt2))
    windows = TextWindows(load_tokenizer(str(gpt2)), 20, model)
    batch = windows.batch(windows.cut(TEXT))

    def refuse(*_: object) -> None:
        raise AssertionError("a later layer ran")

    module_at(model, "transformer.h.2").register_forward_pre_hook(refuse)
    hidden_at(model, module_at(model, "transformer.h.1"), batch)


def test_splice_replaces_the_output_and_is_undone(gpt2: Path):
    model = load_model(str(gpt2))
    ids = torch.arange(12).view(1, 12)
    module = module_at(model, "transformer.h.1")
    plain = model(ids).logits
    with splice(module, lambda hidden: hidden):
        assert torch.equal(model(ids).logits, plain)
    with splice(module, torch.zeros_like):
        zeroed = model(ids).logits
        last = model(ids, output_hidden_states=True).hidden_states[2]
    assert torch.equal(last, torch.zeros_like(last))
    assert not torch.allclose(zeroed, plain)
    assert torch.equal(model(ids).logits, plain)


def test_tuple_outputs_are_understood(bert: Path):
    """An attention module returns (hidden states, weights)."""
    model = load_model(str(bert))
    module = module_at(model, "encoder.layer.0.attention")
    ids = torch.arange(12).view(1, 12)
    seen: list[object] = []

    for factor in (1, 2):
        with splice(module, lambda hidden, factor=factor: hidden * factor):
            after = module.register_forward_hook(lambda module, args, output: seen.append(output))
            model(ids)
            after.remove()
    plain, doubled = seen
    assert isinstance(plain, tuple) and isinstance(doubled, tuple)
    assert torch.equal(doubled[0], 2 * plain[0]) and len(doubled) == len(plain)


def test_windows_cover_the_text_once(gpt2: Path, bert: Path):
    for folder, around in ((gpt2, 0), (bert, 2)):
        tokenizer = load_tokenizer(str(folder))
        windows = TextWindows(tokenizer, 16)
        cut = windows.cut(TEXT)
        assert all(len(window) == 16 for window in cut[:-1]) and len(cut[-1]) <= 16
        assert windows.text_tokens == 16 - around
        text = [token for window in cut for token in window if token not in windows.special]
        assert tokenizer.decode(text) == TEXT
        assert sum(map(windows.kept, cut)) == len(text)
        assert sum(map(windows.kept, windows.cut(TEXT, max_tokens=21))) == 21
    assert windows.cut("") == []


def test_padding_and_special_tokens_are_not_kept(bert: Path):
    windows = TextWindows(load_tokenizer(str(bert)), 16)
    batch = windows.batch([[1, 50, 51, 52, 2], [1, 53, 2]])
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch.keep.int().tolist() == [[0, 1, 1, 1, 0], [0, 1, 0, 0, 0]]


def test_mistakes_are_named(gpt2: Path, tmp_path: Path):
    model, tokenizer = load_model(str(gpt2)), load_tokenizer(str(gpt2))
    with pytest.raises(
        ValueError, match=r"GPT2LMHeadModel has no module 'h\.1'.*transformer\.h\.1"
    ):
        module_at(model, "h.1")
    with pytest.raises(ValueError, match="context_length is 65, the model takes up to 64"):
        TextWindows(tokenizer, 65, model)
    windows = TextWindows(tokenizer, 8, model)
    batch = windows.batch(windows.cut(TEXT))
    with pytest.raises(
        ValueError, match=r"must be \[batch, tokens, width\], found BaseModelOutput"
    ):
        hidden_at(model, module_at(model, "transformer"), batch)
    for load in (load_model, load_tokenizer):
        with pytest.raises(
            ValueError, match="cannot load '.*absent' as a Hugging Face folder or id"
        ):
            load(str(tmp_path / "absent"))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="CUDA"):
            load_model(str(gpt2), "cuda")
