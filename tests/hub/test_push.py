"""Pushed by the real client to a hub on this machine, an SAE loads from it with the same bits."""

import html
import json
import re
from collections.abc import Iterator
from pathlib import Path

import markdown
import pytest
import torch
import yaml
from huggingface_hub import constants

import fastsae
from fastsae import SAE, JumpReLU, TopK, interop
from fastsae.cli import run
from fastsae.hub import PushConfig, write_repository

from .local_hub import TOKEN, Hub, local_hub

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")  # its uploads
D_IN, D_SAE, K = 12, 40, 5
NATIVE = {"README.md", "config.json", "sae.safetensors"}
ORIGIN = {
    "model_name": "openai-community/gpt2",
    "model_class_name": "HookedTransformer",
    "hook_name": "blocks.6.hook_resid_post",
    "hf_hook_name": "transformer.h.6",
    "prepend_bos": True,
    "context_size": 128,
}


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[Hub]:
    """The hub that huggingface_hub talks to."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with local_hub() as found:
        settings = {
            "ENDPOINT": found.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": found.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,  # its storage is on other machines
        }
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value)
        yield found


@pytest.fixture
def finished(tmp_path) -> Path:
    """What a run leaves, with curves and the results of `fastsae eval`."""
    out = tmp_path / "run"
    sae = SAE(D_IN, D_SAE, TopK(K))
    sae.save(out / "sae")
    (out / "curves.png").write_bytes(b"\x89PNG of the curves")
    summary = {"fvu": 0.0886, "fvu_all": 0.09, "l0": 5.0, "dead_fraction": 0.0149}
    summary |= {"evaluated_on": "held-out data", "evaluated_tokens": 26324}
    summary |= {"left_out_of_evaluation": 0, "tokens": 2457600, "left_out_tokens": 0}
    summary |= {"gamma": [0.5], "tokens_per_second": 21745.0, "seconds": 113.0}
    summary |= {"step_path": "fused", "sae_lens": "none", "origin": ORIGIN}
    (out / "summary.json").write_text(json.dumps(summary))
    return out


def test_the_same_bits_come_back(hub, finished, tmp_path):
    sae, x = fastsae.load(finished), torch.randn(50, D_IN)
    pushed = sae.push_to_hub("org/name", run=finished)
    assert pushed.url == f"{hub.url}/org/name" and not pushed.missing
    again = fastsae.load("org/name")
    assert torch.equal(again(x), sae(x))
    for name, tensor in sae.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    for layout in ("sae_lens", "sparsify"):
        torch.testing.assert_close(fastsae.load(f"org/name/{layout}")(x), sae(x))
    files = hub.repositories["org/name"].files
    assert {name for name in files if "/" not in name} == {*NATIVE, "curves.png"}
    assert not [name for name in files if name.endswith((".pt", ".bin", ".pkl"))]
    assert files["curves.png"] == (finished / "curves.png").read_bytes()
    assert json.loads(files["sae_lens/cfg.json"])["metadata"].items() >= ORIGIN.items()


def test_a_later_push_replaces_all_of_an_earlier_one(hub):
    fastsae.push_to_hub(SAE(D_IN, D_SAE, TopK(K)), "org/name")
    sae = SAE(D_IN, D_SAE, JumpReLU(l0_coef=0.0)).eval()
    pushed = fastsae.push_to_hub(sae, "org/name", message="JumpReLU")
    assert pushed.missing == {"sparsify": "sparsify supports topk, not jumprelu"}
    found = hub.repositories["org/name"]
    assert found.messages == ["Upload SAE", "JumpReLU"]
    lens = {"sae_lens/cfg.json", "sae_lens/sae_weights.safetensors"}
    assert found.files.keys() == NATIVE | lens
    assert torch.equal(fastsae.load("org/name").W_dec, sae.W_dec)
    fastsae.push_to_hub(sae, "org/name", native_only=True)
    assert found.files.keys() == NATIVE


def test_a_dry_run_writes_what_a_push_uploads(hub, finished, tmp_path, capsys):
    command = ["push", str(finished), "org/name", "--license", "mit"]
    run([*command, "--dry-run", str(tmp_path / "look")])
    printed = capsys.readouterr().out
    assert "nothing was uploaded" in printed and not hub.repositories
    run([*command, "--private"])
    assert f"pushed to {hub.url}/org/name" in capsys.readouterr().out
    found = hub.repositories["org/name"]
    written = {p: p.read_bytes() for p in (tmp_path / "look").rglob("*") if p.is_file()}
    names = {path.relative_to(tmp_path / "look").as_posix(): c for path, c in written.items()}
    assert found.private and found.files == names
    with pytest.raises(ValueError, match="look is not an empty directory"):
        run([*command, "--dry-run", str(tmp_path / "look")])


def test_what_the_hub_refuses_is_one_line(hub, monkeypatch):
    sae = SAE(D_IN, D_SAE, TopK(K))
    sae.push_to_hub("org/name")
    with pytest.raises(
        ValueError, match="cannot push to org/name: the repository already exists and is pub"
    ):
        sae.push_to_hub("org/name", private=True)
    monkeypatch.setenv("HF_TOKEN", "hf_of_another")
    with pytest.raises(ValueError, match="cannot push to org/name: .*401.*hf auth login") as caught:
        sae.push_to_hub("org/name")
    assert "\n" not in str(caught.value) and str(caught.value).count("Unauthorized") == 1
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    with pytest.raises(ValueError, match="cannot push to org/name: .*[Cc]onnect"):
        sae.push_to_hub("org/name")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"repository": "name"}, "repository must be organization/name on the Hub, got 'name'"),
        ({"repository": "a/b/c"}, "repository must be organization/name on the Hub, got 'a/b/c'"),
        ({"base_model": "../x"}, "base_model must be organization/name on the Hub, got '../x'"),
        ({"license": "mit\nx: y"}, "license must be an identifier such as apache-2.0"),
        ({"message": " "}, "message must not be empty"),
    ],
    ids=str,
)
def test_settings_that_make_no_push(settings, message):
    with pytest.raises(ValueError, match=message):
        PushConfig(**{"repository": "org/name"} | settings)


def card(folder: Path) -> tuple[dict, str]:
    """The metadata of a model card, and its text as a page."""
    found = re.fullmatch(r"---\n(.*?)\n---\n(.*)", (folder / "README.md").read_text(), re.DOTALL)
    assert found is not None
    return yaml.safe_load(found[1]), markdown.markdown(
        found[2], extensions=["tables", "fenced_code"]
    )


def test_the_card_of_a_run(finished, tmp_path):
    config = PushConfig(repository="org/name", license="mit")
    write_repository(fastsae.load(finished), tmp_path / "card", config, finished)
    head, page = card(tmp_path / "card")
    assert head["base_model"] == ORIGIN["model_name"] and head["license"] == "mit"
    assert head["library_name"] == "fastsae"
    assert {"sparse-autoencoder", "mechanistic-interpretability", "saelens"} <= {*head["tags"]}
    assert "<h1>name</h1>" in page and 'src="curves.png"' in page
    cells = [re.sub("<.*?>", "", cell) for cell in re.findall(r"<td>(.*?)</td>", page)]
    assert {"0.0886", "5.0", "1.49%", "topk (k = 5)", "transformer.h.6"} <= {*cells}
    assert (
        "26,324 tokens of held-out data" in page and "Training: 2,457,600 tokens in 113 s" in page
    )
    titles = re.findall(r"<h3>(.*?)</h3>", page)
    assert titles == ["fastsae", "SAELens", "sparsify", "dictionary_learning"]
    assert len(re.findall(r'<code class="language-python">', page)) == len(titles)


def test_no_path_of_this_machine_is_published(finished, tmp_path):
    """Unless the model has an id on the hub, only the name of its directory is."""
    summary = json.loads((finished / "summary.json").read_text())
    summary["origin"] |= {"model_name": str(tmp_path / "mine"), "dataset_path": str(tmp_path)}
    (finished / "summary.json").write_text(json.dumps(summary))
    for base, wanted in ((None, "mine"), ("org/model", "org/model")):
        config = PushConfig(repository="org/name", base_model=base)
        out = tmp_path / f"card of {wanted}".replace("/", "-")
        write_repository(fastsae.load(finished), out, config, finished)
        written = [path.read_bytes() for path in out.rglob("*") if path.is_file()]
        assert not [content for content in written if str(tmp_path).encode() in content]
        metadata = json.loads((out / "sae_lens" / "cfg.json").read_text())["metadata"]
        assert metadata["model_name"] == wanted and card(out)[0].get("base_model") == base


def test_where_sae_lens_expects_heads_the_card_turns_that_off(finished, tmp_path):
    path, flat = finished / "summary.json", "sae.turn_off_forward_pass_hook_z_reshaping()"
    for name, wanted in (("blocks.6.attn.hook_z", 1), ("blocks.6.hook_resid_post", 0)):
        summary = json.loads(path.read_text())
        summary["origin"]["hook_name"] = name
        path.write_text(json.dumps(summary))
        config, out = PushConfig(repository="org/name"), tmp_path / name
        write_repository(fastsae.load(finished), out, config, finished)
        assert (out / "README.md").read_text().count(flat) == wanted


def test_what_was_a_path_when_the_run_was_made_decides(finished, tmp_path, monkeypatch):
    """Wherever it is pushed from: there, an id may be the name of a directory."""
    summary = json.loads((finished / "summary.json").read_text())
    summary["origin"] |= {"dataset_path": "clients/acme"}
    (finished / "summary.json").write_text(json.dumps(summary | {"local": ["dataset_path"]}))
    (tmp_path / ORIGIN["model_name"]).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    config = PushConfig(repository="org/name")
    write_repository(fastsae.load(finished), tmp_path / "out", config, finished)
    metadata = json.loads((tmp_path / "out/sae_lens/cfg.json").read_text())["metadata"]
    assert metadata == metadata | {"model_name": ORIGIN["model_name"], "dataset_path": "acme"}
    with pytest.raises(ValueError, match="out is not an empty directory"):
        write_repository(fastsae.load(finished), tmp_path / "out", config, finished)


def test_a_card_shows_text_of_others_as_text(tmp_path):
    """A model's name comes from the files of data, which may be anyone's."""
    name = "x`</code><script>|\n---\nlicense: mit\x1b[2J"
    folder = tmp_path / "run"
    sae = SAE(D_IN, D_SAE, TopK(K))
    sae.save(folder / "sae")
    summary = dict.fromkeys(("fvu", "fvu_all", "l0", "dead_fraction", "seconds"), 0.5)
    evil = r"[a](https://x) ![b](c) *i* `d` | \\ ~~e~~"
    summary |= {"evaluated_on": evil, "evaluated_tokens": 5, "tokens": 5, "gamma": []}
    summary |= {"left_out_of_evaluation": 0, "left_out_tokens": 0, "tokens_per_second": 1.0}
    summary |= {"step_path": "fused", "sae_lens": "none"}
    summary |= {"origin": {"model_name": name, "hf_hook_name": name}}
    (folder / "summary.json").write_text(json.dumps(summary))
    config = PushConfig(repository="org/name")
    write_repository(sae, tmp_path / "card", config, folder)
    head, page = card(tmp_path / "card")
    assert "license" not in head and "base_model" not in head
    assert "<script" not in page and "\x1b" not in page
    assert len(re.findall("<table>", page)) == 2
    (paragraph,) = re.findall("<p>Measured on (.*?)</p>", page, re.DOTALL)
    assert "<" not in paragraph and evil in html.unescape(paragraph)


@pytest.mark.filterwarnings("ignore")  # of the library
def test_sae_lens_loads_what_was_pushed(hub, finished):
    library = pytest.importorskip("sae_lens")
    sae, x = fastsae.load(finished), torch.randn(50, D_IN)
    sae.push_to_hub("org/name", run=finished)
    theirs = library.SAE.from_pretrained("org/name", "sae_lens")
    torch.testing.assert_close(theirs(x), sae(x))
    assert theirs.cfg.metadata.hook_name == ORIGIN["hook_name"]


@pytest.mark.filterwarnings("ignore")  # of the library
def test_sparsify_loads_what_was_pushed(hub, finished):
    library = pytest.importorskip("sparsify")
    sae, x = fastsae.load(finished), torch.randn(50, D_IN)
    sae.push_to_hub("org/name", run=finished)
    theirs = library.SparseCoder.load_from_hub("org/name", hookpoint="sparsify")
    torch.testing.assert_close(theirs(x).sae_out, sae(x))


def test_the_hub_itself_loads_any_format(hub, tmp_path):
    """Also a file in a repository, whose name then says what the file does not."""
    sae = SAE(D_IN, D_SAE, TopK(K))
    sae.push_to_hub("org/name")
    files = hub.repositories["org/name"].files
    interop.save(sae, tmp_path, "dictionary_learning")
    files |= {f"dl/{path.name}": path.read_bytes() for path in tmp_path.glob("*.*")}
    assert torch.equal(fastsae.load("org/name/dl").W_enc, sae.W_enc)
    with pytest.raises(ValueError, match="org/name on the Hub has no layers.4"):
        fastsae.load("org/name/layers.4")
    hub.repositories["org/name"].files.clear()
    hub.repositories["org/name"].messages.append("Delete all")
    with pytest.raises(ValueError, match="org/name on the Hub has no files of an SAE"):
        fastsae.load("org/name")
    with pytest.raises(ValueError, match="org/other does not exist, locally or on the Hub: .*404"):
        fastsae.load("org/other")
