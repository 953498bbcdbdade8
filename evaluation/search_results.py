"""Results of `fastgen bench search` as Markdown and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastgen.evaluation.report import figure_of, markdown_table, percent, provenance

__all__ = ["search_markdown", "search_plot"]

_RIVALS = ("rbf", "svdd", "best-of-n")  # that the thresholds are tested against in the table


def search_markdown(data: dict[str, Any]) -> str:
    """A result of `fastgen bench search`: what a threshold is worth, the rows, and the tasks."""
    settings = data["settings"]
    held = "" if settings["heldout"] is None else f", held-out verifier {settings['heldout']}"
    count = settings.get("processes", 1)
    shared = "" if count == 1 else f" ({count} processes, a core each)"
    note = (
        f"{settings['model']}, {settings['prompts']} prompts x {settings['seeds']} seeds, one at a time{shared}; "
        f"verifier {settings['verifier']}{held}; sampler {settings['sampler']}. Score: ShapesWorld-GenEval, with 95 % "
        "over prompts. Gain: over the pipeline without a search, paired. Searched and held-out: mean scores of the "
        "verifiers. Diversity: mean distance of two pictures of a prompt in the detector's features.\n\n"
    )
    parts = [note + _rows(data["rows"])]
    if data["reach"]:
        parts.append(_reach(data["reach"]))
    if tests := _comparisons(data["comparisons"]):
        parts.append(tests)
    if data.get("equal"):
        parts.append(_equal(data["equal"]))
    parts.append(_tasks(data["rows"]))
    if data["skipped"]:
        pairs = "; ".join(f"{entry['policy']} at {entry['budget']} ({entry['reason']})" for entry in data["skipped"])
        parts.append(f"Left out: {pairs}.\n")
    return "\n".join(parts) + "\n" + provenance(data) + "\n"


def _rows(rows: list[dict[str, Any]]) -> str:
    table = []
    for row in rows:
        diversity = "" if row["diversity"] is None else f"{row['diversity']:.2f}"
        table.append(
            [
                *(row["policy"], "" if row["budget"] is None else str(row["budget"]), f"{row['nfe']:.0f}"),
                *(f"{row['seconds']:.2f}", f"{percent(row['score'])} ({_range(row['score_ci'])})"),
                *(f"{100 * row['gain']:+.1f}", _decimals(row["searched"]), _decimals(row["heldout"]), diversity),
            ]
        )
    header = ["policy", "budget", "NFE", "s/prompt", "score (95 %)", "gain", "searched", "held-out", "diversity"]
    return markdown_table(header, table)


def _reach(found: list[dict[str, Any]]) -> str:
    """Cost of the thresholds for each rival's score."""
    first = next(entry for entry in found if entry["unit"] == "seconds")
    table = []
    for seconds in (entry for entry in found if entry["unit"] == "seconds"):
        pair = ("policy", "rival", "rival_budget")
        nfe = next(
            entry for entry in found if entry["unit"] == "nfe" and all(entry[key] == seconds[key] for key in pair)
        )
        cells = [seconds["policy"], f"{seconds['rival']} at {seconds['rival_budget']}", percent(seconds["target"])]
        for entry, digits in ((seconds, 2), (nfe, 0)):
            paid = "not reached" if entry["cost"] is None else f"{entry['cost']:.{digits}f}"
            low, high = entry["ci"]
            least = ">= " if entry["bound"] else ""
            cells += [f"{entry['rival_cost']:.{digits}f}", paid]
            cells.append(f"{least}{entry['ratio']:.2f} ({low:.2f} to {high:.2f})")
        table.append(cells)
    headline = next((entry for entry in found if entry["unit"] == "seconds" and entry["rival"] == "rbf"), first)
    low, high = headline["ci"]
    named = f"the score of {headline['rival']} at {headline['rival_budget']} NFE"
    least = "at least " if headline["bound"] else ""
    said = (
        f"{headline['policy']} does not reach {named}."
        if headline["cost"] is None
        else f"**{headline['policy']} reaches {named} {least}{headline['ratio']:.2f} times as fast** (95 %: {low:.2f} "
        f"to {high:.2f}; reached in {headline['reached']:.0%} of the bootstrap draws)."
    )
    said += (
        " Costs are read off the line through the policy's own budgets; draws that do not reach the score count as 0 "
        "times as fast.\n\n"
    )
    header = ["policy", "rival", "its score", "its s", "s to it", "times as fast"]
    return said + markdown_table([*header, "its NFE", "NFE to it", "times fewer"], table)


