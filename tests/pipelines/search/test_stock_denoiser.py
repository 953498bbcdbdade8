"""A search of any diffusers pipeline through its own call: one evaluation at a time gives the stock picture."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from long_tail import long_tail
from stock_families import FAMILIES, family
from stock_table import PROMPTS, SEEDS, drawn, made, stock
from tiny_newer import tiny_hunyuan_image
from tiny_unets import ddim, tiny_sd

from fastgen import NoiseSearchPipeline
from fastgen.pipelines.search.denoisers.base import Settings
from fastgen.pipelines.search.denoisers.entry import Entry
from fastgen.pipelines.search.denoisers.stock import StockDenoiser
from fastgen.pipelines.search.names import named_policy
from fastgen.pipelines.search.previews import preview_of

STEPS = 4


def brightness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return images.float().mean(dim=(1, 2, 3))


def test_the_global_random_state_is_left_alone() -> None:
    pipe = family("sd3-controlnet")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    drawn(made(pipe, PROMPTS[:1], FAMILIES["sd3-controlnet"][1]), [3])
    assert torch.equal(torch.get_rng_state(), before)


def test_candidates_of_one_prompt_share_a_forward_pass() -> None:
    pipe, call = family("chroma"), FAMILIES["chroma"][1]
    rows: list[int] = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    try:
        denoiser = made(pipe, PROMPTS, call)
        latents = torch.cat([denoiser.begin(torch.Generator().manual_seed(seed), 0) for seed in range(3)])
        rows.clear()
        time = torch.full((3,), denoiser.times[2], dtype=torch.float64)
        together = denoiser.predict(latents, time, torch.tensor([0, 1, 0]))
        assert sorted(rows) == [1, 1, 2, 2]  # guidance calls the model twice
    finally:
        hook.remove()
    for row, prompt in enumerate((0, 1, 0)):
        alone = denoiser.predict(latents[row : row + 1], time[:1], torch.tensor([prompt]))
        torch.testing.assert_close(together.clean[row : row + 1], alone.clean, atol=1e-5, rtol=1e-5)


def test_texts_are_encoded_once() -> None:
    pipe, call = family("lumina2"), FAMILIES["lumina2"][1]
    calls = []
    hook = pipe.text_encoder.register_forward_hook(lambda *args: calls.append(1))
    try:
        denoiser = made(pipe, PROMPTS[:1], call)
        first = len(calls)
        latents = denoiser.begin(torch.Generator().manual_seed(0), 0)
        for time in denoiser.times:
            denoiser.predict(latents, torch.tensor([time], dtype=torch.float64), torch.tensor([0]))
        assert len(calls) == first > 0
    finally:
        hook.remove()


@pytest.mark.parametrize("name", ["z-image", "sd3", "stable-diffusion-controlnet", "qwen-image-controlnet", "flux"])
def test_steps_before_the_wanted_one_cost_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop is at the wanted place of the schedule, and no other step is gone through for it."""
    denoiser = made(family(name), PROMPTS[:1], FAMILIES[name][1])
    latents = denoiser.begin(torch.Generator().manual_seed(0), 0)
    steps: list[float] = []
    original = Entry._stepped

    def spy(entry: Entry, probe: Any, output: Any, timestep: Any, *args: Any) -> Any:
        steps.append(float(timestep))
        return original(entry, probe, output, timestep, *args)

    monkeypatch.setattr(Entry, "_stepped", spy)
    for time, wanted in zip(denoiser.times, denoiser.entries[0].timesteps.tolist(), strict=True):
        steps.clear()
        denoiser.predict(latents, torch.tensor([time], dtype=torch.float64), torch.tensor([0]))
        assert steps == pytest.approx([wanted], rel=1e-5)


