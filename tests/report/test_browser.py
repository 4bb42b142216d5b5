"""The page in a real browser, without a network: what it shows, and that nothing in it runs."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsae.data import ActivationArray
from fastsae.nn import SAE, TopK
from fastsae.report import ReportConfig, Subject, write_report
from fastsae.report.page import write_page
from fastsae.report.sweep import SCRIPTS
from fastsae.report.text import visible

from .conftest import HOSTILE, VOCABULARY
from .test_report import data_of

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")
DESKTOP, MOBILE = {"width": 1440, "height": 900}, {"width": 390, "height": 844}
TOO_WIDE = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
CUT_CHOICES = """() => [...document.querySelectorAll('select')].flatMap((choice) => {
  const { font, paddingLeft, paddingRight } = getComputedStyle(choice);
  const arrow = 20, room = choice.clientWidth - parseFloat(paddingLeft) - parseFloat(paddingRight);
  const pen = Object.assign(document.createElement('canvas').getContext('2d'), { font });
  const fits = ({ text }) => pen.measureText(text).width <= room - arrow;
  return [...choice.options].filter((one) => !fits(one)).map((one) => one.text);
})"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def report(world, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("page") / "report.html"
    subject = Subject(title='<img src=x onerror="window.hacked=6">')
    write_report(world.sae, world.heldout, ReportConfig(latents=30), out, subject, progress=False)
    return out


@pytest.fixture(scope="module")
def page(browser, report) -> Iterator[Any]:
    """Open, offline; what it logs as an error, or asks of a network, fails the test."""
    context = browser.new_context(offline=True, viewport=DESKTOP)
    opened, faults = context.new_page(), []
    opened.on("console", lambda message: message.type == "error" and faults.append(message.text))
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.on("request", lambda asked: asked.url.startswith("file:") or faults.append(asked.url))
    opened.goto(report.as_uri())
    opened.wait_for_selector("#card h3")
    yield opened
    assert not faults
    context.close()


def opens(page: Any, latent: int) -> bool:
    """Whether that card is open, or comes to be: addresses are followed a moment later."""
    return page.wait_for_selector(f"#card h3 a:text-is('Latent {latent}')") is not None


def test_hostile_tokens_are_text(page):
    """The latent of each token shows it as its own, and nothing that is in it has run."""
    for latent in range(len(VOCABULARY) - len(HOSTILE), len(VOCABULARY)):
        page.evaluate(f"location.hash = 'latent={latent}'")
        if page.locator(f"[data-latents] a[data-id='{latent}']").count():  # it has a card
            assert opens(page, latent)
            shown = page.locator("#card .chips .token").first.text_content()
            assert shown.strip() == visible(VOCABULARY[latent]).strip()
    assert page.evaluate("window.hacked") is None
    assert page.locator("img, iframe, object, embed, link").count() == 0
    assert page.locator("script").count() == 2
    assert page.inner_text("h1") == '<img src=x onerror="window.hacked=6">'
    bidi = "getComputedStyle(document.querySelector('.text .token')).unicodeBidi"
    assert page.evaluate(bidi) == "isolate"


def test_a_permalink_the_list_keys_and_the_map_open_cards(page, report):
    ids = [
        int(text) for text in page.locator("[data-latents] a > span:first-child").all_inner_texts()
    ]
    assert len(ids) == 30
    page.goto(f"{report.as_uri()}#latent={ids[4]}")
    assert opens(page, ids[4])
    page.keyboard.press("j")
    assert opens(page, ids[5]) and page.url.endswith(f"#latent={ids[5]}")
    page.keyboard.press("ArrowLeft")
    page.get_by_label("Previous latent").click()
    assert opens(page, ids[3])
    page.locator(f"[data-latents] a[data-id='{ids[7]}']").focus()
    page.keyboard.press("Enter")
    assert opens(page, ids[7])
    page.locator(f".map a[data-id='{ids[2]}'] circle").dispatch_event("click")
    assert opens(page, ids[2])
    assert page.locator(".map a").last.get_attribute("data-id") == str(ids[2])
    assert page.locator("[data-legend=map] span", has_text="dead").count() == 0
    page.evaluate("location.hash = 'latent=123456'")
    assert page.wait_for_selector("#card > p:text('There is no latent 123456')")


