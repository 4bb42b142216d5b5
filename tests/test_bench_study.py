"""The study's verdicts on results that are made up, its pursuit, and that its plan is sound."""

import math
import re
import sysconfig
from dataclasses import replace

import pytest
import torch

from bench.corrections import NUMBERS, corrections
from bench.record import RESULTS, ROOT
from bench.study.claims import CLAIMS, T95, Claim, difference
from bench.study.measure import pursuit
from bench.study.per_latent import per_latent
from bench.study.plan import DATA, PATHS, TUNING_SEED, Data, Method, Scale, Upgrade
from bench.study.report import report
from bench.study.run import Study, known_runs
from bench.study.text import documents
from fastsae import SAE, AbsTopK
from fastsae.data import Synthetic
from fastsae.files import read_json, write_json
from fastsae.nn import init_from_data
from fastsae.nn.rational import Rational

pytestmark = pytest.mark.usefixtures("undrawn")
LOWER = Claim("paper", "better", "new", "old")
STAMP = {"cpu": "none", "torch": "0", "commit": "0"}


def results(values: list[float], l0: float = 32.0, metric: str = "fvu") -> dict:
    run = {"l0": l0, "lr": 1.0, "stamp": STAMP}
    return {str(seed): {metric: value, **run} for seed, value in enumerate(values)}


OLD = [0.2, 0.1, 0.3, 0.2, 0.2]


@pytest.mark.parametrize(
    ("factors", "verdict"),
    [
        ([0.8, 0.9, 0.8, 0.9, 0.8], "better"),
        ([1.2, 1.1, 1.2, 1.1, 1.2], "worse"),
        ([1.001, 0.999, 1.002, 1.0, 0.998], "equivalent"),
        ([0.5, 1.4, 0.7, 1.2, 1.0], "undecided"),
        ([0.5], "undecided"),  # one seed tells nothing
        ([0.98, 0.98, 0.98, 0.98, 0.98], "better"),
        ([0.992, 0.991, 0.992, 0.991, 0.992], "equivalent"),  # though surely less
    ],
)
def test_a_verdict(factors, verdict):
    """Of the relative differences, which are more alike than the seeds are."""
    new = [factor * old for factor, old in zip(factors, OLD, strict=False)]
    found = difference(LOWER, {"new": results(new), "old": results(OLD)})
    assert found is not None and found.verdict == verdict
    mean = sum(factors) / len(factors)
    assert found.center == pytest.approx(mean - 1)
    if factors[1:]:
        deviation = (sum((f - mean) ** 2 for f in factors) / 4) ** 0.5
        assert found.half == pytest.approx(T95[3] * deviation / 5**0.5, abs=1e-12)


def test_more_is_better_of_some_metrics_and_fractions_are_subtracted():
    claim = LOWER._replace(metric="utilization")
    high, low = results([0.9, 0.9], metric="utilization"), results([0.2, 0.2], metric="utilization")
    found = difference(claim, {"new": high, "old": low})
    assert found is not None and found.verdict == "better"
    assert found.center == pytest.approx(0.7)
    assert difference(LOWER, {"new": high, "old": low}) is None, "FVU was not measured"


def test_what_cannot_be_compared():
    """A lower error with more active latents; with fewer of them, it is better all the same."""
    old = results([0.2, 0.2])
    found = difference(LOWER, {"new": results([0.1, 0.1], l0=60.0), "old": old})
    assert found is not None and found.verdict == "not comparable: L0 60.0 against 32.0"
    found = difference(LOWER, {"new": results([0.1, 0.1], l0=20.0), "old": old})
    assert found is not None and found.verdict == "better"


