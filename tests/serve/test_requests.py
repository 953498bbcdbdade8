"""Requests: what OpenAI's client sends and reads, what comes back, and what is refused."""

from __future__ import annotations

import serve_libraries  # noqa: F401  # isort: skip

import io
import json
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from running_server import Running, alone, ask, pixels

from fastgen.pipelines.schema import SCHEMA


def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_the_openai_client_draws_the_picture_of_the_seed(server: Running) -> None:
    model = next(iter(server.catalogue.models))
    more = {"seed": 7, "steps": 3, "batch_invariant": True}
    answer = client(server).images.generate(model=model, prompt="a red circle", n=2, extra_body=more)
    assert answer.data is not None and len(answer.data) == 2
    for i, picture in enumerate(answer.data):
        np.testing.assert_array_equal(pixels(picture.b64_json), alone(model, "a red circle", 7 + i, steps=3))


def test_the_openai_client_lists_models_and_finds_one(server: Running) -> None:
    listed = [model.id for model in client(server).models.list()]
    assert listed == list(server.catalogue.models)
    assert client(server).models.retrieve(listed[1]).id == listed[1]
    with pytest.raises(openai.NotFoundError):
        client(server).models.retrieve("other")


def test_a_url_is_fetched_in_the_requested_format(server: Running) -> None:
    answer = client(server).images.generate(
        prompt="a star", response_format="url", output_format="webp", extra_body={"steps": 1, "seed": 0}
    )
    assert answer.data is not None and answer.data[0].url is not None
    fetched = httpx.get(answer.data[0].url)
    assert fetched.headers["content-type"] == "image/webp"
    assert Image.open(io.BytesIO(fetched.content)).format == "WEBP"
    assert httpx.get(answer.data[0].url + "x").status_code == 404


def test_the_openai_client_streams_partial_pictures_that_come_closer(server: Running) -> None:
    events = list(
        client(server).images.generate(
            prompt="a star", stream=True, partial_images=3, extra_body={"seed": 1, "steps": 8, "batch_invariant": True}
        )
    )
    assert [event.type for event in events] == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:3]] == [0, 1, 2]
    last = pixels(events[3].b64_json).astype(float)
    far = [np.abs(pixels(event.b64_json) - last).mean() for event in events[:3]]
    assert far[0] > far[2]
    np.testing.assert_array_equal(last, alone(next(iter(server.catalogue.models)), "a star", 1, steps=8))


def test_the_openai_client_edits_an_uploaded_picture(server: Running) -> None:
    source = Image.new("RGB", (32, 32), "red")
    buffer = io.BytesIO()
    source.save(buffer, "PNG")
    more = {"strength": 0.5, "seed": 3, "steps": 4, "height": 32, "width": 32}
    found = [
        client(server).images.edit(image=("a.png", buffer.getvalue()), prompt="a star", extra_body={**more, **other})
        for other in ({}, {}, {"strength": 1.0})
    ]
    first, again, strong = (pixels(answer.data[0].b64_json) for answer in found if answer.data)
    assert first.shape == (32, 32, 3)
    np.testing.assert_array_equal(first, again)
    assert (first != strong).any()


@pytest.mark.parametrize("which", [1, 2])
def test_models_that_draw_tokens_or_chunks_are_served_too(server: Running, which: int) -> None:
    model = list(server.catalogue.models)[which]
    answer = ask(server.url, model=model, prompt="a star", seed=0, details=True).json()
    record = answer["data"][0]["fastgen"]
    assert record["method"] == {1: "speculative", 2: "dc"}[which] and record["seed"] == 0
    assert ("map" in record.get("details", {})) == (which == 2)
    base = ask(server.url, model=model, prompt="a star", seed=0, method="base")
    assert base.status_code == (200 if which == 1 else 400)


