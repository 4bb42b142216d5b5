"""From the words of a command line to the library's configs, through tyro.

tyro frames the errors of the classes it fills; so it fills copies without checks, and the checks
run after it, where an error becomes one line.
"""

import argparse
import dataclasses
import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

import tyro

from fastsae.nn.activations import CHOICES
from fastsae.train import RECIPES, TrainConfig, recipe

T = TypeVar("T")
if TYPE_CHECKING:
    Activation: TypeAlias = str
    Recipe: TypeAlias = str
else:
    Activation, Recipe = Literal[tuple(CHOICES)], Literal[RECIPES]


class Unchecked:
    """Leaves the checks of a config to `checked`."""

    def __post_init__(self) -> None:
        pass


def unchecked(config: Any) -> Any:
    """A config, and those inside it, as values of classes that check nothing."""
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    nested = {n: unchecked(v) for n, v in values.items() if dataclasses.is_dataclass(v)}
    cls = dataclasses.make_dataclass(
        type(config).__name__,
        [(name, type(value), dataclasses.field(default=value)) for name, value in nested.items()],
        bases=(Unchecked, type(config)),
        namespace={"checked": type(config), "__doc__": type(config).__doc__},
        frozen=True,
        kw_only=True,
    )
    return cls(**values | nested)


def checked(command: Any) -> Any:
    """The config that `unchecked` was given, with its parser's values."""
    names = [field.name for field in dataclasses.fields(command.checked)]
    values = {name: getattr(command, name) for name in names}
    return command.checked(
        **{n: checked(v) if isinstance(v, Unchecked) else v for n, v in values.items()}
    )


def parse(command: type[T], name: str, words: Sequence[str], default: T | None = None) -> T:
    """A command with the values that words give, and else those of default."""
    given: dict[str, Any] = {} if default is None else {"default": default}
    flat, about = tyro.conf.OmitArgPrefixes[command], inspect.getdoc(command)
    return tyro.cli(flat, prog=f"fastsae {name}", args=words, description=about, **given)


def named(words: Sequence[str], **types: Any) -> argparse.Namespace:
    """The options of these names among words, None where not given; the rest is not looked at."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name, kind in types.items():
        parser.add_argument(f"--{name.replace('_', '-')}", f"--{name}", type=kind)
    try:
        return parser.parse_known_args(list(words))[0]
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from error


def training_default(words: Sequence[str]) -> TrainConfig:
    """The config that the recipe and the activation named by words start from."""
    given = named(words, activation=str, recipe=str, d_sae=int, batch_size=int)
    sizes = given.d_sae, given.batch_size
    config = TrainConfig() if given.recipe is None else recipe(given.recipe, *sizes)
    return config if given.activation is None else with_activation(config, given.activation)


def with_activation(config: TrainConfig, name: str) -> TrainConfig:
    """The config with that activation; ValueError lists those there are."""
    if name not in CHOICES:
        raise ValueError(f"activation must be one of {', '.join(CHOICES)}, got {name!r}")
    chosen, own = CHOICES[name], config.activation
    if chosen.name == own.name:  # what makes the choice, on top of what is set already
        plain = type(chosen)()
        special = {n: v for n, v in vars(chosen).items() if v != getattr(plain, n)}
        chosen = dataclasses.replace(own, **special)
    return dataclasses.replace(config, activation=chosen)
