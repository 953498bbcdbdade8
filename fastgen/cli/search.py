"""What `fastgen generate --method search` adds: its options, its pictures, and what is said of them."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastgen.cli.options import option_name
from fastgen.cli.publish import has_matplotlib
from fastgen.errors import FastgenError
from fastgen.pipelines.beginnings import Beginning, read_beginning
from fastgen.pipelines.schema import SearchSettings

if TYPE_CHECKING:
    from fastgen.cli.plan import Job
    from fastgen.evaluation.verifiers.base import Verifier
    from fastgen.pipelines.generation import GeneratedImage
    from fastgen.pipelines.loading.checkpoint import Checkpoint
    from fastgen.pipelines.search.budget import Budget
    from fastgen.pipelines.search.policy import Policy

SaveTreeOption = Annotated[
    bool, typer.Option("--save-tree", help="Also write NAME.tree.png: all candidates and their scores (search).")
]
ImageOption = Annotated[
    Path | None, typer.Option("--image", help="Start from this picture, image-to-image (search).", show_default=False)
]
MaskOption = Annotated[
    Path | None,
    typer.Option(
        "--mask", help="Mask for inpainting: white parts of --image are redrawn (search).", show_default=False
    ),
]
StrengthOption = Annotated[
    float | None,
    typer.Option(
        help="How much of --image may change, above 0 to 1. Default: the pipeline's (search).", show_default=False
    ),
]

#: Of the models that come with fastgen.
DEFAULT_VERIFIER = "shapes-verifier"


@dataclass(frozen=True)
class Search:
    """The checked settings of a search.

    Attributes:
        policy: with its settings.
        budget: of each picture.
        sampler: of noisy steps; None: the policy has none.
        verifier: for `load_verifier`.
        preview: how candidates are decoded.
        save_tree: whether trees are written too.
        settings: for the sidecar.
        beginning: arguments of the call for the picture that it begins with.
    """

    policy: Policy
    budget: Budget
    sampler: str | None
    verifier: str
    preview: Any
    save_tree: bool
    settings: dict[str, Any]
    beginning: dict[str, Any]

    def load_verifier(self, device: str) -> Verifier:
        """The verifier, ready to score on that device."""
        from fastgen.accounting import phase
        from fastgen.evaluation.verifiers.names import load_verifier

        with phase("load"):
            return load_verifier(self.verifier, device)


# ---- options ----


def check_options(method: str | None, asked: SearchSettings, save_tree: bool) -> None:
    """Check what needs neither torch nor the model.

    Raises:
        FastgenError: an option without its method, or no library for the trees.
    """
    given = [*asked.given(), *["save_tree"] * save_tree]
    if given and method != "search":
        raise FastgenError(f"{option_name(given[0])}: needs --method search")
    if save_tree and not has_matplotlib():
        raise FastgenError("--save-tree: needs matplotlib (python -m pip install matplotlib)")


def plan_search(
    checkpoint: Checkpoint,
    pipeline: type,
    call: dict[str, Any],
    asked: SearchSettings,
    save_tree: bool,
    beginning: Beginning | None = None,
) -> Search:
    """Check what needs the model's configuration, but not its weights.

    Args:
        checkpoint: of the model.
        pipeline: its class.
        call: resolved settings of the pictures.
        asked: settings of the search, None where the user gave none.
        save_tree: whether trees are written too.
        beginning: the picture that it begins with.

    Raises:
        ValueError: a model, a policy, a verifier or a sampler that there is not, a setting that the policy does not
            have, or a budget smaller than one picture takes.
    """
    from fastgen.pipelines.search.budget import Budget
    from fastgen.pipelines.search.denoisers.base import denoiser_of
    from fastgen.pipelines.settings import pipeline_arguments
    from fastgen.pipelines.stock_arguments import defaults_of

    adapter = denoiser_of(pipeline)
    policy = _policy(asked)
    sampler = _sampler(policy, asked.sampler)
    budget = Budget(asked.max_nfe, asked.max_seconds, asked.target_score)
    arguments = defaults_of(pipeline) | pipeline_arguments(call)
    steps, scale = arguments.get("num_inference_steps"), arguments.get("guidance_scale")
    if beginning is not None:
        if "strength" in beginning.arguments and "strength" not in arguments:
            raise FastgenError(f"--strength: {pipeline.__name__} does not take it")
        steps = beginning.steps(steps or 1, arguments.get("strength"))
    guided = adapter.guided_above is not None and scale is not None and scale > adapter.guided_above
    # The pipeline checks again with the loaded model; this check may allow more, but never refuses too much.
    policy.check(budget, (steps or 1) - 1, 2 if guided else 1)
    verifier, files = _verifier(checkpoint, asked)
    values: dict[str, Any] = {
        name: getattr(policy, name) for name in ("starts", "chains") if name in _settings_of(policy)
    }
    settings = {
        **asdict(asked),
        "policy": policy.name,
        "verifier": verifier,
        "verifier_files": files,
        "sampler": sampler,
    }
    settings |= values | ({} if beginning is None else beginning.settings)
    begin = {} if beginning is None else beginning.arguments
    return Search(policy, budget, sampler, verifier, asked.preview or "full", save_tree, settings, begin)


def _policy(asked: SearchSettings) -> Policy:
    from fastgen.pipelines.search.names import POLICIES, named_policy

    name = asked.policy or "threshold"
    given = {name: value for name, value in asked.given().items() if name in ("tau", "starts", "chains")}
    for setting in given if name in POLICIES else ():
        if setting not in _settings_of(POLICIES[name]):
            having = [other for other, kind in POLICIES.items() if setting in _settings_of(kind)]
            raise FastgenError(f"{option_name(setting)}: policy {name} has none, but {', '.join(having)}")
    return named_policy(name, **given)


def _settings_of(policy: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(policy)]


def _sampler(policy: Policy, asked: str | None) -> str | None:
    if asked is not None and not policy.stochastic:
        raise FastgenError(f"--sampler: policy {policy.name} adds no noise between the steps")
    return (asked or "ancestral") if policy.stochastic else None


def _verifier(checkpoint: Checkpoint, asked: SearchSettings) -> tuple[str, str | None]:
    """Its name, and a digest of its weights and thresholds where they are in a folder."""
    from fastgen.cli.plan import weights_digest
    from fastgen.evaluation.verifiers.names import verifier_class
    from fastgen.pipelines.loading.checkpoint import EMBEDDED_MODELS, embedded_folder
    from fastgen.pipelines.search.thresholds import check_in_range

    name = asked.verifier
    if name is None and checkpoint.model not in EMBEDDED_MODELS:
        raise FastgenError(f"--verifier: needs one for model {checkpoint.model!r}; there is no default that fits it")
    name = name or DEFAULT_VERIFIER
    kind, weights = verifier_class(name)
    for option in ("tau", "target_score"):
        if getattr(asked, option) is not None:
            check_in_range(option_name(option), getattr(asked, option), kind)
    if weights is None and name == DEFAULT_VERIFIER:
        weights = str(embedded_folder(name))
    local = weights is not None and Path(weights).is_dir()
    return name, weights_digest([Path(weights or "")], "thresholds/*.json") if local else None


# ---- pictures ----


def searched_pictures(
    pipe: Any, verifier: Any, search: Search, prompts: Sequence[str], seeds: Sequence[int], **arguments: Any
) -> Iterator[GeneratedImage]:
    """`search_images`; an error is reported as the command line does, after the pictures until then.

    Raises:
        FastgenError: the model or the verifier failed.
        KeyboardInterrupt: Ctrl-C, or SIGTERM.
    """
    from fastgen.pipelines.noise_search import SearchInterrupted
    from fastgen.pipelines.search.images import search_images

    try:
        with _terminable():
            limits: dict[str, Any] = {"budget": search.budget, "sampler": search.sampler, "preview": search.preview}
            limits |= search.beginning
            yield from search_images(pipe, verifier, search.policy, prompts, seeds, **limits, **arguments)
    except SearchInterrupted as error:
        if isinstance(error.__cause__, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise FastgenError(str(error)) from error


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM, which `timeout` and batch systems send, ends a search as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def summary(image: Path, picture: GeneratedImage) -> str:
    """One line on the search for a picture."""
    found, stats = picture.search or {}, picture.stats
    score = "none" if found["score"] is None else f"{found['score']:.4g}"
    shown = "" if found["finished"] else f" of a preview at time {_time(found)} of {len(found['tries_by_time']) - 1}"
    tries = " | ".join(_runs(row) for row in found["tries"] if row)
    phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in stats.seconds.items())
    together = f" for {picture.images} pictures" if picture.images > 1 else ""
    parts = [
        *(["interrupted, a rerun searches again"] if picture.interrupted else []),
        f"score {score}{shown}",
        *([f"{found['starts']} starts", f"tries {tries}", f"{found['forced']} forced"] if tries else []),
        f"{found['evaluations']} evaluations",
        f"{found['nfe']} NFE",
        *([f"scheduler {found['replaced']['scheduler']}"] if "scheduler" in found.get("replaced", {}) else []),
        f"{stats.wall_seconds:.1f} s{together} ({phases})",
    ]
    return f"{image}: {', '.join(parts)}"


def _runs(numbers: Sequence[int]) -> str:
    """ "4 1x3 2" of 4 1 1 1 2."""
    runs = [(number, len(list(same))) for number, same in itertools.groupby(numbers)]
    return " ".join(f"{number}x{count}" if count > 1 else str(number) for number, count in runs)


def _time(found: dict[str, Any]) -> int:
    """Of the node whose picture it is."""
    number = found["path"][-1]
    return int(next(row[2] for row in found["trees"][found["chain"]] if row[0] == number))


# ---- trees ----


def tree_file(image: Path, search: dict[str, Any], picture: Any = None) -> tuple[Path, bytes]:
    """Name and bytes of the picture of a search.

    Args:
        image: the picture's own file.
        search: the report in its sidecar.
        picture: the picture, shown next to the tree.
    """
    from fastgen.evaluation.search_trees import search_tree
    from fastgen.io import encode_png

    return image.with_suffix(".tree.png"), encode_png(search_tree(search, picture=picture), {})


def write_missing_trees(jobs: Sequence[Job]) -> None:
    """Trees of pictures that were found before."""
    from PIL import Image

    from fastgen.cli.plan import read_sidecar
    from fastgen.io import atomic_write_many

    for job in jobs:
        search = read_sidecar(job).get("search")
        if search and not job.image.with_suffix(".tree.png").exists():
            with Image.open(job.image) as picture:
                atomic_write_many([tree_file(job.image, search, picture)])


def beginning_of(
    method: str | None, image: Path | None, mask: Path | None, strength: float | None
) -> Beginning | None:
    """What these options ask for.

    Raises:
        FastgenError: without a search, or what `read_beginning` refuses.
    """
    given = {"image": image, "mask": mask, "strength": strength}
    names = [option_name(name) for name, value in given.items() if value is not None]
    if names and method != "search":
        raise FastgenError(f"{names[0]}: needs --method search")
    return read_beginning(image, mask, strength, option_name)