BAD: list[tuple[dict[str, Any], str | None]] = [
    ({}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": "  "}, "prompt"),
    ({"prompt": 3}, "prompt"),
    ({"prompt": "a\u0000b"}, "prompt"),
    ({"prompt": "x" * 201}, "prompt"),
    ({"prompt": "x", "n": 0}, "n"),
    ({"prompt": "x", "n": 5}, "n"),
    ({"prompt": "x", "n": True}, "n"),
    ({"prompt": "x", "size": "big"}, "size"),
    ({"prompt": "x", "size": "4096x64"}, "size"),
    ({"prompt": "x", "size": "33x32"}, "width"),
    ({"prompt": "x", "size": "32x32", "height": 64}, "size"),
    ({"prompt": "x", "width": 100000}, "width"),
    ({"prompt": "x", "steps": 0}, "steps"),
    ({"prompt": "x", "steps": 41}, "steps"),
    ({"prompt": "x", "steps": "3"}, "steps"),
    ({"prompt": "x", "seed": -1}, "seed"),
    ({"prompt": "x", "model": "other"}, "model"),
    ({"prompt": "x", "model": "../../etc"}, "model"),
    ({"prompt": "x", "method": "speculative"}, "method"),
    ({"prompt": "x", "method": "magic"}, "method"),
    ({"prompt": "x", "tail_drop": 0.3}, "tail_drop"),
    ({"prompt": "x", "max_nfe": 4}, "max_nfe"),
    ({"prompt": "x", "method": "search", "max_nfe": 201}, "max_nfe"),
    ({"prompt": "x", "method": "search", "verifier": "clip:/etc"}, "verifier"),
    ({"prompt": "x", "method": "search", "max_nfe": 40}, "verifier"),
    ({"prompt": "x", "partial_images": 2}, "partial_images"),
    ({"prompt": "x", "response_format": "file"}, "response_format"),
    ({"prompt": "x", "image": "http://127.0.0.1/"}, "image"),
    ({"prompt": "x", "unknown": 1}, "unknown"),
]


@pytest.mark.parametrize(("body", "field"), BAD, ids=[json.dumps(body)[:60] for body, _ in BAD])
def test_a_wrong_field_is_named_in_an_error_object(server: Running, body: dict[str, Any], field: str | None) -> None:
    answer = httpx.post(f"{server.url}/v1/images/generations", json=body)
    assert answer.status_code in (400, 404)
    error = answer.json()["error"]
    assert error["param"] == field and error["type"] == "invalid_request_error"
    assert "\n" not in error["message"] and "Traceback" not in error["message"]


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"null", b'{"prompt": NaN}', b"\xff", b'{"prompt":"\\ud800"}'])
def test_a_body_that_is_no_request_is_refused(server: Running, raw: bytes) -> None:
    answer = httpx.post(
        f"{server.url}/v1/images/generations", content=raw, headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400 and set(answer.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"image": b"no picture"},
        {"image": ("a.svg", b"<svg/>")},
        {"image": b"", "mask": b""},
        {"other": b"x"},
    ],
    ids=lambda files: ",".join(files) or "none",
)
@pytest.mark.parametrize("stream", ["false", "true"])
def test_an_upload_that_is_no_picture_is_refused(server: Running, files: dict[str, Any], stream: str) -> None:
    data = {"prompt": "a star", "steps": "2", "stream": stream}
    answer = httpx.post(f"{server.url}/v1/images/edits", data=data, files=files or None)
    assert answer.status_code == 400 and answer.json()["error"]["param"] in ("image", "mask", "other")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NAMES = [*SCHEMA, "n", "size", "seed", "model", "method", "stream", "output_format", "quality", "batch_invariant"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.dictionaries(st.sampled_from(NAMES), json_values, min_size=1, max_size=3))
def test_for_any_fields_the_answer_is_a_picture_or_names_a_field(server: Running, body: dict) -> None:
    answer = ask(server.url, **{"prompt": "x", "steps": 1, **body})
    assert answer.status_code in (200, 400, 404), answer.text
    if answer.status_code != 200:
        assert answer.json()["error"]["param"] is not None