def test_a_report(tmp_path):
    name = "AbsTopK, k=8, x4"
    runs = {name.removeprefix("Abs"): results([0.2, 0.4]), name: results([0.1, 0.2])}
    text = report(Scale(), {"planted": runs}, tmp_path)
    row = "AbsTopK, arXiv:2510.00404 | better | AbsTopK, k=8, x4 | TopK, k=8, x4 | planted | fvu"
    assert f"| {row} | 0.1500 vs. 0.3000 | -50.0 ± 0.0 % | better |" in text
    one = {method: {"0": seeds["0"]} for method, seeds in runs.items()}
    alone = report(Scale(), {"planted": one}, tmp_path)
    assert "| 0.1000 vs. 0.2000 | -50.0 % (one seed) | undecided |" in alone
    text = report(Scale(), {"planted": runs}, tmp_path)
    assert "2 of 2 methods were measured." in text
    assert "| TopK, k=8, x4 | 2 | 1.00 ± 0.00 | 0.3000 ± 0.1414 | 32.0 ± 0.0 | – |" in text
    assert (tmp_path / "results.md").read_text() == text


def test_the_map_of_signed_codes(tmp_path):
    runs = {"TopK, k=32, x4": results([0.2, 0.2]), "AbsTopK, k=32, x4": results([0.1, 0.1])}
    assert "TopK's, by k" not in report(Scale(), {"MiniLM layer 3": runs}, tmp_path)
    runs |= {"TopK, k=16, x1": results([0.2]), "AbsTopK, k=16, x1": results([0.3])}
    text = report(Scale(), {"MiniLM layer 3": runs}, tmp_path)
    assert "| 1 | +50.0 % | – |\n| 4 | – | **-50.0 ± 0.0 %** |\n" in text
    assert "BatchTopK's, by k" not in text
    batch = {f"Batch{name}": seeds for name, seeds in runs.items()}
    text = report(Scale(), {"MiniLM layer 3": batch}, tmp_path)
    assert "BatchAbsTopK's FVU relative to BatchTopK's, by k" in text
    assert "| 1 | +50.0 % | – |\n| 4 | – | **-50.0 ± 0.0 %** |\n" in text


def test_every_method_is_valid_and_every_claim_can_be_measured():
    names = set()
    for data in DATA.values():
        names |= {*data.methods, *data.upgrades}
        for method in data.methods.values():
            config = method.config(384, 3, Scale(), 0.5)
            assert config.seed == 3 and config.data_seed == 0
            assert config.d_sae == round(384 * method.expansion)
        for upgrade in data.upgrades.values():
            assert upgrade.teacher in data.methods
            assert replace(upgrade.config(3, Scale()), seed=0) is not None
            names.add(f"{upgrade.teacher}, tuned")
    controls = {claim for claim in CLAIMS if claim.method == claim.other}
    assert len(controls) <= 2 * len(PATHS), "a control is not compared with itself"
    assert {claim.method for claim in CLAIMS} | {claim.other for claim in CLAIMS} <= names


