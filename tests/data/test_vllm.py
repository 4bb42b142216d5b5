"""Folders of hidden states, laid out as vLLM writes them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastsae.data import VllmHiddenStates

LAYERS, D = 3, 4
LENGTHS = [5, 1, 0, *[7] * 37]


def write(path: Path, tokens: int, first_id: int, layers: int = LAYERS, width: int = D) -> None:
    """A request's file and, as long as vLLM runs, its lock."""
    states = torch.randn(tokens, layers, width).to(torch.bfloat16)
    ids = torch.arange(first_id, first_id + tokens)
    save_file({"hidden_states": states, "token_ids": ids}, path)
    path.with_name(path.name + ".lock").touch()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, tokens in enumerate(LENGTHS):
        write(tmp_path / f"cmpl-{number:04}-0-b1.safetensors", tokens, 100 * number)
    return tmp_path


def test_rows_are_those_of_one_layer_with_their_contexts(folder: Path):
    producer = VllmHiddenStates(folder, layer=1)
    (group,) = producer.groups((), "train")
    (aside,) = producer.groups((), "heldout")
    assert group.contexts is not None and aside.contexts is not None
    assert len(group.rows[0]) + len(aside.rows[0]) == sum(LENGTHS)
    assert aside.contexts.documents.unique().tolist() == [19, 39]
    positions, documents = group.contexts.positions, group.contexts.documents
    assert torch.equal(group.contexts.token_ids, 100 * documents + positions)
    path = folder / "cmpl-0020-0-b1.safetensors"
    stored = load_file(path)["hidden_states"][:, 1]
    assert torch.equal(group.rows[0][documents == 20], stored) and stored.dtype == torch.bfloat16
    (dropped,) = VllmHiddenStates(folder, 1, drop_first=True).groups()
    assert torch.equal(dropped.rows[0], group.rows[0][positions > 0])


def test_groups_continue_from_any_place(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fastsae.data.vllm.GROUP_TOKENS", 20)
    producer = VllmHiddenStates(folder, 0)
    train = [*producer.groups()]
    for done, group in enumerate(train[:-1]):
        after = next(producer.groups(group.next))
        assert torch.equal(after.rows[0], train[done + 1].rows[0])
    both = [*producer.groups((), "both")]
    assert [group.heldout for group in both].count(True) == 2
    rest = [group.rows[0] for group in both if not group.heldout]
    assert torch.equal(torch.cat(rest), torch.cat([group.rows[0] for group in train]))


def test_the_fingerprint_tells_layers_and_files_apart(folder: Path):
    found = [VllmHiddenStates(folder, n).fingerprint for n in (0, 1, 0)]
    write(folder / "cmpl-9999-0-b1.safetensors", 3, 0)
    found.append(VllmHiddenStates(folder, 0).fingerprint)
    assert found[0] == found[2] and len({*found}) == 3


def test_other_files_are_refused(folder: Path, tmp_path_factory: pytest.TempPathFactory):
    with pytest.raises(ValueError, match="layer must be from 0 to 2, got 3"):
        VllmHiddenStates(folder, 3)
    with pytest.raises(ValueError, match="layer must be from 0 to 2, got None"):
        VllmHiddenStates(folder)
    with pytest.raises(ValueError, match=r"holds no \.safetensors files"):
        VllmHiddenStates(tmp_path_factory.mktemp("empty"))
    producer, path = VllmHiddenStates(folder, 0), folder / "cmpl-0007-0-b1.safetensors"

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=f"{path}.*{message}"):
            list(producer.groups())

    write(path, 7, 0, width=D + 1)
    refused("has 3 layers of width 5, cmpl-0000-0-b1.safetensors has 3 of width 4")
    save_file({"hidden_states": torch.zeros(7, 3, D), "token_ids": torch.arange(6)}, path)
    refused("expected hidden_states .* as vLLM writes them, found")
    states = torch.zeros(7, 3, D)
    states[4, 0, 2] = torch.nan
    save_file({"hidden_states": states, "token_ids": torch.arange(7)}, path)
    refused("holds NaN or Inf at token 4")
    path.write_bytes(path.read_bytes()[:-1])
    refused("bytes expected")
