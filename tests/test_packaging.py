"""The package as users get it: its wheel, its folders, its imports."""

from __future__ import annotations

import ast
import fnmatch
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Import package -> folder of the checkout.
FOLDERS = {
    "fastgen": "fastgen",
    "fastgen.drafters": "drafters",
    "fastgen.evaluation": "evaluation",
    "fastgen.kernels": "kernels",
    "fastgen.pipelines": "pipelines",
}
NOT_PUBLISHED = ("__pycache__", "*.pyc", "*.egg-info", ".*")


def published_files(repository: Path) -> dict[str, Path]:
    """Path inside the wheel -> file of the checkout, for all files of the five folders."""
    files = {}
    for package, folder in FOLDERS.items():
        for path in sorted((repository / folder).rglob("*")):
            parts = path.relative_to(repository / folder).parts
            if path.is_file() and not any(fnmatch.fnmatch(part, name) for part in parts for name in NOT_PUBLISHED):
                files["/".join((*package.split("."), *parts))] = path
    return files


def module_name(wheel_path: str) -> str:
    return wheel_path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def run_python(code: str, cwd: Path, python: str | Path = sys.executable, **environment: str) -> str:
    done = subprocess.run(
        [python, "-c", code],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="session")
def configuration(repository: Path) -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read TOML")
    with open(repository / "pyproject.toml", "rb") as file:
        return dict(tomllib.load(file))


def copy_sources(repository: Path, tree: Path) -> None:
    """What an installation reads, without the links of an editable one."""

    def left_out(folder: str, names: list[str]) -> set[str]:
        links = {name for name in names if Path(folder, name).is_symlink()}
        return links | shutil.ignore_patterns(*NOT_PUBLISHED)(folder, names)

    for name in FOLDERS.values():
        shutil.copytree(repository / name, tree / name, ignore=left_out)
    for name in ("pyproject.toml", "README.md", "LICENSE", "build_backend.py"):
        shutil.copy(repository / name, tree)


