"""What a model's files contradict is refused before any weight is read."""

from __future__ import annotations

import json
import re
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_unets

from fastgen.cli.main import run
from fastgen.errors import FastgenError
from fastgen.pipelines.loading import load_pipeline, loader
from fastgen.pipelines.loading.checkpoint import embedded_folder, find_checkpoint
from fastgen.pipelines.settings import check_classes


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where weights are read."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(loader, "load_network", fail)
    monkeypatch.setattr(loader, "_load_tokens", fail)


@pytest.fixture
def z(micro_z: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(micro_z, tmp_path / "z"))


@pytest.fixture
def janus(tmp_path: Path) -> Path:
    return Path(shutil.copytree(embedded_folder("tiny-janus"), tmp_path / "janus"))


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **values}), encoding="utf-8")


def header(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    entries = json.loads(data[8 : 8 + length])
    change(entries)
    encoded = json.dumps(entries).encode()
    file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data[8 + length :])


def rename(entries: dict[str, Any]) -> None:
    name = max(entries, key=lambda name: entries[name].get("data_offsets", [0, 0])[1])
    entries[f"{name}.other"] = entries.pop(name)


def turn(entries: dict[str, Any]) -> None:
    wide = next(name for name, entry in entries.items() if len(set(entry.get("shape", []))) > 1)
    entries[wide]["shape"] = entries[wide]["shape"][::-1]


WEIGHTS = {
    "transformer": "transformer/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_hidden_layers", True), ("hidden_size", "64"), ("rms_norm_eps", []), ("layer_types", 5)],
)
def test_a_configuration_of_transformers_names_the_wrong_value(z: Path, unread: None, key: str, value: Any) -> None:
    edit(z / "text_encoder" / "config.json", **{key: value})
    with pytest.raises(FastgenError, match=f"text_encoder cannot be loaded: .*'{key}'"):
        load_pipeline(str(z))


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_attention_heads", "hidden_size"])
def test_a_negative_number_in_a_configuration_of_transformers_is_refused(z: Path, unread: None, key: str) -> None:
    edit(z / "text_encoder" / "config.json", **{key: -2})
    with pytest.raises(FastgenError, match="text_encoder"):
        load_pipeline(str(z))


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("part", WEIGHTS)
@pytest.mark.parametrize(
    ("change", "message"), [(rename, "it lacks 1 weights, e.g. "), (turn, "it has 1 weights of a wrong shape, e.g. ")]
)
def test_headers_are_compared_with_the_network(
    z: Path, part: str, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    header(z / WEIGHTS[part], change)
    with pytest.raises(FastgenError, match=f"does not fit its configuration: {message}") as caught:
        load_pipeline(str(z))
    assert part in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("transformer/config.json", {"n_layers": 0}),
        ("transformer/config.json", {"n_layers": 4000}),
        ("transformer/config.json", {"n_layers": True}),
        ("transformer/config.json", {"dim": 2**19}),
        ("vae/config.json", {"layers_per_block": 4000}),
        ("vae/config.json", {"latent_channels": 2**19}),
        ("vae/config.json", {"block_out_channels": [2**19, 2**19]}),
        ("text_encoder/config.json", {"num_hidden_layers": 0}),
        ("text_encoder/config.json", {"num_hidden_layers": 4000}),
        ("text_encoder/config.json", {"hidden_size": 2**19, "vocab_size": 2**19}),
        ("scheduler/scheduler_config.json", {"shift": [3.0]}),
    ],
)
def test_a_configuration_that_the_weights_do_not_fit_is_refused_in_seconds(
    z: Path, file: str, values: dict[str, Any]
) -> None:
    edit(z / file, **values)
    begin = time.monotonic()
    with pytest.raises(FastgenError) as caught:
        load_pipeline(str(z))
    assert "\n" not in str(caught.value) and time.monotonic() - begin < 60


@pytest.mark.usefixtures("unread")
def test_layers_that_the_configuration_leaves_out_are_weights_without_use(z: Path) -> None:
    edit(z / "transformer/config.json", n_layers=0)
    with pytest.raises(FastgenError, match=r"has \d+ weights without use, e\.g\. 'layers\..*% of all"):
        load_pipeline(str(z))


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("drafter/config.json", {"vocab_size": 100}),
        ("drafter/config.json", {"hidden_size": 64}),
        ("drafter/config.json", {"target_layers": 99}),
        ("drafter/heads/config.json", {"vocab_size": 100}),
        ("drafter/config.json", {"_class_name": "Other"}),
    ],
)
def test_a_drafter_of_another_model_is_refused(janus: Path, file: str, values: dict[str, Any]) -> None:
    edit(janus / file, **values)
    with pytest.raises(FastgenError, match=r"drafter|heads"):
        load_pipeline(str(janus), method="speculative")


