"""Tables in Markdown and plots of the study's results."""

from pathlib import Path
from statistics import mean, stdev
from typing import Any

from bench.record import markdown

from .claims import Runs, claims_table

COLUMNS = {"fvu": ("FVU", 4), "l0": ("L0", 1), "dead": ("dead", 3)}
COLUMNS |= {"utilisation": ("utilization", 3), "pcr16": ("PCR 16", 4), "pcr64": ("PCR 64", 4)}
COLUMNS |= {"pcr192": ("PCR d/2", 4), "pcr128": ("PCR d/2", 4), "cosine": ("cosine", 4)}
COLUMNS |= {"probing1": ("probing, 1 latent", 3), "probing5": ("probing, 5", 3)}
COLUMNS |= {"recovery": ("recovery", 3)}
"""Title and number of digits of each metric."""


def report(results: dict[str, Any], folder: Path) -> str:
    """Write results.md and a plot per data set; returns the text."""
    data: dict[str, Runs] = results["runs"]
    parts = ["# Study", about(results), "## Claims", claims_table(data)]
    if results["time"]:
        parts += ["## Time", time_table(results["time"])]
    for name, runs in data.items():
        image = f"{name.lower().replace(' ', '-')}.png"
        plot(runs, name, folder / image)
        parts += [f"## {name}", table(runs), f"![FVU of each method]({image})"]
    text = "\n\n".join(parts) + "\n"
    (folder / "results.md").write_text(text)
    return text


def about(results: dict[str, Any]) -> str:
    """How the results were measured."""
    scale, data = results["scale"], results["runs"].values()
    stamps = [run["stamp"] for runs in data for seeds in runs.values() for run in seeds.values()]
    machines = {f"{s['cpu']}, {s['threads']} threads, torch {s['torch']}" for s in stamps}
    commits = {stamp["commit"] for stamp in stamps}
    return (
        f"Written by `python -m bench study`: {scale['steps']} steps of {scale['batch_size']} "
        f"tokens, 4096 latents, the same batches in the same order for all; mean ± standard "
        f"deviation over seeds. Upgrades and their teachers are fine-tuned for "
        f"{scale['tune_steps']} more steps. {'; '.join(sorted(machines))}; commit "
        f"{', '.join(sorted(commits))}. All settings are the defaults, except JumpReLU's."
    )


def table(runs: Runs) -> str:
    """A Markdown table of all methods: mean and standard deviation over seeds of each metric."""
    known = {name for seeds in runs.values() for run in seeds.values() for name in run}
    columns = {name: column for name, column in COLUMNS.items() if name in known}
    rows = []
    for method, seeds in runs.items():
        found = (spread([r.get(n) for r in seeds.values()], d) for n, (_, d) in columns.items())
        rows.append([method, *found])
    return markdown(["", *(title for title, _ in columns.values())], rows)


def time_table(time: dict[str, Any]) -> str:
    """A Markdown table of the training time per million tokens."""
    stamp, methods = time["stamp"], time["methods"]
    about = f"Training steps without data loading, on {time['data']}, from the final checkpoints, "
    about += f"interleaved: median (min to max). {stamp['cpu']}, {stamp['threads']} threads."
    rows = []
    for method, found in sorted(methods.items(), key=lambda item: item[1]["median"]):
        ratio = found["median"] / methods["TopK"]["median"]
        rows.append([method, "{median} ({min} to {max})".format(**found), f"{ratio:.2f}"])
    return f"{about}\n\n" + markdown(["", "s / 1M tokens", "relative to TopK"], rows)


def spread(values: list[float | None], digits: int) -> str:
    """Mean ± standard deviation."""
    found = [value for value in values if value is not None]
    if not found:
        return "–"
    return f"{mean(found):.{digits}f}" + (f" ± {stdev(found):.{digits}f}" if found[1:] else "")


def plot(runs: Runs, name: str, path: Path) -> None:
    """Plot the held-out FVU of each method and seed (left), and FVU during training (right)."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.5), layout="constrained")
    ends, curves = figure.subplots(1, 2, width_ratios=[1, 1.2])
    ends.set_prop_cycle(color=colormaps["tab20"].resampled(20)(range(20)))
    figure.suptitle(name)
    methods = sorted(runs, key=lambda m: mean(run["fvu"] for run in runs[m].values()), reverse=True)
    for place, method in enumerate(methods):
        found = [run["fvu"] for run in runs[method].values()]
        (drawn,) = ends.plot(found, [place] * len(found), "o", markersize=5, alpha=0.8)
        if not method.startswith("RSAE") and "tuned" not in method:
            steps, fvu = zip(*next(iter(runs[method].values()))["curve"], strict=True)
            curves.plot(steps, fvu, linewidth=1.2, color=drawn.get_color(), label=method)
    ends.set_yticks(range(len(methods)), methods, fontsize=8)
    ends.set(xlabel="held-out FVU, a point for each seed", xscale="log")
    curves.set(xlabel="step (first seed)", ylabel="FVU while training", yscale="log")
    figure.legend(*curves.get_legend_handles_labels(), loc="outside lower center", ncols=6)
    for axes in (ends, curves):
        axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=120)
