"""Runs every shell and Python block of README.md and docs/*.md, in the order of the page, in an empty folder a page;
those of docs/ with the slow tests.

A comment on the line before a block changes that:

``<!-- skip: REASON -->``   is not run (it needs the network, a GPU ...)
``<!-- main-job -->``       sets up a fresh environment and draws: `.ci/run` runs it
``<!-- tests -->``          sets up a fresh environment and runs these tests: `.ci/run` runs it, and this file cannot
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import fastgen
from fastgen.cli.main import run

ROOT = Path(__file__).resolve().parents[1]
PAGES = [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if path.is_file()]
RUNNABLE = {"python", "bash", "sh", "console"}
SHOWN = {"", "text", "json", "toml", "yaml", "markdown", "diff"}


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: Path
    line: int  # of the opening fence, from 1
    language: str
    text: str
    marks: tuple[str, ...]  # comments directly above


def blocks(page: Path, text: str) -> Iterator[Block]:
    lines = iter(enumerate(text.splitlines(), start=1))
    marks: list[str] = []
    for number, line in lines:
        comment = re.fullmatch(r"<!-- (.*) -->", line.strip())
        fence = re.fullmatch(r"( *)(`{3,})(\w*).*", line)
        if comment:
            marks.append(comment[1])
        elif fence:
            indent, ticks, language = fence[1], fence[2], fence[3]
            body = []
            for _, inner in lines:
                if inner.strip() == ticks:
                    break
                body.append(inner.removeprefix(indent))
            else:
                raise ValueError(f"{page.name}:{number}: the block is never closed")
            yield Block(page, number, language, "\n".join(body) + "\n", tuple(marks))
            marks = []
        elif line.strip():
            marks = []


def shell_script(block: Block) -> str:
    """The commands of a block; in a console block those after ``$``, with continuation lines after ``>``."""
    if block.language != "console":
        return block.text
    commands = [re.match(r"[$>] (.*)", line) for line in block.text.splitlines()]
    return "\n".join(match[1] for match in commands if match) + "\n"


ALL = [block for page in PAGES for block in blocks(page, page.read_text(encoding="utf-8"))]


def parameters() -> Iterator[object]:
    for block in ALL:
        if block.language not in RUNNABLE:
            continue
        marks: list[pytest.MarkDecorator] = [pytest.mark.slow] if block.page.parent.name == "docs" else []
        for mark in block.marks:
            if mark.startswith("skip: "):
                marks.append(pytest.mark.skip(reason=mark.removeprefix("skip: ")))
            elif mark in ("main-job", "tests"):
                marks.append(pytest.mark.skip(reason="sets up an environment of its own, in .ci/run"))
        yield pytest.param(block, marks=marks, id=f"{block.page.name}:{block.line}")


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Path]:
    """One empty folder a page, so that a block may read what an earlier one of its page wrote."""
    return {page: tmp_path_factory.mktemp(page.stem) for page in PAGES}


def commands(script: str) -> list[list[str]] | None:
    """The words of a script that is nothing but `fastgen` commands, None for any other."""
    lines = script.replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True) for line in lines if re.match(r"fastgen [^|&;<>$`*?~(){}]*$", line)]
    return found if len(found) == len([line for line in lines if line.split("#")[0].strip()]) else None


def run_here(block: Block) -> None:
    """In this process, which has imported the libraries already; that is most of a short block's time."""
    if block.language == "python":
        exec(compile(block.text, f"{block.page.name}:{block.line}", "exec"), {"__name__": "__main__"})
        return
    for words in commands(shell_script(block)) or []:
        assert run(words[1:]) == 0, f"{block.page.name}:{block.line}: {' '.join(words)}"


def run_in_a_shell(block: Block, folder: Path) -> None:
    environment = {
        **os.environ,
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
        "MPLBACKEND": "agg",
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", shell_script(block)],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (
        f"{block.page.name}:{block.line}\n{block.text}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    )


@pytest.mark.parametrize("block", list(parameters()))
def test_block_runs(block: Block, folders: dict[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    if block.language != "python" and commands(shell_script(block)) is None:
        run_in_a_shell(block, folders[block.page])
        return
    monkeypatch.chdir(folders[block.page])
    monkeypatch.setenv("MPLBACKEND", "agg")
    run_here(block)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("fastgen info --json\n", [["fastgen", "info", "--json"]]),
        (
            'fastgen generate "a # b"\n\n# more\nfastgen info\n',
            [["fastgen", "generate", "a # b"], ["fastgen", "info"]],
        ),
        ("fastgen generate 'a b' \\\n  -o x.png  # why\n", [["fastgen", "generate", "a b", "-o", "x.png"]]),
        ("fastgen info > info.txt\n", None),
        ("fastgen info && ls\n", None),
        ("ls\nfastgen info\n", None),
        ("fastgen eval fid *.png\n", None),
    ],
)
def test_scripts_with_only_commands(script: str, words: list[list[str]] | None) -> None:
    assert commands(script) == words


def test_every_block_says_what_it_is() -> None:
    for block in ALL:
        assert block.language in RUNNABLE | SHOWN, f"{block.page.name}:{block.line}: {block.language!r}"
        code = re.search(r"^(?:import|from|pip|python|fastgen)\b.*", block.text, re.MULTILINE)
        if block.language in SHOWN:  # code that is only shown would not be run
            assert not code, f"{block.page.name}:{block.line}: {block.language!r} holds {code and code[0]!r}"
        for mark in block.marks:
            assert re.fullmatch(r"skip: \S.*|tests|main-job", mark), f"{block.page.name}: {mark!r}"


@pytest.mark.parametrize("name", ["main-job", "tests"])
def test_ci_finds_its_commands_in_the_readme(name: str) -> None:
    script = [sys.executable, ROOT / ".ci" / "snippet", name]
    command = subprocess.run(script, check=True, capture_output=True, text=True).stdout.strip()
    (block,) = [block for block in ALL if name in block.marks]
    assert command == block.text.strip()
    assert "\n" not in command and command.startswith("python -m pip install -e ")


def test_the_api_reference_has_every_public_name() -> None:
    pages = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs" / "api").glob("*.md")))
    named = set(re.findall(r"^::: (\S+)$", pages, re.MULTILINE))
    modules = {name for name in fastgen.__all__ if f"fastgen.{name}" in named}
    missing = set(fastgen.__all__) - modules - {name.rpartition(".")[2] for name in named} - {"__version__"}
    for name in missing.copy():  # of a module that is shown whole
        if getattr(fastgen, name).__module__ in named:
            missing.remove(name)
    assert not missing


def test_every_page_is_in_the_navigation() -> None:
    named = set(re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE))
    assert named == {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}