def test_a_study_trains_equal_settings_once_and_continues(tmp_path, monkeypatch):
    options = "--k 4 --encoder tied"
    source = Synthetic(d_in=16, n_latents=32, active=4, n_tokens=4000, noise=0.1)
    methods = {"tuned": Method(options, lr=None), "fixed": Method(options)}
    methods["relu"] = Method("--activation relu --target-l0 4")
    upgrades = {"copy": Upgrade("relu", {}), "paper": Upgrade("relu", {"path": "paper"})}
    upgrades["per latent"] = Upgrade("relu", {}, 50.0)
    made = Data(lambda _: source, methods, upgrades)
    monkeypatch.setitem(DATA, "made", made)
    assert Study("made", tmp_path, tmp_path, Scale(), -math.inf).runs([0], {}) == {}, "no time"
    scale = Scale(steps=40, tune_steps=4, batch_size=64, tokens=500)
    runs = Study("made", tmp_path, tmp_path, scale).runs([0, 1], {})
    assert {name: set(found) for name, found in runs.items()} == {
        name: {"0", "1"} for name in (*methods, *upgrades, "relu, tuned")
    }
    errors = {runs[name]["0"]["fvu"] for name in upgrades}
    assert len(errors) == 3, "they start from other functions, or each latent's is trained"
    factor = runs["tuned"]["0"]["lr"]
    tuned = {}
    for file in tmp_path.glob("made/*/tuning.json"):
        config = read_json(file.with_name("config.json"))["config"]
        tuned[config["optimizer"]["lr"]] = read_json(file)["fvu"]
    best = methods["tuned"].config(16, TUNING_SEED, scale, factor).optimizer.lr
    assert min(tuned, key=tuned.__getitem__) == best and min(tuned) < best < max(tuned)
    shared = factor == 1
    assert runs["fixed"]["0"]["fvu"] != runs["fixed"]["1"]["fvu"]
    assert len([*tmp_path.glob("made/*/study.json")]) == 14 - 2 * shared, "or one of each seed is"
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    assert Study("made", tmp_path, tmp_path, scale).runs([0, 1], {}) == runs
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    # Of known runs, which are marked, what is missing is made, at the known rate.
    known = {name: {s: {**one, "l0": -1.0} for s, one in r.items()} for name, r in runs.items()}
    known["tuned"] = {"0": {**known["tuned"]["0"], "lr": 0.1}}
    del known["paper"]["0"]
    found = Study("made", tmp_path, tmp_path / "new", scale).runs([0, 1], known)
    assert found["fixed"] == known["fixed"] and found["tuned"]["0"] == known["tuned"]["0"]
    assert found["tuned"]["1"]["lr"] == 0.1 and found["tuned"]["1"]["l0"] > 0
    for name in ("relu", *upgrades, "relu, tuned"):  # all of seed 0, from one teacher
        assert found[name]["0"] == runs[name]["0"] and found[name]["1"]["l0"] == -1
    assert len([*tmp_path.glob("new/made/*/study.json")]) == 6
    late = Study("made", tmp_path, tmp_path / "late", scale, -math.inf).runs([0, 1], known)
    assert late == known, "no time"


def test_known_results_are_of_the_same_scale(tmp_path):
    write_json(tmp_path / "known.json", {"scale": vars(Scale(steps=7)), "runs": {"a": {}}})
    assert known_runs(tmp_path / "known.json", Scale(steps=7)) == {"a": {}}
    with pytest.raises(ValueError, match="has runs of the scale"):
        known_runs(tmp_path / "known.json", Scale())


@pytest.mark.parametrize("degree", [(3, 2), (1, 0)])
@pytest.mark.parametrize("gate", ["relu", "topk", "jumprelu"])
def test_a_function_per_latent(gate, degree):
    """It starts as the shared one, whose gradient is the sum of theirs; then each is its own."""
    k = 4 if gate == "topk" else None
    sae = SAE(8, 24, Rational(gate=gate, k=k, degree=degree))
    sae.get_parameter("activation.change").data.normal_(std=0.1)
    each, x = per_latent(sae, 2.0).double(), torch.randn(50, 8, dtype=torch.float64)
    sae.double()
    codes = [one.encode(x).to_dense() for one in (sae, each)]
    torch.testing.assert_close(*codes)
    for found in codes:
        found.square().sum().backward()
    for name, rate in {"change": 2.0, "scale_change": 1.0}.items():
        shared, own = (getattr(one.activation, name) for one in (sae, each))
        if isinstance(shared, torch.nn.Parameter):
            assert own.shape == (24, *shared.shape)
            torch.testing.assert_close(own.grad.sum(0) / rate, shared.grad)
    changes = each.get_parameter("activation.change").data.normal_(std=0.1)
    found = each.encode(x).to_dense()
    for latent, change in enumerate(changes):
        sae.get_parameter("activation.change").data.copy_(2.0 * change)
        torch.testing.assert_close(found[:, latent], sae.encode(x).to_dense()[:, latent])
    with pytest.raises(ValueError, match='needs support "teacher"'):
        per_latent(SAE(8, 24, Rational(gate=gate, k=k, support="none")), 1.0)


