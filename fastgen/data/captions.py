"""Captions of ShapesWorld: a small grammar with paraphrases in the six GenEval tasks, and the held-out prompts.

A caption is `frame(content)`: the frame paraphrases "a photo of …", the content names objects. Held out of every
training caption are: eight colour x shape pairs, sixty (shape, relation, shape) triples, fourteen ordered shape
pairs, and for the tasks with too few contents to spare any (single object, counting) single frame x content
combinations. The evaluation prompts are drawn from what is held out, so no evaluation prompt and none of its
combinations is ever a training caption.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from fastgen.data.scenes import COLORS, RELATIONS, SHAPES, ObjectSpec, SceneSpec

TASKS: tuple[str, ...] = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
"""The six task tags in GenEval's order."""

PROMPTS_PER_TASK = 60

FRAMES: tuple[str, ...] = (
    "a photo of {}",
    "an image of {}",
    "a picture of {}",
    "{}",
    "a drawing of {}",
    "a painting of {}",
    "an illustration of {}",
    "a rendering of {}",
    "a view of {}",
    "a sketch of {}",
    "a scene with {}",
    "an image showing {}",
    "a picture showing {}",
    "a photo showing {}",
    "a small picture of {}",
    "a simple image of {}",
)
COUNT_WORDS: dict[int, str] = {2: "two", 3: "three", 4: "four", 5: "five"}
_JOINERS: tuple[str, ...] = ("{} and {}", "{} with {}", "{} next to {}", "{} together with {}")
_RELATION_PHRASES: dict[str, tuple[str, ...]] = {
    "left of": ("{} left of {}", "{} to the left of {}"),
    "right of": ("{} right of {}", "{} to the right of {}"),
    "above": ("{} above {}", "{} over {}"),
    "below": ("{} below {}", "{} under {}"),
}

# One held-out colour per shape and one held-out shape per colour: 3 is coprime to 8, so this is a permutation.
HELD_OUT_PAIRS: frozenset[tuple[str, str]] = frozenset(
    (COLORS[(3 * index + 1) % len(COLORS)], shape) for index, shape in enumerate(SHAPES)
)

# Share of each kind of caption in training; the tasks that need more than one object get more.
_TRAINING_SHARES: tuple[tuple[str, float], ...] = (
    ("single_object", 0.10),
    ("colors", 0.16),
    ("two_object", 0.12),
    ("counting", 0.20),
    ("position", 0.22),
    ("color_attr", 0.20),
)
_COLORED_COUNTING = 0.4  # share of counting captions that name a colour ("three red circles")
_COLORED_POSITION = 0.4  # share of position captions that name colours


@dataclass(frozen=True, slots=True)
class Caption:
    """A caption with its task tag and its content."""

    text: str
    tag: str
    spec: SceneSpec


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")


def _noun(item: ObjectSpec) -> str:
    return item.shape if item.color is None else f"{item.color} {item.shape}"


def _content(tag: str, spec: SceneSpec, phrase: str = "") -> str:
    """The words that name the objects of `spec`; `phrase` joins two of them."""
    if tag in ("single_object", "colors"):
        return _article(_noun(spec.objects[0]))
    if tag == "counting":
        return f"{COUNT_WORDS[len(spec.objects)]} {_plural(_noun(spec.objects[0]))}"
    return phrase.format(*(_article(_noun(item)) for item in spec.objects))


@dataclass(frozen=True, slots=True)
class _HeldOut:
    prompts: frozenset[str]
    triples: frozenset[tuple[str, str, str]]
    ordered_pairs: frozenset[tuple[str, str]]


def _names_held_out_pair(spec: SceneSpec) -> bool:
    return any((item.color, item.shape) in HELD_OUT_PAIRS for item in spec.objects)


def _crosses_held_out_pair(spec: SceneSpec) -> bool:
    """Whether the colour of one object and the shape of another make a held-out pair."""
    return any((a.color, b.shape) in HELD_OUT_PAIRS for a in spec.objects for b in spec.objects if a is not b)