@pytest.fixture(scope="session")
def wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the tree, with nothing that building here before may have left."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    copy_sources(repository, tree)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        out,
        tree,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def empty_environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scripts folder of a fresh environment with the wheel.

    The dependencies come from this environment through a .pth file: Python does not follow the .pth files of a folder
    named by one, so an editable fastgen of this environment stays invisible there.
    """
    root = tmp_path_factory.mktemp("environment")
    venv.create(root, with_pip=False, symlinks=os.name != "nt")
    scripts = root / ("Scripts" if os.name == "nt" else "bin")
    command = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        scripts / "python",
        "install",
        "--no-deps",
        "--no-index",
        wheel,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    site = Path(run_python("import sysconfig; print(sysconfig.get_path('purelib'))", root, scripts / "python"))
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "dependencies.pth").write_text("\n".join(sorted(paths)))
    return scripts


def test_every_package_folder_is_listed(repository: Path, configuration: dict[str, Any]) -> None:
    files = published_files(repository)
    folders = {module_name(name) for name in files if name.endswith("/__init__.py")}
    setuptools = configuration["tool"]["setuptools"]
    assert set(setuptools["packages"]) == folders
    assert setuptools["package-dir"] == FOLDERS
    without_init = {
        name for name in files if name.endswith(".py") and module_name(str(Path(name).parent)) not in folders
    }
    assert not without_init, "modules in folders without an __init__.py are not published"


def test_the_wheel_has_exactly_the_files_of_the_tree(repository: Path, wheel: Path) -> None:
    files = published_files(repository)
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name and not name.endswith("/")}
        assert names == files.keys()
        for name, path in files.items():
            assert hashlib.sha256(archive.read(name)).digest() == hashlib.sha256(path.read_bytes()).digest(), name
        metadata = {Path(name).name for name in archive.namelist() if ".dist-info/" in name}
    assert {"LICENSE", "METADATA", "entry_points.txt"} <= metadata
    assert "fastgen/py.typed" in names


def test_the_wheel_works_in_an_empty_environment(empty_environment: Path, tmp_path: Path) -> None:
    python, script = empty_environment / "python", empty_environment / "fastgen"
    where = run_python(
        "import fastgen, fastgen.kernels; print(fastgen.__file__, fastgen.kernels.__file__)", tmp_path, python
    )
    for path in where.split():
        assert Path(path).is_relative_to(empty_environment.parent), path
    version = subprocess.run([script, "--version"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert version == run_python("import fastgen; print('fastgen', fastgen.__version__)", tmp_path) + "\n"
    problems = "from fastgen import _assets; print([name for name in _assets.names() if _assets.problem(name)])"
    assert run_python(problems, tmp_path, python) == "[]"


def test_every_module_of_the_wheel_imports(repository: Path, empty_environment: Path, tmp_path: Path) -> None:
    modules = [module_name(name) for name in published_files(repository) if name.endswith(".py")]
    served = all(importlib.util.find_spec(name) for name in ("fastapi", "prometheus_client", "ray", "uvicorn"))
    modules = [name for name in modules if served or not name.startswith("fastgen.serve.")]  # they need an extra
    code = f"import importlib\nfor name in {modules!r}: importlib.import_module(name)"
    run_python(code, tmp_path, empty_environment / "python")


def editable_wheel(tree: Path, out: Path, before: str = "pass") -> Path:
    code = f"import build_backend; {before}; print(build_backend.build_editable({str(out)!r}))"
    return out / run_python(code, tree).splitlines()[-1]


def test_type_checkers_and_python_find_an_editable_install(repository: Path, tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    tree, out, elsewhere = (tmp_path / name for name in ("tree", "out", "elsewhere"))
    for folder in (tree, out, elsewhere):
        folder.mkdir()
    copy_sources(repository, tree)
    built = editable_wheel(tree, out)
    venv.create(tmp_path / "venv", with_pip=False, symlinks=os.name != "nt")
    python = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", built]
    subprocess.run(command, capture_output=True, text=True, check=True)

    (tree / "kernels" / "later.py").write_text("answer: int = 42\n")
    text = "from fastgen.errors import FastgenError\nfrom fastgen.kernels.later import answer\nreveal_type(answer)\n"
    (elsewhere / "script.py").write_text(text)
    options = ["--strict", "--python-executable", python, "--cache-dir", tmp_path / "cache", "script.py"]
    command = [sys.executable, "-m", "mypy", *options]
    done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, check=False)
    report = done.stdout
    assert done.returncode == 0, report + done.stderr
    assert 'Revealed type is "int"' in report.replace("builtins.", "")

    code = "import fastgen, fastgen.kernels.later, os; print(os.path.realpath(fastgen.kernels.later.__file__))"
    assert run_python(code, elsewhere, python) == str(tree / "kernels" / "later.py")
    shutil.rmtree(tree / "build")  # `git clean` takes the links away; setuptools' hook is still there
    assert run_python(code, elsewhere, python) == str(tree / "kernels" / "later.py")
    no_leaks = (
        "import importlib.util as u; print([n for n in ('kernels', 'pipelines', 'evaluation') if u.find_spec(n)])"
    )
    assert run_python(no_leaks, elsewhere, python) == "[]"


def test_an_editable_install_needs_no_links(repository: Path, tmp_path: Path) -> None:
    tree, out = tmp_path / "tree", tmp_path / "out"
    tree.mkdir()
    copy_sources(repository, tree)
    refuse = "build_backend.Path.symlink_to = lambda *a, **k: (_ for _ in ()).throw(OSError('no links here'))"
    with zipfile.ZipFile(editable_wheel(tree, out, refuse)) as archive:
        assert not [name for name in archive.namelist() if "links" in name]
        assert [name for name in archive.namelist() if name.endswith("_finder.py")]


# --- our folders and other people's packages ---------------------------------------------------------------------

IMPORT_THEIRS = """
from fastgen._compat import repair_torchvision
repair_torchvision()  # an unfit torchvision is not what is tested here
import sys
assert sys.path[0] == "", "this must run with the checkout first on the path"
import diffusers, transformers
from diffusers import ZImagePipeline
from transformers import JanusForConditionalGeneration, Qwen3Model
from diffusers.utils import is_kernels_available as in_diffusers
from transformers.utils import is_kernels_available as in_transformers
"""


def test_our_kernels_folder_is_not_mistaken_for_the_hugging_face_package(repository: Path) -> None:
    assert (repository / "kernels" / "__init__.py").is_file()
    code = IMPORT_THEIRS + (
        "import importlib.metadata, os\n"
        "installed = any(d.metadata['Name'] == 'kernels' for d in importlib.metadata.distributions())\n"
        "assert in_diffusers() == installed and (installed or not in_transformers())\n"
        "module = sys.modules.get('kernels')\n"
        "ours = module is not None and module.__file__.startswith(os.getcwd())\n"
        "assert not ours or not installed and not hasattr(module, '__version__'), module\n"
        "import fastgen.kernels\n"
        "assert fastgen.kernels.__name__ == 'fastgen.kernels'"
    )
    run_python(code, repository)


def test_the_hugging_face_package_is_found_from_the_checkout(repository: Path, tmp_path: Path) -> None:
    """A stand-in with the name, the version and a sub-module, found after the current directory."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("from kernels.layer import Device\n")
    (tmp_path / "kernels" / "layer.py").write_text("class Device: pass\n")
    (tmp_path / "kernels-0.99.dist-info").mkdir()
    (tmp_path / "kernels-0.99.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: kernels\nVersion: 0.99\n"
    )
    code = (
        "import sys; assert sys.path[0] == ''\n"
        "import kernels, fastgen.kernels\n"
        "from kernels.layer import Device\n"
        "assert kernels.Device is Device\n"
        "assert fastgen.kernels is not kernels\n"
        "print(kernels.__file__)"
    )
    assert run_python(code, repository, PYTHONPATH=str(tmp_path)) == str(tmp_path / "kernels" / "__init__.py")


