"""The report on one SAE."""

from pathlib import Path

from fastsae.data import StoredActivations
from fastsae.device import choose_device
from fastsae.nn import SAE

from .cards import make_cards
from .config import ReportConfig
from .contexts import number
from .curves import curves_of
from .evidence import Evidence
from .firings import collect
from .frequencies import choose, frequencies
from .geometry import latent_map
from .neuronpedia import check_exportable, write_dashboards
from .page import write_page
from .subject import Subject, describe, provenance
from .text import Strings
from .verdicts import verdicts

SCRIPTS = ("page.js", "charts.js", "card.js", "latents.js", "run.js")


def write_report(
    sae: SAE,
    data: StoredActivations,
    config: ReportConfig,
    out: Path,
    subject: Subject | None = None,
    progress: bool = True,
) -> None:
    """Write the report on an SAE to the HTML file `out`: its metrics on `data`, its training, and
    what its latents are active on. With `config.neuronpedia`, write the latents there, too.

    `sae` is moved to `config.device`, and left on the CPU. `config.data` and `config.out` are not
    read here; the command line opens them. The same arguments give the same files. ValueError if
    the data does not fit the SAE, or for a latent to include that it does not have; of a crosscoder
    and of data without text, no dashboards can be written.
    """
    subject = subject or Subject(title=out.stem)
    if wrong := [latent for latent in config.include if not 0 <= latent < sae.d_sae]:
        raise ValueError(f"latents to include must be from 0 to {sae.d_sae - 1}, got {wrong[0]}")
    if config.neuronpedia is not None:
        check_exportable(sae, data, config.neuronpedia)
    firings = collect(sae.to(choose_device(config.device)), data, config, progress)
    sae, strings = sae.cpu(), Strings()
    latents = choose(firings.counts, config)
    evidence = Evidence.gather(sae, data, config, firings, latents)
    cards, notes = make_cards(sae, evidence, strings, config.seed), [*evidence.notes]
    if subject.on_training_data:
        notes.insert(0, "There is no held-out data: latents are shown on training data.")
    compared = [run for run in (subject.run, config.compare) if run is not None]
    contents = {
        "d_sae": sae.d_sae,
        "tokens": firings.found.tokens,
        "signed": bool((firings.values < 0).any()),
        "strings": strings.texts,
        "curves": [curves_of(*one) for one in zip(compared, names_of(compared), strict=True)],
        "frequencies": frequencies(firings),
        "map": latent_map(sae, firings.counts, latents, config.projection, config.seed),
        "lens_level": number(evidence.lens[0].level) if evidence.lens else None,
        "latents": cards,
    }
    some = f"{len(latents):,} of {sae.d_sae:,} latents, drawn from all frequencies, have a card."
    write_page(
        out,
        "run.html",
        SCRIPTS,
        contents,
        title=subject.title,
        subtitle=describe(sae, data),
        verdicts=verdicts(sae, firings.found, subject.run),
        provenance=provenance(sae, data, firings, subject),
        about_cards=some if len(latents) < sae.d_sae else "Every latent has a card.",
        notes=notes,
    )
    if config.neuronpedia is not None:
        write_dashboards(sae, data, config, evidence, subject)


def names_of(runs: list[Path]) -> list[str]:
    """What runs are called in a legend: the ends of their paths, as long as it takes for them to
    differ."""
    parts = [run.resolve().parts for run in runs]
    for length in range(1, max(map(len, parts), default=0)):
        names = ["/".join(part[-length:]) for part in parts]
        if len({*names}) == len(names):
            return names
    return [run.name for run in runs]