def _comparisons(found: list[dict[str, Any]]) -> str:
    """Paired tests at equal seconds; a rival that is still faster at its largest budget is marked."""
    policies = dict.fromkeys(entry["policy"] for entry in found)
    rivals = dict.fromkeys(entry["rival"] for entry in found if entry["rival"].split()[0] in _RIVALS)
    if not rivals:
        return ""
    table = []
    for policy in policies:
        for budget in dict.fromkeys(entry["budget"] for entry in found if entry["policy"] == policy):
            cells = []
            for rival in rivals:
                key = (policy, budget, rival)
                entry = next(one for one in found if (one["policy"], one["budget"], one["rival"]) == key)
                mark = "" if entry["slower"] else "*"
                p = "< 0.001" if entry["p"] < 0.001 else f"{entry['p']:.3f}"
                cells.append(f"{100 * entry['difference']:+.1f} ({_range(entry['ci'])}), p {p}{mark}")
            table.append([policy, str(budget), f"{entry['seconds']:.2f}", *cells])
    note = (
        "Score above a rival's in points, at its least budget that takes no fewer seconds, with 95 % and p of the "
        "one-sided paired permutation test over prompts (not corrected for their number; * the rival takes fewer "
        "seconds even at its largest budget):\n\n"
    )
    return note + markdown_table(["policy", "budget", "s/prompt", *(f"above {rival}" for rival in rivals)], table)


def _equal(found: list[dict[str, Any]]) -> str:
    """Paired tests at equal mean seconds."""
    table = []
    for entry in (one for one in found if one["rival"].split()[0] in _RIVALS):
        (low, high), share = entry["rival_budgets"], entry["share"]
        p = "< 0.001" if entry["p"] < 0.001 else f"{entry['p']:.3f}"
        mixed = f"{entry['rival']}, {share:.0%} at {low}, {1 - share:.0%} at {high}"
        cells = [
            entry["policy"],
            str(entry["budget"]),
            f"{entry['seconds']:.2f}",
            mixed,
            percent(entry["rival_score"]),
        ]
        table.append([*cells, f"{100 * entry['difference']:+.1f} ({_range(entry['ci'])})", p])
    note = (
        "At equal mean seconds, against a rival that takes one of its two nearest budgets at random; the same test. "
        "Rivals whose least budget takes more seconds are not here:\n\n"
    )
    return note + markdown_table(["policy", "budget", "s/prompt", "rival", "its score", "above it", "p"], table)


def _tasks(rows: list[dict[str, Any]]) -> str:
    """Gains at each policy's largest budget."""
    last = {row["policy"]: row for row in rows if row["budget"] is not None}
    tags = list(rows[0]["tasks"])
    table = [["none: score", "", *(percent(rows[0]["tasks"][tag]) for tag in tags)]]
    for name, row in last.items():
        table.append([name, str(row["budget"]), *(f"{100 * row['task_gains'][tag]:+.1f}" for tag in tags)])
    header = ["gain in points", "budget", *(tag.replace("_", " ") for tag in tags)]
    return markdown_table(header, table)


def _range(ends: list[float]) -> str:
    return f"{100 * ends[0]:.1f} to {100 * ends[1]:.1f}"


def _decimals(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def search_plot(data: dict[str, Any], path: Path) -> None:
    """Score against forward passes and against seconds, one line a policy, with 95 % for the first threshold.

    Raises:
        FastgenError: matplotlib is not installed.
    """
    figure, panels = figure_of(2)
    figure.set_size_inches(12, 4.6)
    base = data["rows"][0]
    series: dict[str, list[dict[str, Any]]] = {}
    for row in data["rows"]:
        if row["budget"] is not None:
            series.setdefault(row["policy"], []).append(row)
    markers = "osD^v<>PX*"
    for panel, cost, label in zip(panels, ("nfe", "seconds"), ("NFE a prompt", "seconds a prompt"), strict=True):
        banded = False
        for number, (name, rows) in enumerate(series.items()):
            rows = sorted(rows, key=lambda row: row[cost])
            costs, scores = [row[cost] for row in rows], [100 * row["score"] for row in rows]
            ours = rows[0]["method"] == "threshold"
            style: dict[str, Any] = {"color": f"C{number % 10}", "marker": markers[number % 10], "label": name}
            style |= {"linewidth": 2.6, "zorder": 4} if ours else {"linewidth": 1.2, "linestyle": "--"}
            panel.plot(costs, scores, markersize=5, **style)
            if ours and not banded:  # all bands at once hide each other; the table has them
                banded = True
                low, high = zip(*(row["score_ci"] for row in rows), strict=True)
                ends = [100 * end for end in low], [100 * end for end in high]
                panel.fill_between(costs, *ends, color=style["color"], alpha=0.15, linewidth=0)
        panel.plot(base[cost], 100 * base["score"], marker="x", color="black", linestyle="none", label="no search")
        panel.axhline(100 * base["score"], color="black", linewidth=0.8, linestyle=":")
        panel.set_xscale("log")
        _plain_ticks(panel)
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("ShapesWorld-GenEval (%)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=120)


def _plain_ticks(panel: Any) -> None:
    """Plain numbers on a logarithmic axis, and enough of them over less than a decade."""
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.xaxis.set_major_formatter(ScalarFormatter())
    panel.xaxis.set_minor_formatter(NullFormatter())
