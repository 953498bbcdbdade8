"""Tables and plots of the benchmarks of speculative decoding and its drafters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastgen.errors import FastgenError
from fastgen.evaluation.report import figure_of, markdown_table, paired_cells, percent, plot_scores, table_page

__all__ = ["speculative_cost_markdown", "speculative_markdown", "speculative_plot"]


_NAMED = 12  # more names at points of a plot would hide each other


def speculative_markdown(data: dict[str, Any]) -> str:
    """A result of `fastgen bench speculative`: passes, seconds and quality."""
    rows = []
    sizes = list(dict.fromkeys(size for row in data["rows"] for size in row.get("pictures_a_minute", {})))
    compares = any(row.get("paired") for row in data["rows"])
    for row in data["rows"]:
        distance = "" if row["fd"] is None else f"{row['fd']:.2f}"
        judged = "" if row["verifier"] is None else percent(row["verifier"])
        score = ["", ""] if row["score"] is None else [percent(row["score"]), percent(row["stderr"])]
        made = row.get("pictures_a_minute", {})
        rows.append(
            [
                *(row["variant"], f"{row['target_pass_ratio']:.3f}", f"{row['accepted_length']:.2f}"),
                *(f"{row['seconds']['p50']:.3f}", f"{row['speedup_vs_fastest_plain']:.2f}"),
                *(
                    f"{row['speedup_vs_stock']:.2f}",
                    f"{row['stolen']:.1f}",
                    *score,
                    *paired_cells(row, compares),
                    distance,
                    judged,
                ),
                *(f"{made[size]:.0f}" if size in made else "" for size in sizes),
            ]
        )
    header = ["variant", "passes", "accepted", "s/picture", "x plain", "x stock", "stolen", "score", "± s.e."]
    header += ["against plain"] * compares + ["FD-shapes", "verifier", *(f"batch {size}" for size in sizes)]
    default = data["settings"].get("default")
    note = (
        "Passes of the target as a share of the plain loop's; accepted length with the bonus token; speed-up against "
        "our plain loop and against stock `generate`, one picture at a time; stolen mass a picture; "
        + ("score against the plain loop's with 95 % of it, paired by prompt; " if compares else "")
        + "mean score by the embedded verifier"
        + ("; pictures a minute by batch size" if sizes else "")
        + "".join(f"; `{row['what']}` takes {row['seconds']['p50']:.2f} s" for row in data.get("commands", []))
        + "."
        + (f" Without `--tree`, one picture by `exact` drafts with `{default}` here." if default else "")
        + "\n\n"
    )
    return table_page(note, header, rows, data)


def speculative_cost_markdown(data: dict[str, Any]) -> str:
    """A result of `fastgen bench speculative-cost`: by tokens of a pass, then by source."""
    settings, rows, sources = data["settings"], [], []
    for row in data["rows"]:
        times = (1e3 * row[name]["p50"] for name in ("verify", "draft", "left"))
        rows.append([row["size"], str(row["nodes"]), *(f"{ms:.2f}" for ms in times), f"{row['break_even']:.2f}"])
    for row in data["sources"]:
        name = f"{row['rule']} {row['source']}" if row["rule"] else f"{row['source']} loop"
        numbers = (1e3 * row["round"]["p50"], row["tokens"], row["break_even"], row["seconds_per_picture"])
        shown = (*numbers, row["speedup_vs_plain"], row["speedup_vs_fastest_plain"])
        sources.append([row["size"], name, str(row["nodes"]), *(f"{value:.2f}" for value in shown)])
    how = "compiled" if settings["compile"] else "not compiled"
    if settings["compile"] and settings["device"] != "cpu":
        how += ", as CUDA graphs, which the pipeline does not use"
    costs = (
        f"One picture with guidance, {how}. Medians in milliseconds "
        "of a pass over that many tokens, of a drafter's level, and of the rest of a round; a chain of that many "
        "tokens pays from this accepted length on (the bonus counted).\n\n"
    )
    costs += markdown_table(["size", "tokens", "verify", "draft", "rest", "pays from"], rows)
    note = (
        f"\nBy source: milliseconds of a whole round; tokens a pass that `{settings['acceptance_of']}` accepts, not "
        "this model, and from which on a source pays; with the former, seconds a picture and the speed-up against our "
        "plain loop and against the fastest: its pass, padded to more tokens where that takes less time.\n\n"
    )
    header = [
        "size",
        "source",
        "nodes",
        "round",
        "tokens a pass",
        "pays from",
        "s/picture",
        "x plain",
        "x fastest plain",
    ]
    return table_page(costs + note, header, sources, data)


def speculative_plot(data: dict[str, Any], path: Path) -> None:
    """Score with its standard error against the speed-up; a colour a rule, and the names of up to twelve rows at their
    points.

    Raises:
        FastgenError: matplotlib is not installed, or the result has no scores.
    """
    rows = [row for row in data["rows"] if row["score"] is not None]
    if not rows:
        raise FastgenError("--plot: the result has no scores")
    figure, (panel,) = figure_of(1)
    figure.set_size_inches(7, 4.2)
    series: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        series.setdefault(row["rule"] or "plain loop", []).append(row)

    def gain(row: dict[str, Any]) -> float:
        # The plain loops draw the same distribution, so the score of one stands for the fastest.
        return 1.0 if row["rule"] is None else float(row["speedup_vs_fastest_plain"])

    plot_scores(panel, series, gain, linestyle="none")
    if len(rows) > _NAMED:
        panel.legend(fontsize=8)
    else:
        beside = {"xytext": (-9, 0), "textcoords": "offset points", "rotation": 90, "ha": "center", "va": "center"}
        for row in rows:
            name, place = row["variant"] if row["rule"] else "plain loop", (gain(row), 100 * row["score"])
            panel.annotate(name, place, fontsize=8, **beside)
    panel.set_xlabel("speed-up against the fastest plain loop")
    figure.savefig(path, dpi=120)