def sample_training_caption(rng: random.Random, held_out: bool = True, crossed: bool = True) -> Caption:
    """Draw one training caption.

    Args:
        rng: source of randomness.
        held_out: drop what the evaluation prompts hold out; `False` draws from the whole grammar.
        crossed: with `held_out`, keep captions that name the colour and the shape of a held-out pair, but of two
            objects. Where they are kept, these words together always mean two objects, and a model can learn that in
            place of reading which colour stands before which shape.
    """
    banned = _held_out() if held_out else _HeldOut(frozenset(), frozenset(), frozenset())
    tags, shares = zip(*_TRAINING_SHARES, strict=True)
    while True:
        tag = rng.choices(tags, shares)[0]
        spec, phrase = _sample_content(tag, rng)
        caption = Caption(rng.choice(FRAMES).format(_content(tag, spec, phrase)), tag, spec)
        if held_out and (_names_held_out_pair(spec) or caption.text in banned.prompts):
            continue
        if held_out and not crossed and _crosses_held_out_pair(spec):
            continue
        shapes = tuple(item.shape for item in spec.objects)
        if tag == "position" and (shapes[0], spec.relation, shapes[1]) in banned.triples:
            continue
        if tag == "two_object" and shapes in banned.ordered_pairs:
            continue
        return caption


def caption_of(tag: str, spec: SceneSpec, rng: random.Random) -> Caption:
    """A caption of given content, in words drawn at random."""
    phrase = ""
    if spec.relation is not None:
        phrase = rng.choice(_RELATION_PHRASES[spec.relation])
    elif tag in ("two_object", "color_attr"):
        phrase = rng.choice(_JOINERS)
    return Caption(rng.choice(FRAMES).format(_content(tag, spec, phrase)), tag, spec)


def _sample_content(tag: str, rng: random.Random) -> tuple[SceneSpec, str]:
    if tag == "single_object":
        return SceneSpec((ObjectSpec(rng.choice(SHAPES)),)), ""
    if tag == "colors":
        return SceneSpec((ObjectSpec(rng.choice(SHAPES), rng.choice(COLORS)),)), ""
    if tag == "counting":
        color = rng.choice(COLORS) if rng.random() < _COLORED_COUNTING else None
        item = ObjectSpec(rng.choice(SHAPES), color)
        return SceneSpec((item,) * rng.randint(2, 5)), ""
    first, second = rng.sample(SHAPES, 2)
    if tag == "two_object":
        return SceneSpec((ObjectSpec(first), ObjectSpec(second))), rng.choice(_JOINERS)
    if tag == "color_attr":
        color_a, color_b = rng.sample(COLORS, 2)
        return SceneSpec((ObjectSpec(first, color_a), ObjectSpec(second, color_b))), rng.choice(_JOINERS)
    relation = rng.choice(RELATIONS)
    colors: list[str | None] = [None, None]
    if rng.random() < _COLORED_POSITION:
        colors = [*rng.sample(COLORS, 2)]
    spec = SceneSpec((ObjectSpec(first, colors[0]), ObjectSpec(second, colors[1])), relation)
    return spec, rng.choice(_RELATION_PHRASES[relation])


@lru_cache(maxsize=1)
def evaluation_captions() -> tuple[Caption, ...]:
    """The fixed evaluation set: 60 captions a task in the order of `TASKS`, the same on every machine."""
    rng = random.Random(2026)
    captions: list[Caption] = []
    for tag in TASKS:
        captions += _evaluation_task(tag, rng)
    return tuple(captions)


