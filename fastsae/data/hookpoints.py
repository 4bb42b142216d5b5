"""Hookpoints: the places in a model where hidden states are read or replaced."""

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fastsae.data.model import TokenBatch

INPUT = ":in"  # suffix of a hookpoint's path: the module's input instead of its output
PROBE = (2, 13)  # windows and tokens of the pass that finds layouts; no model has 13 heads

Layout = Literal["tokens", "flat", "heads", "heads_first"]
"""How a hookpoint's tensor is arranged: [B, T, d_in], [B * T, d_in], [B, T, heads, d_in / heads]
or [B, heads, T, d_in / heads]."""


class Hookpoint(NamedTuple):
    """Where hidden states are read or replaced."""

    module: nn.Module
    at_input: bool = False
    """Whether they are the module's input instead of its output."""

    layout: Layout = "tokens"

    width: int = 0
    """Of a token's row."""


def module_at(model: nn.Module, path: str) -> nn.Module:
    """The module at a dotted path such as `encoder.layer.3`; a ValueError lists close matches."""
    names = [name for name, _ in model.named_modules() if name]
    if path in names:
        return model.get_submodule(path)
    near = [name for name in names if name.endswith(f".{path}")]
    near = near or difflib.get_close_matches(path, names, n=5, cutoff=0.4)
    near = near or [name for name, _ in model.named_children()]
    raise ValueError(f"{type(model).__name__} has no module {path!r}; nearest: {', '.join(near)}")


def hookpoints_at(model: nn.Module, paths: Sequence[str]) -> list[Hookpoint]:
    """The outputs of the modules at dotted paths, or with the suffix `:in` their inputs.

    A forward pass over a few tokens finds their layouts and widths. ValueError if a path is not in
    the model, with close matches, or if the module does not give a row for every token.
    """
    found = [Hookpoint(module_at(model, p.removesuffix(INPUT)), p.endswith(INPUT)) for p in paths]
    ids = torch.zeros(PROBE, dtype=torch.int64)
    try:
        tensors = _captured(model, found, TokenBatch(ids, torch.ones_like(ids), ids == 0))
    except ValueError as error:
        if _encoder(model) is None or runner(model, found) is not model:
            raise
        raise ValueError(
            f"of {type(model).__name__} only the encoder runs on text alone, "
            f"not {' and '.join(paths)}: {error}"
        ) from error
    complete = []
    for path, hook, x in zip(paths, found, tensors, strict=True):
        layout = _layout(path, x)
        width = _rows(x, layout, PROBE[0]).shape[-1]
        complete.append(hook._replace(layout=layout, width=width))
    return complete


def _layout(path: str, tensor: Tensor) -> Layout:
    shape, (windows, tokens) = tuple(tensor.shape), PROBE
    if len(shape) == 3 and shape[:2] == PROBE:
        return "tokens"
    if len(shape) == 2 and shape[0] == windows * tokens:
        return "flat"
    if len(shape) == 4 and shape[:2] == PROBE:
        return "heads"
    if len(shape) == 4 and (shape[0], shape[2]) == PROBE:
        if shape[3] == tokens:
            raise ValueError(
                f"{path} gives attention weights, [batch, heads, tokens, tokens]: "
                "a hookpoint must have a row for each token"
            )
        return "heads_first"
    raise ValueError(
        f"{path} must have a row for each token of each window, [batch, tokens, width]: "
        f"found {shape} for {windows} windows of {tokens} tokens"
    )


def _rows(tensor: Float[Tensor, "..."], layout: Layout, windows: int) -> Float[Tensor, "B T d_in"]:
    """A hookpoint's tensor with a row per token; heads are concatenated."""
    if layout == "flat":
        return tensor.unflatten(0, (windows, -1))
    return (tensor.transpose(1, 2) if layout == "heads_first" else tensor).flatten(2)


