"""Reading and replacing hidden states, and cutting text, on tiny models of both kinds."""

from pathlib import Path

import pytest
import torch
from torch import nn

from fastsae.data.hookpoints import Hookpoint, hidden_at, hookpoints_at, module_at, splice
from fastsae.data.model import TextWindows, TokenBatch, load_model, load_tokenizer

TEXT = "It was the worst of times, it was the best of times.\n" * 5


@pytest.mark.parametrize(
    ("name", "path"), [("gpt2", "transformer.h.1"), ("bert", "encoder.layer.1")]
)
def test_hidden_states_are_the_models_own(name: str, path: str, request: pytest.FixtureRequest):
    folder = str(request.getfixturevalue(name))
    model = load_model(folder)
    windows = TextWindows(load_tokenizer(folder), 20, model)
    batch = windows.batch(windows.cut(TEXT))
    (hidden,) = hidden_at(model, hookpoints_at(model, [path]), batch)
    out = model(batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True)
    assert torch.equal(hidden, out.hidden_states[2])
    assert not hidden.requires_grad and not model.training
    names = [path, f"{path}:in", path.replace("1", "0"), f"{path.replace('1', '2')}:in"]
    several = hidden_at(model, hookpoints_at(model, names), batch)
    expected = [out.hidden_states[depth] for depth in (2, 1, 1, 2)]
    assert all(map(torch.equal, several, expected))


def test_layers_after_the_hookpoint_do_not_run(gpt2: Path):
    model = load_model(str(gpt2))
    windows = TextWindows(load_tokenizer(str(gpt2)), 20, model)
    batch = windows.batch(windows.cut(TEXT))

    def refuse(*_: object) -> None:
        raise AssertionError("a later layer ran")

    module_at(model, "transformer.h.2").register_forward_pre_hook(refuse)
    hidden_at(model, hookpoints_at(model, ["transformer.h.1"]), batch)
    hidden_at(model, hookpoints_at(model, [f"transformer.h.{n}:in" for n in (1, 0)]), batch)


class Writes(nn.Module):
    """Doubles what it is given in place, and is given it by name."""

    def forward(self, *, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states.mul_(2)


class Calls(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.writes, self.unused = nn.Embedding(9, 4), Writes(), nn.Linear(4, 4)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.writes(hidden_states=self.embed(input_ids))


def test_what_later_modules_do_does_not_reach_what_was_read():
    model = Calls()
    ids = torch.arange(6).view(2, 3)
    batch = TokenBatch(ids, torch.ones_like(ids), torch.ones_like(ids).bool())
    hooks = hookpoints_at(model, ("embed", "writes:in", "writes"))
    embedded, taken, put = hidden_at(model, hooks, batch)
    assert torch.equal(embedded, model.embed(ids)) and torch.equal(taken, embedded)
    assert torch.equal(put, 2 * embedded)
    with torch.no_grad(), splice(Hookpoint(model.writes, True), torch.ones_like, 2):
        assert torch.equal(model(ids, ids), torch.full((2, 3, 4), 2.0))
    with pytest.raises(ValueError, match="never called its Linear"):
        hidden_at(model, [*hooks, Hookpoint(model.unused)], batch)
    with pytest.raises(ValueError, match=r"embed:in must have a row for each .* found \(2, 13\)"):
        hookpoints_at(model, ["embed:in"])


def test_splice_replaces_the_output_and_is_undone(gpt2: Path):
    model = load_model(str(gpt2))
    ids = torch.arange(12).view(1, 12)
    hook = Hookpoint(module_at(model, "transformer.h.1"))
    plain = model(ids).logits
    with splice(hook, lambda hidden: hidden, 1):
        assert torch.equal(model(ids).logits, plain)
    with splice(hook, torch.zeros_like, 1):
        zeroed = model(ids).logits
        last = model(ids, output_hidden_states=True).hidden_states[2]
    assert torch.equal(last, torch.zeros_like(last))
    assert not torch.allclose(zeroed, plain)
    assert torch.equal(model(ids).logits, plain)


def test_splicing_an_input_changes_that_module_alone(bert: Path):
    """A block's input also goes around it, in the residual stream; its inner module's does not."""
    model = load_model(str(bert))
    ids = torch.arange(12).view(1, 12)
    dense = module_at(model, "encoder.layer.1.output.dense")
    block = module_at(model, "encoder.layer.1.output")
    with torch.no_grad(), splice(Hookpoint(dense, True), torch.zeros_like, 1):
        found = model(ids, output_hidden_states=True).hidden_states
    seen: list[torch.Tensor] = []
    handle = block.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    plain = model(ids, output_hidden_states=True).hidden_states
    handle.remove()
    assert torch.equal(found[1], plain[1])
    with torch.no_grad():
        assert torch.equal(found[2], block.LayerNorm(dense.bias + seen[0]))  # pyright: ignore


def test_tuple_outputs_are_understood(bert: Path):
    """An attention module returns (hidden states, weights)."""
    model = load_model(str(bert))
    module = module_at(model, "encoder.layer.0.attention")
    ids = torch.arange(12).view(1, 12)
    seen: list[object] = []

    for factor in (1, 2):
        with splice(Hookpoint(module), lambda hidden, factor=factor: hidden * factor, 1):
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
        assert sum(len(windows.rows(window)) for window in cut) == len(text)
        heads = windows.cut(TEXT, max_tokens=21)
        assert sum(len(windows.rows(window)) for window in heads) == 21
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
    with pytest.raises(ValueError, match="context_length must be at most 64, got 65"):
        TextWindows(tokenizer, 65, model)
    with pytest.raises(
        ValueError, match=r"must be \[batch, tokens, width\], found BaseModelOutput"
    ):
        hookpoints_at(model, ["transformer"])
    with pytest.raises(ValueError, match=r"no module 'h\.1'; nearest: transformer\.h\.1"):
        hookpoints_at(model, ["h.1:in"])
    for load in (load_model, load_tokenizer):
        with pytest.raises(
            ValueError, match="cannot load '.*absent' as a Hugging Face folder or id"
        ):
            load(str(tmp_path / "absent"))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="CUDA"):
            load_model(str(gpt2), "cuda")
