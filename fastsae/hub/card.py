"""The model card of an SAE: what it is, its numbers, and how each library loads it."""

import html
import json
from collections.abc import Iterator
from typing import NamedTuple

import fastsae.interop as interop
from fastsae.interop.sae_lens import has_heads
from fastsae.nn import SAE
from fastsae.progress import printable
from fastsae.train.describe import describe_activation
from fastsae.train.summary import Origin
from fastsae.version import __version__

from .config import HUB_ID, PushConfig

TAGS = "sparse-autoencoder", "mechanistic-interpretability"
LIBRARY_TAGS = {"sae_lens": "saelens", "sparsify": "sparsify"}
"""The tags by which the Hub finds the SAEs of a library."""


class Results(NamedTuple):
    """Numbers of an SAE."""

    rows: list[tuple[str, str, str]]
    """Name, value and meaning of each."""

    measured_on: str
    """What they were measured on."""

    training: str | None
    """What training took."""


USAGE = {
    "fastsae": """
import fastsae

sae = fastsae.load("{repository}")
codes = sae.encode(x)  # codes.values and codes.indices
""",
    "sae_lens": """
from sae_lens import SAE

sae = SAE.from_pretrained("{repository}", "sae_lens")
latents = sae.encode(x)
""",
    "sparsify": """
from sparsify import SparseCoder

coder = SparseCoder.load_from_hub("{repository}", hookpoint="sparsify")
top = coder.encode(x)  # top.top_acts and top.top_indices
""",
    "dictionary_learning": """
import fastsae, fastsae.interop
from dictionary_learning.utils import load_dictionary

fastsae.interop.save(fastsae.load("{repository}"), "dictionary", "dictionary_learning")
dictionary, config = load_dictionary("dictionary", device="cpu")
""",
}
"""How libraries load it; x are activations [tokens, width]."""

NAMES = {"sae_lens": "SAELens"}

ENTITIES = {ord(mark): f"&#{ord(mark)};" for mark in "\\`*_[]()!|~:"}
"""Characters that are Markdown, by their codes, as HTML shows them."""


def model_card(
    sae: SAE,
    config: PushConfig,
    origin: Origin,
    results: Results | None,
    *,
    layouts: tuple[str, ...] = (),
    curves: bool = False,
) -> str:
    """The text of README.md.

    Args:
        origin: where its activations come from; without paths of a machine.
        layouts: formats of other libraries in directories of their names.
        curves: whether there is a curves.png.
    """
    parts = [*front_matter(config, origin, layouts), *description(sae, config, origin)]
    if results is not None:
        parts += ["", "## Results", "", f"Measured on {plain(results.measured_on)}."]
        parts += [f"Training: {results.training}."] if results.training else []
        parts += table(("", "", ""), [tuple(map(plain, row)) for row in results.rows])
    parts += ["", "![Training curves](curves.png)"] if curves else []
    parts += ["", "## Usage", "", f"With `x` activations of shape [tokens, {sae.d_in}]:"]
    for name in ("fastsae", *layouts, *convertible(sae)):
        lines = usage(name, config.repository, origin)
        parts += ["", f"### {NAMES.get(name, name)}", "", "```python", lines, "```"]
    return "\n".join(parts) + "\n"


def usage(name: str, repository: str, origin: Origin) -> str:
    """How a library loads it and encodes x."""
    lines = USAGE[name].strip().format(repository=repository)
    if name == "sae_lens" and has_heads(origin.get("hook_name")):
        *before, encode = lines.splitlines()
        flat = "sae.turn_off_forward_pass_hook_z_reshaping()  # x is [tokens, heads * d_head]"
        lines = "\n".join([*before, flat, encode])
    return lines


def front_matter(config: PushConfig, origin: Origin, layouts: tuple[str, ...]) -> Iterator[str]:
    """The metadata that the Hub reads, as YAML."""
    yield from ("---", "library_name: fastsae", "tags:")
    yield from (f"- {tag}" for tag in (*TAGS, *(LIBRARY_TAGS[name] for name in layouts)))
    if HUB_ID.fullmatch(base := origin.get("model_name", "")):
        yield f"base_model: {base}"
    if config.license is not None:
        yield f"license: {json.dumps(config.license)}"  # quoted, or it may be read as a number
    yield from ("---", "")


def description(sae: SAE, config: PushConfig, origin: Origin) -> Iterator[str]:
    """What the SAE is, and where its activations come from."""
    kind = "crosscoder" if sae.layers > 1 else "transcoder" if sae.d_out else "autoencoder"
    model = origin.get("model_name")
    of = f" of {code(model)}" if model else ""
    yield f"# {config.repository.split('/')[1]}"
    yield ""
    yield (
        f"A sparse {kind} of activations{of}: it rewrites them as a few active latents of "
        f"a dictionary of {sae.d_sae:,}. Saved by fastsae {__version__}."
    )
    yield from table(("", ""), [*facts(sae), *places(origin)])


def facts(sae: SAE) -> Iterator[tuple[str, str]]:
    """Its shape and activation."""
    yield "activation", describe_activation(sae.activation.cfg)
    yield "latents", f"{sae.d_sae:,}"
    yield "width", f"{sae.d_in:,}" if sae.d_out is None else f"{sae.d_in:,} to {sae.d_out:,}"
    yield "dtype", str(sae.W_enc.dtype).removeprefix("torch.")


def places(origin: Origin) -> Iterator[tuple[str, str]]:
    """Where its activations are taken, and how text is cut for them."""
    names = {
        "hf_hook_name": "hookpoint",
        "hook_name": "hookpoint in TransformerLens",
        "hf_hook_names": "hookpoints",
        "hf_hook_name_out": "hookpoint of the output",
        "hook_name_out": "output in TransformerLens",
        "dataset_path": "dataset",
    }
    shown = {origin.get("hf_hook_name"), origin.get("hf_hook_name_out")}
    for key, name in names.items():
        value = origin.get(key)
        if value is not None and (key.startswith("hf_") or value not in shown):
            values = (value,) if isinstance(value, str) else value
            yield name, ", ".join(map(code, values))
    if (size := origin.get("context_size")) is not None:
        begins = ", begins with BOS" if origin.get("prepend_bos") else ""
        first = ", first position left out" if origin.get("seqpos_slice") else ""
        yield "context", f"{size:,} tokens{begins}{first}"


def code(text: str) -> str:
    """Text of unknown origin as a code span, which cannot end it or begin another cell."""
    return f"`{printable(text, 200).replace('`', '_').replace('|', '_')}`"


def plain(text: str) -> str:
    """Text of files as it is: neither HTML nor Markdown, nor another cell."""
    return html.escape(printable(text)).translate(ENTITIES)


def table(head: tuple[str, ...], rows: "list[tuple[str, ...]]") -> Iterator[str]:
    """The lines of a table, after an empty one."""
    yield from ("", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}")
    for row in rows:
        yield f"| {' | '.join(cell.strip() for cell in row)} |"


def convertible(sae: SAE) -> tuple[str, ...]:
    """dictionary_learning, if it supports the SAE."""
    try:
        interop.contents(sae, "dictionary_learning")
    except ValueError:
        return ()
    return ("dictionary_learning",)
