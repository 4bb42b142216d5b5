"""Damages the files that fastsae reads, at random: each one must load or be refused by one error.

    python -m tests.fuzz --seconds 600 [--seed 1000] [--only openai]

A loader may raise ValueError, FileNotFoundError or PermissionError. It may take MAX_SECONDS, and
memory in proportion to the size of its files. Every seed is a run of its own; those in KEPT, which
once found something, come first, here and in `test_fuzz.py`.
"""

import argparse
import faulthandler
import functools
import itertools
import json
import re
import struct
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import hypothesis
import numpy as np
import torch
from hypothesis import strategies as st
from safetensors.torch import save_file

import fastsae
from fastsae import SAE, ActivationShards, Gated, TopK, TrainConfig, interop
from fastsae.checkpoint import load_checkpoint, save_checkpoint
from fastsae.cli.upgrade import upgrade_table
from fastsae.data import ShardWriter, VllmHiddenStates, as_source
from fastsae.data.ordinary import Ordinary
from fastsae.files import write_json
from fastsae.nn import TopKConfig
from fastsae.shards import Shards
from fastsae.train.comparison import comparison_table
from fastsae.train.curves import PANELS
from fastsae.train.log import read_lines
from fastsae.train.optim import Adam
from fastsae.train.plan import Plan
from fastsae.train.run_folder import begin, check_same
from fastsae.train.run_table import run_table
from fastsae.train.standardization import Standardization
from fastsae.train.state import TrainState
from fastsae.train.summary import Summary, read_results
from fastsae.train.sweep import begin as begin_sweep
from fastsae.train.sweep import stored_sweep

from .processes import run_all

KEPT = (0, 7005)
MAX_SECONDS = 2.0
MAX_MEGABYTES = 64
"""Besides 25 times the size of the files: a value of JSON takes up to 24 times its text."""

EXPECTED = ValueError, FileNotFoundError, PermissionError
D_IN, D_SAE, N = 6, 10, 40

FORMS = *interop.WRITABLE[1:], *(form for form in interop.FORMATS if form not in interop.WRITABLE)
"""Of other libraries."""


def sound(form: str, folder: Path) -> Path:
    """A whole SAE in the format of another library; what to load."""
    sae = SAE(D_IN, D_SAE, TopK(3))
    folder.mkdir(exist_ok=True)
    if form == "gemma_scope":
        arrays = {"W_enc": sae.W_enc.T, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
        arrays["threshold"] = torch.ones(D_SAE)
        np.savez(folder / "params.npz", **{n: t.detach().numpy() for n, t in arrays.items()})
        return folder
    if form == "gemma_scope_2":
        tensors = {"w_enc": sae.W_enc.T, "b_enc": sae.b_enc, "w_dec": sae.W_dec, "b_dec": sae.b_dec}
        tensors["threshold"] = torch.ones(D_SAE)
        save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "params.safetensors")
        about = {"type": "sae", "architecture": "jump_relu", "width": D_SAE, "l0": 3}
        write_json(folder / "config.json", about | {"affine_connection": False})
        return folder
    if form == "qwen_scope":
        path = folder / "L0_3" / "layer0.sae.pt"
        path.parent.mkdir()
        names = {"W_enc": sae.W_enc, "W_dec": sae.W_dec.T.contiguous()}
        names |= {"b_enc": sae.b_enc, "b_dec": sae.b_dec}
        torch.save({n: t.detach() for n, t in names.items()}, path)
        return path
    if form == "openai":
        names = {"encoder.weight": sae.W_enc, "decoder.weight": sae.W_dec.T.contiguous()}
        names |= {"latent_bias": sae.b_enc, "pre_bias": sae.b_dec}
        torch.save({n: t.detach() for n, t in names.items()}, folder / "sae.pt")
        return folder / "sae.pt"
    interop.save(sae, folder, form)
    return folder


class Loader(NamedTuple):
    """Whole files in an empty folder, and how they are read."""

    make: Callable[[Path], object]
    load: Callable[[Path], object]


def save_native(folder: Path) -> None:
    SAE(D_IN, D_SAE, Gated(l1_coef=0.0)).save(folder)


