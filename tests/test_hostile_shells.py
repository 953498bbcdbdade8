"""Real processes in an ASCII locale, with names that are not UTF-8 and a standard output that cannot be written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full and fork")

Ask = Callable[..., dict[str, Any]]
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
RING = ["generate", "a ring", "--steps", "1"]
RENDERS = ["eval", "shapes", "--model", "renders", "--limit", "2", "--images-per-prompt", "1"]
BENCH = ["bench", "generate", "--runs", "1"]
UTF8, LATIN = "gr\xfcn".encode().decode("latin-1"), "caf\xe9"  # bytes, one a character


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """Runs a command in a process of its own, in a folder that has a result in a.json."""
    home = tmp_path_factory.mktemp("shell")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHON"))}
    command = [sys.executable, str(Path(__file__).parent / "helpers/warm.py")]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    variables = environment | ASCII | {"FASTGEN_CACHE": str(home / "cache")}
    count = 0
    with subprocess.Popen(command, env=variables, **pipes) as process:
        assert process.stdin and process.stdout

        def call(words: list[str], stdout: str = "file", inside: str = "") -> dict[str, Any]:
            nonlocal count
            count += 1
            folder = home / str(count)
            work = os.path.join(os.fsencode(folder), inside.encode("latin-1"))
            os.makedirs(work)
            if result.exists():
                os.symlink(result, os.path.join(work, b"a.json"))
            request = {"words": words, "folder": str(folder), "inside": inside, "stdout": stdout}
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            return {**json.loads(process.stdout.readline()), "folder": folder}

        result = home / "scores.json"
        made = call([*RENDERS, "--out", "new"])
        assert made["code"] == 0, made
        (made["folder"] / "new/scores.json").rename(result)
        yield call
        process.stdin.close()


QUICK = [["--version"], ["eval", "--help"], RING, ["eval", "report", "a.json", "-o", "r.md"]]
SLOW = [
    *([], ["--help"], ["train", "--help"], ["info"], ["info", "--json"], [*RING, "--json"], RENDERS, ["models"]),
    *(
        [*RENDERS, "--json"],
        ["models", "--json"],
        ["eval", "compare", "a.json", "a.json"],
        ["bench", "speculative", "-h"],
    ),
]
ALL = [*QUICK, *(pytest.param(words, marks=pytest.mark.slow) for words in SLOW)]


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_a_standard_output_that_cannot_be_written_is_one_line_or_nothing(words: list[str], ask: Ask) -> None:
    full = ask(words, "/dev/full")
    if words:  # the help of a call without words goes to standard error in some releases
        assert (full["code"], full["err"]) == (2, "error: [Errno 28] No space left on device\n")
    for stdout in ("broken", "closed"):
        ended = ask(words, stdout)
        assert ended["code"] == 141 if words else ended["code"] in (2, 141)
        assert not words or ended["err"] == ""
    if words[:1] == ["generate"]:
        for done in (full, ended):
            assert (done["folder"] / "out.png").is_file() and (done["folder"] / "out.json").is_file()


def test_an_error_needs_no_standard_output(ask: Ask) -> None:
    for stdout in ("/dev/full", "broken", "closed"):
        ended = ask(["generate", "a ring", "--device", "meta"], stdout)
        assert ended["code"] == 2 and ended["err"].startswith("error: device: 'meta' cannot be used")
        assert ended["err"].count("\n") == 1


def named(name: str) -> list[list[str]]:
    """Every place of the command line that takes a name or a text."""
    return [
        ["generate", name],
        ["generate", f"--{name}"],
        [*RING, "-o", f"{name}.png"],
        [*RING, "--model", f"./{name}"],
        [*RING, "--negative-prompt", name],
        ["generate", "--prompts-file", name],
        ["eval", name],
        [*RENDERS, "--out", name],
        ["eval", "geneval", "--metadata", name, "--detector", "shapes"],
        ["eval", "fid", name, "--reference", name],
        ["eval", "compare", name, name],
        ["eval", "report", "a.json", "-o", f"{name}.html"],
        ["eval", "report", "a.json", "-o", "r.html", "--title", name],
        [*BENCH, "--out", f"{name}.json"],
        ["bench", "speculative", "--variant", name],
        ["train", "vae", "-o", name],
        [name],
    ]


@pytest.mark.parametrize("name", [LATIN, pytest.param(UTF8, marks=pytest.mark.slow)])
def test_names_that_the_locale_cannot_decode_end_in_one_line(name: str, ask: Ask) -> None:
    for words in named(name):
        ended = ask(words)
        err = ended["err"]
        assert ended["code"] == 2 and ended["out"] == "" and err.startswith("error: ") and err.count("\n") == 1, ended
        assert err.isascii() and os.listdir(ended["folder"]) == ["a.json"]


@pytest.mark.parametrize("inside", [LATIN, pytest.param(UTF8, marks=pytest.mark.slow)])
def test_commands_work_in_a_folder_whose_name_is_not_text(inside: str, ask: Ask) -> None:
    for words in ([*RING, "--json"], [*RENDERS, "--json"], ["eval", "report", "a.json", "-o", "r.html"]):
        ended = ask(words, inside=inside)
        assert ended["code"] == 0 and "Traceback" not in ended["err"], ended


@pytest.mark.slow
@pytest.mark.parametrize("closing", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-", "> /dev/full"])
def test_a_shell_that_closes_streams(closing: str, tmp_path: Path) -> None:
    """The same through a whole start and end of Python."""
    words = f"exec '{sys.executable}' -m fastgen --version {closing}"
    done = subprocess.run(["sh", "-c", words], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == {"<&-": 0, "2>&-": 0, "> /dev/full": 2}.get(closing, 141)
    assert done.stderr == ("error: [Errno 28] No space left on device\n" if "full" in closing else "")
