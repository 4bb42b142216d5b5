"""Files and rows become documents, or a one-line error that names them."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
import torch

from fastsae.data import ActivationShards, HarvestConfig, harvest
from fastsae.data.model import TextWindows, load_tokenizer
from fastsae.data.text import dataset_rows, file_rows, text_files

TEXT = "The best of times: “naïve” café.\nIt was the worst of times.\n"
CHAT = [{"role": "user", "content": "was it"}, {"role": "assistant", "content": "the best"}]


def zstandard(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("name", "compress"),
    [
        ("a.txt", bytes),
        ("a.txt.gz", gzip.compress),
        ("a.md.bz2", bz2.compress),
        ("a.rst.xz", lzma.compress),
        ("a.txt.zst", zstandard),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_file_is_decompressed_and_decoded(
    tmp_path: Path, name: str, compress: Callable[[bytes], bytes], encoding: str
):
    (tmp_path / name).write_bytes(compress(TEXT.encode(encoding)))
    assert text_files((str(tmp_path),)) == [tmp_path / name]
    assert [value for _, value in file_rows([tmp_path / name], "text")] == [TEXT]


def test_python_source_may_name_its_encoding(tmp_path: Path):
    source = "# -*- coding: latin-1 -*-\ncafé = 1\n"
    (tmp_path / "a.py").write_bytes(source.encode("latin-1"))
    assert [value for _, value in file_rows([tmp_path / "a.py"], "text")] == [source]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", TEXT.encode("latin-1", "replace"), "a.txt is not utf-8 text .*: convert it"),
        ("a.jsonl", b'{"text": "caf\xe9"}', "a.jsonl is not utf-8 text .*: convert it"),
        ("a.txt", TEXT.encode("utf-16-le"), "a.txt is not utf-8|a.txt holds NUL characters"),
        ("a.txt", "ascii".encode("utf-16-le"), "a.txt holds NUL characters"),
        ("a.txt.gz", b"text", "cannot read .*a.txt.gz: Not a gzipped file"),
        ("a.txt.gz", gzip.compress(bytes(99), mtime=0)[:-9], "cannot read .*a.txt.gz"),
        ("a.txt.zst", b"text", "cannot read .*a.txt.zst"),
    ],
)
def test_a_file_that_is_no_text_is_named(tmp_path: Path, name: str, data: bytes, message: str):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        list(file_rows([tmp_path / name], "text"))
    assert "\n" not in str(error.value)


def test_blank_lines_are_no_rows_but_counted(tmp_path: Path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a"}\n\n  \n{"text": "b"}\n{}\n')
    rows = file_rows([file], "text")
    assert [next(rows).value, next(rows).value] == ["a", "b"]
    with pytest.raises(ValueError, match="a.jsonl line 5: expected"):
        next(rows)


@pytest.mark.parametrize(
    ("name", "config", "split", "message"),
    [
        ("plain", None, "train", None),
        (
            "plain",
            None,
            "test",
            "cannot load split 'test' of .*plain': it was saved with split train",
        ),
        ("plain", "en", "train", "it was saved with config None, not 'en'"),
        ("named", "en", "train", None),
        ("named", "en", "test", None),
        ("named", "de", "test", "it was saved with config en, not 'de'"),
        ("named", None, "other", "it was saved with split test"),
        ("several", None, "b", None),
        ("several", None, "train", "it was saved with split a and b"),
        ("several", "en", "b", "it was saved with config None, not 'en'"),
    ],
)
def test_a_dataset_saved_to_disk_has_its_own_config_and_split(
    tmp_path: Path, name: str, config: str | None, split: str, message: str | None
):
    rows = datasets.Dataset.from_list([{"text": "b"}])
    named = datasets.Dataset.from_list(
        [{"text": "b"}], info=datasets.DatasetInfo(config_name="en"), split=datasets.Split.TEST
    )
    several = datasets.DatasetDict({"a": datasets.Dataset.from_list([{"text": "a"}]), "b": rows})
    {"plain": rows, "named": named, "several": several}[name].save_to_disk(str(tmp_path / name))
    found = dataset_rows(str(tmp_path / name), config=config, split=split, column="text")
    if message is None:
        assert [row.value for row in found] == ["b"]
    else:
        with pytest.raises(ValueError, match=message):
            next(found)


def harvested(tmp_path: Path, model: Path, rows: list[dict], **settings: Any) -> ActivationShards:
    """Of the rows as a .jsonl file and as a dataset, which must give the same."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "rows"))
    sources: list[dict[str, Any]] = [
        {"text": (str(tmp_path / "rows.jsonl"),)},
        {"dataset": str(tmp_path / "rows")},
    ]
    found: list[ActivationShards] = []
    for source in sources:
        config = HarvestConfig(
            model=str(model),
            hookpoint="transformer.h.0" if "gpt2" in model.name else "encoder.layer.0",
            out=tmp_path / f"out-{len(source)}-{len(found)}",
            context_length=16,
            heldout_fraction=0.0,
            **source,
            **settings,
        )
        found.append(harvest(config, progress=False))
    first, second = (every(shards) for shards in found)
    assert all(map(torch.equal, first, second))
    return found[0]


