"""What runs on a CPU needs no Triton: in a process that cannot find it, all of that runs."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]

WITHOUT = """
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] == "triton" else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
"""

OPS = """
import torch
from fastsae_kernels import *
from fastsae_kernels import __all__ as names
from fastsae_kernels.adam import AdamStep, RowGradients, Rows, Window, adam_, flush_
from fastsae_kernels.encode import encode_topk_each
from fastsae_kernels.latent_major import latent_major, sum_runs
from fastsae_kernels.rotation import rotation_gradients

N, K, F, D = 9, 3, 70, 12

def floats(*shape):
    return torch.randn(shape).requires_grad_()

def encoder():
    return floats(N, D), floats(F, D), floats(F)

i = torch.randint(F, (N, K))
calls = {
    "decode": lambda: decode(floats(N, K), i, floats(F, D)),
    "gather_dot": lambda: gather_dot(floats(N, D), i, floats(F, D)),
    "scatter_outer": lambda: scatter_outer(floats(N, K), i, floats(N, D), F),
    "squared_error": lambda: squared_error(
        floats(N, K), i, floats(F, D), floats(D), floats(N, D)
    ),
    "topk": lambda: topk(floats(N, F), K, "abs"),
    "topk_batch": lambda: topk_batch(floats(N, F), N * K),
    "encode_topk": lambda: encode_topk(*encoder(), K),
    "encode_topk_batch": lambda: encode_topk_batch(*encoder(), N * K),
    "encode_above": lambda: encode_above(*encoder(), 0.5),
    "encode_decode": lambda: encode_decode(
        *encoder(), floats(F, D), floats(D), K, "value", "rotation_dense"
    ),
    "rational": lambda: rational(floats(N, K), floats(4), floats(2), 1.5, floats(), floats(K)),
    "jumprelu": lambda: jumprelu(floats(N, F), floats(F), 0.5),
    "jumprelu_l0": lambda: jumprelu_l0(floats(N, F), floats(F), 0.5),
}
assert calls.keys() == set(names)
for name, call in calls.items():
    outs = call()
    outs = outs if isinstance(outs, tuple) else (outs,)
    torch.stack([out.sum() for out in outs if out.requires_grad]).sum().backward()

x, W, b = (t.detach() for t in encoder())
values, i = encode_topk(x, W, b, K, shadow=W.bfloat16())
encode_topk_each(x, W, b, [(K, "value"), (1, "abs")])
rotation_gradients(x, W, b, W, values, i, x, values, "support", (True,) * 3)
runs = latent_major(i, F)
entries = values.flatten()[runs.entry]
sum_runs(entries, x, runs)
rows = Rows(W, torch.zeros_like(W), torch.zeros_like(W))
window = Window(torch.zeros(F, dtype=torch.int32), torch.zeros(4))
for step in (1, 2):
    adam_(rows, rows, RowGradients(runs, entries, x, entries, x), AdamStep(step, 1e-3), window)
flush_(rows, rows, AdamStep(2, 1e-3), window)
"""

LAST = """
assert "torch._dynamo" not in sys.modules  # seconds of imports that nothing here needs
assert not [name for name in sys.modules if name.split(".")[0] == "triton"]
assert not [name for name in sys.modules if name.startswith("fastsae") and "_kernel." in f"{name}."]
"""


TRAIN = """
from fastsae.cli import run
run(["train", *sys.argv[1:]])
"""


def test_every_op_runs_and_the_command_line_trains(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((2000, 16), "f4"))
    settings = {"data": tmp_path / "x.npy", "out": tmp_path / "run", "d-sae": 64, "k": 4}
    settings |= {"batch-size": 64, "steps": 2, "device": "cpu"}
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", WITHOUT + OPS + TRAIN + LAST, *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "sae").is_dir()
