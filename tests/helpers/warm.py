"""A Python that has imported everything, in a locale of its own, and forks a real process for each command.

The children skip Python's slow shutdown, except for the last flush of standard output.

    python warm.py < requests > answers          one JSON object a line

A request: {"words": [...], "folder": ..., "inside": ..., "stdout": "file" | "/dev/full" | "closed" | "broken"}. The
working directory is `inside` in `folder`; words and `inside` are latin-1 of their bytes.
The answer: {"code", "out", "err"}, bytes as latin-1. The child ends as any Python does: what is wrong then shows.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from typing import Any

MODULES = (
    "fastgen.cli.generate",
    "fastgen.cli.eval",
    "fastgen.cli.bench",
    "fastgen.cli.info",
    "fastgen.cli.train",
    "fastgen.evaluation.shapesworld",
    "fastgen.evaluation.report_page",
    "fastgen.pipelines.loading.loader",
    "fastgen.pipelines.noise_search",
    "fastgen.training.engine",
    "diffusers.pipelines.z_image.pipeline_z_image",
    "transformers.models.qwen3.modeling_qwen3",
)


def become(request: dict[str, Any]) -> None:
    """Turn this child into the process that a shell would have started."""
    import torch

    torch.set_num_threads(1)
    folder = os.fsencode(request["folder"])
    for number, name in ((1, b"out"), (2, b"err")):
        os.dup2(os.open(folder + b"." + name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    where = request["stdout"]
    if where == "/dev/full":
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    elif where == "broken":
        reader, writer = os.pipe()
        os.dup2(writer, 1)
        os.close(reader)
        os.close(writer)
    os.chdir(os.path.join(folder, request["inside"].encode("latin-1")))
    sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), write_through=True)
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w", closefd=False)))
    if where == "closed":
        os.close(1)
        sys.stdout = None  # as Python starts with it
    sys.__stdout__ = sys.stdout
    sys.argv = ["fastgen", *(os.fsdecode(word.encode("latin-1")) for word in request["words"])]


def serve() -> None:
    import importlib

    for name in MODULES:
        importlib.import_module(name)
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    for line in sys.stdin.buffer:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            signal.alarm(120)
            become(request)
            return
        _, status = os.waitpid(child, 0)
        answer: dict[str, Any] = {"code": os.waitstatus_to_exitcode(status)}
        for name in ("out", "err"):
            with open(os.fsencode(request["folder"]) + b"." + name.encode(), "rb") as file:
                answer[name] = file.read().decode("latin-1")
        print(json.dumps(answer), file=answers, flush=True)
    os._exit(0)


def end() -> None:
    """Run the command and end as Python does."""
    import traceback

    from fastgen.cli.main import main

    code: Any = 1
    try:
        main()
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        print(f"Exception ignored on flushing sys.stdout: {error}", file=sys.stderr)
        code = 120
    os._exit(code)


if __name__ == "__main__":
    serve()
    end()
