"""Finding models and checking their files, before torch is needed."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from generate_command import call

from fastgen.errors import FastgenError
from fastgen.pipelines.loading.checkpoint import EMBEDDED_MODELS, Checkpoint, find_checkpoint


@pytest.fixture
def z(micro_z: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(micro_z, tmp_path / "z"))


@pytest.fixture
def janus(micro_janus: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(micro_janus, tmp_path / "janus"))


def weights_of(folder: Path) -> Path:
    return sorted(folder.rglob("*.safetensors"))[-1]


def test_what_the_configuration_tells(z: Path, janus: Path) -> None:
    found = find_checkpoint(str(z))
    assert (found.kind, found.pipeline_class, found.size_multiple, found.max_size) == (
        "diffusers",
        "ZImagePipeline",
        8,
        128,
    )
    assert found.defaults["steps"] == 2
    found = find_checkpoint(janus)
    assert (found.kind, found.fixed_size) == ("janus", 16)
    found.check_weights()


@pytest.mark.parametrize("name", EMBEDDED_MODELS)
def test_embedded_models_are_whole(name: str) -> None:
    found = find_checkpoint(name)
    found.check_weights()
    found.check_size(64, 64)
    with pytest.raises(FastgenError, match="height: 62"):
        found.check_size(62, 64)
    with pytest.raises(FastgenError, match="width: 65"):
        found.check_size(64, 65)


def derive(folder: Path, base: Path, keep: tuple[str, ...] = ("transformer",)) -> Path:
    """A model that holds `keep` itself and takes the rest from `base`."""
    folder.mkdir()
    for name in ("model_index.json", *keep):
        copy = shutil.copytree if (base / name).is_dir() else shutil.copy
        copy(base / name, folder / name)
    defaults = json.loads((base / "fastgen.json").read_text())
    (folder / "fastgen.json").write_text(json.dumps({**defaults, "base": f"../{base.name}"}))
    return folder


def test_a_model_takes_what_it_lacks_from_its_base(micro_z: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(micro_z, tmp_path / "whole"))
    found = find_checkpoint(derive(tmp_path / "part", base))
    whole = find_checkpoint(base)
    assert found.component("transformer").parent.name == "part" and found.component("vae").resolve() == base / "vae"
    assert [folder.resolve() for folder in found.folders] == [tmp_path / "part", base]
    assert found.defaults == whole.defaults and found.size_multiple == whole.size_multiple
    found.check_weights()
    truncate(base / "vae")
    with pytest.raises(FastgenError, match="truncated"):
        found.check_weights()


@pytest.mark.parametrize(
    ("base", "message"), [("../absent", "no whole pipeline"), (3, "must name a folder"), ("", "must name a folder")]
)
def test_a_bad_base_is_an_error(micro_z: Path, tmp_path: Path, base: object, message: str) -> None:
    folder = derive(tmp_path / "part", micro_z)
    (folder / "fastgen.json").write_text(json.dumps({"base": base}))
    with pytest.raises(FastgenError, match=message):
        find_checkpoint(folder)


@pytest.mark.parametrize(
    ("config", "pipeline", "expected"),
    [
        ({"_class_name": "FluxTransformer2DModel", "patch_size": 1}, "FluxPipeline", 16),
        ({"_class_name": "SD3Transformer2DModel", "patch_size": 2}, "StableDiffusion3Pipeline", 16),
        (None, "StableDiffusionPipeline", 8),
    ],
)
def test_size_multiples_of_known_models(
    tmp_path: Path, config: dict[str, object] | None, pipeline: str, expected: int
) -> None:
    (tmp_path / "vae").mkdir()
    vae = {"_class_name": "AutoencoderKL", "block_out_channels": [1, 2, 3, 4]}
    (tmp_path / "vae" / "config.json").write_text(json.dumps(vae))
    if config is not None:
        (tmp_path / "transformer").mkdir()
        (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
    index = {"_class_name": pipeline, "vae": ["diffusers", "AutoencoderKL"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert find_checkpoint(tmp_path).size_multiple == expected


def test_no_multiple_is_claimed_for_an_unknown_autoencoder(tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text('{"_class_name": "AutoencoderDC"}')
    (tmp_path / "model_index.json").write_text(
        '{"_class_name": "SanaPipeline", "vae": ["diffusers", "AutoencoderDC"]}'
    )
    found = find_checkpoint(tmp_path)
    found.check_size(1000, 37)


@pytest.mark.parametrize("value", [0, -8, 1.5, True, "64"])
def test_sizes_are_positive_integers(value: object) -> None:
    with pytest.raises(FastgenError, match="height"):
        Checkpoint("m", Path(), "diffusers", size_multiple=8).check_size(value, None)  # type: ignore[arg-type]


def test_largest_size() -> None:
    with pytest.raises(FastgenError, match="at most 128"):
        Checkpoint("m", Path(), "diffusers", size_multiple=8, max_size=128).check_size(128, 136)


def truncate(folder: Path) -> None:
    path = weights_of(folder)
    path.write_bytes(path.read_bytes()[:-100])


def cut_header(folder: Path) -> None:
    path = weights_of(folder)
    path.write_bytes(path.read_bytes()[:60])


def empty(folder: Path) -> None:
    weights_of(folder).write_bytes(b"")


def garbage_header(folder: Path) -> None:
    path = weights_of(folder)
    path.write_bytes(struct.pack("<Q", 16) + b"x" * 16)


def list_header(folder: Path) -> None:
    weights_of(folder).write_bytes(struct.pack("<Q", 2) + b"[]")


def longer(folder: Path) -> None:
    path = weights_of(folder)
    path.write_bytes(path.read_bytes() + b"more")


def lfs_pointer(folder: Path) -> None:
    weights_of(folder).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")


def remove(folder: Path) -> None:
    weights_of(folder).unlink()


def remove_shard(folder: Path) -> None:
    path = weights_of(folder)
    index = {"weight_map": {"a": path.name, "b": "other-00002.safetensors"}}
    path.with_name(path.name + ".index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "damage",
    [truncate, cut_header, empty, garbage_header, list_header, longer, lfs_pointer, remove, remove_shard],
)
@pytest.mark.parametrize("kind", ["z", "janus"])
def test_broken_weights_are_named(damage: Callable[[Path], None], kind: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(kind)
    damage(folder)
    with pytest.raises(FastgenError) as caught:
        find_checkpoint(folder).check_weights()
    message = str(caught.value)
    assert "weight file" in message and ".safetensors" in message and str(folder) in message and "\n" not in message


@pytest.mark.parametrize("name", ["model_index.json", "transformer/config.json", "tokenizer/tokenizer.json"])
@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe\x00"])
def test_invalid_json_is_named(z: Path, name: str, content: bytes) -> None:
    (z / name).write_bytes(content)
    with pytest.raises(FastgenError, match=name):
        find_checkpoint(z)


def test_missing_component_and_wrong_shape_of_files(z: Path, janus: Path, tmp_path: Path) -> None:
    shutil.rmtree(z / "vae")
    with pytest.raises(FastgenError, match="component 'vae'"):
        find_checkpoint(z)
    (z / "model_index.json").write_text("{}")
    with pytest.raises(FastgenError, match="_class_name"):
        find_checkpoint(z)
    (z / "model_index.json").write_text("[]")
    with pytest.raises(FastgenError, match="not a JSON object"):
        find_checkpoint(z)
    (janus / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(FastgenError, match="'llama'"):
        find_checkpoint(janus)
    (tmp_path / "void").mkdir()
    with pytest.raises(FastgenError, match="neither model_index.json nor config.json"):
        find_checkpoint(tmp_path / "void")
    with pytest.raises(FastgenError, match="is a file"):
        find_checkpoint(janus / "config.json")


def test_the_official_layout_of_janus_pro_is_answered_with_the_converted_id(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    official = {
        "architectures": ["MultiModalityCausalLM"],
        "model_type": "multi_modality",
        "aligner_config": {"cls": "MlpProjector", "model_type": "aligner"},
        "gen_vision_config": {"cls": "VQ-16", "model_type": "gen_vision"},
        "language_config": {"model_type": "llama", "vocab_size": 102400},
    }
    (tmp_path / "config.json").write_text(json.dumps(official))
    code, _, err = call(capsys, "a ring", "--model", tmp_path)
    assert code == 2 and err.count("\n") == 1
    assert "deepseek-community/Janus-Pro-1B or deepseek-community/Janus-Pro-7B" in err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tinny", "unknown.*tiny, tiny-janus.*owner/name"),
        ("./nowhere", "no such folder"),
        ("/no/such/folder", "no such folder"),
        ("a/b/c", "no such folder"),
        ("~/no-such-folder", "no such folder"),
        ("", "needs a name"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(FastgenError, match=message):
        find_checkpoint(name)


def test_hub_model_without_connection_says_how_to_get_it() -> None:
    with pytest.raises(FastgenError, match="hf download owner/nothing-here") as caught:
        find_checkpoint("owner/nothing-here")
    assert "\n" not in str(caught.value)


def test_hub_model_from_the_cache(z: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, revision, allow_patterns: str(z))
    found = find_checkpoint("owner/name")
    assert found.hub_id == "owner/name" and found.folder == z and found.kind == "diffusers"


def test_needs_no_torch() -> None:
    code = (
        "import sys; from fastgen.pipelines.loading.checkpoint import find_checkpoint\n"
        "find_checkpoint('tiny').check_weights(); print('torch' in sys.modules or 'diffusers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    import importlib.util

    assert done.stdout.strip() == str(importlib.util.find_spec("torchvision") is not None)
