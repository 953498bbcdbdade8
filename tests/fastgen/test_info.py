"""`fastgen info`: complete where everything works, and still an answer where something is broken."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fastgen import _assets
from fastgen.cli import info
from fastgen.cli.main import run


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return info.collect()


def test_report_has_every_part(report: dict[str, Any]) -> None:
    assert json.loads(json.dumps(report)) == report
    assert report["packages"].keys() == info.PACKAGES.keys()
    assert all(item["status"] in ("ok", "limited", "missing", "broken") for item in report["packages"].values())
    for name in ("torch", "diffusers", "transformers", "accelerate", "torchmetrics"):
        assert report["packages"][name]["status"] == "ok", report["packages"][name]
        assert report["packages"][name]["version"]
    assert report["devices"]["cpu"]["cores"] >= 1
    assert report["fast_paths"].keys() == {"triton kernels", "torch.compile", "flash attention", "bfloat16"}
    assert report["models"].keys() == set(_assets.names())


def test_every_fast_path_that_is_not_available_says_why(report: dict[str, Any]) -> None:
    for name, path in report["fast_paths"].items():
        assert path["available"] is (path["reason"] is None), name


def test_operations_with_kernels_are_named_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "_no_cuda", lambda: "no GPU")
    detail = info._triton_kernels()["detail"]
    for name in ("adaln", "group_norm_silu", "kv_compact", "tree_attention"):
        assert name in detail.replace(":", ",").replace(" ", "").split(",")
    assert "dispatch" not in detail and "varlen" not in detail


def test_json_is_one_object_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out).keys() >= {"fastgen", "packages", "devices", "fast_paths", "models"}


def test_text_names_everything(capsys: pytest.CaptureFixture[str], report: dict[str, Any]) -> None:
    assert run(["info"]) == 0
    text = capsys.readouterr().out
    for part in ("packages", "fast_paths", "models", "optional"):
        for name in report[part]:
            assert name in text
    assert report["packages"]["torch"]["version"] in text


def save_distribution(folder: Path, name: str, script: str) -> None:
    metadata = folder / f"{name}-9.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.0\n")
    (metadata / "entry_points.txt").write_text(f"[console_scripts]\nfastgen = {script}\n")


@pytest.mark.parametrize(
    ("name", "script", "warned"),
    [
        ("fastgen", "fastgen.main:run", True),
        ("fastgen", "fastgen.cli.main:main", True),  # the name alone is enough
        ("of_another_name", "somewhere:main", True),
        ("of_another_name", "fastgen.cli.main:main", False),
    ],
)
def test_another_project_of_the_name_is_warned_of(
    name: str,
    script: str,
    warned: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    save_distribution(tmp_path, name, script)
    assert run(["info"]) == 0
    error = capsys.readouterr().err
    assert (f"warning: the distribution {name} 9.0 is another project" in error) is warned
    assert (f"pip uninstall {name}" in error) is warned


@pytest.mark.skipif(os.name == "nt", reason="a script needs an extension there")
def test_a_command_of_another_project_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = tmp_path / "fastgen"
    monkeypatch.setenv("PATH", str(tmp_path))
    for text, warned in (("from fastgen.cli.main import main", False), ("from fastgen.other import run", True)):
        command.write_text(f"#!/usr/bin/env python\n{text}\n")
        command.chmod(0o755)
        found = [text for text in info._conflicts() if str(command) in text]
        assert bool(found) is warned, found


def break_imports(monkeypatch: pytest.MonkeyPatch, errors: dict[str, Exception]) -> None:
    real = importlib.import_module

    def import_module(name: str, package: str | None = None) -> ModuleType:
        if name in errors:
            raise errors[name]
        return real(name, package)

    monkeypatch.setattr(info.importlib, "import_module", import_module)


def test_missing_and_broken_packages_have_different_messages(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    break_imports(
        monkeypatch,
        {
            "triton": ModuleNotFoundError("No module named 'triton'", name="triton"),
            "torchmetrics": ModuleNotFoundError("No module named 'lightning'", name="lightning"),
            "accelerate": RuntimeError("two\nlines"),
        },
    )
    monkeypatch.setattr(info, "_version", lambda name: None if name == "triton" else "9.9")
    packages = info.collect()["packages"]
    assert packages["triton"]["status"] == "missing"
    assert packages["torchmetrics"] == {
        "version": "9.9",
        "status": "broken",
        "detail": "ModuleNotFoundError: No module named 'lightning'",
    }
    assert packages["accelerate"]["detail"] == "RuntimeError: two lines"
    assert run(["info"]) == 0
    assert "broken  RuntimeError: two lines" in capsys.readouterr().out


def test_a_part_that_fails_does_not_take_the_others_with_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> Any:
        raise RuntimeError("driver too old")

    monkeypatch.setattr(info, "_devices", fail)
    monkeypatch.setattr(info, "_flash_attention", fail)
    monkeypatch.setattr(info, "_models", fail)
    report = info.collect()
    assert report["devices"] == {"error": "RuntimeError: driver too old"}
    assert report["fast_paths"]["flash attention"] == {"error": "RuntimeError: driver too old"}
    assert "error" not in report["fast_paths"]["bfloat16"]
    assert run(["info"]) == 0
    assert capsys.readouterr().out.count("driver too old") == 3


def test_info_runs_without_torch() -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'diffusers', 'transformers', 'torchvision', 'triton'): sys.modules[name] = None\n"
        "from fastgen.cli.main import run\n"
        "sys.exit(run(['info', '--json']))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    report = json.loads(done.stdout)
    assert report["packages"]["torch"]["status"] in ("broken", "missing")
    assert "error" in report["devices"]
    assert report["python"]


def test_compile_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info.shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    assert info._compile()["reason"] == "no C++ compiler on PATH (looked for g++, clang++, c++)"
    monkeypatch.setattr(info.shutil, "which", lambda name: "/bin/" + name if name == "g++" else None)
    assert info._compile()["available"]
    monkeypatch.setenv("CXX", "clang++-99 -O2")
    assert info._compile()["reason"] == "no C++ compiler on PATH (looked for clang++-99)"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two checkpoints and their checksums."""
    for name in ("tiny", "other"):
        (tmp_path / name / "vae").mkdir(parents=True)
        (tmp_path / name / "vae" / "config.json").write_text("{}")
        (tmp_path / name / "weights.safetensors").write_bytes(bytes(range(256)) * 9)
    _assets.write_checksums(tmp_path)
    return tmp_path