def test_links_inside_the_repository_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            if "://" not in target and not target.startswith("mailto:"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def environment_names(source: str) -> set[str]:
    """Variables that a module reads by `os.environ` or `os.getenv`, as a literal or by a constant of the module."""
    tree = ast.parse(source)
    constants: dict[str, set[str]] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            texts = {each.value for each in ast.walk(node.value) if isinstance(each, ast.Constant)}
            constants[node.targets[0].id] = {each for each in texts if isinstance(each, str)}
    for node in ast.walk(tree):
        if isinstance(node, ast.comprehension | ast.For) and isinstance(node.target, ast.Name):
            constants[node.target.id] = constants.get(ast.unparse(node.iter), set())
    found: set[str] = set()
    for node in ast.walk(tree):
        key: ast.expr | None = None
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) in ("os.environ", "environ"):
            key = node.slice
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            *(f"{where}environ.{name}" for where in ("os.", "") for name in ("get", "setdefault", "pop")),
            "os.getenv",
            "getenv",
        ):
            key = node.args[0]
        elif isinstance(node, ast.Compare) and "environ" in ast.unparse(node.comparators[0]):
            key = node.left
        if isinstance(key, ast.Constant):
            found.add(str(key.value))
        elif isinstance(key, ast.Name):
            found |= constants.get(key.id) or {f"<{key.id}>"}
    return found


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("os.environ['A']", {"A"}),
        ("os.environ.get('A', '1')", {"A"}),
        ("os.getenv('A')", {"A"}),
        ("'A' in os.environ", {"A"}),
        ("_X = 'A'\nos.environ.get(_X)", {"A"}),
        ("os.environ.setdefault('A', 'b')", {"A"}),
        ("_X = ('A', 'B')\n[name for name in _X if not os.environ.get(name)]", {"A", "B"}),
        ("os.environ[unknown]", {"<unknown>"}),
        ("f(os.environ)", set()),
    ],
)
def test_reads_of_the_environment_are_found(source: str, names: set[str]) -> None:
    assert environment_names(source) == names


def test_the_page_of_environment_variables_is_that_of_the_code() -> None:
    code: set[str] = set()
    for folder in ("drafters", "evaluation", "fastgen", "kernels", "pipelines"):
        for path in (ROOT / folder).rglob("*.py"):
            code |= environment_names(path.read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    table = "".join(line.split("|")[1] for line in page.splitlines() if line.startswith("| `"))
    sets = page.split("fastgen sets")[1].split("\n\n")[0]
    assert set(re.findall(r"`([A-Z_]+)`", table + sets)) == code


@pytest.mark.parametrize("words", ["is gated", "does not fit into memory", "drawing does not fit", "FASTGEN_DEBUG=1"])
def test_troubleshooting_quotes_messages_of_the_code(words: str) -> None:
    page = " ".join((ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").split())
    assert words in page
    assert any(words in path.read_text(encoding="utf-8") for path in (ROOT / "pipelines").rglob("*.py"))


def test_the_reader_of_blocks() -> None:
    text = (
        "text\n<!-- tests -->\n\n```bash\nls\n```\n<!-- skip: no -->\nwords between\n```python\nx = 1\n```\n"
        "  ```console\n  $ echo a \\\n  > b\n  a b\n  ```\n````text\n```python\nraise\n```\n````\n"
    )
    found = list(blocks(Path("page.md"), text))
    assert [(block.line, block.language, block.marks) for block in found] == [
        (4, "bash", ("tests",)),
        (9, "python", ()),
        (12, "console", ()),
        (17, "text", ()),
    ]
    assert shell_script(found[2]) == "echo a \\\nb\n"
    with pytest.raises(ValueError, match="page.md:1: the block is never closed"):
        list(blocks(Path("page.md"), "```bash\nls\n"))
