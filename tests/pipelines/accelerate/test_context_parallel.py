"""Context parallelism in two processes on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HELPERS = Path(__file__).parents[2] / "helpers"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux", "qwen-image"])
def test_two_processes_draw_the_picture_of_one(name: str, tmp_path: Path) -> None:
    command = [sys.executable, str(HELPERS / "context_parallel.py")]
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store"), name], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    for output in outputs:
        found = json.loads(output.splitlines()[-1])
        assert found["reason"] == "diffusers needs a GPU for each process"
        assert found["twice"] == "parallelism is enabled already"
        assert found["difference"] < 1e-4 and found["same"] and found["left"] == []
    tokens = {tuple(json.loads(output.splitlines()[-1])["tokens"]) for output in outputs}
    assert all(each > 0 for row in tokens for each in row)
