"""The caption grammar and the held-out evaluation prompts."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter

import pytest

from fastgen.data.captions import (
    HELD_OUT_PAIRS,
    PROMPTS_PER_TASK,
    TASKS,
    Caption,
    evaluation_captions,
    evaluation_prompts,
    sample_training_caption,
    vocabulary,
)
from fastgen.data.scenes import COLORS, RELATIONS, SHAPES


@pytest.fixture(scope="module")
def training() -> list[Caption]:
    rng = random.Random(123)
    return [sample_training_caption(rng) for _ in range(60_000)]


def test_evaluation_set_is_fixed() -> None:
    """The prompts are part of every published score: any change must be deliberate."""
    digest = hashlib.sha256(json.dumps(evaluation_prompts()).encode()).hexdigest()
    assert digest == "cc1683ec2f1949f194e00470f365593fd30dd3e277833ff757626254cfe4d3f7"


def test_evaluation_set_has_sixty_distinct_prompts_a_task() -> None:
    prompts = evaluation_prompts()
    assert [item["tag"] for item in prompts] == [tag for tag in TASKS for _ in range(PROMPTS_PER_TASK)]
    assert len({item["prompt"] for item in prompts}) == len(prompts) == 360


def test_metadata_follows_the_geneval_schema() -> None:
    for item in evaluation_prompts():
        keys = ["tag", "include", "exclude", "prompt"] if item["tag"] == "counting" else ["tag", "include", "prompt"]
        assert list(item) == keys
        assert all(clause["class"] in SHAPES and clause["count"] >= 1 for clause in item["include"])
        if item["tag"] == "counting":
            assert item["exclude"][0]["count"] == item["include"][0]["count"] + 1
        colored = [clause for clause in item["include"] if "color" in clause]
        assert len(colored) == {"colors": 1, "color_attr": 2}.get(item["tag"], 0)
        positions = [clause["position"] for clause in item["include"] if "position" in clause]
        assert len(positions) == (item["tag"] == "position")
        assert all(relation in RELATIONS and index == 0 for relation, index in positions)


def test_prompt_words_match_their_metadata() -> None:
    """An independent reading of the prompt text finds the objects, in the order the schema gives them."""
    for item in evaluation_prompts():
        words = item["prompt"].replace("crosses", "cross").split()
        named = [w if w in SHAPES else w[:-1] for w in words if w in SHAPES or w.rstrip("s") in SHAPES]
        classes = [clause["class"] for clause in item["include"]]
        assert named == (classes[::-1] if item["tag"] == "position" else classes)
        assert [w for w in words if w in COLORS] == [c["color"] for c in item["include"] if "color" in c]


def test_evaluation_is_balanced() -> None:
    captions = evaluation_captions()
    counts = Counter(len(c.spec.objects) for c in captions if c.tag == "counting")
    assert set(counts) == {2, 3, 4, 5} and max(counts.values()) == min(counts.values())
    relations = Counter(c.spec.relation for c in captions if c.tag == "position")
    assert relations == {relation: 15 for relation in RELATIONS}
    shapes = Counter(c.spec.objects[0].shape for c in captions if c.tag == "single_object")
    assert max(shapes.values()) - min(shapes.values()) <= 1


def test_held_out_pairs_cover_each_colour_and_shape_once() -> None:
    assert Counter(color for color, _ in HELD_OUT_PAIRS) == dict.fromkeys(COLORS, 1)
    assert Counter(shape for _, shape in HELD_OUT_PAIRS) == dict.fromkeys(SHAPES, 1)


def test_training_never_sees_an_evaluation_prompt_or_combination(training: list[Caption]) -> None:
    texts = {caption.text for caption in training}
    assert texts.isdisjoint(item["prompt"] for item in evaluation_prompts())
    for caption in training:
        assert not any((item.color, item.shape) in HELD_OUT_PAIRS for item in caption.spec.objects)
    evaluated = evaluation_captions()

    def combinations(captions: list[Caption] | tuple[Caption, ...], tag: str) -> set[tuple[str | None, ...]]:
        return {(c.spec.objects[0].shape, c.spec.relation, c.spec.objects[1].shape) for c in captions if c.tag == tag}

    for tag in ("position", "two_object"):
        assert combinations(training, tag).isdisjoint(combinations(evaluated, tag))


def test_whole_grammar_reaches_what_training_holds_out() -> None:
    """The test above can fail: without the hold-out the same sampler does produce evaluation prompts."""
    rng = random.Random(5)
    texts = {sample_training_caption(rng, held_out=False).text for _ in range(20_000)}
    assert len(texts & {item["prompt"] for item in evaluation_prompts()}) > 50


def test_training_covers_every_task_shape_colour_and_word(training: list[Caption]) -> None:
    assert {caption.tag for caption in training} == set(TASKS)
    words = {word for caption in training for word in caption.text.split()}
    assert words == set(vocabulary())
    assert all(set(item["prompt"].split()) <= words for item in evaluation_prompts())


@pytest.mark.parametrize("text", ["three red circles", "a red circle left of a blue square", "a photo of two crosses"])
def test_readme_prompts_are_in_the_grammar(training: list[Caption], text: str) -> None:
    """The prompts that the README shows are of the kinds the models were trained on (all words known)."""
    assert set(text.split()) <= set(vocabulary())


def test_captions_without_crossed_pairs_never_name_a_held_out_pair_of_two_objects() -> None:
    """Neither together nor crosswise; with them, about a quarter of the captions with two coloured objects do."""
    shares = []
    for crossed in (True, False):
        rng = random.Random(4)
        captions = [sample_training_caption(rng, crossed=crossed) for _ in range(20_000)]
        pairs = [c.spec.objects for c in captions if len(c.spec.objects) == 2 and None not in
                 {c.spec.objects[0].color, c.spec.objects[1].color} and c.tag != "counting"]  # fmt: skip
        assert len(pairs) > 3_000
        named = [any((x.color, y.shape) in HELD_OUT_PAIRS for x in pair for y in pair) for pair in pairs]
        shares.append(sum(named) / len(named))
    assert 0.15 < shares[0] < 0.35 and shares[1] == 0
