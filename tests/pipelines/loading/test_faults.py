"""What the Hub and the libraries raise becomes one line, wherever it is raised."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors

from fastgen.errors import FastgenError
from fastgen.evaluation.verifiers.hub import snapshot
from fastgen.pipelines.loading.checkpoint import download, find_checkpoint
from fastgen.pipelines.loading.faults import explained
from fastgen.pipelines.loading.load_options import LoadOptions, LoRA


def made(kind: type[Exception], text: str) -> Exception:
    return kind.__new__(kind, text)  # their constructors want a response of the HTTP library of the day


CONNECT, TIMEOUT = type("ConnectError", (Exception,), {}), type("ReadTimeout", (Exception,), {})
OF_HUB: list[tuple[Exception, str]] = [
    (made(errors.GatedRepoError, "gated"), "is gated: accept its terms"),
    (made(errors.RepositoryNotFoundError, "no"), "not on the Hub, or private"),
    (made(errors.RevisionNotFoundError, "no"), "no such revision"),
    (made(errors.RemoteEntryNotFoundError, "no"), "lacks a file on the Hub: RemoteEntry"),
    (made(errors.OfflineModeIsEnabled, "offline"), "hf download owner/name"),
    (made(errors.LocalEntryNotFoundError, "no"), "hf download owner/name"),
    (CONNECT("no route"), "hf download owner/name"),
    (TIMEOUT("slow"), "hf download owner/name"),
    (made(errors.HfHubHTTPError, "500 oops"), "the Hub answered: HfHubHTTPError"),
    (OSError(28, "No space left on device"), "cannot be downloaded"),
]


def lora(name: str) -> None:
    LoRA(name).load(SimpleNamespace(load_lora_weights=lambda *_, **__: huggingface_hub.snapshot_download()), "one")


def verifier(name: str) -> None:
    snapshot("clip-score", name, ["*.json"])


@pytest.mark.parametrize("place", [find_checkpoint, download, lora, verifier])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(("error", "line"), OF_HUB, ids=lambda value: type(value).__name__)
def test_errors_of_the_hub(
    place: Callable[[str], Any], wrapped: bool, error: Exception, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        if wrapped:  # as loaders do
            raise ValueError("something went wrong\nbadly") from error
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(FastgenError, match=line) as caught:
        place("owner/name")
    assert "owner/name" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError(), "it does not fit into memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "it does not fit into memory"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried"), "it does not fit into memory"),
        (pickle.UnpicklingError("x"), "it: a weight file is no archive of tensors"),
        (KeyError("layers\n"), "it cannot be loaded: KeyError: 'layers"),
        (AssertionError(), "it cannot be loaded: AssertionError$"),
        (FastgenError("a line of ours"), "^a line of ours$"),
        (OSError("no such file"), "it cannot be loaded: OSError: no such file"),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_errors_of_libraries(error: Exception, line: str, wrapped: bool) -> None:
    if wrapped and "memory" not in line and "archive" not in line:
        pytest.skip("the outer one says more")
    with pytest.raises(FastgenError, match=line), explained("it"):
        if wrapped:
            raise ValueError("outer") from error
        raise error


def test_a_pipeline_that_cannot_be_placed_says_so(tmp_path: Path) -> None:
    def enable_model_cpu_offload(device: object) -> None:
        raise NotImplementedError("needs\nhooks")

    pipe = SimpleNamespace(enable_model_cpu_offload=enable_model_cpu_offload)
    with pytest.raises(FastgenError, match="^offload: SimpleNamespace cannot do 'model': .*: needs hooks$"):
        LoadOptions.place(pipe, torch.device("cuda"), "model")
