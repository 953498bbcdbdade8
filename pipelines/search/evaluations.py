"""Evaluations of a search: model, decoder and verifier, for samples of many chains together.

What is not a number, in latents, pixels or scores, is a fault of its sample and of no other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastgen.accounting import add_verifier_calls, current, phase
from fastgen.checks import check_finite
from fastgen.errors import NotFiniteError
from fastgen.pipelines.search.fitting import fitting
from fastgen.pipelines.search.interpolants import Prediction
from fastgen.pipelines.search.previews import Preview

if TYPE_CHECKING:
    from fastgen.pipelines.search.engine import Ask, Chain

    _Row = tuple[Chain, Ask, int]

__all__ = ["Answer", "Verifier", "evaluate"]

#: Scores pictures [k, 3, H, W] uint8 of k prompts: [k].
Verifier = Callable[[Tensor, list[str]], Tensor]


@dataclass
class Answer:
    """The evaluation of a sample: see `fastgen.pipelines.search.engine.Node`."""

    prediction: Prediction
    score: float = math.nan
    picture: Tensor | None = None
    fault: NotFiniteError | None = None
    usable: bool = True


def evaluate(
    asked: list[tuple[Chain, Ask]],
    verifier: Verifier,
    prompts: Sequence[str],
    batch_size: int,
    preview: Preview | None,
) -> list[Answer]:
    """Evaluate what all chains ask, in slices of `batch_size`; one answer for each of the samples."""
    rows = [(chain, ask, row) for chain, ask in asked for row in range(len(ask.latents))]
    answers: dict[int, Answer] = {}
    for first in range(0, len(rows), batch_size):
        part = range(first, min(first + batch_size, len(rows)))
        said = _predict([rows[i] for i in part])
        answers |= dict(zip(part, _answers(said), strict=True))
        sound = [i for i in part if rows[i][1].scored and answers[i].usable]
        for cheap in (False, True):
            wanted = [i for i in sound if cheap == (preview is not None and not rows[i][1].last)]
            shown = _shown([(rows[i], answers[i].prediction) for i in wanted], preview if cheap else None)
            for i, picture in zip(wanted, shown, strict=True):
                if isinstance(picture, NotFiniteError):
                    answers[i].fault = picture
                else:
                    answers[i].picture = picture
            wanted = [i for i in wanted if answers[i].fault is None]
            _score([answers[i] for i in wanted], verifier, [prompts[rows[i][0].prompt] for i in wanted])
    return [answers[i] for i in range(len(rows))]


def _answers(said: Prediction) -> list[Answer]:
    """Rows of a prediction, with a fault where it is not a number."""
    rows = zip(said.clean.split(1), said.noise.split(1), strict=True)
    found = [Answer(Prediction(clean, noise)) for clean, noise in rows]
    for answer in found if _fault(said.clean, "latents") or _fault(said.noise, "latents") else ():
        answer.fault = _fault(answer.prediction.clean, "latents") or _fault(answer.prediction.noise, "latents")
        answer.usable = answer.fault is None
    return found


def _fault(values: Tensor | float, what: str) -> NotFiniteError | None:
    try:
        check_finite(values, what)
    except NotFiniteError as error:
        return error.with_traceback(None)  # which holds tensors
    return None


def _predict(part: Sequence[_Row]) -> Prediction:
    """Evaluate rows, as many together as free memory allows."""
    parts = fitting(part, part[0][0].denoiser.fits, _evaluated)
    return Prediction(*(torch.cat([getattr(said, name) for said in parts]) for name in ("clean", "noise")))


def _evaluated(part: Sequence[_Row]) -> Prediction:
    chain, ask, _ = part[0]
    denoiser = chain.denoiser
    places = [ask.sampler.model_level(ask.index, denoiser.interpolant) for _, ask, _ in part]
    latents = torch.cat([ask.latents[row] for _, ask, row in part])
    times = torch.tensor([time for time, _ in places], dtype=torch.float64, device=latents.device)
    scale = torch.tensor([scale for _, scale in places]).to(latents).view(-1, *[1] * (latents.ndim - 1))
    which = torch.tensor([chain.prompt for chain, _, _ in part], device=latents.device)
    with _billed(part):
        return denoiser.predict(latents / scale, times, which)


def _shown(part: Sequence[tuple[_Row, Prediction]], preview: Preview | None) -> list[Tensor | NotFiniteError]:
    """For each row its picture [1, 3, H, W] uint8, or the error."""
    if not part:
        return []
    denoiser = part[0][0][0].denoiser

    def decoded(part: Sequence[tuple[_Row, Prediction]]) -> Tensor:
        said = Prediction(*(torch.cat([getattr(said, name) for _, said in part]) for name in ("clean", "noise")))
        which = torch.tensor([chain.prompt for (chain, _, _), _ in part])
        with _billed([row for row, _ in part]):
            return denoiser.pictures(said, which) if preview is None else preview(denoiser, said)

    try:
        return list(torch.cat(fitting(part, denoiser.decodes, decoded)).split(1))
    except NotFiniteError as error:
        if len(part) == 1:
            return [error.with_traceback(None)]
    return [picture for one in part for picture in _shown([one], preview)]


@contextmanager
def _billed(part: Sequence[_Row]) -> Iterator[None]:
    """FLOPs of what runs inside, where they are counted, in equal parts to the rows' prompts."""
    stats = current()
    before = 0 if stats is None else stats.flops
    yield
    if stats is not None and stats.flops > before:
        for chain, _, _ in part:
            chain.pool.flops += (stats.flops - before) / len(part)


def _score(answers: Sequence[Answer], verifier: Verifier, prompts: list[str]) -> None:
    """Set scores; one that is not a number is a fault.

    Raises:
        ValueError: the verifier did not return one number for each picture.
    """
    if not answers:
        return
    pictures = torch.cat([answer.picture for answer in answers if answer.picture is not None])
    with phase("verifier"):
        add_verifier_calls(len(pictures))
        given = verifier(pictures, prompts)
        try:
            found = torch.as_tensor(given)
        except (TypeError, ValueError, RuntimeError) as error:
            name = type(given).__name__
            raise ValueError(f"verifier: returned {name}, needs a tensor of numbers, one for each picture") from error
    if found.shape != (len(pictures),) or found.is_complex():
        raise ValueError(
            f"verifier: returned {found.dtype} of shape {tuple(found.shape)}, needs real numbers of shape "
            f"({len(pictures)},), one for each picture"
        )
    for answer, score in zip(answers, found.double().cpu().tolist(), strict=True):
        answer.score, answer.fault = score, _fault(score, "the verifier's scores")