@pytest.mark.usefixtures("unread")
def test_a_drafter_in_the_place_of_the_heads_is_refused(janus: Path) -> None:
    for file in ("config.json", "diffusion_pytorch_model.safetensors"):
        shutil.copy(janus / "drafter" / file, janus / "drafter/heads" / file)
    with pytest.raises(FastgenError, match="heads"):
        load_pipeline(str(janus), method="speculative")


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("part", ["vision_config", "vq_config", "text_config"])
@pytest.mark.parametrize("value", [None, "x", [1]])
def test_a_part_of_a_configuration_that_is_no_object_is_one_line(janus: Path, part: str, value: Any) -> None:
    edit(janus / "config.json", **{part: value})
    for method in (None, "speculative"):
        with pytest.raises(FastgenError) as caught:
            load_pipeline(str(janus), method=method)
        assert "\n" not in str(caught.value)
    assert run(["generate", "a red circle", "--model", str(janus), "--method", "speculative"]) == 2


@pytest.mark.usefixtures("unread")
def test_the_whole_drafter_of_another_model_is_refused(micro_janus: Path) -> None:
    drafter = str(embedded_folder("tiny-janus") / "drafter")
    with pytest.raises(FastgenError, match="drafter: made for a model of hidden_size"):
        load_pipeline(str(micro_janus), method="speculative", drafter=drafter)


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("budget", [0, 1, 127, 257, 10**9])
def test_a_token_budget_outside_of_the_patch_grid_is_refused(tmp_path: Path, budget: int) -> None:
    shutil.copytree(embedded_folder("tiny"), tmp_path / "tiny")
    folder = Path(shutil.copytree(embedded_folder("small-dc"), tmp_path / "dc"))
    edit(folder / "transformer/config.json", floor=0.5)  # 128 x 128 pixels: 256 patches
    others = {"tail_drop": None, "uncond_tail_drop": None}
    edit(folder / "fastgen.json", base="../tiny", token_budget=budget, **others)
    with pytest.raises(FastgenError, match="token_budget: .* is not allowed"):
        load_pipeline(str(folder))


def test_prompts_that_are_no_classes_are_refused_before_weights_load(tmp_path: Path) -> None:
    tiny_unets.tiny_dit(tiny_unets.ddim()).save_pretrained(tmp_path)
    edit(tmp_path / "model_index.json", id2label={"207": "golden retriever", "1": "fish, goldfish"})
    checkpoint = find_checkpoint(tmp_path)
    for weights in tmp_path.rglob("*.safetensors"):
        weights.unlink()
    check_classes(checkpoint, ["goldfish", "fish", "golden retriever", "3"])
    for prompt in ("a red circle", "-1", "99999999", "1.0"):
        with pytest.raises(FastgenError, match="prompt: the model has no class"):
            check_classes(checkpoint, ["1", prompt])
    edit(tmp_path / "model_index.json", id2label={"x": 5})
    with pytest.raises(FastgenError, match="id2label"):
        check_classes(checkpoint, ["1"])
    check_classes(find_checkpoint("tiny"), ["any text"])


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("argument", ["model", "device", "dtype", "method", "drafter", "variant"])
@pytest.mark.parametrize("value", [5, 5.0, b"tiny", [], {}, object(), True, "a\0b", ""])
def test_wrong_arguments_are_named(argument: str, value: Any) -> None:
    given: dict[str, Any] = {"model": "tiny-janus", "method": "speculative", argument: value}
    with pytest.raises((FastgenError, TypeError), match=argument):
        load_pipeline(**given)


def test_json_from_outside_goes_through_the_bounded_reader(repository: Path) -> None:
    """`json.loads` is for what this process wrote itself: `json.dumps` on the same line, or a file of its child."""
    own = re.compile(r"json\.loads\((json\.dumps\(|out\.read_text|measured\.read_text)")
    found = [
        f"{path.relative_to(repository)}:{number}: {line.strip()}"
        for folder in ("fastgen", "drafters", "evaluation", "kernels", "pipelines")
        for path in sorted((repository / folder).rglob("*.py"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(r"json\.loads?\(|from json import|JSONDecoder|\byaml\.", line) and not own.search(line)
    ]
    assert [line for line in found if not line.startswith("fastgen/io.py")] == []
