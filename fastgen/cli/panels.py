"""How the help of a command is laid out: panels by method, examples, and the options that every command has."""

from __future__ import annotations

import logging
import re
from typing import Annotated, Any

import typer

from fastgen.pipelines.schema import (
    ChunkingSettings,
    DrawSettings,
    SamplingSettings,
    SearchSettings,
    SpeculativeSettings,
)

# The text in brackets at the end of a sentence of an option's help, and the panel that it goes to without that.
PANELS = {
    "diffusion": DrawSettings.panel,
    "autoregressive": SamplingSettings.panel,
    "dynamic chunking": ChunkingSettings.panel,
    "speculative": SpeculativeSettings.panel,
    "search": SearchSettings.panel,
}
_BRACKETS = re.compile(rf"\s*\(({'|'.join(PANELS)})\)(\.|$)")

EXAMPLES = {
    "generate": [
        'fastgen generate "three red circles" -o out.png',
        "fastgen generate --prompts-file prompts.txt --num-images 4 -o pictures",
        'fastgen generate "three red circles" --method dc --tail-drop 0.3',
        'fastgen generate "three red circles" --method speculative',
        'fastgen generate "three red circles" --method search --max-nfe 120',
    ],
    "eval shapes": ["fastgen eval shapes --model tiny --limit 5"],
    "eval geneval": ["fastgen eval geneval --images pictures --detector shapes --out scored"],
    "eval fid": ["fastgen eval fid pictures --out fid.json"],
    "eval compare": ["fastgen eval compare before/scores.json after/scores.json --margin 0.01"],
    "eval report": ["fastgen eval report scored/scores.json --out report.html"],
    "models": ["fastgen models"],
    "info": ["fastgen info --json"],
    "tune": ["fastgen tune --model tiny --prompts-file prompts.txt --minutes 5 -o plan.json"],
    "serve": ["fastgen serve --model tiny --model tiny-janus", "fastgen serve --host 0.0.0.0 --api-key KEY"],
    "bench serve": ["fastgen bench serve --rounds 5 --out serve.json"],
    "bench generate": ["fastgen bench generate --out generate.json"],
    "bench dc": ["fastgen bench dc --limit 2 --out dc.json"],
    "bench dc-speed": ["fastgen bench dc-speed --size S@256 --out dc-speed.json"],
    "bench speculative": ["fastgen bench speculative --limit 2 --out speculative.json"],
    "bench search": ["fastgen bench search --budget 48 --out search.json"],
    "bench speculative-cost": ["fastgen bench speculative-cost --size janus-pro-1b"],
    "bench accelerate": ["fastgen bench accelerate --model tiny --out accelerate.json"],
    "bench kernels": ["fastgen bench kernels --out kernels.json"],
}


def arrange(name: str, command: Any) -> None:
    """Lay out the help of a command ("generate", "eval fid")."""
    for option in command.params:
        if found := _BRACKETS.search(getattr(option, "help", None) or ""):
            option.help = _BRACKETS.sub(".", option.help)
            option.rich_help_panel = PANELS[found[1]]
    if name in EXAMPLES:
        command.epilog = "Examples:\n\n" + "\n\n".join(EXAMPLES[name])
    command.params.append(verbose_option())


def verbose_option() -> Any:
    """-v, --verbose of a command, made by typer: its own classes differ between releases."""
    app = typer.Typer(add_completion=False)
    app.command()(_verbose)
    return next(option for option in typer.main.get_command(app).params if option.name == "verbose")


def _be_verbose(context: typer.Context, value: bool) -> None:
    if not value:
        return
    logger, handler = logging.getLogger("fastgen"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    before = logger.level

    def restore() -> None:
        logger.removeHandler(handler)
        logger.setLevel(before)

    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    context.call_on_close(restore)


def _verbose(
    verbose: Annotated[
        bool,
        typer.Option(
            "-v",
            "--verbose",
            callback=_be_verbose,
            expose_value=False,
            help="Log what fastgen does, and which fast paths it takes, on stderr.",
        ),
    ] = False,
) -> None: ...