# --- what imports what -------------------------------------------------------------------------------------------

# kernels <- models, drafters <- pipelines <- evaluation <- training <- cli: a module may import its own layer and
# every layer below. drafters may use models (a target may be one of ours), not the other way round.
LAYERS = ("", "data", "kernels", "models", "drafters", "pipelines", "evaluation", "training", "cli", "__main__")
LEAVES = (
    "_assets",
    "_compat",
    "_flops",
    "accounting",
    "checks",
    "contracts",
    "environment",
    "errors",
    "io",
    "locks",
    "pretrained",
)
# Libraries that look for torchvision; only packages that repair it first may import them.
NEED_TORCHVISION_CHECK = {
    "accelerate",
    "diffusers",
    "open_clip",
    "timm",
    "torchmetrics",
    "torchvision",
    "transformers",
}


def layer(module: str) -> str:
    """The package below `fastgen` that `module` belongs to; "" for fastgen itself and its leaves."""
    part = module.split(".")[1] if "." in module else ""
    # The command line and the server are both what a user meets: one layer.
    return "" if part in LEAVES else {"serve": "cli"}.get(part, part)


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Every module that `path` imports anywhere, and whether for type checking only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for child in block.body
        for node in ast.walk(child)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node in typing_only
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            if node.module == "fastgen":
                for alias in node.names:
                    yield f"fastgen.{alias.name}", node in typing_only
            else:
                yield node.module, node in typing_only


def modules(repository: Path) -> list[tuple[str, Path]]:
    return [(module_name(name), path) for name, path in published_files(repository).items() if name.endswith(".py")]


def test_dependencies_never_point_upwards(repository: Path) -> None:
    wrong = []
    for module, path in modules(repository):
        own = layer(module)
        assert own in LAYERS, f"{module}: give its package a place in LAYERS"
        for imported, typing_only in imports(path):
            if imported.split(".")[0] != "fastgen" or (module == "fastgen" and typing_only):
                continue  # `import fastgen` is lazy: its names from above are for type checkers
            if imported == "fastgen.__version__":
                imported = "fastgen"
            other = layer(imported)
            known = other in LAYERS
            if not known or LAYERS.index(other) > LAYERS.index(own):
                wrong.append(f"{module} imports {imported}")
    assert not wrong, wrong


def test_leaves_import_only_leaves(repository: Path) -> None:
    for module, path in modules(repository):
        if module.split(".")[-1] in LEAVES and module.count(".") == 1:
            for imported, _ in imports(path):
                if imported.split(".")[0] == "fastgen":
                    assert imported.split(".")[1] in LEAVES, f"{module} imports {imported}"


def test_our_folders_are_imported_through_fastgen_only(repository: Path) -> None:
    ours = set(FOLDERS.values()) - {"fastgen"}
    for tree in ("tests", *FOLDERS.values()):
        for path in (repository / tree).rglob("*.py"):
            for imported, _ in imports(path):
                assert imported.split(".")[0] not in ours, f"{path} imports {imported}"


def test_libraries_that_need_torchvision_load_after_its_repair(repository: Path) -> None:
    paths = dict(modules(repository))
    for module, path in paths.items():
        needed = {name.split(".")[0] for name, typing_only in imports(path) if not typing_only}
        if not needed & NEED_TORCHVISION_CHECK or module == "fastgen._compat":
            continue
        package = f"fastgen.{layer(module)}"
        if package == "fastgen.cli":
            assert any(
                name.startswith("fastgen.") and layer(name) not in ("", "data", "kernels", "cli")
                for name, _ in imports(path)
            ), f"{module} imports {needed & NEED_TORCHVISION_CHECK} itself"
            continue
        assert "repair_torchvision()" in paths[package].read_text(encoding="utf-8"), package


BROKEN_TORCHVISION = """
import torch
if not ({declared}):
    raise RuntimeError("operator torchvision::nms does not exist")
__version__ = "0.99"
"""


