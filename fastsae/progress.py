"""Progress bars on terminals and in notebooks; none in pipes and files."""

import sys
from collections.abc import Iterable
from typing import Any

TIMES = "{elapsed}<{remaining}, ends {eta:%H:%M}, {rate_fmt}{postfix}"
FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [" + TIMES + "]"


def shows_bars() -> bool:
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def progress_bar(
    label: str,
    unit: str,
    total: int | None,
    initial: int = 0,
    *,
    shown: bool = True,
    over: Iterable[Any] | None = None,
) -> Any:
    """A tqdm bar, which iterates over what is given; total is None where it is unknown."""
    from tqdm.auto import tqdm  # here, so that kernels and steps can be used without it

    return tqdm(
        over,
        desc=label,
        unit=unit,
        unit_scale=unit == "token",
        total=total,
        initial=initial,
        disable=not (shown and shows_bars()),
        bar_format=FORMAT if total else None,
        dynamic_ncols=True,
    )