def _unrows(
    rows: Float[Tensor, "B T d_in"], tensor: Float[Tensor, "..."], layout: Layout
) -> Float[Tensor, "..."]:
    """Rows in the layout of the tensor that they are from."""
    if layout == "heads_first":
        return rows.unflatten(2, (tensor.shape[1], -1)).transpose(1, 2)
    return rows.reshape(tensor.shape)


def _tensor(passed: Any) -> Tensor:
    """The hidden states in a module's inputs or outputs: a tensor, or the first of a tuple."""
    hidden = passed[0] if isinstance(passed, tuple) and passed else passed
    if not isinstance(hidden, Tensor):
        raise ValueError(
            f"a hookpoint's activations must be [batch, tokens, width], found "
            f"{type(hidden).__name__}"
        )
    return hidden


@contextmanager
def _hooked(hookpoint: Hookpoint, replace: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While active, replace the hookpoint's tensor."""

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        replaced = replace(_tensor(output))
        return (replaced, *output[1:]) if isinstance(output, tuple) else replaced

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (replace(_tensor(args)), *args[1:]), kwargs
        hidden = _tensor(kwargs.get("hidden_states"))
        return (), {**kwargs, "hidden_states": replace(hidden)}

    if hookpoint.at_input:
        handle = hookpoint.module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = hookpoint.module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def splice(
    hookpoint: Hookpoint,
    replace: Callable[[Float[Tensor, "B T d_in"]], Float[Tensor, "B T d_in"]],
    windows: int,
) -> Iterator[None]:
    """While active, replace the hookpoint's hidden states, in batches of `windows` windows."""

    def replaced(tensor: Tensor) -> Tensor:
        rows = _rows(tensor, hookpoint.layout, windows)
        return _unrows(replace(rows), tensor, hookpoint.layout)

    with _hooked(hookpoint, replaced):
        yield


def _encoder(model: nn.Module) -> nn.Module | None:
    """The encoder of a model that also has a decoder; the config of a T5 encoder denies that."""
    encoder, decoder = getattr(model, "encoder", None), getattr(model, "decoder", None)
    return encoder if isinstance(encoder, nn.Module) and decoder is not None else None


def runner(model: nn.Module, hookpoints: Sequence[Hookpoint]) -> nn.Module:
    """The part of a model to run on text: the encoder alone if all hookpoints are in one."""
    encoder = _encoder(model)
    inside = set(encoder.modules()) if encoder else set()
    return encoder if encoder and all(h.module in inside for h in hookpoints) else model


class _Reached(Exception):
    """Ends a forward pass once all hidden states are captured."""


def hidden_at(
    model: nn.Module, hookpoints: Sequence[Hookpoint], batch: TokenBatch
) -> list[Float[Tensor, "B T _"]]:
    """The hidden states at each hookpoint, from one forward pass that stops after the last one."""
    found = zip(hookpoints, _captured(model, hookpoints, batch), strict=True)
    return [_rows(tensor, hook.layout, len(batch.input_ids)) for hook, tensor in found]


def _captured(model: nn.Module, hookpoints: Sequence[Hookpoint], batch: TokenBatch) -> list[Tensor]:
    captured: dict[int, Tensor] = {}

    def capture(place: int, hidden: Tensor) -> Tensor:
        captured.setdefault(place, hidden.clone())  # a later layer may write to it
        if len(captured) == len(hookpoints):
            raise _Reached
        return hidden

    device = next(model.parameters()).device
    with torch.no_grad(), ExitStack() as hooked:
        for place, hookpoint in enumerate(hookpoints):
            hooked.enter_context(_hooked(hookpoint, partial(capture, place)))
        try:
            runner(model, hookpoints)(
                input_ids=batch.input_ids.to(device),
                attention_mask=batch.attention_mask.to(device),
            )
        except _Reached:
            return [captured[place] for place in range(len(hookpoints))]
    missed = next(hook.module for place, hook in enumerate(hookpoints) if place not in captured)
    raise ValueError(f"the model's forward pass never called its {type(missed).__name__}")
