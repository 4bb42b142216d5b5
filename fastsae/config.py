"""Frozen dataclass trees to plain JSON values and back, strictly."""

import dataclasses
import math
import reprlib
import types
import typing
from pathlib import Path
from typing import Any, TypeVar, Union

T = TypeVar("T")

RENAMED = {"price_warmup": "sparsity_warmup", "centre": "center"}
"""Settings in files of older versions, by their names there."""


def check_choices(config: Any, **choices: Any) -> None:
    """ValueError unless each named setting is one of the Literal's values given for it."""
    for name, choice in choices.items():
        value, allowed = getattr(config, name), typing.get_args(choice)
        if value not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, got {value!r}")


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass tree as a dict of JSON values.

    Of a class that has a method `named`, which finds a class by its name, the name comes first.
    """
    name = {"name": config.name} if hasattr(config, "named") else {}
    return name | {
        field.name: to_json(getattr(config, field.name)) for field in dataclasses.fields(config)
    }


def to_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple | list):
        return [to_json(item) for item in value]
    return value


def from_dict(cls: type[T], values: Any, where: str = "") -> T:
    """The dataclass that to_dict made values from.

    Raises ValueError that names an unknown key, a missing one, or a value of the wrong type.
    """
    name = where or cls.__name__
    if not isinstance(values, dict):
        raise ValueError(f"{name} must be an object, got {reprlib.repr(values)}")
    if find := getattr(cls, "named", None):
        name = str(values.get("name"))[:60]
        cls, values = find(name), {key: v for key, v in values.items() if key != "name"}
    fields = {field.name: field for field in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    values = {RENAMED.get(key, key): value for key, value in values.items()}
    for key in values:
        if key not in fields:
            known = ", ".join(fields)
            raise ValueError(f"{name} has no setting {reprlib.repr(key)}; its settings are {known}")
    if values.get("l1_coef") == 0 and values.get("target_l0") and fields["l1_coef"].default is None:
        values = {**values, "l1_coef": None}  # older files say so where none was given
    hints = typing.get_type_hints(cls)
    for key, field in fields.items():
        required = field.default is dataclasses.MISSING
        if key not in values and required and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{name} lacks the setting {key!r}")
    return cls(**{key: from_json(hints[key], v, f"{name}.{key}") for key, v in values.items()})


def from_json(hint: Any, value: Any, where: str) -> Any:
    """A JSON value as the setting of that type; ValueError if it is of another one."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is dict or typing.is_typeddict(hint):
        if not isinstance(value, dict):
            raise ValueError(f"{where} must be an object, got {reprlib.repr(value)}")
        hints = dict.fromkeys(value, arguments[1]) if origin else typing.get_type_hints(hint)
        optional = getattr(hint, "__optional_keys__", ())
        for key in hints:
            if key not in value and key not in optional:
                raise ValueError(f"{where} lacks {reprlib.repr(key)}")
        return {
            key: from_json(h, value[key], f"{where}: {reprlib.repr(key)}")
            for key, h in hints.items()
            if key in value
        }
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, where)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        kinds = [a for a in arguments if a is not type(None)]
        lists = [a for a in kinds if typing.get_origin(a) is tuple]
        hint, *_ = lists if lists and isinstance(value, list) else kinds
        return from_json(hint, value, where)
    if origin is typing.Literal:
        right = value in arguments
    elif origin is tuple and isinstance(value, list) and fits(arguments, value):
        return tuple(from_json(arguments[0], item, where) for item in value)
    elif hint is float:
        right = type(value) in (int, float)
    elif hint is Path:
        right = isinstance(value, str)
    else:
        right = type(value) is hint
    if not right or not representable(value):
        allowed = arguments if origin is typing.Literal else getattr(hint, "__name__", hint)
        allowed = "a finite number" if hint is float else allowed
        raise ValueError(f"{where} must be {allowed}, got {reprlib.repr(value)}")
    return Path(str(value)) if hint is Path else value


def representable(value: Any) -> bool:
    """False for a number that is not finite or, if it is an integer, takes more than 64 bits."""
    if isinstance(value, int):
        return -(2**63) <= value < 2**63
    return not isinstance(value, float) or math.isfinite(value)


def fits(kinds: tuple[Any, ...], values: list[Any]) -> bool:
    """Whether a list is as long as a tuple of these types."""
    return ... in kinds or len(values) == len(kinds)
