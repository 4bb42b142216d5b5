"""What an installed wheel must do, in an environment that has nothing but its dependencies.

Run outside the checkout, with the path of the environment: `python installed.py ENVIRONMENT`.
"""

import subprocess
import sys
import time
from importlib.metadata import files
from pathlib import Path

MOST_SECONDS = 2.0
"""Longest import of fastsae, beyond torch."""

EXTRAS = ("transformers", "wandb", "datasets", "huggingface_hub", "matplotlib")
"""Extra dependencies, which importing fastsae must not need."""

environment = Path(sys.argv[1]).resolve()
import torch  # noqa: E402

start = time.perf_counter()
import fastsae.public  # noqa: E402  what `import fastsae` imports at its first use
import fastsae_kernels  # noqa: E402

seconds = time.perf_counter() - start
print(f"import fastsae: {seconds:.2f} s beyond torch")
assert seconds < MOST_SECONDS, f"importing fastsae took {seconds:.1f} s beyond torch"
assert not set(EXTRAS) & sys.modules.keys()
for package in (fastsae, fastsae_kernels):
    assert package.__file__ and environment in Path(package.__file__).parents, package.__file__
assert any(path.name == "LICENSE" for path in files("fastsae-triton") or ())

sae = fastsae.SAE(16, 128, fastsae.TopK(4))
x = torch.randn(64, 16)
(sae(x) - x).square().mean().backward()
assert all(p.grad is not None for p in sae.parameters())
command = environment / "bin" / "fastsae"
sae.save("sae")
subprocess.run([command, "convert", "sae", "exported", "--to", "sae_lens"], check=True)
torch.testing.assert_close(fastsae.load("exported")(x), sae(x))