POLICIES = ["threshold", "rbf", "svdd", "code", "smc", "best-of-n", "random", "zero-order"]
SEARCHED = ["lumina2", "pixart-sigma", "stable-diffusion-inpaint"]
SPREAD = [(SEARCHED[place % len(SEARCHED)], policy) for place, policy in enumerate(POLICIES)]


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        pytest.param(name, policy, marks=() if (name, policy) in SPREAD else pytest.mark.slow)
        for name in SEARCHED
        for policy in POLICIES
    ],
)
def test_policies_search_pipelines_without_an_adapter(name: str, policy: str) -> None:
    pipe, call = family(name), FAMILIES[name][1]
    options = {"tau": 0.4} if policy == "threshold" else {}
    search = NoiseSearchPipeline(pipe, brightness, named_policy(policy, **options) if options else policy)
    found = search(
        PROMPTS[0],
        num_inference_steps=2,
        max_nfe=200,
        generator=torch.Generator().manual_seed(1),
        pipeline_kwargs=call,
    )
    assert len(found.images) == 1 and found.reports[0].nfe <= 200


def test_one_candidate_is_the_stock_picture() -> None:
    pipe, call = family("sdxl-inpaint"), FAMILIES["sdxl-inpaint"][1]
    nfe = 2 * len(made(pipe, PROMPTS[:1], call).times)
    search = NoiseSearchPipeline(pipe, brightness, "best-of-n")
    generator = torch.Generator().manual_seed(SEEDS[0])
    found = search(
        PROMPTS[0], num_inference_steps=STEPS, max_nfe=nfe, generator=generator, output_type="pt", pipeline_kwargs=call
    )
    theirs = stock(pipe, PROMPTS[0], SEEDS[0], call)
    assert float((found.images[0] - theirs).abs().max()) <= 1.01 / 255  # pictures are bytes


def attributes(pipe: Any) -> dict[tuple[str, str], int]:
    """Every attribute of the pipeline and of its parts, by identity."""
    owners = {"": pipe, **{name: part for name, part in pipe.components.items() if hasattr(part, "__dict__")}}
    found = {(name, key): id(value) for name, owner in owners.items() for key, value in vars(owner).items()}
    return found | {(name, "class"): id(type(owner)) for name, owner in owners.items()}