def as_older_version(path: Path) -> None:
    """Remove what would betray every change of the file's values."""
    values = json.loads(path.read_text())
    path.write_text(json.dumps({n: v for n, v in values.items() if n not in ("crc32", "version")}))


def save_older_native(folder: Path) -> None:
    save_native(folder)
    as_older_version(folder / "config.json")


def read_foreign(folder: Path) -> None:
    single = [*folder.glob("sae.pt"), *folder.rglob("*.sae.pt")]
    fastsae.load(single[0] if single else folder)


def state() -> TrainState:
    sae = SAE(D_IN, D_SAE, TopK(3))
    units = Standardization.of([Ordinary.of(torch.eye(D_IN), None)])
    return TrainState.fresh(sae, Adam(sae), units)


def write_checkpoint(folder: Path) -> None:
    whole = state()
    save_checkpoint(folder, 5, whole.tensors(), whole.meta(), 1)


def write_checkpoint_of_two(folder: Path) -> None:
    """By two processes."""
    tensors, meta = state().tensors(), state().meta()
    names = [name for name, tensor in tensors.items() if tensor.shape[:1] == (D_SAE,)]

    def save_part(shards: Shards) -> None:
        own = {name: tensors[name][shards.rows(D_SAE)] for name in names}
        save_checkpoint(folder, 5, tensors | own, meta, 1, names, shards)

    run_all(1, 2, save_part)


def write_older_checkpoint(folder: Path) -> None:
    write_checkpoint(folder)
    as_older_version(folder / "step-00000005" / "state.json")


def restore_checkpoint(folder: Path) -> None:
    state().restore(*load_checkpoint(folder / "step-00000005"))


def run_config(out: Path) -> tuple[TrainConfig, Plan]:
    config = TrainConfig(out=out, device="cpu", steps=10, activation=TopKConfig(k=3))
    return config, Plan.of(config, D_IN, N)


def write_run(folder: Path) -> None:
    begin(*run_config(folder), "data", None)
    line = dict.fromkeys(("step", *PANELS), 5)
    (folder / "metrics.jsonl").write_text(f"{json.dumps(line)}\n" * 3)


def read_run(folder: Path) -> None:
    for line in read_lines(folder / "metrics.jsonl"):
        assert all(isinstance(line[name], int | float) for name in ("step", *PANELS))
    check_same(*run_config(folder), "data", None)


def write_sweep(folder: Path) -> None:
    begin_sweep(folder, {"one": run_config(folder / "one")[0]})


def write_results(folder: Path) -> None:
    row = {name: 0.5 for name in ("fvu", "fvu_all", "mse", "l0", "dead_fraction", "seconds")}
    row |= dict(evaluated_tokens=5, left_out_of_evaluation=0, tokens=5, left_out_tokens=0)
    row |= dict(evaluated_on="held-out data", step_path="fused", sae_lens="none", gamma=[0.5])
    row |= dict(tokens_per_second=5.0)
    write_json(folder / "summary.json", row)
    write_json(folder / "comparison.json", {"one": row, "two": row})
    about = dict(support="teacher", new_scalars=7, saes={"baseline": row})
    write_json(folder / "upgrade.json", row | about)


def load_results(folder: Path) -> None:
    run_table(folder)
    comparison_table(read_results(dict[str, Summary], folder / "comparison.json"))
    upgrade_table(folder)


def write_shards(folder: Path) -> None:
    writer = ShardWriter(folder, D_IN, model="m", hookpoint="h", harvest={"a": 1}, shard_bytes=900)
    labels = torch.arange(N)
    writer.append(torch.randn(N, D_IN), labels, labels, labels)
    writer.finish()


def write_npy(folder: Path) -> None:
    np.save(folder / "a.npy", np.ones((N, D_IN), np.float32))
    np.save(folder / "b.npy", np.ones((N, D_IN), np.float32, order="F"))


def write_plain(folder: Path) -> None:
    save_file({"x": torch.ones(N, D_IN)}, folder / "a.safetensors")


