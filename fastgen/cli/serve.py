"""`fastgen serve`: the methods behind an HTTP interface, and a web page."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import fields
from types import SimpleNamespace
from typing import Annotated, Any

import typer

from fastgen.checks import check_choice
from fastgen.cli.options import load_options, with_loading
from fastgen.cli.publish import DtypeOption
from fastgen.errors import FastgenError

app = typer.Typer(help="Serve pictures over HTTP, with a web page.")

_LIBRARIES = {
    "fastapi": "fastapi",
    "uvicorn": "uvicorn",
    "prometheus_client": "prometheus-client",
    "multipart": "python-multipart",
}
_RAY, _LIMITS = "Ray Serve (--engine ray)", "Most that one request may ask for"


def check_libraries(*, ray: bool = False) -> None:
    """Raises:
    FastgenError: names the libraries to install.
    """
    needed = _LIBRARIES | ({"ray": "'ray[serve]'"} if ray else {})
    if missing := [package for name, package in needed.items() if importlib.util.find_spec(name) is None]:
        raise FastgenError(f"serve: needs {', '.join(missing)}: pip install {' '.join(missing)}")


@app.command()
@with_loading
def serve(
    context: typer.Context,
    model: Annotated[
        list[str] | None,
        typer.Option(help="A name, a folder or a Hub id; repeat. Default: tiny.", show_default=False),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; one that other machines can reach needs a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            help="Key that requests must send. The environment variable FASTGEN_API_KEY is safer: no list of "
            "processes shows it.",
            show_default=False,
        ),
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Serve other machines without a key.")] = False,
    verifier: Annotated[
        str | None,
        typer.Option(
            help="Verifier of searches: a name, NAME:WEIGHTS or a folder. Default: the model's.", show_default=False
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    dtype: DtypeOption = "auto",
    batch_size: Annotated[int, typer.Option(help="Most pictures per batch.")] = 8,
    max_wait_ms: Annotated[float, typer.Option(help="How long a picture waits for others to share its batch.")] = 20,
    max_queue: Annotated[int, typer.Option(help="Pictures that wait; more are refused with status 429.")] = 64,
    timeout: Annotated[float, typer.Option(help="Time limit of a request in seconds.")] = 600,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write prompts to the log.")] = False,
    engine: Annotated[str, typer.Option(help="local draws in this process, ray on replicas of Ray Serve.")] = "local",
    replicas: Annotated[int, typer.Option(help="Minimum number of replicas (ray).", rich_help_panel=_RAY)] = 1,
    max_replicas: Annotated[
        int | None,
        typer.Option(
            help="Maximum number of replicas under load. Default: the minimum.",
            show_default=False,
            rich_help_panel=_RAY,
        ),
    ] = None,
    replica_gpus: Annotated[
        float, typer.Option(help="GPUs of a replica; 0.5 lets two share one.", rich_help_panel=_RAY)
    ] = 0,
    replica_cpus: Annotated[float, typer.Option(help="CPU cores of a replica.", rich_help_panel=_RAY)] = 1,
    replica_models: Annotated[int, typer.Option(help="Models that a replica keeps loaded.", rich_help_panel=_RAY)] = 2,
    ray_address: Annotated[
        str | None,
        typer.Option(
            help="Address of a running cluster. Default: starts one on this machine.",
            show_default=False,
            rich_help_panel=_RAY,
        ),
    ] = None,
    limit_body_megabytes: Annotated[int, typer.Option(help="Largest request.", rich_help_panel=_LIMITS)] = 32,
    limit_prompt: Annotated[int, typer.Option(help="Longest prompt in characters.", rich_help_panel=_LIMITS)] = 4000,
    limit_images: Annotated[int, typer.Option(help="Most pictures per request.", rich_help_panel=_LIMITS)] = 10,
    limit_side: Annotated[
        int, typer.Option(help="Largest height and width in pixels.", rich_help_panel=_LIMITS)
    ] = 2048,
    limit_steps: Annotated[int, typer.Option(help="Most denoising steps.", rich_help_panel=_LIMITS)] = 200,
    limit_nfe: Annotated[
        int, typer.Option(help="Most forward passes of a search per picture.", rich_help_panel=_LIMITS)
    ] = 2000,
    **loading: Any,
) -> None:
    """Serve pictures over HTTP as OpenAI's image interface does, with a page at /. Ctrl-C finishes what is in the
    making and ends."""
    check_choice("--engine", engine, ("local", "ray"))
    check_libraries(ray=engine == "ray")
    from fastgen.serve.settings import ClusterSettings, Limits, ServeSettings

    given = context.params | {"options": load_options(SimpleNamespace(**loading))}  # named as the settings are
    limits = Limits(**_of(Limits, given, "limit_"))
    settings = ServeSettings(
        **_of(ServeSettings, given)
        | {"models": tuple(model or ["tiny"]), "api_key": api_key or os.environ.get("FASTGEN_API_KEY") or None},
        limits=limits,
    )
    cluster = ClusterSettings(**_of(ClusterSettings, given))
    from fastgen.serve.server import serve as run

    run(settings, cluster if engine == "ray" else None)


def _of(kind: type[Any], given: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The options that are fields of a settings class."""
    names = [each.name for each in fields(kind) if prefix + each.name in given]
    return {name: given[prefix + name] for name in names}
