"""From the words of a command line, and a TOML file, to settings.

Settings are given by their names, which no two parts of a config share.
"""

import dataclasses
import difflib
import tomllib
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from fastsae.config import RENAMED, representable
from fastsae.nn import ActivationConfig
from fastsae.nn.activations import CHOICES
from fastsae.train import TrainConfig
from fastsae.train.recipes import recipe_settings

T = TypeVar("T")
Given = list[tuple[str, list[str]]]
"""Each setting that is given, in order, with the words up to the next one; first those before any,
under the empty name. The last of several counts."""
Settings = dict[str, Any]
"""Values by the names of settings. Those of a config make no sense together until all are known, so
that only the complete config is checked."""


class FromFile(list[str]):
    """Words from a file: all are values of their setting, none a positional argument."""


FIELD_NAMES = RENAMED | {
    "dict_size": "d_sae",
    "epochs": "steps",
    "expansion_factor": "d_sae",
    "l0": "target_l0",
    "l1": "l1_coef",
    "l1_coefficient": "l1_coef",
    "learning_rate": "lr",
    "num_latents": "d_sae",
    "output": "out",
    "top_k": "k",
}
"""What users of other libraries look for."""


def read_words(words: Sequence[str]) -> Given:
    """The settings that words give, after those in the files of --config."""
    given: Given = [("", [])]
    stored: Given = []
    rest = iter(words)
    for word in rest:
        if not word.startswith("--"):
            given[-1][1].append(word)
            continue
        flag, equals, value = word.removeprefix("--").partition("=")
        if flag == "config":  # later words continue those before it
            path = value if equals else next(rest, "")
            if not path or path.startswith("--"):
                raise ValueError("--config needs a value")
            stored += read_toml(Path(path))
            continue
        if not flag:
            raise ValueError(f"unexpected argument {word!r}")
        given.append((flag.replace("-", "_"), [value] if equals else []))
    return stored + given


def read_toml(path: Path) -> Given:
    """The settings in a TOML file as words, by their names, whatever table they are in."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a TOML file: {error}") from error
    found = [*settings_in(table)]
    names = [name for name, _ in found]
    for name in names:
        if not name or names.count(name) > 1:
            fault = "is given twice" if name else "is no setting's name"
            raise ValueError(f"{path}: {name!r} {fault}")
    return found


def settings_in(table: dict[str, Any], title: str = "") -> Iterator[tuple[str, list[str]]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from settings_in(value, key)
        else:
            values = value if isinstance(value, list) else [value]
            name = title if title and key == "name" else key  # [activation] has its name inside
            words = [str(v).lower() if isinstance(v, bool) else str(v) for v in values]
            yield name.replace("-", "_"), FromFile(words)


def filled(cls: type[T], given: Given, positional: Sequence[str] = (), **parts: Settings) -> T:
    """A command's options, and the configs that are parts of it, with what is given."""
    values, hints = read_values(cls, given, positional, **parts), typing.get_type_hints(cls)
    configs = {n: hints[n](**updated(hints[n], part, values)) for n, part in parts.items()}
    return cls(**configs, **{n: v for n, v in values.items() if n in hints and n not in configs})


def read_values(
    cls: type, given: Given, positional: Sequence[str] = (), **parts: Settings
) -> Settings:
    """What is given of a command's options and the settings of its parts, by name."""
    fields = [field for field in dataclasses.fields(cls) if field.name not in parts]
    hints = typing.get_type_hints(cls)
    known = {field.name: hints[field.name] for field in fields}
    for name, part in parts.items():
        known |= types_in(hints[name], part)
    values = typed(given, known, positional)
    for field in fields:
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and field.name not in values:
            name = field.name.upper() if field.name in positional else option(field.name)
            raise ValueError(f"{name} is required")
    return values


def types_in(cls: type, settings: Settings) -> Settings:
    """The types of a config's settings, and of those of its parts, by name."""
    hints, found = typing.get_type_hints(cls), {}
    for name, value in settings.items():
        part = part_of(hints[name], value)
        own = vars(value) if part and value is not None else fields_of(part)
        found |= types_in(part, own) if part else {name: hints[name]}
    return found


def part_of(hint: Any, value: Any) -> Any:
    """The class of a setting that is a config itself, also if it may be left out; else None."""
    if dataclasses.is_dataclass(value):
        return type(value)
    kinds = [kind for kind in kinds_of(hint) if dataclasses.is_dataclass(kind)]
    return kinds[0] if kinds else None


def fields_of(part: Any) -> Settings:
    return {field.name: field.default for field in dataclasses.fields(part)} if part else {}


def updated(cls: type, settings: Settings, values: Settings) -> Settings:
    """A config's settings with these values for them and for those of its parts. A part that was
    left out comes into being by a value for one of its settings."""
    hints, result = typing.get_type_hints(cls), {}
    for name, value in settings.items():
        part = part_of(hints[name], value)
        if part is None:
            result[name] = values.get(name, value)
        elif value is not None:
            result[name] = part(**updated(part, vars(value), values))
        else:
            own = {n: values[n] for n in fields_of(part) if n in values}
            for needed, default in fields_of(part).items():
                if own and default is dataclasses.MISSING and needed not in own:
                    raise ValueError(f"{option(next(iter(own)))} needs {option(needed)}, too")
            result[name] = part(**own) if own else None
    return result


