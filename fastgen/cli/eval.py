"""`fastgen eval`: scores of models and folders; one module per sub-command."""

from __future__ import annotations

import warnings

import typer

from fastgen.cli.eval_compare import compare
from fastgen.cli.eval_fid import fid
from fastgen.cli.eval_geneval import geneval
from fastgen.cli.eval_report import report
from fastgen.cli.eval_shapes import shapes

app = typer.Typer(help="Score images and models.", no_args_is_help=True)

# Pillow's warning of a large image; the readers refuse it, in one line.
warnings.filterwarnings("ignore", message="Image size .* exceeds limit")


@app.callback()
def _group() -> None:
    """Score images and models."""


app.command("shapes")(shapes)
app.command("geneval")(geneval)
app.command("fid")(fid)
app.command("compare")(compare)
app.command("report")(report)
