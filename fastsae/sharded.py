"""Files of tensors whose rows several processes divide: none ever holds all of one.

Of the tensors that `sharded` names (and that exist), all with d_sae rows, each process has
`shards.rows(d_sae)`. All others are the same on every process. Every process calls these functions
at the same time; where one fails, all raise.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsae.files import (
    CHECKSUM,
    Content,
    Entry,
    Extent,
    Layout,
    create,
    finish,
    in_hex,
    is_shape,
    joined_crc32,
    layout_of,
    read_header,
    read_tensors,
    sealed,
    share,
    shown,
    temporary_of,
    write_rows,
    write_settings,
)
from fastsae.meeting import all_results, everywhere, on_first
from fastsae.shards import Shards

REPLICATED = "state.safetensors"
"""The file of the tensors that all processes have."""

Table = dict[str, int]
"""CRC-32 of the bytes of each tensor that a process holds."""


def save_sharded(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    directory: str | Path,
    sharded: Collection[str],
    shards: Shards,
) -> None:
    """Write what `SAE.save` writes of the whole SAE, byte for byte.

    Args:
        tensors: the SAE's state dict, with this process's rows of those in `sharded`.
        config: `SAE.config` of the whole SAE.

    An SAE that the directory holds is replaced as a whole, or kept if a process fails. ValueError
    if processes differ that should hold the same; OSError.
    """
    settings, path = (Path(directory) / name for name in ("config.json", "sae.safetensors"))
    own, others = _split(tensors, sharded)
    rows, d_sae = _rows(own, shards)
    layout = layout_of(tensors, dict.fromkeys(own, d_sae))
    temporary = temporary_of(path)

    def begin() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        finish(settings, path)
        temporary.unlink(missing_ok=True)
        create(temporary, layout)

    def write() -> Table:
        mine = _write(temporary, layout, own, rows.start, writes=shards.data_rank == 0)
        return mine | _write(temporary, layout, others, 0, writes=shards.rank == 0)

    on_first(shards, begin)
    try:
        tables = all_results(shards, write)
        check_replicas(tables, own, shards)
        contents = {
            name: Content(tensor.dtype, layout.entries[name].shape, tables[0][name])
            for name, tensor in tensors.items()
        }
        for name, tensor in own.items():
            for table in tables[1 : shards.latent]:
                joined = joined_crc32(contents[name].crc32, table[name], tensor.nbytes)
                contents[name] = contents[name]._replace(crc32=joined)
    except BaseException:
        if shards.rank == 0:
            temporary.unlink(missing_ok=True)
        raise
    on_first(shards, lambda: write_settings(settings, sealed(config, contents), path))


def write_shards(
    folder: Path, tensors: Mapping[str, Tensor], sharded: Collection[str], shards: Shards
) -> dict[str, Any]:
    """Write the rows of each place on the latent axis to a file of its own in a folder, and all
    other tensors to state.safetensors; returns what `read_shards` needs to know.

    ValueError if processes differ that should hold the same; OSError.
    """
    own, others = _split(tensors, sharded)
    rows, d_sae = _rows(own, shards)
    names = file_names(shards.latent)

    def write() -> tuple[Table, dict[str, dict[str, Any]]]:
        parts = {REPLICATED: others, names[1 + shards.latent_rank]: own}
        writes = shards.rank == 0, shards.data_rank == 0
        table, files = Table(), {}
        for (name, part), mine in zip(parts.items(), writes, strict=True):
            layout = layout_of(part, {})
            if mine:
                create(folder / name, layout)
            found = _write(folder / name, layout, part, 0, mine)
            table |= found
            files[name] = {"bytes": layout.size, CHECKSUM: in_hex(layout.crc32(found))}
        files[names[1 + shards.latent_rank]]["rows"] = [rows.start, rows.stop]
        return table, files

    tables, files = zip(*all_results(shards, write), strict=True)
    check_replicas(tables, own, shards)
    every = {name: about for found in files for name, about in found.items()}
    return {
        "mesh": {"data": shards.data, "latent": shards.latent},
        "sharded": {name: [d_sae, *tensor.shape[1:]] for name, tensor in sorted(own.items())},
        "files": {name: every[name] for name in names},
    }


def file_names(latent: int) -> list[str]:
    """The file of replicated tensors, and one for each place on the latent axis."""
    shards = (f"shard-{place:05d}-of-{latent:05d}.safetensors" for place in range(latent))
    return [REPLICATED, *shards]


def read_shards(folder: Path, about: Any, shards: Shards) -> dict[str, Tensor]:
    """What `write_shards` wrote, whatever the mesh, of sharded tensors this process's rows.

    ValueError if a file is missing or damaged, naming it, or d_sae is not divisible.
    """
    found = _Stored.of(folder, about)

    def read() -> dict[str, Tensor]:
        rows = shards.rows(found.d_sae)
        parts = [
            _read_shard(file, found.shapes, rows)
            for file in found.files[1:]
            if file.start < rows.stop and rows.start < file.stop
        ]
        whole = {n: [part[n] for part in parts] for n in found.shapes}
        own = {name: of[0] if len(of) == 1 else torch.cat(of) for name, of in whole.items()}
        return read_tensors(folder / REPLICATED) | own

    tensors = everywhere(shards, read)
    extents = [Extent(file.path, 0, file.size) for file in found.files]
    for file, crc32 in zip(found.files, checksums(extents, shards), strict=True):
        if in_hex(crc32) != file.crc32:
            raise ValueError(f"{file.path} was changed after it was written: its checksum differs")
    return tensors


class _File(NamedTuple):
    path: Path
    size: int
    crc32: str
    start: int
    """Its rows are [start, stop) of the whole tensors."""
    stop: int


class _Stored(NamedTuple):
    """What `write_shards` returned."""

    shapes: dict[str, list[int]]
    """Of the whole sharded tensors."""
    files: list[_File]
    """The one of replicated tensors, then those of rows, in their order."""
    d_sae: int

    @classmethod
    def of(cls, folder: Path, about: Any) -> "_Stored":
        try:
            shapes, stored, files, end = dict(about["sharded"]), dict(about["files"]), [], 0
            for name in file_names(len(stored) - 1):
                size, (start, stop) = stored[name]["bytes"], stored[name].get("rows", (0, 0))
                counts = all(is_shape([count]) for count in (size, start, stop))
                if not counts or start != end or stop < start:
                    raise ValueError(f"{name} has {shown(stored[name])}")
                files.append(_File(folder / name, size, stored[name][CHECKSUM], start, stop))
                end = stop
            if not all(is_shape(shape) and shape[0] == end for shape in shapes.values()):
                raise ValueError(f"{end} rows of {shown(shapes)}")
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise ValueError(f"{folder}: its list of files is damaged: {error!r:.200}") from None
        return cls(shapes, files, end)


def _read_shard(file: _File, shapes: Mapping[str, list[int]], rows: slice) -> dict[str, Tensor]:
    """What a file has of some rows."""
    wanted = {name: [file.stop - file.start, *shape[1:]] for name, shape in shapes.items()}
    found = {name: entry.shape for name, entry in read_header(file.path).items()}
    if found != wanted:
        raise ValueError(f"{file.path} must hold {shown(wanted)}, got {shown(found)}")
    low, high = (min(max(row, file.start), file.stop) for row in (rows.start, rows.stop))
    return read_tensors(file.path, slice(low - file.start, high - file.start), shapes)


def read_rows(
    path: Path, sharded: Collection[str], shards: Shards
) -> tuple[dict[str, Tensor], dict[str, Content]]:
    """What one process wrote, of sharded tensors this process's rows, and what a checksum needs of
    the whole tensors; ValueError as `read_shards`."""

    def read() -> tuple[dict[str, Entry], dict[str, Tensor]]:
        header = read_header(path)
        divided = [name for name in sharded if name in header]
        match [*{tuple(header[name].shape[:1]) for name in divided}]:
            case [(d_sae,)]:
                return header, read_tensors(path, shards.rows(d_sae), divided)
        raise ValueError(f"{path}: {shown(divided)} must have rows, as many of each")

    header, tensors = everywhere(shards, read)
    extents = [Extent(path, entry.start, entry.stop) for entry in header.values()]
    found = zip(header.items(), checksums(extents, shards), strict=True)
    return tensors, {n: Content(tensors[n].dtype, e.shape, crc32) for (n, e), crc32 in found}


def checksums(extents: Sequence[Extent], shards: Shards) -> list[int]:
    """The CRC-32 of each extent. Every process reads an equal part of all bytes, a few of them
    at a time; ValueError if a file is too short."""
    # In the order of rows, so that a process reads mostly what it loads: along `data` first.
    order = sorted(range(shards.size), key=lambda rank: (rank % shards.latent, rank))
    parts = [[*share(extents, part, shards.size)] for part in range(shards.size)]
    own = parts[order.index(shards.rank)]
    tables = all_results(shards, lambda: [extent.crc32() for extent in own])
    found = [0] * len(extents)
    for rank, part in zip(order, parts, strict=True):
        for n, (extent, crc32) in enumerate(zip(part, tables[rank], strict=True)):
            found[n] = joined_crc32(found[n], crc32, extent.size)
    return found


def check_replicas(tables: Sequence[Table], sharded: Collection[str], shards: Shards) -> None:
    """ValueError, naming tensors and ranks, unless processes hold the same bytes of the same rows
    and of what is not sharded."""
    differ = {
        (name, other, rank)
        for rank, table in enumerate(tables)
        for name, crc32 in table.items()
        if crc32 != tables[other := rank % shards.latent if name in sharded else 0][name]
    }
    if differ:
        names, others, ranks = (sorted(set(values)) for values in zip(*differ, strict=True))
        raise ValueError(
            f"not saved: processes {ranks} and {others} should hold the same, but differ in "
            f"{shown(names)}"
        )


def _write(
    path: Path, layout: Layout, tensors: Mapping[str, Tensor], first: int, writes: bool
) -> Table:
    """`write_rows` if this process is the one that writes them."""
    if writes:
        return write_rows(path, layout, tensors, first)
    return {name: Content.of(tensor).crc32 for name, tensor in tensors.items()}


def _split(
    tensors: Mapping[str, Tensor], sharded: Collection[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Those that are sharded, and the others."""
    own = {name: tensor for name, tensor in tensors.items() if name in sharded}
    return own, {name: tensor for name, tensor in tensors.items() if name not in sharded}


def _rows(own: Mapping[str, Tensor], shards: Shards) -> tuple[slice, int]:
    """The rows of this process, and the number of all."""
    (count,) = {len(tensor) for tensor in own.values()}
    rows = shards.rows(count * shards.latent)
    assert rows.stop - rows.start == count and rows.step is None
    return rows, count * shards.latent
