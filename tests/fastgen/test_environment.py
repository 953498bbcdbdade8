"""What a result says of where it was made."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastgen.environment as environment


@pytest.mark.parametrize("named", ["abc123", "", None])
def test_a_commit_without_a_repository_is_the_one_that_is_named(
    named: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "fastgen" / "environment.py"))
    monkeypatch.delenv("FASTGEN_COMMIT", raising=False)
    if named is not None:
        monkeypatch.setenv("FASTGEN_COMMIT", named)
    assert environment.commit() == (named or None)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_repository_goes_before_what_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "fastgen" / "environment.py"
    file.parent.mkdir()
    file.write_text("x = 1\n")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr(environment, "__file__", str(file))
    monkeypatch.setenv("FASTGEN_COMMIT", "abc123")
    found = environment.commit()
    assert found is not None and len(found) == 12 and not found.endswith("+")
    file.write_text("x = 2\n")
    assert environment.commit() == found + "+"


def test_versions_name_python() -> None:
    assert environment.versions(()) == {"python": ".".join(map(str, sys.version_info[:3]))}