def test_whole_checkpoints_have_no_problem(root: Path) -> None:
    assert _assets.names(root) == ["other", "tiny"]
    assert _assets.problem("tiny", root) is None
    assert _assets.problem("other", root) is None
    assert _assets.size(root / "tiny") == 2 + 256 * 9
    assert not list(root.glob("*.partial"))


def test_every_change_of_a_checkpoint_is_seen(root: Path) -> None:
    weights = root / "tiny" / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[1000] ^= 1
    weights.write_bytes(data)
    assert _assets.problem("tiny", root) == "changed: weights.safetensors"
    weights.unlink()
    assert _assets.problem("tiny", root) == "missing: weights.safetensors"
    (root / "other" / "vae" / "extra.txt").write_text("")
    assert _assets.problem("other", root) == "not published: vae/extra.txt"


@pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"tiny": 3}'])
def test_checksums_that_cannot_be_used_are_a_problem(root: Path, text: str | None) -> None:
    if text is None:
        (root / _assets.CHECKSUMS).unlink()
    else:
        (root / _assets.CHECKSUMS).write_text(text)
    assert _assets.CHECKSUMS in str(_assets.problem("tiny", root))


def test_the_embedded_checkpoints_are_those_that_were_published() -> None:
    assert {name: _assets.problem(name) for name in _assets.names()} == dict.fromkeys(_assets.names())


def test_no_assets_folder_is_no_error(tmp_path: Path) -> None:
    assert _assets.names(tmp_path / "absent") == []