def test_a_torchvision_of_another_torch_breaks_nothing(tmp_path: Path) -> None:
    """A stand-in that behaves like a torchvision built for another torch."""
    (tmp_path / "torchvision").mkdir()
    declared = "hasattr(torch.ops.torchvision, 'nms') and hasattr(torch.ops.torchvision, 'qnms')"
    (tmp_path / "torchvision" / "__init__.py").write_text(BROKEN_TORCHVISION.format(declared=declared))
    environment = {"PYTHONPATH": str(tmp_path)}
    alone = "try: import torchvision\nexcept RuntimeError as error: print(error)"
    assert run_python(alone, tmp_path, **environment) == "operator torchvision::nms does not exist"
    code = "import fastgen.pipelines, torchvision; print(torchvision.__version__)"
    assert run_python(code, tmp_path, **environment) == "0.99"


@pytest.mark.parametrize(
    ("text", "state"),
    [
        (None, "missing"),
        ("healthy = 1", "healthy"),
        (BROKEN_TORCHVISION.format(declared="False"), "broken: operator torchvision::nms does not exist"),
        ("raise OSError('libjpeg is missing')", "broken: libjpeg is missing"),
    ],
)
def test_other_states_of_torchvision_are_left_alone(text: str | None, state: str, tmp_path: Path) -> None:
    hide = "import sys; sys.modules['torchvision'] = None; " if text is None else ""
    if text is not None:
        (tmp_path / "torchvision.py").write_text(text)
    code = hide + "from fastgen._compat import repair_torchvision; print(repair_torchvision())"
    assert run_python(code, tmp_path, PYTHONPATH=str(tmp_path)) == state


# --- `import fastgen` --------------------------------------------------------------------------------------------


def test_import_fastgen_is_lazy(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "before = set(sys.modules)\n"
        "import fastgen\n"
        "fastgen.account, fastgen.FastgenError, fastgen.contracts, dir(fastgen)\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'PIL', 'typer', 'rich', 'scipy'}\n"
        "print(sorted(heavy & (set(sys.modules) - before)))"
    )
    assert run_python(code, tmp_path) == "[]"


def test_public_names_resolve() -> None:
    import fastgen

    for name in fastgen.__all__:
        assert getattr(fastgen, name) is not None
        assert name in dir(fastgen)
    with pytest.raises(AttributeError, match="module 'fastgen' has no attribute 'generat'"):
        _ = fastgen.generat


def test_the_oldest_versions_allowed_are_those_that_were_tested(
    repository: Path, configuration: dict[str, Any]
) -> None:
    project = configuration["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    allowed = dict(re.match(r"([\w-]+)>=([\d.]+)", requirement).groups() for requirement in wanted)  # type: ignore[union-attr]
    lines = (repository / ".ci" / "minimum.txt").read_text().splitlines()
    tested = dict(line.split("==") for line in lines if not line.startswith("#"))
    # Of the extra `geneval`, with the torchvision that fits that torch.
    assert f"open-clip-torch>={tested.pop('open-clip-torch')}" in project["optional-dependencies"]["geneval"]
    assert tested.pop("torchvision")
    assert tested == allowed


# `fastgen` after an installer's words, and extras of that name, without our longer name.
OTHER_PROJECT = re.compile(r"install\b[^\n`.;]*[\s\"'=]fastgen(?![-\w])|\bfastgen\[\w")


def test_no_text_says_to_install_the_other_project(repository: Path) -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=repository, capture_output=True, text=True, check=True)
    texts = [repository / name for name in listed.stdout.split() if name != "tests/test_packaging.py"]
    for path in texts:
        if path.suffix in (".py", ".md", ".toml", ".txt", ".jinja", ".yaml", "") and path.is_file():
            found = OTHER_PROJECT.search(path.read_text(encoding="utf-8"))
            assert found is None, f"{path}: {found}"


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("pip install fastgen[report]", True),
        ('pip install "fastgen"', True),
        ("install fastgen", True),
        ("uv pip install -U fastgen", True),
        ("(the extra fastgen[report])", True),
        ("pip install fastgen-diffusers", False),
        ("pip install -e . && fastgen generate", False),
        ("an editable install. fastgen is", False),
        ("pip install matplotlib", False),
    ],
)
def test_the_other_project_is_recognised(text: str, wrong: bool) -> None:
    assert bool(OTHER_PROJECT.search(text)) is wrong


def test_the_distribution_is_not_named_as_the_other_project(configuration: dict[str, Any]) -> None:
    from fastgen.cli.info import DISTRIBUTION

    assert configuration["project"]["name"] == DISTRIBUTION == "fastgen-diffusers"
    for extra, requirements in configuration["project"]["optional-dependencies"].items():
        assert not any(re.match(r"fastgen(?!-diffusers)", one) for one in requirements), extra


def test_version_is_the_one_of_the_metadata(configuration: dict[str, Any]) -> None:
    import fastgen

    assert configuration["project"]["version"] == fastgen.__version__
