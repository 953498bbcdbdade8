"""Tables and plots of the benchmarks of dynamic chunking."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastgen.evaluation.report import (
    figure_of,
    markdown_table,
    paired_cells,
    percent,
    plot_scores,
    provenance,
    table_page,
)

__all__ = ["dc_markdown", "dc_quality_markdown", "dc_quality_plot", "pareto_front"]


def dc_markdown(data: dict[str, Any]) -> str:
    """A result of `fastgen bench dc-speed`: forward time and FLOPs against the dense model."""
    rows, settings = [], data["settings"]
    for row in data["rows"]:
        share = "" if row["share"] is None else f"{row['share']:g}"
        cells = [
            f"{row['size']}, {row['pixels']} px",
            str(row["batch"]),
            str(row["dense_tokens"]),
            row["variant"],
            share,
        ]
        if "missing" in row:
            rows.append([*cells, *[""] * 5, f"not measured: {row['missing']}"])
            continue
        ratios = [f"{row[name]:.3f}" for name in ("flop_ratio", "time_ratio", "efficiency")]
        rows.append([*cells, f"{row['flops'] / 1e9:.0f}", str(row["n"]), f"{row['seconds']['p50']:.2f}", *ratios])
    header = ["model", "batch", "tokens", "variant", "kept", "GFLOPs", "n", "s p50", "FLOP ratio", "time ratio"]
    asked = f"at least {settings['asked']:g} is asked where there are {settings['asked_tokens']} tokens or more"
    note = (
        f"{settings['dtype']}, random weights, forced kept shares; ratios to the eager dense model. The last column "
        f"is the FLOP ratio over the time ratio, 1 where all saved FLOPs are saved time; {asked}."
    )
    if settings["extrapolated"]:
        note += (
            " Extrapolated: one block of each kind and the rest of the model are measured and scaled to the model's "
            "depth; Z-Image's noise refiner and last layer take a dense layer's seconds per FLOP."
        )
    return table_page(f"{note}\n\n", [*header, "FLOP / time"], rows, data)


def dc_quality_markdown(data: dict[str, Any]) -> str:
    """A result of `fastgen bench dc`: scores against FLOPs and seconds."""
    base, other, rows = data["rows"][0], data["flops_beside"], []
    front = [row["variant"] for row in pareto_front(data["rows"])]
    compares = any(row.get("paired") for row in data["rows"])
    for row in data["rows"]:
        kept = "" if row["kept"] is None else percent(row["kept"])
        distance = "" if row["fd"] is None else f"{row['fd']:.2f}"
        seconds = row["seconds"]["p50"]
        rows.append(
            [
                *(
                    row["variant"] + (" *" if row["variant"] in front else ""),
                    kept,
                    f"{row['flops'] / 1e9:.2f}",
                    f"{row['flops'] / base['flops']:.3f}",
                ),
                f"{(row['flops'] - other) / (base['flops'] - other):.3f}",
                *(f"{seconds:.4f}", f"{seconds / base['seconds']['p50']:.3f}"),
                *(percent(row["score"]), percent(row["stderr"]), *paired_cells(row, compares), distance),
            ]
        )
    note = (
        f"{other / 1e9:.2f} GFLOPs of every picture are the text encoder's and the decoder's, which no method here "
        "touches; the ratio of the denoiser leaves them out. * on the Pareto front: no other row has its score "
        "in less time."
        + (" The score against the first row's with 95 % of it, paired by prompt." if compares else "")
        + "\n\n"
    )
    header = ["variant", "kept %", "GFLOPs", "ratio", "denoiser's", "s/picture", "ratio", "score", "± s.e."]
    table = markdown_table([*header, *["against the first"] * compares, "FD-shapes"], rows)
    return note + table + "\n" + _router_markdown(data) + "\n" + provenance(data) + "\n"


def pareto_front(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The Pareto-optimal rows in seconds and score; fastest first."""
    front: list[dict[str, Any]] = []
    for row in sorted(rows, key=lambda row: (row["seconds"]["p50"], -row["score"])):
        if not front or row["score"] > front[-1]["score"]:
            front.append(row)
    return front


def _router_markdown(data: dict[str, Any]) -> str:
    """Where the router keeps tokens: by noise level on renders, and by step while it draws."""
    router = data["router"]
    rows = [
        [f"{row['sigma']:g}", *(percent(row[name]) for name in ("kept", "boundary", "inside", "background"))]
        for row in router["rows"]
    ]
    steps = next(row["kept_by_step"] for row in data["rows"] if row["kept_by_step"])
    aim = ""
    if n := router.get("compression"):
        aim = f" Training aims at {percent(1 / n)} kept at every noise level; half to twice that is what we accept."
    return (
        f"Router on {router['renders']} fresh renders: natural kept share, and mean boundary probability of positions "
        "on object boundaries, inside objects and in the background (all in percent); over all noise levels that of "
        f"boundaries is {router['boundary_to_background']:.1f} times that of the background.{aim}\n\n"
        + markdown_table(["sigma", "kept", "boundary", "inside", "background"], rows)
        + f"\nKept while drawing without tail drop in {len(steps)} steps, first to last: "
        + ", ".join(f"{share:.0%}" for share in steps)
        + ".\n"
    )


def dc_quality_plot(data: dict[str, Any], path: Path) -> None:
    """Score with its standard error against FLOPs and against seconds, one series a method, and the Pareto front by
    name.

    Raises:
        FastgenError: matplotlib is not installed.
    """
    figure, panels = figure_of(2)
    series: dict[str, list[dict[str, Any]]] = {}
    for row in data["rows"]:
        words = row["variant"].split()
        plain = len(words) > 1 and (words[1] == "guidance" or words[1].isdecimal())
        name = "dynamic chunking" if words[0] == "dc" else " ".join(words[: 1 if plain else 2])
        name += ", first-block cache" if words[0] == "dc" and "first-block-cache" in words else ""
        name += ", tail drop" if words[0] == "dc" and words[1] not in ("0", "late", "own") else ""
        name += ", late drops" if "late" in words else ", more guidance" if "guidance" in words else ""
        series.setdefault(name + (" + Lite-CFG" if "lite-cfg" in words else ""), []).append(row)
    for panel, label, value in zip(
        panels,
        ("GFLOPs a picture", "seconds a picture"),
        (lambda row: row["flops"] / 1e9, lambda row: row["seconds"]["p50"]),
        strict=True,
    ):
        plot_scores(panel, series, value, linestyle="none")
        panel.set_xlabel(label)
    panels[1].set_ylabel("")
    front = pareto_front(data["rows"])
    places = [(row["seconds"]["p50"], 100 * row["score"]) for row in front]
    panels[1].plot(*zip(*places, strict=True), color="black", linewidth=0.8, zorder=0, label="Pareto front")
    for number, place in enumerate(places, start=1):
        panels[1].annotate(str(number), place, xytext=(-7, 5), textcoords="offset points", fontsize=7)
    names = "\n".join(f"{number}  {row['variant']}" for number, row in enumerate(front, start=1))
    panels[1].text(0.98, 0.04, names, transform=panels[1].transAxes, ha="right", va="bottom", ma="left", fontsize=7)
    figure.legend(*panels[1].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7)
    figure.savefig(path, dpi=120)
