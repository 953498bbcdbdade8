"""Tables and plots of the benchmarks of dynamic chunking."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastgen.evaluation.report import figure_of, markdown_table, percent, plot_scores, provenance, table_page, three

__all__ = ["dc_markdown", "dc_quality_markdown", "dc_quality_plot"]


def dc_markdown(data: dict[str, Any]) -> str:
    """A result of `fastgen bench dc-speed`: forward time and FLOPs against the dense model."""
    rows = []
    for row in data["rows"]:
        rho = "" if row["tail_drop"] is None else f"{row['tail_drop']:g}"
        cells = [row["size"], str(row["batch"]), row["variant"], rho, f"{row['flops'] / 1e9:.1f}"]
        rows.append([*cells, *three(row["seconds"]), f"{row['flop_ratio']:.3f}", f"{row['time_ratio']:.3f}"])
    header = ["size", "batch", "variant", "tail drop", "GFLOPs", "s p20", "p50", "p80", "FLOP ratio", "time ratio"]
    settings = data["settings"]
    where = f"{settings['image_size']} pixels, {settings['dtype']}, {'compiled' if settings['compile'] else 'eager'}"
    note = f"{where}, {settings['kept']:.0%} of all tokens before the tail drop.\n\n"
    return table_page(note, header, rows, data)


def dc_quality_markdown(data: dict[str, Any]) -> str:
    """A result of `fastgen bench dc`: scores against FLOPs and seconds."""
    base, beside, rows = data["rows"][0], data["flops_beside"], []
    for row in data["rows"]:
        kept = "" if row["kept"] is None else percent(row["kept"])
        distance = "" if row["fd"] is None else f"{row['fd']:.2f}"
        seconds = row["seconds"]["p50"]
        rows.append(
            [
                *(row["variant"], kept, f"{row['flops'] / 1e9:.2f}", f"{row['flops'] / base['flops']:.3f}"),
                f"{(row['flops'] - beside) / (base['flops'] - beside):.3f}",
                *(f"{seconds:.4f}", f"{seconds / base['seconds']['p50']:.3f}"),
                *(percent(row["score"]), percent(row["stderr"]), distance),
            ]
        )
    note = (
        f"{beside / 1e9:.2f} GFLOPs of every picture are the text encoder's and the decoder's, which no method here "
        "touches; the ratio of the denoiser leaves them out.\n\n"
    )
    header = ["variant", "kept %", "GFLOPs", "ratio", "denoiser's", "s/picture", "ratio", "score", "± s.e."]
    table = markdown_table([*header, "FD-shapes"], rows)
    return note + table + "\n" + _router_markdown(data) + "\n" + provenance(data) + "\n"


def _router_markdown(data: dict[str, Any]) -> str:
    """Where the router keeps tokens: by noise level on renders, and by step while it draws."""
    router = data["router"]
    rows = [
        [f"{row['sigma']:g}", *(percent(row[name]) for name in ("kept", "boundary", "inside", "background"))]
        for row in router["rows"]
    ]
    steps = next(row["kept_by_step"] for row in data["rows"] if row["kept_by_step"])
    return (
        f"Router on {router['renders']} fresh renders: natural kept share, and mean boundary probability of positions "
        "on object boundaries, inside objects and in the background (all in percent); over all noise levels that of "
        f"boundaries is {router['boundary_to_background']:.1f} times that of the background.\n\n"
        + markdown_table(["sigma", "kept", "boundary", "inside", "background"], rows)
        + "\nKept while drawing without tail drop, first to last step: "
        + ", ".join(f"{share:.0%}" for share in steps)
        + ".\n"
    )


def dc_quality_plot(data: dict[str, Any], path: Path) -> None:
    """Score with its standard error against FLOPs and against seconds, one series a method.

    Raises:
        FastgenError: matplotlib is not installed.
    """
    figure, panels = figure_of(2)
    series: dict[str, list[dict[str, Any]]] = {}
    for row in data["rows"]:
        words = row["variant"].split()
        name = "dynamic chunking" if words[0] == "dc" else " ".join(words[: 1 if "guidance" in words else 2])
        name += ", late drops" if "late" in words else ", more guidance" if "guidance" in words else ""
        series.setdefault(name + (" + Lite-CFG" if "lite-cfg" in words else ""), []).append(row)
    for panel, label, value in zip(
        panels,
        ("GFLOPs a picture", "seconds a picture"),
        (lambda row: row["flops"] / 1e9, lambda row: row["seconds"]["p50"]),
        strict=True,
    ):
        plot_scores(panel, series, value)
        panel.set_xlabel(label)
    panels[1].set_ylabel("")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7)
    figure.savefig(path, dpi=120)
