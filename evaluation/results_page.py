"""Result JSON as Markdown: every kind of result that fastgen writes, and the page of the committed ones.

``python -m fastgen.evaluation.results_page`` writes ``docs/results.md``, and the tables of gains and of scores in
``README.md``, from the files in ``docs/results``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastgen.evaluation.benchmarks.accelerate import accelerate_markdown
from fastgen.evaluation.benchmarks.serve import serve_markdown
from fastgen.evaluation.dc_results import dc_markdown, dc_quality_markdown
from fastgen.evaluation.gains import gains_table
from fastgen.evaluation.kernel_results import kernels_markdown
from fastgen.evaluation.report import markdown_table, percent, provenance, scores_markdown, three
from fastgen.evaluation.search_results import search_markdown
from fastgen.evaluation.speculative_results import (
    speculative_cost_markdown,
    speculative_markdown,
)
from fastgen.io import read_object

# Of results whose name is not that of their command.
_COMMANDS = {
    "bench-accelerate": "bench accelerate --share 0.667 --share 0.5 "
    "--plan plan-tiny-solver-2.json --plan plan-tiny-solver-3.json",
    "bench-search-twelve": "bench search",
    "bench-search-equal": "bench search",
    "bench-search-rbf": "bench search",
    "bench-search-own-call": "bench search --policy threshold --budget 100 --seeds 1 --limit 10",
    "bench-dc": "bench dc --runs 3",
    "bench-dc-speed": "bench dc-speed --seconds 500",
    "bench-dc-latent": "bench dc --model tiny-dc --dense tiny-dc-dense",
    "bench-speculative": "bench speculative --dtype bfloat16 --timed-prompts 12 --runs 4 "
    "--batch 1 --batch 4 --batch 16 --commands 5",
    "bench-speculative-trees": "bench speculative --dtype bfloat16 --images-per-prompt 2 --runs 2",
    "bench-speculative-sources": "bench speculative --dtype float32 --no-compile --no-quality --batch 4 --batch 16",
    "bench-speculative-cost": "bench speculative-cost --size janus-pro-1b --size llamagen-xl "
    "--nodes 1 --nodes 2 --nodes 4 --nodes 8 --nodes 16 --nodes 32 --runs 7",
    "bench-serve-load": "bench serve --minutes 30 --replicas 2 --rounds 2 --pictures 8",
    "bench-kernels-end-to-end": "bench kernels --end-to-end",
}
# Whose rows are not the default ones.
_OTHER_ROWS = ("bench-speculative", "bench-speculative-trees", "bench-speculative-sources")
_MODELS = (
    ("tiny", "diffusion"),
    ("tiny-janus", "autoregressive"),
    ("small", "diffusion, 128x128"),
    ("small-dc", "diffusion, 128x128, dynamic chunking"),
)
_FORMER = (
    ("tiny-dc", "diffusion, dynamic chunking of latent positions; no longer embedded"),
    ("tiny-dc-dense", "diffusion, the baseline of tiny-dc; no longer embedded"),
)


def generate_markdown(data: dict[str, Any]) -> str:
    """A result of `fastgen bench generate`: cold starts and pictures in a warm process."""
    cold = [
        [row["what"], str(row["n"]), *three(row["seconds"]), _megabytes(row["peak_rss_bytes"])] for row in data["cold"]
    ]
    warm = []
    for row in data["warm"]:
        cells = [row["model"], row.get("engine", "eager"), str(row["batch"])]
        step = f"{1e3 * row['seconds_per_step']['p50']:.1f}"
        invariant = "yes" if row["batch_invariant"] else "no"
        warm.append([*cells, invariant, str(row["n"]), *three(row["seconds_per_image"]), step])
    tables = []
    if cold:
        tables.append(markdown_table(["cold", "n", "p20 s", "p50 s", "p80 s", "peak MB"], cold))
    header = ["model", "engine", "batch", "batch-invariant", "n", "s/picture p20", "p50", "p80", "ms/step p50"]
    tables.append(markdown_table(header, warm))
    return "\n".join(tables) + "\n" + provenance(data) + "\n"


def _megabytes(value: int | None) -> str:
    return "" if value is None else f"{value / 1e6:.0f}"


def _read(folder: Path, name: str) -> dict[str, Any] | None:
    path = folder / f"{name}.json"
    return read_object(path) if path.exists() else None


def scores_table(folder: Path) -> str:
    """One row for each embedded model that has scores in `folder`."""
    header, rows = ["model"], []
    for model, _ in _MODELS:
        if (scores := _read(folder, f"shapesworld-{model}")) is None:
            continue
        header = ["model", *(tag.replace("_", " ") for tag in scores["tasks"]), "**mean**", "± s.e.", "FD-shapes"]
        tasks = [percent(task["score"]) for task in scores["tasks"].values()]
        distance = f"{scores['fd_shapes']['value']:.1f}"
        overall = [f"**{percent(scores['overall'])}**", percent(scores["overall_stderr"]), distance]
        rows.append([model, *tasks, *overall])
    return markdown_table(header, rows)


def with_tables(readme: str, folder: Path) -> str:
    """The text of a README with the tables between ``<!-- gains -->`` and ``<!-- scores -->`` replaced.

    Raises:
        ValueError: it does not have exactly two marks of each.
    """
    for mark, table in (("<!-- gains -->", gains_table), ("<!-- scores -->", scores_table)):
        parts = readme.split(mark)
        if len(parts) != 3:
            raise ValueError(f"needs two marks {mark}, found {len(parts) - 1}")
        readme = f"{parts[0]}{mark}\n{table(folder)}{mark}{parts[2]}"
    return readme


def results_page(folder: Path) -> str:
    """The page of all results in `folder`; those that are not there are left out."""

    def read(name: str) -> dict[str, Any] | None:
        return _read(folder, name)

    parts = [
        "# Results\n\nWritten by `python -m fastgen.evaluation.results_page` from the JSON files in "
        "`docs/results/`, which hold every number with the machine, the versions, the commit and the date it "
        "comes from. ShapesWorld-GenEval and FD-shapes are scores on ShapesWorld, comparable only with each "
        "other.\n"
    ]

    def scored(title: str, text: str, scores: dict[str, Any]) -> list[str]:
        distance = scores["fd_shapes"]
        return [
            f"## {title}\n\n{text}\n\n{scores_markdown(scores)}",
            f"{distance['protocol']}: **{distance['value']:.2f}**\n",
        ]

    for model, kind in (*_MODELS, *_FORMER):
        if (scores := read(f"shapesworld-{model}")) is not None:
            settings = scores["settings"]
            command = f"fastgen eval shapes --model {model} --images-per-prompt {settings['images_per_prompt']}"
            if settings["batch_size"] is not None:
                command += f" --fast-batches --batch-size {settings['batch_size']}"
            parts += scored(f"{model} ({kind})", f"`{command}`", scores)
    if (scores := read("recipe-z-image")) is not None:
        story = (
            "From random weights with its defaults, next to the committed `tiny`, which was trained in stages: "
            "`fastgen train z-image --part RUNS/vae/model/vae --compile --threads 1`, then "
            "`fastgen eval shapes --model RUNS/z-image/model`."
        )
        parts += scored("Recipe z-image, in one go", story, scores)
    for name, title, text in (
        ("bench-generate", "Cost of `fastgen generate`", generate_markdown),
        ("bench-dc", "Dynamic chunking: quality against cost", dc_quality_markdown),
        ("bench-dc-latent", "Dynamic chunking of latent positions, trained from random weights", dc_quality_markdown),
        ("bench-speculative", "Speculative decoding of image tokens", speculative_markdown),
        ("bench-speculative-trees", "Speculative decoding: trees and windows", speculative_markdown),
        ("bench-speculative-sources", "Speculative decoding: costs of sources, not compiled", speculative_markdown),
        ("bench-speculative-cost", "Speculative decoding: cost of a round at real sizes", speculative_cost_markdown),
        ("bench-search", "Noise search: score against compute and seconds", search_markdown),
        ("bench-search-twelve", "Noise search: the same with one seed and more prompts", search_markdown),
        ("bench-search-equal", "Noise search: thresholds against rivals of equal seconds", search_markdown),
        ("bench-search-own-call", "Noise search: thresholds by the pipeline's own call, no adapter", search_markdown),
        ("bench-search-rbf", "Noise search: thresholds against RBF with 500 passes", search_markdown),
        ("bench-accelerate", "Exact parts, a plan, and fewer steps", accelerate_markdown),
        ("bench-dc-speed", "Dynamic chunking: FLOPs and time at real sizes", dc_markdown),
        ("bench-serve", "A server and its clients", serve_markdown),
        ("bench-serve-load", "A server whose replicas are killed, on a busy machine", serve_markdown),
        ("bench-kernels", "Fused kernels", kernels_markdown),
        ("bench-kernels-end-to-end", "Fused kernels: steps of whole models", kernels_markdown),
    ):
        if (data := read(name)) is not None:
            command = _COMMANDS.get(name, name.replace("-", " ", 1))
            if name in _OTHER_ROWS:
                command += "".join(f' --variant "{row["variant"]}"' for row in data["rows"] if row["rule"])
            notes = "".join(f" {note}" for note in data.get("notes", ()))
            parts.append(
                f"## {title}\n\n`fastgen {command}`; seconds are wall-clock, n runs after "
                f"warm-up, percentiles over the runs.{notes}\n\n{text(data)}"
            )
    for name, title in (
        ("bench-search-overhead", "Noise search: what wrapping costs"),
        ("shapes-checker", "ShapesWorld checker"),
    ):
        if (folder / f"{name}.json").is_file():
            parts.append(f"## {title}\n\nSee [{name}](results/{name}.md).\n")
    return "\n".join(parts)


if __name__ == "__main__":
    root = Path(__file__).resolve().parents[1]
    (root / "docs" / "results.md").write_text(results_page(root / "docs" / "results"), encoding="utf-8")
    page = root / "README.md"
    page.write_text(with_tables(page.read_text(encoding="utf-8"), root / "docs" / "results"), encoding="utf-8")
