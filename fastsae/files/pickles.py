"""Reads the pickle of a state dict or a tensor, as torch.save writes it, by interpreting the few
instructions that one needs.

Only the functions in CALLS are called, dictionary keys are strings, and a tensor is a view of its
storage: a pickle can neither run code, nor hash or compare what it nests, nor claim more memory
than its file has bytes.
"""

import math
import pickletools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from .headers import is_shape
from .read import shown

MAX_PICKLE = 1 << 16
"""Bytes of a pickle; a tensor takes about 200."""

DTYPES = {
    "torch DoubleStorage": torch.float64,
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch BoolStorage": torch.bool,
}

LITERALS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
WITH_VALUE = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"}
TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
MARK = object()

Storage = Callable[[str, torch.dtype, int], Tensor]
"""The entries of a storage as a vector, from its key, dtype and their number."""


def parse_pickle(pickle: bytes | bytearray, storage: Storage, expected: type) -> Any:
    """What a pickle holds: a dictionary with tensors and plain values, or a tensor. ValueError for
    another type, or other contents."""
    if len(pickle) > MAX_PICKLE:
        raise ValueError(f"its pickle has {len(pickle)} bytes, allowed are {MAX_PICKLE}")
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    storages: dict[str, Tensor] = {}
    for opcode, value, _ in pickletools.genops(bytes(pickle)):
        argument = cast(Any, value)
        match opcode.name:
            case "PROTO":
                pass
            case "STOP":
                break
            case "MARK":
                stack.append(MARK)
            case name if name in LITERALS:
                stack.append(LITERALS[name])
            case name if name in WITH_VALUE:
                if opcode.name == "LONG1" and not -(2**63) <= argument < 2**63:
                    raise ValueError("it holds an integer beyond 64 bits")
                stack.append(argument)
            case "GLOBAL":
                if argument not in CALLS and argument not in DTYPES:
                    raise ValueError(f"it holds {argument[:60]}")
                stack.append(_Global(argument))
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case name if name in TUPLES:
                count = TUPLES[name]
                stack[len(stack) - count :] = [tuple(stack[len(stack) - count :])]
            case "TUPLE":
                stack.append(tuple(_since_mark(stack)))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "APPEND" | "APPENDS":
                items = [stack.pop()] if opcode.name == "APPEND" else _since_mark(stack)
                _of(list, stack[-1]).extend(items)
            case "SETITEM" | "SETITEMS":
                items = _popped(stack, 2) if opcode.name == "SETITEM" else _since_mark(stack)
                for key, item in zip(items[::2], items[1::2], strict=True):
                    _of(dict, stack[-1])[_of(str, key)] = item
            case "BINPERSID":
                kind, dtype, key, _, count = _of(tuple, stack.pop())
                if _of(str, kind) != "storage":
                    raise ValueError("it refers to something else than a storage")
                if _of(str, key) not in storages:
                    storages[key] = storage(key, DTYPES[_of(_Global, dtype)], _of(int, count))
                stack.append(storages[key])
            case "REDUCE":
                function, arguments = _popped(stack, 2)
                stack.append(CALLS[_of(_Global, function)](*_of(tuple, arguments)))
            case "BUILD":  # attributes of an OrderedDict
                stack.pop()
                _of(dict, stack[-1])
            case _:
                raise ValueError(f"it holds {opcode.name}")
    (found,) = stack
    return _of(expected, found)


class _Global(str):
    """The name of a function or a class of torch's."""

    __slots__ = ()


def _of(kind: type, value: Any) -> Any:
    """The value; ValueError if it is not exactly of that type."""
    if type(value) is not kind:
        raise ValueError(f"it has {type(value).__name__} in place of {kind.__name__}")
    return value


def _popped(stack: list[Any], count: int) -> list[Any]:
    found = stack[len(stack) - count :]
    del stack[len(stack) - count :]
    return found


def _since_mark(stack: list[Any]) -> list[Any]:
    """Everything above the last mark, taken off the stack together with it."""
    place = next(n for n in reversed(range(len(stack))) if stack[n] is MARK)
    found = stack[place + 1 :]
    del stack[place:]
    return found


def _ordered_dict() -> dict[str, Any]:
    return {}


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    """A view of a storage; ValueError for more entries than the storage has."""
    sizes, strides = _of(tuple, size), _of(tuple, stride)
    if not all(map(is_shape, (sizes, strides, [offset]))):
        raise ValueError(f"it has a tensor of size {shown(sizes)} with strides {shown(strides)}")
    if math.prod(sizes) > len(storage):
        raise ValueError("its tensors are larger than the file")
    return _of(Tensor, storage).as_strided(sizes, strides, offset)


def _parameter(tensor: Any, *_: Any) -> Tensor:
    return _of(Tensor, tensor)


CALLS: dict[str, Callable[..., Any]] = {
    "collections OrderedDict": _ordered_dict,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_parameter": _parameter,
}
"""What a state dict calls, by name in the pickle."""