def _evaluation_task(tag: str, rng: random.Random) -> list[Caption]:
    contents = _evaluation_contents(tag, rng)
    frames = list(FRAMES)
    captions: list[Caption] = []
    texts: set[str] = set()
    position = 0
    rng.shuffle(frames)
    while len(captions) < PROMPTS_PER_TASK:
        # Walk the contents round robin and shift the frames by one after each round: balanced in both.
        spec, phrase = contents[position % len(contents)]
        frame = frames[(position + position // len(contents)) % len(frames)]
        text = frame.format(_content(tag, spec, phrase))
        position += 1
        if text not in texts:
            texts.add(text)
            captions.append(Caption(text, tag, spec))
    return captions


def _evaluation_contents(tag: str, rng: random.Random) -> list[tuple[SceneSpec, str]]:
    """The contents of one task's evaluation prompts, shuffled, each with the phrase that joins its objects."""
    items: list[tuple[SceneSpec, str]]
    pairs = sorted(HELD_OUT_PAIRS)
    if tag == "single_object":
        items = [(SceneSpec((ObjectSpec(shape),)), "") for shape in SHAPES]
    elif tag == "colors":
        items = [(SceneSpec((ObjectSpec(shape, color),)), "") for color, shape in pairs]
    elif tag == "counting":
        # Counts alternate, so that any stretch of the list holds each of them equally often: no shuffle.
        shapes = rng.sample(SHAPES, len(SHAPES))
        return [(SceneSpec((ObjectSpec(shape),) * count), "") for shape in shapes for count in COUNT_WORDS]
    elif tag == "two_object":
        # Fourteen ordered pairs; the other order of each stays in training.
        ordered = [(a, b) for i, a in enumerate(SHAPES) for b in SHAPES[i + 1 :]]
        chosen = [pair if rng.random() < 0.5 else pair[::-1] for pair in rng.sample(ordered, 14)]
        items = [(SceneSpec((ObjectSpec(a), ObjectSpec(b))), joiner) for joiner in _JOINERS for a, b in chosen]
    elif tag == "color_attr":
        items = [
            (SceneSpec((ObjectSpec(a[1], a[0]), ObjectSpec(b[1], b[0]))), rng.choice(_JOINERS))
            for a in pairs
            for b in pairs
            if a != b
        ]
    else:
        items = []
        ordered = [(a, b) for a in SHAPES for b in SHAPES if a != b]
        for relation in RELATIONS:
            for a, b in rng.sample(ordered, PROMPTS_PER_TASK // len(RELATIONS)):
                spec = SceneSpec((ObjectSpec(a), ObjectSpec(b)), relation)
                items.append((spec, rng.choice(_RELATION_PHRASES[relation])))
    rng.shuffle(items)
    return items


@lru_cache(maxsize=1)
def _held_out() -> _HeldOut:
    captions = evaluation_captions()
    triples, pairs = set(), set()
    for caption in captions:
        if caption.tag == "position" and caption.spec.relation is not None:
            triples.add((caption.spec.objects[0].shape, caption.spec.relation, caption.spec.objects[1].shape))
        elif caption.tag == "two_object":
            pairs.add((caption.spec.objects[0].shape, caption.spec.objects[1].shape))
    return _HeldOut(frozenset(caption.text for caption in captions), frozenset(triples), frozenset(pairs))


def caption_metadata(caption: Caption) -> dict[str, Any]:
    """`caption` in GenEval's metadata schema: tag, include, [exclude], prompt (evaluation.md section 1)."""
    first = caption.spec.objects[0]
    metadata: dict[str, Any] = {"tag": caption.tag}
    if caption.tag == "counting":
        count = len(caption.spec.objects)
        metadata["include"] = [{"class": first.shape, "count": count}]
        metadata["exclude"] = [{"class": first.shape, "count": count + 1}]
    elif caption.spec.relation is not None:
        second = caption.spec.objects[1]
        metadata["include"] = [
            _clause(second),
            {**_clause(first), "position": [caption.spec.relation, 0]},
        ]
    else:
        metadata["include"] = [_clause(item) for item in caption.spec.objects]
    metadata["prompt"] = caption.text
    return metadata


def _clause(item: ObjectSpec) -> dict[str, Any]:
    clause: dict[str, Any] = {"class": item.shape, "count": 1}
    if item.color is not None:
        clause["color"] = item.color
    return clause


def evaluation_prompts() -> list[dict[str, Any]]:
    """The 360 evaluation prompts as GenEval metadata dictionaries, 60 a task."""
    return [caption_metadata(caption) for caption in evaluation_captions()]


@lru_cache(maxsize=1)
def vocabulary() -> tuple[str, ...]:
    """Every word the grammar can produce, sorted; the word-level tokenizers are built from it."""
    words: set[str] = set()
    for frame in FRAMES:
        words |= set(frame.format("").split())
    for phrase in (*_JOINERS, *(p for phrases in _RELATION_PHRASES.values() for p in phrases)):
        words |= set(phrase.format("", "").split())
    words |= {"a", "an", *SHAPES, *(_plural(shape) for shape in SHAPES), *COLORS, *COUNT_WORDS.values()}
    return tuple(sorted(words))
