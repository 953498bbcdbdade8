"""The models of a server, and how they draw a batch of orders."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from PIL import Image

from fastgen.cli.methods import best_device, check_method, find_model
from fastgen.cli.search import Search, plan_search
from fastgen.environment import versions
from fastgen.errors import FastgenError
from fastgen.evaluation.images import check_image_file
from fastgen.evaluation.verifiers.names import verifier_class
from fastgen.io import encode_png
from fastgen.pipelines.generation import GeneratedImage, Progress, generate_images, set_checkpoint
from fastgen.pipelines.loading import load_checkpoint, resolve_device
from fastgen.pipelines.loading.checkpoint import EMBEDDED_MODELS, Checkpoint
from fastgen.pipelines.schema import SETTINGS, SearchSettings
from fastgen.pipelines.settings import pipeline_class, resolve_settings
from fastgen.serve.errors import ApiError, from_message
from fastgen.serve.orders import Drawn, Event, Order
from fastgen.serve.partial import Partials, Watched
from fastgen.serve.requests import check_limits, size_of
from fastgen.serve.settings import ServeSettings

__all__ = ["Catalogue", "Studio"]


class Catalogue:
    """The models that a server offers: finds them, and makes orders of requests. Loads no weights.

    Raises:
        FastgenError: a model that there is not, or a device or type that this machine has not.
    """

    def __init__(self, settings: ServeSettings) -> None:
        self.settings = settings
        which = (settings.variant, settings.revision)
        self.models: dict[str, Checkpoint] = {name: find_model(name, *which) for name in settings.models}
        device = best_device() if settings.device == "auto" else settings.device
        if settings.verifier is not None:
            verifier_class(settings.verifier)
        self.device, self.dtype = resolve_device(device, settings.dtype)
        for found in self.models.values():
            settings.options.check(pipeline_class(found), found.index, self.device, found.target_options)

    def methods(self, model: str) -> list[str]:
        """What the model can draw with; the first is its own."""
        checkpoint = self.models[model]
        if checkpoint.draws_tokens:
            return ["speculative"] if checkpoint.speculative_only else ["speculative", "base"]
        own = "dc" if checkpoint.has_dynamic_chunking else "base"
        return [own, *(["search"] if self.settings.verifier or model in EMBEDDED_MODELS else [])]

    def description(self, model: str) -> dict[str, Any]:
        """What the page and clients want to know of a model."""
        checkpoint = self.models[model]
        return {"methods": self.methods(model), "defaults": dict(checkpoint.defaults), "edits": self._edits(model)}

    def _edits(self, model: str) -> bool:
        try:
            pipeline_class(self.models[model], None, "image")
        except FastgenError:
            return False
        return True

    def orders(self, request: Any, image: bytes | None = None, mask: bytes | None = None) -> list[Order]:
        """One order for each picture of a request.

        Args:
            request: an `ImageRequest` or `EditRequest`.
            image, mask: files that were uploaded.

        Raises:
            ApiError: a field that is out of range, does not go with the others, or not with the model.
        """
        check_limits(request, self.settings.limits)
        name = request.model if request.model is not None else next(iter(self.models))
        if name not in self.models:
            raise ApiError(404, f"model: {ascii(name)} is not served here", "model", "model_not_found")
        checkpoint = self.models[name]
        method = request.method or self.methods(name)[0]
        height, width = size_of(request)
        asked = {each: getattr(request, each) for each in SETTINGS} | {"height": height, "width": width}
        if isinstance(asked["quality"], str):
            asked["quality"] = None
        strength = getattr(request, "strength", None)
        begins = None if image is None else "image" if mask is None else "mask_image"
        try:
            for label, data in (("image", image), ("mask", mask)):
                if data is not None:
                    check_image_file(data, label)
            check_method(method, checkpoint)
            kind = pipeline_class(checkpoint, method, begins)
            call = resolve_settings(kind, checkpoint, asked)
            search = {
                name: value for name in SearchSettings.rules() if (value := getattr(request, name, None)) is not None
            }
            if search and method != "search":
                raise ApiError(400, f"{next(iter(search))}: needs method search", next(iter(search)), "invalid_value")
            if method == "search":
                search.setdefault("max_nfe", self.settings.limits.nfe)
                search["verifier"] = self.settings.verifier
                plan_search(checkpoint, kind, call, SearchSettings(**search), False)
        except (FastgenError, ValueError, TypeError) as error:
            raise from_message(error) from error
        first = request.seed if request.seed is not None else secrets.randbelow(2**31)
        shared: dict[str, Any] = {
            "model": name,
            "method": method,
            "prompt": request.prompt,
            "settings": call,
            "search": search if method == "search" else None,
            "image": image,
            "mask": mask,
            "strength": strength,
            "batch_invariant": request.batch_invariant,
            "partial_images": request.partial_images,
            "details": request.details,
        }
        return [Order(seed=first + i, **shared) for i in range(request.n)]


class Studio:
    """Loaded models, which draw batches. Used by one thread at a time.

    Args:
        catalogue: the models.
        keep: that stay loaded, at most; the one that was used longest ago goes. None: all of them.
    """

    def __init__(self, catalogue: Catalogue, keep: int | None = None) -> None:
        self._catalogue, self._keep = catalogue, keep
        self._pipes: dict[str, Any] = {}
        self._verifiers: dict[str, Any] = {}
        self._versions = versions()

    def load(self, model: str) -> Any:
        """The pipeline of a model, loaded once."""
        if model in self._pipes:
            self._pipes[model] = self._pipes.pop(model)  # the last one used stands last
        else:
            while self._keep is not None and len(self._pipes) >= self._keep:
                del self._pipes[next(iter(self._pipes))]
            checkpoint, where = self._catalogue.models[model], self._catalogue
            method = "speculative" if checkpoint.draws_tokens else None
            dtype = str(where.dtype).removeprefix("torch.")
            options = where.settings.options
            self._pipes[model] = load_checkpoint(
                checkpoint, device=str(where.device), dtype=dtype, method=method, options=options
            )
        return self._pipes[model]

    def draw(self, orders: Sequence[Order], report: Callable[[Event, int | None], None]) -> Iterator[Drawn]:
        """See `Artist.draw`."""
        first = orders[0]
        pipe = self._pipeline(first)
        partials = Partials(pipe, [order.partial_images for order in orders])

        def on_progress(progress: Progress) -> None:
            visits = [[chain, *row] for _, chain, row in progress.visits] if first.details else []
            report(
                Event(step=progress.step, steps=progress.steps, visits=visits),
                None if progress.images_now > 1 else progress.images_done,
            )
            for i, png in partials.after(progress):
                report(Event(partial=png), i)

        prompts, seeds = [order.prompt for order in orders], [order.seed for order in orders]
        common: dict[str, Any] = {
            **first.settings,
            "batch_size": len(orders),
            "batch_invariant": first.batch_invariant,
            "callback": on_progress,
        }
        if first.method == "search":
            pictures = self._searched(pipe, first, prompts, seeds, common, report)
        elif first.image is not None:
            pictures = self._edited(pipe, first, common)
        else:
            record = first.details and self._catalogue.models[first.model].has_dynamic_chunking
            pictures = generate_images(pipe, prompts, seeds, **common, record_steps=record)
        for order, picture in zip(orders, pictures, strict=True):
            yield self._drawn(pipe, order, picture)

    def _pipeline(self, order: Order) -> Any:
        pipe = self.load(order.model)
        checkpoint = self._catalogue.models[order.model]
        if checkpoint.kind == "janus" and order.method == "base":
            from fastgen.pipelines.janus import JanusImagePipeline

            pipe = JanusImagePipeline(pipe.model, pipe.tokenizer)
            set_checkpoint(pipe, checkpoint)
        return pipe

    def _searched(
        self,
        pipe: Any,
        order: Order,
        prompts: list[str],
        seeds: list[int],
        common: dict[str, Any],
        report: Callable[[Event, int | None], None],
    ) -> Iterator[GeneratedImage]:
        from fastgen.pipelines.search.images import search_images

        checkpoint = self._catalogue.models[order.model]
        plan: Search = plan_search(checkpoint, type(pipe), order.settings, SearchSettings(**order.search or {}), False)
        if plan.verifier not in self._verifiers:
            self._verifiers[plan.verifier] = plan.load_verifier(str(self._catalogue.device))
        verifier = self._verifiers[plan.verifier]
        if order.details:
            verifier = Watched(verifier, lambda png, score: report(Event(partial=png, score=score), None))
        limits: dict[str, Any] = {"budget": plan.budget, "sampler": plan.sampler, "preview": plan.preview}
        yield from search_images(pipe, verifier, plan.policy, prompts, seeds, **limits, **common)

    def _edited(self, pipe: Any, order: Order, common: dict[str, Any]) -> Iterator[GeneratedImage]:
        """The picture of one order that begins with an uploaded one."""
        begins = "image" if order.mask is None else "mask_image"
        kind: Any = pipeline_class(self._catalogue.models[order.model], order.method, begins)
        other = kind.from_pipe(pipe)
        set_checkpoint(other, self._catalogue.models[order.model])
        given: dict[str, Any] = {"image": _opened(order.image, "image"), "strength": order.strength}
        if order.mask is not None:
            given["mask_image"] = _opened(order.mask, "mask")
        yield from generate_images(other, [order.prompt], [order.seed], beginning=given, **common)

    def _drawn(self, pipe: Any, order: Order, picture: GeneratedImage) -> Drawn:
        record = {
            "model": order.model,
            "method": order.method,
            "prompt": order.prompt,
            "seed": order.seed,
            "size": f"{picture.image.width}x{picture.image.height}",
            "settings": order.settings | (order.search or {}),
            "loss": picture.loss,
            "stats": picture.record,
            "versions": self._versions,
        }
        details: dict[str, Any] = {}
        if order.details and picture.search is not None:
            details["search"] = picture.search
        if order.details and picture.steps:
            from fastgen.evaluation.chunk_maps import chunk_sheet

            details["map"] = encode_png(chunk_sheet(pipe.vae, picture.steps, picture.image, picture.sample), {})
        return Drawn(encode_png(picture.image, {}), record, details)


def _opened(data: bytes | None, label: str) -> Image.Image:
    """An uploaded picture, within the limits that evaluation has for files."""
    from fastgen.evaluation.images import decode_image

    picture = Image.fromarray(decode_image(data or b"", label, upright=True))
    return picture.convert("L") if label == "mask" else picture
