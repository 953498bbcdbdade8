"""`fastgen generate` in this process."""

from __future__ import annotations

import pytest

from fastgen.cli.main import run


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    code = run(["generate", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err
