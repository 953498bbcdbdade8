"""Code and pickles in a model's folder never run, whatever is on standard input."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from generate_command import call

import fastgen
from fastgen.errors import FastgenError
from fastgen.pretrained import load_pretrained, open_clip_folder

CODE = """
open({marker!r}, "w").write("ran")
from transformers import PreTrainedTokenizerFast, CLIPImageProcessor, Qwen3Model, PreTrainedConfig
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline
class T(PreTrainedTokenizerFast): pass
class I(CLIPImageProcessor): pass
class C(PreTrainedConfig): model_type = "own"
class M(Qwen3Model): pass
class S(FlowMatchEulerDiscreteScheduler): pass
class P(ZImagePipeline): pass
"""


class Trap:
    """Folders with code of their own, and whether it ran."""

    def __init__(self, root: Path) -> None:
        self.root, self.marker = root, root / "ran"
        self.code = CODE.format(marker=str(self.marker))

    def folder(self, source: Path) -> Path:
        folder = self.root / "model"
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("drafter"))
        for place in (folder, *(path for path in folder.iterdir() if path.is_dir())):
            for name in ("evil", "pipeline"):
                (place / f"{name}.py").write_text(self.code)
        return folder

    def model(self) -> Path:
        """A model, tokenizer and image processor that transformers knows only by their own code."""
        folder = self.root / "model"
        folder.mkdir()
        (folder / "evil.py").write_text(self.code)
        edit(folder / "config.json", model_type="own", auto_map=AUTO_MAP)
        edit(folder / "tokenizer_config.json", tokenizer_class="T", auto_map=AUTO_MAP)
        edit(folder / "preprocessor_config.json", image_processor_type="I", auto_map=AUTO_MAP)
        return folder


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Trap]:
    """Standard input says yes to every question, and the folder's modules can be imported by name."""
    made = Trap(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # pytest sets sys.stdin itself
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "model"))
    yield made
    assert not made.marker.exists(), "code of the model's folder ran"
    for name in ("evil", "pipeline"):
        assert name not in sys.modules


def edit(file: Path, **values: Any) -> None:
    held = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**held, **values}))


AUTO_MAP = {
    "AutoConfig": "evil.C",
    "AutoModel": "evil.M",
    "AutoTokenizer": ["evil.T", "evil.T"],
    "AutoImageProcessor": "evil.I",
    "AutoProcessor": "evil.I",
    "AutoModelForImageTextToText": "evil.M",
}


def index_of(**components: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "model_index.json", **components)