def every(shards: ActivationShards) -> tuple[torch.Tensor, ...]:
    rows = torch.arange(shards.n_tokens)
    return (shards.rows(rows), *shards.contexts(rows))


def texts(shards: ActivationShards, model: Path) -> dict[int, str]:
    tokenizer = load_tokenizer(str(model))
    _, ids, _, documents = every(shards)
    return {
        document: str(tokenizer.decode(ids[documents == document].tolist()))
        for document in documents.unique().tolist()
    }


def test_null_rows_are_skipped_and_counted(gpt2: Path, tmp_path: Path):
    rows = [{"text": text} for text in ("was it", None, "the best", None, None)]
    shards = harvested(tmp_path, gpt2, rows)
    assert texts(shards, gpt2) == {0: "was it", 2: "the best"}
    assert shards.skipped_rows == 3


def test_chat_messages_go_through_the_models_template(bert: Path, tmp_path: Path):
    """Also if the template writes the special tokens that every window gets."""
    tokenizer = load_tokenizer(str(bert))
    rows = [{"messages": CHAT}] * 2
    with pytest.raises(ValueError, match="row 0, column 'messages': .* has no chat template"):
        datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "chat"))
        config = HarvestConfig(
            model=str(bert),
            hookpoint="encoder.layer.0",
            out=tmp_path / "none",
            dataset=str(tmp_path / "chat"),
            text_column="messages",
            context_length=16,
        )
        harvest(config, progress=False)
    model = tmp_path / "bert"
    model.mkdir()
    for file in bert.iterdir():
        (model / file.name).symlink_to(file)
    template = "[CLS]{% for m in messages %}{{ m.role[0] }}: {{ m.content }};{% endfor %}[SEP]"
    tokenizer.chat_template = template
    (model / "tokenizer_config.json").unlink()
    (model / "tokenizer.json").unlink()
    tokenizer.save_pretrained(model)
    shards = harvested(tmp_path, model, rows, text_column="messages")
    assert texts(shards, model) == dict.fromkeys((0, 1), "u: was it;a: the best;")
    assert every(shards)[2].min() == 1  # one [CLS], not two


def test_token_ids_are_used_as_they_are(bert: Path, tmp_path: Path):
    """Special tokens around them and padding are recognized."""
    tokenizer = load_tokenizer(str(bert))
    bare = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    around = tokenizer(TEXT)["input_ids"]
    rows = [{"ids": ids} for ids in (bare, around, [*around, 0, 0], [0, 0, 0, *around])]
    found = harvested(tmp_path, bert, rows, tokens_column="ids")
    x, ids, positions, documents = every(found)
    windows = TextWindows(tokenizer, 16)
    assert [*map(windows.cut, (bare, around))] == [windows.cut(TEXT)] * 2
    for document in range(4):
        assert ids[documents == document].tolist() == bare
        assert torch.equal(positions[documents == document], positions[documents == 0])


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("text", 3, "expected text or chat messages, found int"),
        ("text", b"bytes", "expected text or chat messages, found bytes"),
        ("text", [5, 6], "expected text, found token ids: name the column with tokens_column"),
        ("text", ["a", "b"], "expected text or chat messages, found a list of str"),
        ("text", {"a": 1}, "expected text or chat messages, found dict"),
        ("tokens", "text", "expected a list of token ids, found str"),
        ("tokens", [5, 6.5], "expected a list of token ids, found a list of float"),
        ("tokens", [5, 320], "token id 320 is outside the model's vocabulary of 320"),
        ("tokens", [-1], "token id -1 is outside"),
    ],
)
def test_a_value_that_is_no_text_is_named(
    gpt2: Path, tmp_path: Path, column: str, value: Any, message: str
):
    datasets.Dataset.from_list([{"a": None}, {"a": value}]).save_to_disk(str(tmp_path / "rows"))
    settings: dict[str, Any] = {f"{column}_column": "a", "context_length": 16}
    config = HarvestConfig(
        model=str(gpt2),
        hookpoint="transformer.h.0",
        out=tmp_path / "out",
        dataset=str(tmp_path / "rows"),
        **settings,
    )
    with pytest.raises(ValueError, match=f"row 1, column 'a': {message}"):
        harvest(config, progress=False)
