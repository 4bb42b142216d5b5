"""Other names of hookpoints: TransformerLens hooks, and globs over module paths."""

import glob
import re
from collections.abc import Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn

from fastsae.data.hookpoints import INPUT


class Block(NamedTuple):
    """Where the hooks of a transformer block are, as paths in the block."""

    blocks: str
    """Path of the blocks in the model with a head."""

    attn_out: str
    mlp_out: str
    z: str
    """Input: the heads' outputs, concatenated."""

    post: str
    """Input: the MLP's activations."""

    resid_mid: str | None
    """Input: between attention and MLP; None if they are parallel."""

    resid_post: str = ""
    """The block's output, or the input of the norm that follows the last addition."""

    normalized_resid_post: str | None = None
    """The block's output, if it is that of a norm."""


_LLAMA = Block(
    "model.layers",
    "self_attn",
    "mlp",
    "self_attn.o_proj:in",
    "mlp.down_proj:in",
    "post_attention_layernorm:in",
)
_NORMED = _LLAMA._replace(
    attn_out="post_attention_layernorm",
    mlp_out="post_feedforward_layernorm",
    resid_mid="pre_feedforward_layernorm:in",
)
_GPT2 = Block("transformer.h", "attn", "mlp", "attn.c_proj:in", "mlp.c_proj:in", "ln_2:in")
_NEOX = Block(
    "gpt_neox.layers", "attention", "mlp", "attention.dense:in", "mlp.dense_4h_to_h:in", None
)
BLOCKS: dict[str, Block] = {
    "gpt2": _GPT2,
    "gpt_neo": _GPT2._replace(z="attn.attention.out_proj:in"),
    "gptj": _GPT2._replace(z="attn.out_proj:in", post="mlp.fc_out:in", resid_mid=None),
    "gpt_neox": _NEOX,
    "bloom": Block(
        "transformer.h",
        "self_attention.dense",
        "mlp.dense_4h_to_h",
        "self_attention.dense:in",
        "mlp.dense_4h_to_h:in",
        "post_attention_layernorm:in",
    ),
    "bert": Block(
        "bert.encoder.layer",
        "attention.output.dense",
        "output.dense",
        "attention.output.dense:in",
        "output.dense:in",
        "attention.output.LayerNorm:in",
        "output.LayerNorm:in",
        "",
    ),
    "opt": Block(
        "model.decoder.layers",
        "self_attn",
        "fc2",
        "self_attn.out_proj:in",
        "fc2:in",
        "final_layer_norm:in",
    ),
    "phi": _LLAMA._replace(z="self_attn.dense:in", post="mlp.fc2:in", resid_mid=None),
    "gemma2": _NORMED,
    "gemma3_text": _NORMED,
    "olmo2": _NORMED._replace(resid_mid="mlp:in"),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "olmo"), _LLAMA),
}
"""By the model type of the config."""

_OPT_350M = BLOCKS["opt"]._replace(
    resid_mid="self_attn_layer_norm:in",
    resid_post="final_layer_norm:in",
    normalized_resid_post="",
)
"""It normalizes after each addition, as BERT does."""

_OWNERS = {"z": "attn.", "post": "mlp."}
"""Modules of a block that have a hook, in TransformerLens; others are the block's own."""

_HOOK = re.compile(r"blocks\.(\d+|\*)\.(?:attn\.|mlp\.)?hook_(\w+)")


def is_path(name: str) -> bool:
    """Whether a hookpoint is a module's path, rather than a name that depends on the model."""
    return not glob.has_magic(name) and not _HOOK.fullmatch(name)


def module_paths(model: nn.Module, names: Sequence[str]) -> tuple[str, ...]:
    """The hookpoints that names, globs and paths stand for; ValueError for a name without one.

    A wildcard of a glob stands for a part of one step of a path.
    """
    paths: dict[str, None] = {}
    modules = [name for name, _ in model.named_modules() if name]
    for name in names:
        path = _translated(model, name)
        if glob.has_magic(path):
            found = _matches(modules, path)
            if not found:
                raise ValueError(f"{type(model).__name__} has no modules that match {name!r}")
            paths |= dict.fromkeys(found)
        else:
            paths[path] = None
    return tuple(paths)


def _matches(modules: list[str], pattern: str) -> list[str]:
    """In the model's order; no wildcard matches a dot."""
    at_input = INPUT if pattern.endswith(INPUT) else ""
    steps = pattern.removesuffix(INPUT).split(".")
    return [
        f"{module}{at_input}"
        for module in modules
        if len(own := module.split(".")) == len(steps) and all(map(fnmatchcase, own, steps))
    ]


def _translated(model: nn.Module, name: str) -> str:
    """A TransformerLens name as a path; other names as they are."""
    hook = _HOOK.fullmatch(name)
    if hook is None:
        return name
    kind = str(getattr(getattr(model, "config", None), "model_type", None))
    block = BLOCKS.get(kind)
    if block is None:
        raise ValueError(
            f"{name!r} is known for the model types {', '.join(sorted(BLOCKS))}, not for {kind!r}: "
            "give a module's path"
        )
    if getattr(model.config, "do_layer_norm_before", None) is False:
        block = _OPT_350M
    number, place = hook.groups()
    blocks, *paths = block
    if getattr(model, "base_model", None) is model:  # loaded without a head
        blocks = blocks.removeprefix(f"{model.base_model_prefix}.")
    found = zip(Block._fields[1:], paths, strict=True)
    places = {"resid_pre": INPUT} | {
        place: path and f".{path}" for place, path in found if path is not None
    }
    if place not in places:
        raise ValueError(f"{kind} has no hook {place!r} in its blocks, only {', '.join(places)}")
    return f"{blocks}.{number}{places[place]}"


def lens_name(model: nn.Module, path: str) -> str | None:
    """The TransformerLens name of a hookpoint's path; None if it has none, or if names of this
    model's type are not known."""
    number = re.search(r"\.(\d+)(?=[.:]|$)", path)
    if number is None:
        return None
    for place in ("resid_pre", *Block._fields[1:]):
        name = f"blocks.{number[1]}.{_OWNERS.get(place, '')}hook_{place}"
        with suppress(ValueError):  # the model has no such hook
            if _translated(model, name) == path:
                return name
    return None
