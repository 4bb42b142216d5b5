"""Opens what a producer's settings name: its model and its text."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastsae.config import to_dict
from fastsae.data.hook_names import lens_name
from fastsae.data.model import load_model, load_tokenizer
from fastsae.data.producer import ModelProducer
from fastsae.data.producer_config import ProducerConfig
from fastsae.data.text import (
    Documents,
    dataset_rows,
    file_rows,
    is_json_lines,
    text_files,
    text_of,
    tokens_of,
)
from fastsae.device import choose_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NOT_IN_REQUEST = ("batch_tokens", "trust_remote_code")
"""Settings that do not change the rows, or only their last bits."""


def read_files(config: ProducerConfig) -> list[Path]:
    """The text files of a config; ValueError if there are none, or they lack columns."""
    files = text_files(config.text)
    if config.column != "text" and (other := [file for file in files if not is_json_lines(file)]):
        raise ValueError(
            f"column {config.column!r} needs a dataset or .jsonl files, got {other[0]}"
        )
    return files


def request(config: ProducerConfig, files: list[Path], hookpoint: str) -> dict[str, Any]:
    """The settings that determine the rows at a hookpoint, as JSON values."""
    known = {field.name for field in fields(ProducerConfig)} - {*NOT_IN_REQUEST}
    values = to_dict(replace(config, hookpoint=hookpoint))
    listing = "\n".join(f"{file.name} {file.stat().st_size}" for file in files)
    digest = hashlib.sha256(listing.encode()).hexdigest()
    return {name: values[name] for name in values if name in known} | {"files": digest}


def loaded(config: ProducerConfig, device: str) -> "PreTrainedModel":
    """The model of a config."""
    return load_model(config.model, choose_device(device), config.model_dtype, config.files)


def open_producer(
    config: ProducerConfig,
    files: list[Path],
    model: "PreTrainedModel",
    dtype: torch.dtype | None = None,
) -> tuple[ModelProducer, Documents]:
    """The producer of a config whose hookpoints are paths, with rows of a dtype, by default the
    model's; and the documents that it reads."""
    tokenizer = load_tokenizer(config.model, config.files)
    documents = _documents(config, files, tokenizer, model)
    about = request(config, files, "any") | {"dtype": str(dtype), "passes": config.batch_tokens}
    producer = ModelProducer(
        model,
        tokenizer,
        documents,
        config.hookpoints,
        context_length=config.context_length,
        prepend_bos=config.prepend_bos,
        drop_first=config.drop_first,
        max_document_tokens=config.max_document_tokens,
        heldout_fraction=config.heldout_fraction,
        dtype=dtype,
        batch_tokens=config.batch_tokens,
        fingerprint=hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16],
    )
    return producer, documents


def facts(producer: ModelProducer, paths: Iterable[str]) -> dict[str, Any]:
    """What the settings leave open, for libraries that run the model themselves: whether windows
    begin with the BOS token, and the TransformerLens names of hookpoints, where they have one."""
    names = {path: lens_name(producer.model, path) for path in paths}
    known = {path: name for path, name in names.items() if name is not None}
    return {"begins_with_bos": producer.begins_with_bos, "lens_names": known}


def _documents(config: ProducerConfig, files: list[Path], tokenizer: Any, model: Any) -> Documents:
    def rows():
        if config.dataset is None:
            return file_rows(files, config.column)
        return dataset_rows(
            config.dataset,
            config=config.dataset_config,
            split=config.dataset_split,
            column=config.column,
        )

    if config.tokens_column is None:
        return Documents(rows, lambda value: text_of(value, tokenizer))
    vocabulary = len(model.get_input_embeddings().weight)
    return Documents(rows, lambda value: tokens_of(value, vocabulary))