def after_search(name: str, error: type[BaseException] | None, threaded: bool) -> None:
    """Every attribute is the same object after a search."""
    pipe, call = family(name), FAMILIES[name][1]
    stock(pipe, PROMPTS[0], 0, call)  # libraries install hooks of their own at the first call
    for part, side in (("tokenizer", "left"), ("tokenizer_2", "left")):
        if hasattr(getattr(pipe, part, None), "padding_side"):  # Sana sets it
            getattr(pipe, part).padding_side = side
    before = attributes(pipe)
    raised: list[BaseException] = []

    def verifier(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        if error is not None:
            raise error
        return brightness(images, prompts)

    def work() -> None:
        try:
            search = NoiseSearchPipeline(pipe, verifier, "best-of-n")
            search(PROMPTS[0], num_inference_steps=2, max_nfe=16, pipeline_kwargs=call)
        except BaseException as caught:
            raised.append(caught)

    if threaded:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    else:
        work()
    assert bool(raised) == (error is not None)
    assert attributes(pipe) == before


WAYS = [
    (name, error, threaded)
    for name in ("hunyuan-image", "sdxl-inpaint", "ernie-image")
    for error in (None, RuntimeError, KeyboardInterrupt)
    for threaded in (False, True)
]


@pytest.mark.parametrize(
    ("name", "error", "threaded"),
    long_tail(WAYS, fast=[*WAYS[:6], ("sdxl-inpaint", RuntimeError, False), ("ernie-image", None, True)], unpack=True),
)
def test_every_attribute_of_the_pipeline_is_as_before(
    name: str, error: type[BaseException] | None, threaded: bool
) -> None:
    after_search(name, error, threaded)


@pytest.mark.parametrize("name", [n if n == "sana" else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES])
def test_every_attribute_of_every_family_is_as_before(name: str) -> None:
    after_search(name, KeyboardInterrupt if len(name) % 2 else None, False)


def test_momentum_of_guidance_is_left_out_and_named() -> None:
    pipe, call = tiny_hunyuan_image(momentum=-0.5), FAMILIES["hunyuan-image"][1]
    search = NoiseSearchPipeline(pipe, brightness, "best-of-n")
    found = search(PROMPTS[0], num_inference_steps=2, max_nfe=8, pipeline_kwargs=call)
    assert "AdaptiveProjectedMixGuidance without momentum" in found.stats.paths["guider"]
    assert pipe.guider.adaptive_projected_guidance_momentum == -0.5


def test_searches_in_threads_do_not_meet() -> None:
    """Two pipelines on one set of weights."""
    pipe, call = family("lumina2"), FAMILIES["lumina2"][1]
    other = type(pipe)(**{**pipe.components, "scheduler": type(pipe.scheduler).from_config(pipe.scheduler.config)})
    other.set_progress_bar_config(disable=True)
    alone = [drawn(made(each, [prompt], call), [7]) for each, prompt in zip((pipe, other), PROMPTS, strict=True)]
    found: dict[int, torch.Tensor] = {}

    def work(place: int, each: Any, prompt: str) -> None:
        found[place] = drawn(made(each, [prompt], call), [7])

    threads = [
        threading.Thread(target=work, args=(place, each, prompt))
        for place, (each, prompt) in enumerate(zip((pipe, other), PROMPTS, strict=True))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place in (0, 1):
        torch.testing.assert_close(found[place], alone[place], atol=1e-5, rtol=0)  # rounding moves in threads


@pytest.mark.parametrize("argument", ["no_such", "latents", "generator", "num_images_per_prompt", "output_type"])
def test_arguments_that_a_search_does_not_take(argument: str) -> None:
    with pytest.raises(ValueError, match=f"^{argument}: a search of ChromaPipeline does not take it"):
        made(family("chroma"), PROMPTS, {argument: 1})


def test_cheap_previews_need_latents_that_are_an_image() -> None:
    packed = made(family("flux2-klein"), PROMPTS[:1], FAMILIES["flux2-klein"][1])
    for option in ("pooled", lambda latents: latents):
        with pytest.raises(ValueError, match="^preview: latents of Flux2KleinPipeline are tokens"):
            preview_of(option, packed)
    assert preview_of("full", packed) is None
    for name in ("chroma", "lumina2"):
        assert preview_of("pooled", made(family(name), PROMPTS[:1], FAMILIES[name][1])) is not None


def test_what_cannot_be_searched_says_what_was_not_found() -> None:
    class NoStep(StableDiffusionPipeline):
        def __call__(self, prompt: str, num_inference_steps: int = 4, generator: Any = None) -> Any:
            return self.vae.decode(torch.zeros(1, 4, 8, 8))

    class OtherStart(StableDiffusionPipeline):
        def __call__(self, prompt: str, num_inference_steps: int = 4, generator: Any = None) -> Any:
            self.scheduler.set_timesteps(num_inference_steps)
            latents = self.prepare_latents(1, 4, 32, 32, torch.float32, "cpu", generator)
            return self.scheduler.step(latents, self.scheduler.timesteps[0], latents + 1)

    class NoNoise:
        scheduler = ddim()

    pipe = tiny_sd(ddim())
    for kind, missing in ((NoStep, "its step"), (OtherStart, "its start noise")):
        pipe.__class__ = kind
        with pytest.raises(ValueError, match=f"^pipe: {kind.__name__} cannot be searched: {missing} was not found"):
            StockDenoiser(pipe, PROMPTS, Settings(2))
    with pytest.raises(ValueError, match="^pipe: NoNoise cannot be searched: its start noise was not found"):
        NoiseSearchPipeline(NoNoise(), brightness)
