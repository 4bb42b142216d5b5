"""Modules of many architectures: each gives a row per token, or a clear error."""

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from fastsae.data.hookpoints import hidden_at, hookpoints_at, splice
from fastsae.data.model import TokenBatch

HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_hidden_layers": 2}
SMALL: dict[str, Any] = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, **HEADS}
EXPERTS: dict[str, Any] = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
SEQ2SEQ: dict[str, Any] = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2}


class Attention(nn.Module):
    """Keeps its heads apart, before the tokens."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states.unflatten(2, (4, 8)).transpose(1, 2) * 2


class HeadsFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.heads = nn.Embedding(99, 32), Attention()
        self.weights, self.mixed = nn.Identity(), nn.Identity()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        heads = self.heads(self.embed(input_ids))
        values = self.weights(heads @ heads.mT) @ heads
        return self.mixed(values.transpose(1, 2).flatten(2))


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    match name:
        case "heads_first":
            model = HeadsFirst()
        case "opt":
            config = transformers.OPTConfig(
                vocab_size=99, hidden_size=32, ffn_dim=48, word_embed_proj_dim=32, **HEADS
            )
            model = transformers.OPTForCausalLM(config)
        case "qwen3_moe":
            config = transformers.Qwen3MoeConfig(num_key_value_heads=2, **SMALL, **EXPERTS)
            model = transformers.Qwen3MoeForCausalLM(config)
        case "mt5":
            model = transformers.MT5Model(transformers.MT5Config(**SEQ2SEQ))
        case _:
            config = transformers.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4)
            model = transformers.GPT2LMHeadModel(config)
    return model.eval()


def batch() -> TokenBatch:
    """Two windows, one of them padded; as many tokens as there are heads."""
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    mask = (ids > 0).long()
    return TokenBatch(ids, mask, mask.bool())


@pytest.mark.parametrize(
    ("name", "path", "width", "layout"),
    [
        ("opt", "model.decoder.layers.1.fc1", 48, "flat"),
        ("opt", "model.decoder.layers.1.fc2:in", 48, "flat"),
        ("qwen3_moe", "model.layers.1.self_attn.q_norm", 32, "heads"),
        ("qwen3_moe", "model.layers.1.self_attn.k_norm:in", 16, "heads"),
        ("qwen3_moe", "model.layers.1.mlp.gate", 5, "flat"),
        ("qwen3_moe", "model.layers.1.mlp", 32, "tokens"),
        ("heads_first", "heads", 32, "heads_first"),
        ("mt5", "encoder.block.1", 32, "tokens"),
    ],
)
def test_rows_are_those_of_the_windows_alone(name: str, path: str, width: int, layout: str):
    """Whatever the layout: a window's rows do not depend on its neighbors in the batch."""
    model, both = build(name), batch()
    hooks = hookpoints_at(model, [path])
    assert hooks[0].layout == layout
    (rows,) = hidden_at(model, hooks, both)
    assert rows.shape == (2, 4, width)
    for window, (ids, length) in enumerate(zip(both.input_ids, (4, 2), strict=True)):
        ids = ids[None, :length]
        (alone,) = hidden_at(model, hooks, TokenBatch(ids, torch.ones_like(ids), ids > 0))
        torch.testing.assert_close(rows[window, :length], alone[0])


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("opt", "model.decoder.layers.1.fc1"),
        ("qwen3_moe", "model.layers.1.self_attn.q_norm"),
        ("heads_first", "heads"),
    ],
)
def test_splicing_undoes_the_layout(name: str, path: str):
    model, both = build(name), batch()
    (hook,) = hookpoints_at(model, [path])
    seen: list[torch.Tensor] = []

    def outputs(change: Any) -> torch.Tensor:
        with torch.no_grad(), splice(hook, change, 2):
            handle = hook.module.register_forward_hook(lambda *passed: seen.append(passed[2]))
            model(input_ids=both.input_ids, attention_mask=both.attention_mask)
            handle.remove()
        return seen.pop()

    plain = outputs(lambda rows: rows)
    (rows,) = hidden_at(model, [hook], both)
    assert torch.equal(outputs(lambda _: rows), plain)
    assert torch.equal(outputs(lambda rows: 2 * rows), 2 * plain)


@pytest.mark.parametrize(
    ("name", "path", "message"),
    [
        ("gpt2", "transformer.wpe", r"wpe must have a row for .* found \(1, 13, 32\)"),
        ("heads_first", "weights", "weights gives attention weights, .* a row for each token"),
        ("qwen3_moe", "model.rotary_emb", r"rotary_emb must have .* found \(1, 13, 8\)"),
        (
            "mt5",
            "decoder.block.0",
            "of MT5Model only the encoder runs on text alone, not decoder.block.0",
        ),
    ],
)
def test_a_module_without_a_row_per_token_is_named(name: str, path: str, message: str):
    with pytest.raises(ValueError, match=message) as error:
        hookpoints_at(build(name), [path])
    assert "\n" not in str(error.value)