def test_search_sort_and_filter(page, report):
    found = lambda: page.locator("[data-latents] a > span:first-child").all_inner_texts()  # noqa: E731
    cards = data_of(report.read_text())["latents"]
    order = {str(c["id"]): (c["count"] < 20, -c["histogram"]["to"], c["id"]) for c in cards}
    assert found() == sorted(order, key=order.__getitem__)
    assert page.locator("[data-latents] .space").count() == 0  # no token begins with a space
    page.evaluate(f"location.hash = 'latent={found()[0]}'")
    assert opens(page, int(found()[0]))
    page.fill("[name=query]", "WORD3")
    assert "3" in found() or len(found()) < 30
    page.fill("[name=query]", "#5")
    assert found() in (["5"], [])
    page.fill("[name=query]", "no such token")
    assert found() == [] and "No latent" in page.inner_text("[data-found]")
    assert page.inner_text("#card") == "No latent with a card matches."
    without = next(i for i in range(40) if str(i) not in order)
    page.fill("[name=query]", f"#{without}")
    assert f"--include {without}" in page.inner_text("[data-found]")
    assert f"--include {without}" in page.inner_text("#card")
    page.fill("[name=query]", "")
    assert page.locator("#card h3").count() == 1
    page.select_option("[name=sort]", "id")
    assert found() == sorted(found(), key=int)
    page.select_option("[name=filter]", "rare")
    assert found() == []
    page.select_option("[name=filter]", "all")
    assert len(found()) == 30


def test_activations_are_shown_on_hover(page):
    page.locator("[data-latents] a").first.click()
    page.locator(".text .token.on").first.hover()
    assert ": " in page.inner_text("#tip")
    assert page.locator("#curves p.soft, [data-charts=frequencies] svg, #map svg").count() == 3


def test_an_sae_without_active_latents_has_a_page(browser, tmp_path):
    sae, out = SAE(8, 16, TopK(2)).eval(), tmp_path / "dead.html"
    with torch.no_grad():
        sae.W_enc.zero_()
    config = ReportConfig(latents=4)
    write_report(sae, ActivationArray(torch.randn(300, 8)), config, out, progress=False)
    page, faults = browser.new_page(), []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(out.as_uri())
    page.wait_for_selector("[data-charts=map] svg")
    assert page.inner_text("[data-about-map]") == "No latent is active. 0 of 16 latents."
    assert page.inner_text("[data-count=dead]") == "16" and not faults
    page.close()


def test_two_runs_of_one_name_have_their_own_legends(browser, world, tmp_path):
    line = {"step": 1, "fvu": 0.5, "l0": 2.0, "dead_fraction": 0.0, "tokens_per_second": 9.0}
    runs = [tmp_path / name / "run" for name in "ab"]
    for run in runs:
        run.mkdir(parents=True)
        (run / "metrics.jsonl").write_text(json.dumps(line))
    page, out = browser.new_page(), tmp_path / "report.html"
    config, subject = ReportConfig(latents=4, compare=runs[1]), Subject(title="run", run=runs[0])
    write_report(world.sae, world.heldout, config, out, subject, progress=False)
    page.goto(out.as_uri())
    page.wait_for_selector("[data-legend=curves] span")
    shown = page.locator("[data-legend=curves] span").all_inner_texts()
    assert [text[-5:] for text in shown] == ["a/run", "b/run"]
    page.close()


def test_it_fits_a_phone_and_paper(page):
    page.set_viewport_size(MOBILE)
    assert page.evaluate(TOO_WIDE) == 0 and page.evaluate(CUT_CHOICES) == []
    page.emulate_media(media="print")
    assert page.locator("form.tools").is_hidden() and page.locator("#card").is_visible()
    page.emulate_media(media="screen")
    page.set_viewport_size(DESKTOP)
    assert page.evaluate(TOO_WIDE) == 0


def test_the_names_of_a_sweep_stay_in_view(browser, tmp_path):
    """Of nine SAEs, so that not all have a color of the palette; one has a long, hostile name."""
    names = [f"topk-k={2**i}" for i in range(8)] + ["jumprelu-target_l0=32-<b>d_sae=65536</b>"]
    runs = [
        {"name": name, "fvu": 0.5 - i / 20, "l0": 2.0**i, "dead": i / 100, "d_sae": 65536}
        | {"speed": 12345.6, "seconds": 100 * i, "report": None}
        for i, name in enumerate(names)
    ]
    out, words = tmp_path / "report.html", {"title": "sweep", "subtitle": "", "about_table": ""}
    write_page(out, "sweep.html", SCRIPTS, {"runs": runs}, **words)
    page = browser.new_page(viewport=MOBILE)
    page.goto(out.as_uri())
    shown = page.locator("tbody td:first-child")
    assert shown.all_inner_texts() == names[::-1]  # sorted by FVU
    assert page.evaluate(TOO_WIDE) == 0
    scrolled = "(box) => { box.scrollLeft = 1e4; return box.scrollLeft }"
    assert page.locator(".scroll").evaluate(scrolled) > 0
    edges = [shown.nth(i).bounding_box() for i in range(len(names))]
    assert all(box["x"] >= 0 and box["x"] + box["width"] < 200 for box in edges)
    page.get_by_role("button", name="seconds").click()
    assert shown.all_inner_texts() == names
    page.close()
