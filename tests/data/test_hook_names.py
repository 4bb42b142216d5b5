"""TransformerLens names mean the same in every architecture, and globs match whole steps."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from fastsae.data import HarvestConfig, harvest_each
from fastsae.data.hook_names import BLOCKS, lens_name, module_paths
from fastsae.data.hookpoints import hidden_at, hookpoints_at, module_at
from fastsae.data.model import TokenBatch

SIZE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "head_dim": 8,
    "pad_token_id": 0,
}
OWN: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global"], 2]], "num_layers": 2},
    "gptj": {"rotary_dim": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
}
FULL = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "post")
POST_NORM = ("bert", "opt-350m")


def build(kind: str, auto: Any = AutoModelForCausalLM) -> PreTrainedModel:
    torch.manual_seed(0)
    model_type, *variant = kind.split("-")
    config = AutoConfig.for_model(model_type, **OWN.get(model_type, {}))
    for name, value in SIZE.items():
        if hasattr(config, name):
            setattr(config, name, value)
    if variant:
        config.do_layer_norm_before = False
    model = auto.from_config(config).eval()
    for weight in model.parameters():  # else biases are 0 and norms do nothing
        weight.data += 0.1 * torch.randn_like(weight) * (weight.ndim == 1)
    return model


@pytest.mark.parametrize("kind", [*BLOCKS, "opt-350m"])
def test_names_fulfil_the_equations_of_a_block(kind: str):
    model = build(kind)
    parallel = kind in BLOCKS and BLOCKS[kind].resid_mid is None
    places = [place for place in FULL if not (parallel and place == "resid_mid")]
    places += ["normalized_resid_post"] * (kind in POST_NORM)
    prefix = {"z": "attn.", "post": "mlp."}
    names = [f"blocks.1.{prefix.get(place, '')}hook_{place}" for place in places]
    paths = module_paths(model, names)
    assert [lens_name(model, path) for path in paths] == names
    ids = torch.arange(1, 11).view(2, 5)
    batch = TokenBatch(ids, torch.ones_like(ids), ids > 0)
    at = dict(zip(places, hidden_at(model, hookpoints_at(model, paths), batch), strict=True))
    if not parallel:
        torch.testing.assert_close(at["resid_mid"], at["resid_pre"] + at["attn_out"])
    before = at["resid_pre"] + at["attn_out"]
    if kind in POST_NORM:
        with torch.no_grad():
            norms = [
                module_at(model, paths[places.index(f"resid_{place}")].removesuffix(":in"))
                for place in ("mid", "post")
            ]
            before = norms[0](at["resid_mid"])
            after = norms[1](at["resid_post"])
        torch.testing.assert_close(at["normalized_resid_post"], after)
    torch.testing.assert_close(at["resid_post"], before + at["mlp_out"])
    for place, out in (("z", "attn_out"), ("post", "mlp_out")):
        path = paths[places.index(place)].removesuffix(":in")
        with torch.no_grad():
            projected = module_at(model, path)(at[place])
        if "layernorm" not in paths[places.index(out)]:
            torch.testing.assert_close(projected, at[out])


@pytest.mark.parametrize("kind", ["bert", "gpt2", "opt", "llama", "gpt_neox"])
def test_a_model_without_a_head_has_the_same_names(kind: str):
    names = ["blocks.*.hook_resid_post", "blocks.0.hook_mlp_out"]
    whole, base = build(kind), build(kind, AutoModel)
    found = module_paths(base, names)
    assert module_paths(whole, names) == tuple(f"{whole.base_model_prefix}.{p}" for p in found)
    hookpoints_at(base, found)


def test_globs_match_whole_steps_in_the_models_order():
    model = build("gpt2")
    blocks = ("transformer.h.0", "transformer.h.1")
    assert module_paths(model, ["transformer.h.*"]) == blocks
    assert module_paths(model, ["blocks.*.hook_resid_pre"]) == tuple(f"{b}:in" for b in blocks)
    assert module_paths(model, ["transformer.h.1", "*.h.?"]) == blocks[::-1]
    assert module_paths(model, ["transformer.h.1.ln_*:in"]) == tuple(
        f"transformer.h.1.ln_{n}:in" for n in (1, 2)
    )


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("gpt2", "model.layers.*", "GPT2LMHeadModel has no modules that match 'model.layers.*'"),
        ("gptj", "blocks.0.hook_resid_mid", "gptj has no hook 'resid_mid' in its blocks, only"),
        (
            "roberta",
            "blocks.0.hook_resid_pre",
            "is known for the model types bert, bloom, .*, not for 'roberta'",
        ),
    ],
)
def test_names_without_a_module_are_named(kind: str, name: str, message: str):
    with pytest.raises(ValueError, match=message):
        module_paths(build(kind), [name])


def test_a_harvest_stores_the_paths(gpt2: Path, tmp_path: Path):
    (tmp_path / "a.txt").write_text("was it the best")
    config = HarvestConfig(
        model=str(gpt2),
        hookpoint=("blocks.1.hook_mlp_out", "transformer.h.*.ln_2"),
        out=tmp_path / "out",
        text=(str(tmp_path / "a.txt"),),
        context_length=16,
    )
    found = harvest_each(config, progress=False)
    wanted = ["transformer.h.1.mlp", *(f"transformer.h.{n}.ln_2" for n in range(4))]
    assert list(found) == [shards.hookpoint for shards in found.values()] == wanted
    written = {path: path.stat().st_mtime_ns for path in config.out.rglob("*")}
    harvest_each(config, progress=False)
    assert {path: path.stat().st_mtime_ns for path in config.out.rglob("*")} == written


def test_the_docs_list_the_model_types():
    page = (Path(__file__).parents[2] / "docs/harvest.md").read_text()
    listed = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (.*?) \| `[\w.]+\.N` \|", page, re.M)))
    assert sorted(listed) == sorted(BLOCKS)