def test_differences_in_the_documentation_are_results():
    results = (RESULTS / "study" / "results.md").read_text()
    for page in ("README.md", "docs/study.md"):
        shown = re.findall(r"[+-][\d.]+ ± [\d.]+ (?:%|points)", (ROOT / page).read_text())
        assert len(shown) > 5
        assert not [difference for difference in shown if f" {difference} " not in results], page
    maps = re.findall(r"TopK's, by k, on .*:\n\n((?:\|.*\n)+)", results)
    assert len(maps) == 2, "by token and by batch"
    assert all(one in (ROOT / "docs" / "study.md").read_text() for one in maps)


@pytest.mark.parametrize("by", ["value", "abs"])
def test_pursuit_finds_the_codes_of_an_orthonormal_dictionary(by):
    """And is the least-squares fit on the chosen rows of any other."""
    rows, _ = torch.linalg.qr(torch.randn(12, 12))
    codes = torch.zeros(5, 12).scatter(1, torch.randperm(12)[:3].expand(5, 3), 1.0)
    codes = codes * (1 + torch.rand(5, 12)) * (torch.randn(5, 12).sign() if by == "abs" else 1)
    torch.testing.assert_close(pursuit(codes @ rows, rows, 3, by).float(), codes @ rows)
    rows, x = torch.randn(30, 12), torch.randn(5, 12, dtype=torch.float64)
    torch.testing.assert_close(pursuit(x, rows, 8, by), pursuit_by_lstsq(x, rows.double(), 8, by))
    if by == "abs":  # all of the rows, of which some are equal or 0, fit what they span
        rows = torch.cat([rows[:5], rows[:2], torch.zeros(1, 12)])
        torch.testing.assert_close(
            pursuit(x, rows, 8, by), x @ torch.linalg.pinv(rows[:5].double()) @ rows[:5].double()
        )


def pursuit_by_lstsq(x: torch.Tensor, rows: torch.Tensor, k: int, by: str) -> torch.Tensor:
    """A token at a time, each step a new least-squares fit."""
    found = []
    for token in x:
        chosen, left, values = [], token, token[:0]
        for _ in range(k):
            match = rows @ left
            match = match.abs() if by == "abs" else match
            match[chosen] = -torch.inf
            chosen.append(int(match.argmax()))
            values = torch.linalg.lstsq(rows[chosen].T, token[:, None]).solution[:, 0]
            left = token - values @ rows[chosen]
        found.append((values if by == "abs" else values.clamp_min(0)) @ rows[chosen])
    return torch.stack(found)


def test_the_more_corrections_the_lower_the_error():
    data = Synthetic(d_in=16, n_latents=64, active=4, n_tokens=300)
    sae = init_from_data(SAE(16, 48, AbsTopK(4)), data.sample(300))
    measured = corrections(sae, data, 300)
    found = [measured[str(number)] for number in NUMBERS]
    for metric in ("fvu", "pursuit gap"):
        values = [part[metric] for part in found]
        assert values == sorted(values, reverse=True), metric
        assert values[-1] < values[0], metric


def test_the_text_of_packages(tmp_path, capsys, monkeypatch):
    library = tmp_path / "library"
    (library / "json").mkdir(parents=True)
    (library / "json" / "decoder.py").write_text('"""Zero."""\n')
    monkeypatch.setattr(sysconfig, "get_path", lambda name: library)
    (tmp_path / "own" / "tests").mkdir(parents=True)
    (tmp_path / "own" / "words.py").write_text('"""One."""\ndef f():\n    """Two."""\n')
    (tmp_path / "own" / "later.py").write_text("x = = 1\n")
    (tmp_path / "own" / "tests" / "left.py").write_text('"""Out."""\n')
    found = dict(documents([tmp_path / "own"]))
    assert found["own-words"] == "One.\n\nTwo." and not {"own-later", "own-tests-left"} & {*found}
    assert "later.py" in capsys.readouterr().err
    assert "topic-lambda" in found and found["json-decoder"] == "Zero."