def both(*changes: Callable[[Path], None]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for each in changes:
            each(folder)

    return change


def tokenizer_with_code(place: str) -> Callable[[Path], None]:
    return lambda folder: edit(folder / place / "tokenizer_config.json", auto_map=AUTO_MAP, tokenizer_class="T")


DIFFUSERS = {
    "tokenizer by an Auto class": both(
        index_of(tokenizer=["transformers", "AutoTokenizer"]), tokenizer_with_code("tokenizer")
    ),
    "processor by an Auto class": both(
        index_of(tokenizer=["transformers", "AutoProcessor"]),
        lambda folder: edit(folder / "tokenizer/processor_config.json", auto_map=AUTO_MAP, processor_class="I"),
    ),
    # a processor loads its tokenizer by an Auto class, without a word on trust
    "tokenizer of a processor": both(
        index_of(tokenizer=["transformers", "CLIPProcessor"]),
        tokenizer_with_code("tokenizer"),
        lambda folder: edit(folder / "tokenizer/preprocessor_config.json", image_processor_type="CLIPImageProcessor"),
    ),
    "network by an Auto class": both(
        index_of(text_encoder=["transformers", "AutoModel"]),
        lambda folder: edit(folder / "text_encoder/config.json", auto_map=AUTO_MAP, model_type="own"),
    ),
    "network by an Auto class of diffusers": both(
        index_of(vae=["diffusers", "AutoModel"]),
        lambda folder: edit(folder / "vae/config.json", auto_map=AUTO_MAP, _class_name=["evil", "M"]),
    ),
    "component of a local module": index_of(scheduler=["evil", "S"]),
    "network of a local module": index_of(text_encoder=["evil", "M"]),
    "network of a local package": index_of(text_encoder=["fastgen.models.evil", "M"]),
    "component of the standard library": index_of(scheduler=["os", "system"]),
    "component that is a function": index_of(scheduler=["transformers", "pipeline"]),
    "pipeline of a local module": index_of(_class_name=["evil", "P"]),
    "pipeline class of a module": index_of(_class_name=["pipeline", "P"]),
}


@pytest.mark.parametrize("name", DIFFUSERS)
def test_code_in_a_diffusers_folder_never_runs(
    name: str, micro_z: Path, trap: Trap, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = trap.folder(micro_z)
    DIFFUSERS[name](folder)
    code, _, stderr = call(capsys, "a red circle", "-o", trap.root / "out.png", "--model", folder, "--steps", 1)
    assert code == 2 and len(stderr.splitlines()) == 1 and stderr.startswith("error: "), stderr
    assert not (trap.root / "out.png").exists()


@pytest.mark.parametrize("library", ["transformers", "None"])
def test_a_module_of_a_name_that_diffusers_looks_for_is_refused(library: str, micro_z: Path, trap: Trap) -> None:
    folder = trap.folder(micro_z)
    component = {"transformers": "tokenizer", "None": "."}[library]
    (folder / component / f"{library}.py").write_text(trap.code)
    with pytest.raises(FastgenError, match="never runs such code"):
        fastgen.load_pipeline(str(folder))


def test_a_module_next_to_a_scheduler_is_not_looked_up(micro_z: Path, trap: Trap) -> None:
    """Schedulers are built by their class in diffusers."""
    folder = trap.folder(micro_z)
    (folder / "scheduler" / "diffusers.py").write_text(trap.code)
    assert type(fastgen.load_pipeline(str(folder)).scheduler).__module__.startswith("diffusers.")  # type: ignore[attr-defined]


JANUS = {
    "tokenizer": tokenizer_with_code("."),
    "processor": lambda folder: edit(folder / "processor_config.json", auto_map=AUTO_MAP, processor_class="I"),
    "config": lambda folder: edit(folder / "config.json", auto_map=AUTO_MAP),
    "part of a config": lambda folder: edit(
        folder / "config.json",
        text_config={
            **json.loads((folder / "config.json").read_text())["text_config"],
            "auto_map": AUTO_MAP,
            "name_or_path": str(folder),
            "model_type": "blip_2_qformer",
        },
    ),
}


@pytest.mark.parametrize("name", JANUS)
def test_code_in_a_janus_folder_never_runs(
    name: str, micro_janus: Path, trap: Trap, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = trap.folder(micro_janus)
    JANUS[name](folder)
    code, _, stderr = call(capsys, "a red circle", "-o", trap.root / "out.png", "--model", folder)
    # transformers has these classes itself: what the configuration says of code is not looked at
    unused = name in ("config", "processor")
    assert code == (0 if unused else 2), stderr
    assert unused or (len(stderr.splitlines()) == 1 and stderr.startswith("error: ")), stderr


@pytest.mark.parametrize("kind", ["AutoConfig", "AutoModel", "AutoTokenizer", "AutoImageProcessor", "AutoProcessor"])
def test_every_auto_class_refuses_code(kind: str, trap: Trap) -> None:
    import transformers

    folder = trap.model()
    with pytest.raises(FastgenError, match="fastgen never runs such code"):
        load_pretrained(getattr(transformers, kind), folder)
    with pytest.raises(FastgenError, match="trust_remote_code: "):
        load_pretrained(getattr(transformers, kind), folder, trust_remote_code=True)


def test_a_loader_that_trusts_code_by_default_is_not_trusted() -> None:
    class Loader:
        @staticmethod
        def from_pretrained(source: str, trust_remote_code: bool = True) -> bool:
            return trust_remote_code

    assert load_pretrained(Loader, "folder") is False


@pytest.mark.parametrize("name", ["DCZImagePipeline", "JanusImagePipeline"])
def test_our_pipelines_refuse_code_when_loaded_directly(
    name: str, micro_dc: Path, micro_z: Path, micro_janus: Path, trap: Trap
) -> None:
    from fastgen.pipelines.dc_z_image import DCZImagePipeline
    from fastgen.pipelines.janus import JanusImagePipeline

    kind: Any = {"DCZImagePipeline": DCZImagePipeline, "JanusImagePipeline": JanusImagePipeline}[name]
    folder = trap.folder(micro_janus if name.startswith("Janus") else micro_z)
    if name.startswith("Janus"):
        tokenizer_with_code(".")(folder)
    else:
        DIFFUSERS["tokenizer of a processor"](folder)
    with pytest.raises(FastgenError, match="never runs such code"):
        kind.from_pretrained(folder)
    with pytest.raises(FastgenError, match="trust_remote_code: "):
        kind.from_pretrained(folder, trust_remote_code=True)


@pytest.mark.parametrize("name", ["clip-score", "pick-score", "qwen-vl"])
def test_verifiers_refuse_code(name: str, trap: Trap) -> None:
    from fastgen.evaluation.verifiers.names import load_verifier

    folder = trap.model()
    with pytest.raises(FastgenError, match="never runs such code"):
        load_verifier(f"{name}:{folder}")


@pytest.mark.parametrize(
    "text",
    [{"hf_model_name": "model"}, {"hf_tokenizer_name": "model", "tokenizer_kwargs": {"trust_remote_code": True}}],
)
def test_an_open_clip_folder_with_parts_of_transformers_is_refused(text: dict[str, Any], tmp_path: Path) -> None:
    edit(tmp_path / "open_clip_config.json", model_cfg={"embed_dim": 8, "vision_cfg": {}, "text_cfg": text})
    with pytest.raises(FastgenError, match="hf_.*_name is not supported"):
        open_clip_folder(tmp_path)
    edit(tmp_path / "open_clip_config.json", model_cfg={"text_cfg": {"width": 32, "hf_model_name": None}})
    assert open_clip_folder(tmp_path) == f"local-dir:{tmp_path}"


class Exploit:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("kind", ["z", "janus"])
@pytest.mark.parametrize("bare", [False, True])
def test_pickled_weights_run_nothing(
    kind: str, bare: bool, request: pytest.FixtureRequest, trap: Trap, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    folder = trap.root / "model"
    shutil.copytree(request.getfixturevalue(f"micro_{kind}"), folder)
    place, stem = (folder, "pytorch_model") if kind == "janus" else (folder / "vae", "diffusion_pytorch_model")
    for file in place.glob("*.safetensors"):
        file.unlink()
    payload = {"x": Exploit(trap.marker)}
    if bare:
        (place / f"{stem}.bin").write_bytes(pickle.dumps(payload))
    else:
        torch.save(payload, place / f"{stem}.bin")
    code, _, stderr = call(capsys, "a red circle", "-o", trap.root / "out.png", "--model", folder)
    assert code == 2 and len(stderr.splitlines()) == 1 and stderr.startswith("error: "), stderr


# ---- nothing goes past the helper ----

# Calls that load what a user names, and what makes each of them safe.
SAFE = {
    "from_pretrained": lambda module, node: module == "fastgen.pretrained",
    "torch.load": lambda module, node: keyword(node, "weights_only") is True,
    "np.load": lambda module, node: keyword(node, "allow_pickle") is False,
    "DiffusionPipeline.download": lambda module, node: keyword(node, "trust_remote_code") is False,
}
# Not used in product code at all.
NEVER = ("pickle", "torch.jit.load", "torch.hub.load", "joblib", "yaml.load", "exec", "eval", "__import__", "marshal")


def keyword(node: ast.Call, name: str) -> Any:
    return next((ast.literal_eval(each.value) for each in node.keywords if each.arg == name), None)


@pytest.fixture(scope="module")
def product(repository: Path) -> dict[str, list[ast.AST]]:
    """Every module of the product, as its syntax nodes."""
    folders = (repository / folder for folder in ("fastgen", "drafters", "evaluation", "kernels", "pipelines"))
    files = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    return {
        ".".join(path.relative_to(repository).with_suffix("").parts): [
            *ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        ]
        for path in files
    }


def test_product_code_loads_nothing_past_the_helper(product: dict[str, list[ast.AST]]) -> None:
    wrong = []
    for module, node in ((module, node) for module, nodes in product.items() for node in nodes):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        for pattern, is_safe in SAFE.items():
            if (name == pattern or name.endswith(f".{pattern}")) and not is_safe(module, node):
                wrong.append(f"{module}:{node.lineno} {name}")
        if any(name == each or name.startswith(f"{each}.") for each in NEVER):
            wrong.append(f"{module}:{node.lineno} {name}")
    assert not wrong, wrong


def test_product_code_hands_no_loader_around(product: dict[str, list[ast.AST]]) -> None:
    """`load = Class.from_pretrained` would be called where the test above does not see it."""
    for module, nodes in product.items():
        called = {node.func for node in nodes if isinstance(node, ast.Call)}
        loose = [
            node.lineno
            for node in nodes
            if isinstance(node, ast.Attribute) and node.attr == "from_pretrained" and node not in called
        ]
        assert not loose, f"{module}: lines {loose}"