def read_rows(folder: Path) -> None:
    shards = ActivationShards(folder)
    rows = torch.arange(0, shards.n_tokens, max(1, shards.n_tokens // 8))[:8]
    shards.rows(rows)
    if shards.has_contexts:
        shards.contexts(rows)


def write_pt(folder: Path) -> None:
    torch.save(torch.ones(N, D_IN), folder / "a.pt")


def read_pt(folder: Path) -> None:
    as_source(folder / "a.pt")


def write_vllm(folder: Path) -> None:
    for name in ("a", "b"):
        states = {"hidden_states": torch.ones(N, 2, D_IN), "token_ids": torch.arange(N)}
        save_file(states, folder / f"{name}.safetensors")


def read_vllm(folder: Path) -> None:
    for group in VllmHiddenStates(folder, 1).groups():
        assert group.contexts is not None


LOADERS = {
    "fastsae": Loader(save_native, fastsae.load),
    "fastsae, older": Loader(save_older_native, fastsae.load),
    **{form: Loader(functools.partial(sound, form), read_foreign) for form in FORMS},
    "checkpoint": Loader(write_checkpoint, restore_checkpoint),
    "checkpoint of two": Loader(write_checkpoint_of_two, restore_checkpoint),
    "checkpoint, older": Loader(write_older_checkpoint, restore_checkpoint),
    "run": Loader(write_run, read_run),
    "sweep": Loader(write_sweep, stored_sweep),
    "results": Loader(write_results, load_results),
    "shards": Loader(write_shards, read_rows),
    "npy": Loader(write_npy, read_rows),
    "safetensors": Loader(write_plain, read_rows),
    "pt": Loader(write_pt, read_pt),
    "vllm": Loader(write_vllm, read_vllm),
}

NUMBERS = (0, 1, -1, 7, 2**31, 2**32 + 1, 2**53, 2**62, 2**63, 2**64, 10**30, 0.5, -1.5, 1e308)
VALUES = (None, True, "", "x", "../x", "/dev/zero", "\x1b[2J", "y" * 5000, [], {}, [[[]]], [1] * 99)
TEXTS = (
    "1e400",
    "-Infinity",
    "NaN",
    "9" * 5000,
    "1" * 10**6,
    "[" * 10**5,
    '{"a":' * 10**5,
    '"\\ud800"',
)


def damaged(content: bytes, suffix: str, random: Random) -> bytes:
    """The content of a file, changed in a few places; half of the time, in terms of its format."""
    parsers = {".json": in_json, ".safetensors": in_header, ".npy": in_npy}
    parsers |= {".pt": in_archive, ".npz": in_archive}
    if suffix in parsers and random.random() < 0.6:
        return parsers[suffix](content, random)
    return in_bytes(content, random)


def in_bytes(content: bytes, random: Random) -> bytes:
    found = bytearray(content)
    for _ in range(random.randint(1, 6)):
        start = random.randrange(len(found) + 1)
        stop = min(len(found), start + random.choice((0, 1, 1, 1, 4, 64)))
        match random.randrange(6):
            case 0:
                del found[start:]
            case 1:
                del found[start:stop]
            case 2:
                found[start:stop] = found[start:stop] * random.randint(2, 50)
            case 3:
                found[start:stop] = bytes(
                    random.choice((0, 0xFF, 0x80)) for _ in range(start, stop)
                )
            case _:
                found[start:stop] = random.randbytes(stop - start)
    return bytes(found)


def in_json(content: bytes, random: Random) -> bytes:
    value = json.loads(content)
    for _ in range(random.randint(1, 3)):
        value = changed(value, random, whole=0.02)
    text = json.dumps(value)
    if random.random() < 0.1:  # what no value is written as
        numbers = [found.span() for found in re.finditer(r"-?\d[\d.e+-]*|null|true|\"\w*\"", text)]
        start, stop = random.choice(numbers or [(0, 0)])
        text = text[:start] + random.choice(TEXTS) + text[stop:]
    if random.random() < 0.05 and isinstance(value, dict):  # a setting twice
        text = text[:-1] + "," + text[1:]
    return text.encode("utf-8", "replace")


def changed(value: Any, random: Random, whole: float = 0.2) -> Any:
    """A value of JSON with one part of it replaced, removed, added or renamed; all of it with that
    probability."""
    inner = (
        [*(value if isinstance(value, dict) else range(len(value)))]
        if value and isinstance(value, dict | list)
        else []
    )
    if not inner or random.random() < whole:
        return random.choice((*NUMBERS, *VALUES))
    place, found = random.choice(inner), value.copy()
    match random.randrange(6):
        case 0:
            del found[place]
        case 1 if isinstance(found, dict):
            found[f"{place}s"] = found.pop(place)
        case 1 if isinstance(found, list):
            found.insert(place, found[place])
        case _:
            found[place] = changed(found[place], random)
    return found


def in_header(content: bytes, random: Random) -> bytes:
    (length,) = struct.unpack("<Q", content[:8])
    header = in_json(content[8 : 8 + length], random)
    claimed = random.choice((len(header),) * 20 + (0, 1, len(header) + 1, 2**40, 2**63))
    return struct.pack("<Q", claimed) + header + content[8 + length :]


def in_npy(content: bytes, random: Random) -> bytes:
    length = struct.unpack("<H", content[8:10])[0]
    header = content[10 : 10 + length].decode("latin1")
    new = random.choice(
        ("(-1, 6)", f"({2**62}, 6)", f"({10**4000},)", "(6,)", "()", "(0, 6)", f"(0, {2**62})")
        + ("(True, 6)", "(1.0, 6)", "None", "(" * 500, "-" * 9000 + "1", f"({'1,' * 3000})")
    )
    kind = random.choice(
        ("<f4",) * 6 + ("O", "<f8", "<f2", ">f4", "V999999999", "<U9", "f4,f4", "?")
    )
    header = re.sub(r"\(.*\)", lambda _: new, header).replace("<f4", kind)
    version, form = random.choice(((b"\x01\x00", "<H"), (b"\x02\x00", "<I"), (b"\x03\x00", "<I")))
    claimed = min(random.choice((len(header),) * 4 + (0, 2**16 - 1, 2**32 - 1)), 2**16 - 1)
    return (
        content[:6]
        + version
        + struct.pack(form, claimed)
        + header.encode()
        + content[10 + length :]
    )


def in_archive(content: bytes, random: Random) -> bytes:
    """Entries changed and compressed in other ways, or a directory that is not true."""
    with tempfile.TemporaryFile() as file:
        file.write(content)
        with zipfile.ZipFile(file) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
        name = random.choice([*entries, *(n for n in entries if n.endswith(".pkl"))])
        if random.random() < 0.8:
            change = (
                in_pickle
                if name.endswith(".pkl")
                else in_npy
                if name.endswith(".npy")
                else in_bytes
            )
            entries[name] = change(entries[name], random)
        else:
            entries[name] = bytes(random.choice((0, 1 << 16, 1 << 22)))
        file.seek(0)
        file.truncate()
        methods = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) * 8 + (
            zipfile.ZIP_BZIP2,
            zipfile.ZIP_LZMA,
        )
        with zipfile.ZipFile(file, "w", random.choice(methods)) as archive:
            for name, entry in entries.items():
                archive.writestr(name, entry)
        file.seek(0)
        found = bytearray(file.read())
    if random.random() < 0.2:
        start = found.rfind(b"PK\x01\x02", 0, random.randrange(len(found)) + 1)
        place = max(start, 0) + random.choice((8, 10, 16, 20, 24, 28, 42))
        found[place : place + 4] = struct.pack(
            "<I", random.choice((0, 100, 2**16, 2**31, 2**32 - 1))
        )
    return bytes(found)


OPCODES = (b"(", b")", b"}", b"]", b"t", b"R", b"b", b"s", b"u", b"a", b"e", b"Q", b"N", b"0", b"2")
OPCODES += (b"\x85", b"\x86", b"\x87", b"h\x00", b"h\x01", b"q\x00", b"q\x01", b"K\x05", b"\x94")
OPCODES += (b"J\xff\xff\xff\xff", b"M\xff\xff", b"X\x01\x00\x00\x00a", b"\x8a\xff" + b"\x7f" * 255)
OPCODES += (b"ctorch\nFloatStorage\n", b"cos\nsystem\n", b"ccollections\nOrderedDict\n", b"\x8f")
OPCODES += (b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch._utils\n_rebuild_parameter\n", b"\x93")


def in_pickle(content: bytes, random: Random) -> bytes:
    found = in_bytes(content, random) if random.random() < 0.3 else content
    for _ in range(random.randint(1, 4)):
        place = random.randrange(len(found) + 1)
        added = b"".join(random.choices(OPCODES, k=random.randint(1, 12)))
        found = found[:place] + added * random.choice((1, 1, 1, 30, 10**4)) + found[place:]
    return found


class Fuzz:
    """One loader with its whole files, and what became of the damaged ones."""

    def __init__(self, name: str, folder: Path):
        self.loader, self.folder = LOADERS[name], folder
        self.outcomes: Counter[str] = Counter()
        folder.mkdir()
        self.loader.make(folder)
        self.files = {
            path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
        }
        self.loader.load(folder)

    def run(self, seed: int, examples: int) -> None:
        """AssertionError, or the exception itself, with the smallest example that hypothesis
        finds."""

        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=examples,
            deadline=None,
            database=None,
            suppress_health_check=[hypothesis.HealthCheck.too_slow],
        )
        @hypothesis.given(st.randoms(use_true_random=True))
        def test(random: Random) -> None:
            self.check(random)

        test()

    def check(self, random: Random) -> None:
        path = random.choice([*self.files])
        path.write_bytes(damaged(self.files[path], path.suffix, random))
        size = sum(path.stat().st_size for path in self.files)
        with measured(MAX_MEGABYTES + 25 * size / 2**20):
            try:
                self.loader.load(self.folder)
                self.outcomes["loaded"] += 1
            except EXPECTED as error:
                assert "\n" not in str(error) and len(str(error)) < 5000, str(error)[:500]
                self.outcomes[type(error).__name__] += 1
            finally:
                path.write_bytes(self.files[path])


class measured:
    """AssertionError if its body takes MAX_SECONDS of a core, or ever allocates more than the given
    megabytes (measured on Linux only)."""

    def __init__(self, megabytes: float):
        self.megabytes = megabytes

    def __enter__(self) -> None:
        if sys.platform.startswith("linux"):
            Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
        faulthandler.dump_traceback_later(60, exit=True)  # for a loader that never returns
        self.before, self.start = resident("VmRSS"), time.process_time()

    def __exit__(self, kind: type | None, *_: object) -> None:
        seconds, megabytes = time.process_time() - self.start, resident("VmHWM") - self.before
        faulthandler.cancel_dump_traceback_later()
        if kind is None:
            assert seconds < MAX_SECONDS, f"{seconds:.1f} s"
            assert megabytes < self.megabytes, f"{megabytes:.0f} MB"


def resident(what: str) -> float:
    """Megabytes of this process; 0 where the system does not say."""
    if not sys.platform.startswith("linux"):
        return 0.0
    (found,) = re.findall(rf"{what}:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found) / 1024


def seeds(first: int) -> Iterator[int]:
    return itertools.chain(KEPT, itertools.count(first))


def main() -> None:
    parser = argparse.ArgumentParser(description="Damage files at random and load them.")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1000, help="first seed after the kept ones")
    parser.add_argument("--examples", type=int, default=50, help="per loader and seed")
    parser.add_argument("--only", choices=LOADERS)
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.seconds
    faults = Counter()
    with tempfile.TemporaryDirectory() as folder:
        names = [arguments.only] if arguments.only else [*LOADERS]
        fuzzes = {name: Fuzz(name, Path(folder) / name) for name in names}
        rounds = ((seed, name) for seed in seeds(arguments.seed) for name in fuzzes)
        for seed, name in itertools.takewhile(lambda _: time.monotonic() < end, rounds):
            try:
                fuzzes[name].run(seed, arguments.examples)
            except Exception as error:
                faults[f"{name}: {type(error).__name__}"] += 1
                text = f"{type(error).__name__}: {getattr(error, 'exceptions', error)!s:.300}"
                print(f"seed {seed}, {name}: {text}", flush=True)
    for name, fuzz in fuzzes.items():
        print(name, dict(fuzz.outcomes))
    total = sum(fuzz.outcomes.total() for fuzz in fuzzes.values())
    print(f"{total} files, faults: {dict(faults)}")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
