"""`fastgen models`: which method works with which family of models, as the tests found it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fastgen.cli.publish import JsonOption
from fastgen.errors import FastgenError

__all__ = ["FILE", "METHODS", "find", "markdown", "read"]

app = typer.Typer(help="Show which method works with which model.", add_completion=False)

FILE = Path(__file__).parents[1] / "support.json"

#: Columns of the table, each with what a "yes" means.
METHODS = {
    "kernels": "fused kernels (enable_kernels): in the denoiser's blocks, or in the decoder only",
    "search": "noise search (--method search)",
    "chunking": "dynamic chunking by fastgen.upcycle; pays after training only",
    "speculative": "speculative decoding (--method speculative; token_stage of fastgen.accelerate for GLM-Image)",
    "step cache": "diffusers' first-block cache (step_cache of fastgen.accelerate)",
    "offload": "weights in main memory until they are needed (--offload)",
    "lora": "LoRA weights (--lora)",
    "compile": "regional compilation (compile of fastgen.accelerate)",
}

#: Models on the Hub that people ask for, by family.
HUB = {
    "chameleon": ["leloy/Anole-7b-v0.1-hf"],
    "emu3": ["BAAI/Emu3-Gen-hf"],
    "flux": ["black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-schnell"],
    "flux2": ["black-forest-labs/FLUX.2-dev"],
    "flux2-klein": ["black-forest-labs/FLUX.2-klein-4B"],
    "glm-image": ["zai-org/GLM-Image"],
    "janus": ["deepseek-community/Janus-Pro-1B", "deepseek-community/Janus-Pro-7B"],
    "pixart-alpha": ["PixArt-alpha/PixArt-XL-2-1024-MS"],
    "pixart-sigma": ["PixArt-alpha/PixArt-Sigma-XL-2-1024-MS"],
    "qwen-image": ["Qwen/Qwen-Image"],
    "sana": ["Efficient-Large-Model/Sana_1600M_1024px_diffusers"],
    "sd3": ["stabilityai/stable-diffusion-3.5-medium", "stabilityai/stable-diffusion-3.5-large"],
    "sdxl": ["stabilityai/stable-diffusion-xl-base-1.0"],
    "z-image": ["Tongyi-MAI/Z-Image-Turbo"],
    "dit": ["facebook/DiT-XL-2-256"],
}


def read() -> dict[str, dict[str, str]]:
    """The table: a row for each family."""
    from fastgen.io import read_json

    return read_json(FILE)


def find(name: str, rows: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    """Rows of a family, a pipeline class or a Hub id.

    Raises:
        FastgenError: there is no such row.
    """
    asked = name.strip().lower()
    ids = {hub.lower(): family for family, hubs in HUB.items() for hub in hubs}
    exact = {key: row for key, row in rows.items() if asked in (key, row["pipeline"].lower()) or ids.get(asked) == key}
    part = asked.rpartition("/")[2]
    found = exact or {key: row for key, row in rows.items() if part in key or part in row["pipeline"].lower()}
    if not found or not part:
        raise FastgenError(f"NAME: {name!r} is not in the table; needs part of one of {', '.join(rows)}")
    return found


def markdown(rows: dict[str, dict[str, str]]) -> str:
    """The table of the documentation."""
    head = ["family", "pipeline or model", *METHODS]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for name, row in rows.items():
        lines.append(f"| {' | '.join([name, '`' + row['pipeline'] + '`', *(row[method] for method in METHODS)])} |")
    return "\n".join(lines) + "\n"


def _plain(rows: dict[str, dict[str, str]]) -> str:
    table = [["family", *METHODS], *([name, *(row[method] for method in METHODS)] for name, row in rows.items())]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in table)


def _one(name: str, row: dict[str, str]) -> str:
    lines = [f"{name} ({row['pipeline']})", *(f"  on the Hub: {each}" for each in HUB.get(name, []))]
    width = max(map(len, METHODS))
    lines += [f"  {method:<{width}}  {row[method]:<8} {text}" for method, text in METHODS.items()]
    return "\n".join(lines)


@app.command()
def models(
    name: Annotated[
        str | None, typer.Argument(help="A family, a pipeline class or a Hub id; part of it is enough.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show which method works with which model."""
    rows = read() if name is None else find(name, read())
    if as_json:
        typer.echo(json.dumps({key: {**row, "hub": HUB.get(key, [])} for key, row in rows.items()}))
    elif name is None:
        typer.echo(_plain(rows))
        typer.echo("\ntrained: works, and pays after training only. decoder: in the image decoder only.")
        typer.echo("`fastgen models NAME` shows one family and its models on the Hub.")
    else:
        typer.echo("\n\n".join(_one(key, row) for key, row in rows.items()))