def typed(given: Given, hints: dict[str, Any], positional: Sequence[str] = ()) -> dict[str, Any]:
    """The values that words stand for; ValueError for an unknown name, or words too many. A list
    may be given in several parts."""
    values, loose, lists = {}, [], dict[str, list[str]]()
    for name, words in given:
        if not name:
            loose += words
            continue
        stored = isinstance(words, FromFile)
        if name.startswith("no_") and hints.get(name[3:]) is bool and not stored:
            name, words = name[3:], ["false", *words]
        if name not in hints:
            raise ValueError(unknown(name, hints))
        if not stored and any(... in typing.get_args(kind) for kind in kinds_of(hints[name])):
            words = lists[name] = lists.get(name, []) + words
        count = arity(hints[name], words)
        if stored and (len(words) != count or hints[name] is bool and not count):
            wanted = "one value" if count == 1 else f"{count} values"
            wanted = "true or false" if hints[name] is bool else wanted
            raise ValueError(f"{name} must be {wanted}, got {' '.join(words)!r} in the file")
        if not count and hints[name] is not bool and not stored:
            raise ValueError(f"{option(name)} needs a value")
        values[name] = converted(option(name), hints[name], words[:count])
        loose += words[count:]
    for name in positional:
        count = arity(hints[name], loose)
        if loose:
            values[name] = converted(name.upper(), hints[name], loose[:count])
        loose = loose[count:]
    if loose:
        raise ValueError(f"unexpected argument {loose[0]!r}")
    return values


def option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def unknown(name: str, hints: dict[str, Any]) -> str:
    """What to say of an option that there is not, with those that may have been meant."""
    elsewhere = {n for cfg in CHOICES.values() for n in vars(cfg)} - {*hints}
    meant = FIELD_NAMES.get(name, name)
    close = [meant] if meant in {*hints, *elsewhere} else difflib.get_close_matches(name, hints)
    owners = [n for n, cfg in CHOICES.items() if meant in vars(cfg) and meant in elsewhere]
    text = f"unknown option {option(name)}"
    if close and (meant != name or not owners):
        text += f"; did you mean {' or '.join(map(option, close))}?"
    return text + (f" (for --activation {', '.join(owners)})" if owners else "")


def kinds_of(hint: Any) -> list[Any]:
    """The types that a union is of, or the one type there is."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return list(typing.get_args(hint)) if union else [hint]


def arity(hint: Any, words: Sequence[str]) -> int:
    """How many of the words after an option are its own."""
    if hint is bool:
        return int(words[:1] in (["true"], ["false"]))
    (sizes,) = [typing.get_args(k) for k in kinds_of(hint) if typing.get_origin(k) is tuple] or [()]
    return len(words) if ... in sizes else len(sizes) or 1


def converted(name: str, hint: Any, words: list[str]) -> Any:
    """The value of a type that words stand for; ValueError that begins with the name."""
    kinds = kinds_of(hint)
    if type(None) in kinds and words in (["none"], ["None"]):
        return None
    many = [kind for kind in kinds if typing.get_origin(kind) is tuple]
    if many and (len(words) > 1 or str not in kinds):
        sizes = typing.get_args(many[0])
        if ... not in sizes and len(words) != len(sizes):
            raise ValueError(f"{name} takes {len(sizes)} values, got {len(words)}")
        return tuple(converted(name, sizes[0], [word]) for word in words)
    if hint is bool:
        return words != ["false"]
    if not words or not words[0]:
        raise ValueError(f"{name} needs a value")
    (kind,) = [k for k in kinds if k is not type(None) and k not in many]
    if typing.get_origin(kind) is Literal:
        allowed = typing.get_args(kind)
        if words[0] not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {words[0]!r}")
        return words[0]
    try:
        value = kind(words[0])
    except ValueError:
        value = None
    if value is None or not representable(value):
        wanted = "a whole number" if kind is int else "a finite number"
        wanted += " of at most 64 bits" * (kind is int and value is not None)
        raise ValueError(f"{name} must be {wanted}, got {words[0]!r}")
    return value


def training_start(given: Given) -> Settings:
    """The settings that the recipe and the activation asked for start from."""
    kinds = {"activation": str, "recipe": str | None, "d_sae": int, "batch_size": int}
    values = {n: converted(option(n), kinds[n], words[:1]) for n, words in given if n in kinds}
    start = {**vars(TrainConfig())}
    if values.get("recipe") is not None:
        start |= recipe_settings(values["recipe"], values.get("d_sae"), values.get("batch_size"))
    return with_activation(start, values["activation"]) if "activation" in values else start


def with_activation(settings: Settings, name: str) -> Settings:
    """Settings of training with that activation, which keeps its own where it is of that kind."""
    plain, special = choice(name)
    own = settings["activation"]
    kept = own if isinstance(own, type(plain)) else plain
    return settings | {"activation": dataclasses.replace(kept, **special)}


def choice(name: str) -> tuple[ActivationConfig, Settings]:
    """The defaults of an activation, and what makes a variant such as abstopk differ from them;
    ValueError lists the activations there are."""
    if name not in CHOICES:
        raise ValueError(f"activation must be one of {', '.join(CHOICES)}, got {name!r}")
    plain = type(CHOICES[name])()
    return plain, {n: v for n, v in vars(CHOICES[name]).items() if v != getattr(plain, n)}
