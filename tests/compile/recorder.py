"""Records what launchers would run on a GPU, from meta tensors: nothing is allocated, nothing runs.

Triton itself derives a kernel's signature, constants and alignments from the arguments it is
launched with; it is stopped where it would compile. Needs a process without TRITON_INTERPRET.
"""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import triton
from torch._library.custom_ops import CustomOpDef
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

import fastsae_kernels
from fastsae_kernels import _launch

# Ops import these only when they launch one, and `recording` patches what is already imported.
for file in sorted(Path(fastsae_kernels.__file__).parent.glob("_*_kernel.py")):
    import_module(f"fastsae_kernels.{file.stem}")


@dataclass(frozen=True, kw_only=True)
class Launch:
    """All that decides which code a launch runs: equal ones compile to the same."""

    arch: int
    """Compute capability of the target: 90 for sm_90."""

    module: str
    kernel: str

    signature: dict[str, str]
    """Type of each parameter."""

    constants: dict[tuple[int, ...], Any]
    """Parameters known at compile time, by position."""

    attributes: dict[tuple[int, ...], list]
    """What else is known of a parameter: that 16 divides it."""

    options: dict[str, Any]
    """Warps, stages and the like, where the launcher chooses them."""

    case: str = field(compare=False)
    shape: str = field(compare=False)
    """What launched it, and at which shape: of equal launches, the first."""

    @property
    def configuration(self) -> str:
        """Types (- for None), constants, and the parameters that 16 does not divide."""
        names = list(self.signature)
        constants = {names[place[0]]: value for place, value in self.constants.items()}
        nothing = [name for name, value in constants.items() if value is None]
        types = ["-" if name in nothing else t for name, t in self.signature.items()]
        words = [",".join(t.removeprefix("*") for t in types if t[0] in "*-")]
        words += [f"{name}={constants[name]}" for name in constants if name not in nothing]
        odd = [
            name
            for n, (name, t) in enumerate(self.signature.items())
            if t[0] in "*iu" and not self.attributes.get((n,))
        ]
        return " ".join(words + ["odd:" + ",".join(odd)] * bool(odd))

    def compile(self) -> CompiledKernel:
        kernel = getattr(import_module(self.module), self.kernel)
        source = ASTSource(kernel, self.signature, self.constants, self.attributes)
        target = GPUTarget("cuda", self.arch, 32)
        return triton.compile(source, target=target, options=self.options)


class _Driver:
    """Stands in for the CUDA driver of a machine whose GPU is of the given capability."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # triton remembers targets by device

    def get_current_stream(self, device: int) -> int:
        return 0


def _run_op(op: CustomOpDef, *arguments: Any, **named: Any) -> Any:
    return op._init_fn(*arguments, **named)


@contextmanager
def recording(arch: int, case: str, shape: str) -> Iterator[list[Launch]]:
    """Collect what functions called with meta tensors launch on a GPU of capability arch."""
    launches: list[Launch] = []
    run = JITFunction.run

    def record(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        chosen = {name: v for name, v in options.items() if name not in kernel.arg_names}

        def stop(*, compile: dict[str, Any], **_: Any) -> bool:
            launch = Launch(
                arch=arch,
                module=kernel.__module__,
                kernel=kernel.__name__,
                signature=compile["signature"],
                constants=compile["constants"],
                attributes=compile["configs"][0],
                options=chosen,
                case=case,
                shape=shape,
            )
            launches.append(launch)
            return True

        with patch.object(knobs.runtime, "jit_cache_hook", stop):
            run(kernel, *arguments, grid=grid, warmup=True, **options)

    with ExitStack() as stack:
        stack.enter_context(patch.object(driver, "_active", _Driver(arch)))
        stack.enter_context(patch.object(JITFunction, "run", record))
        stack.enter_context(patch.object(_launch._local, "interpreted", True, create=True))
        # An op would run its fake on meta tensors.
        stack.enter_context(patch.object(CustomOpDef, "__call__", _run_op))
        for name, module in list(sys.modules.items()):
            if name.startswith("fastsae_kernels") and hasattr(module, "capability"):
                stack.enter_context(patch.object(module, "capability", lambda _: divmod(arch, 10)))
        yield launches
