"""Contents of summary.json, and how the results of a run are read."""

from collections.abc import Callable
from pathlib import Path
from typing import NotRequired, TypedDict, TypeVar

from fastsae.config import from_json
from fastsae.files import read_json

from .facts import Facts

T = TypeVar("T")


class Origin(TypedDict, total=False):
    """Where the activations of a run come from, as far as it is known, in the terms of SAELens'
    metadata: its own evaluation and SAEBench's need them to run the model again."""

    model_name: str
    """Id on the Hugging Face hub, or a directory."""
    model_class_name: str
    """HookedTransformer if hook_name is a TransformerLens name, else AutoModelForCausalLM."""
    hook_name: str
    """The hookpoint: its TransformerLens name if it has one, else the path of a module."""
    hf_hook_name: str
    """The path of the module in the Hugging Face model; with :in, of its input."""
    hook_name_out: str
    """The hookpoint of a transcoder's targets."""
    hf_hook_name_out: str
    hf_hook_names: tuple[str, ...]
    """The hookpoints of a crosscoder's layers, which has none of the four above."""
    prepend_bos: bool
    """Whether every context begins with the BOS token."""
    context_size: int
    """Tokens per context, special tokens included."""
    seqpos_slice: tuple[int | None, ...]
    """First position of a context that was trained on, and the one after the last; None for the
    end. Absent if all were."""
    dataset_path: str
    """Id or directory of the dataset; there is none for text files."""


class Summary(TypedDict):
    """The saved SAE on data that it was not trained on, if there is some, and how training went."""

    fvu: float
    fvu_all: float
    l0: float
    dead_fraction: float
    evaluated_on: str
    """held-out data or training data."""
    evaluated_tokens: int
    left_out_of_evaluation: int
    tokens: int
    left_out_tokens: int
    gamma: tuple[float, ...]
    """|mean| / |std| of each source."""
    tokens_per_second: float
    seconds: float
    step_path: str
    """fused or autograd."""
    sae_lens: str
    """The folder of the SAE for SAELens, or why there is none."""
    origin: NotRequired[Origin]
    """Where the activations come from, if it is known."""
    local: NotRequired[tuple[str, ...]]
    """Which values of origin were paths of the machine, as opposed to ids on the Hugging Face hub,
    when the run was made; older versions did not store it."""
    ended_early: NotRequired[str]
    """Why a callback ended the run, if one did."""
    activation: NotRequired[str]
    """Its name; older versions did not store it."""
    facts: NotRequired[Facts]
    """What was planned, and what it took; not in a sweep, where SAEs share memory and time."""


def read_results(kind: Callable[..., T], path: Path) -> T:
    """The value in a JSON file, of a type such as a TypedDict or a dict of them; keys that it does
    not have are left out. ValueError names the file and the entry that is missing or invalid."""
    return from_json(kind, read_json(path), str(path))
