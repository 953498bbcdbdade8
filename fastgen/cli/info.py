"""`fastgen info`: versions, devices, fast paths and embedded models of this installation.

It is what a bug report starts with, so it must run where something is missing or broken: every part is looked at on
its own, and what goes wrong becomes part of the answer.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import pkgutil
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

import fastgen
from fastgen import _assets
from fastgen.cli.publish import JsonOption
from fastgen.environment import cpu_name

app = typer.Typer(help="Show versions, devices and which fast paths are available.", add_completion=False)

DISTRIBUTION = "fastgen-diffusers"
# Distribution -> module and a name to import from it. diffusers and transformers load their parts when they are asked
# for, so that a broken installation shows only then.
PACKAGES = {
    "torch": ("torch", ""),
    "torchvision": ("torchvision", ""),
    "diffusers": ("diffusers", "ZImagePipeline"),
    "transformers": ("transformers", "JanusForConditionalGeneration"),
    "accelerate": ("accelerate", ""),
    "torchmetrics": ("torchmetrics", ""),
    "open-clip-torch": ("open_clip", ""),
    "triton": ("triton", ""),
}
# Looked up by their metadata only: from a checkout, `import kernels` would find the folder of that name.
OPTIONAL = {
    "matplotlib": "figures of reports and searches",
    "jinja2": "HTML reports",
    "flash-attn": "flash attention outside torch",
    "kernels": "attention kernels from the Hub in diffusers and transformers",
}


def collect() -> dict[str, Any]:
    """Everything `fastgen info` shows, JSON-ready. Never raises because of a missing or broken package."""
    parts: dict[str, Callable[[], Any]] = {
        "packages": _packages,
        "devices": _devices,
        "fast_paths": _fast_paths,
        "models": _models,
        "optional": _optional,
        "conflicts": _conflicts,
    }
    return {
        "fastgen": fastgen.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: _guarded(part) for name, part in parts.items()},
    }


def _guarded(part: Callable[[], Any]) -> Any:
    try:
        return part()
    except Exception as error:  # the report continues without this part
        return {"error": _one_line(error)}


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}{'…' if len(text) > 200 else ''}"


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _packages() -> dict[str, dict[str, str | None]]:
    from fastgen._compat import repair_torchvision

    try:
        torchvision = repair_torchvision()
    except Exception as error:  # torch itself does not import
        torchvision = f"broken: {_one_line(error)}"
    found: dict[str, dict[str, str | None]] = {}
    for distribution, (module, name) in PACKAGES.items():
        version = _version(distribution)
        status, detail = "ok", None
        try:
            imported = importlib.import_module(module)
            if name:
                getattr(imported, name)
            version = version or getattr(imported, "__version__", None)
        except ModuleNotFoundError as error:
            absent = error.name == module and version is None
            status, detail = ("missing", None) if absent else ("broken", _one_line(error))
        except Exception as error:
            status, detail = "broken", _one_line(error)
        found[distribution] = {"version": version, "status": status, "detail": detail}
    state, _, why = torchvision.partition(": ")
    if state == "repaired":
        found["torchvision"] = {
            "version": _version("torchvision"),
            "status": "limited",
            "detail": f"its compiled operators do not load with this torch ({why}); diffusers and transformers fail "
            "where fastgen is not imported first: install the matching build or `pip uninstall torchvision`",
        }
    return found


def _cpu_flags() -> set[str]:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return set(next(line for line in lines if line.startswith(("flags", "Features"))).split())
    except (OSError, StopIteration):
        return set()


def _devices() -> dict[str, Any]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    devices: dict[str, Any] = {"cpu": {"name": cpu_name(), "cores": cores, "torch_threads": torch.get_num_threads()}}
    devices["cuda"] = [
        {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
        }
        for properties in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]
    devices["mps"] = torch.backends.mps.is_available()
    return devices


def _no_cuda() -> str | None:
    """Why there is no CUDA, or None when there is."""
    import torch

    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built without CUDA"
    return "no usable CUDA device or driver"


def _path(reason: str | None, detail: str | None = None) -> dict[str, Any]:
    return {"available": reason is None, "reason": reason, "detail": detail}


def _fast_paths() -> dict[str, dict[str, Any]]:
    return {
        name: _guarded(part)
        for name, part in {
            "triton kernels": _triton_kernels,
            "torch.compile": _compile,
            "flash attention": _flash_attention,
            "bfloat16": _bfloat16,
        }.items()
    }


def _triton_kernels() -> dict[str, Any]:
    import fastgen.kernels

    ops = sorted(module.name for module in pkgutil.iter_modules(fastgen.kernels.__path__) if module.ispkg)
    if (reason := _no_cuda()) is not None:
        return _path(reason, f"PyTorch references run: {', '.join(ops)}")
    try:
        importlib.import_module("triton")
    except Exception as error:
        return _path(_one_line(error))
    return _path(None, ", ".join(ops))


def _compile() -> dict[str, Any]:
    chosen = os.environ.get("CXX", "").split()[:1]
    compiler = next(filter(shutil.which, chosen or ("g++", "clang++", "c++")), None)
    if compiler is None:
        return _path(f"no C++ compiler on PATH (looked for {chosen[0] if chosen else 'g++, clang++, c++'})")
    if (reason := _no_cuda()) is None:
        try:
            importlib.import_module("triton")
        except Exception as error:
            return _path(f"CUDA code needs triton: {_one_line(error)}")
        return _path(None, "CUDA through triton, CPU through C++")
    return _path(None, f"CPU through {compiler}; {reason}")


def _flash_attention() -> dict[str, Any]:
    import torch

    if (reason := _no_cuda()) is not None:
        return _path(reason, "scaled_dot_product_attention runs its fused CPU kernel")
    enabled = {
        name: switch()
        for name, switch in {
            "flash": torch.backends.cuda.flash_sdp_enabled,
            "memory-efficient": torch.backends.cuda.mem_efficient_sdp_enabled,
            "cudnn": torch.backends.cuda.cudnn_sdp_enabled,
            "math": torch.backends.cuda.math_sdp_enabled,
        }.items()
    }
    detail = "scaled_dot_product_attention: " + ", ".join(name for name, on in enabled.items() if on)
    if not enabled["flash"]:
        return _path("switched off in torch.backends.cuda", detail)
    if torch.cuda.get_device_capability() < (8, 0):
        return _path("needs compute capability 8.0 or newer", detail)
    return _path(None, detail)


def _bfloat16() -> dict[str, Any]:
    import torch

    if _no_cuda() is None:
        return _path(None if torch.cuda.is_bf16_supported(including_emulation=False) else "the GPU only emulates it")
    flags = _cpu_flags()
    native = sorted(flags & {"amx_bf16", "avx512_bf16", "bf16"})
    slow = "this CPU has no bfloat16 instructions; it works, slower than float32"
    return _path(None if native else slow, *native[:1])


def _models() -> dict[str, dict[str, Any]]:
    found = {}
    for name in _assets.names():
        problem = _assets.problem(name)
        found[name] = {
            "bytes": _assets.size(_assets.ROOT / name),
            "status": "ok" if problem is None else "unverified",
            "detail": problem,
        }
    return found


def _optional() -> dict[str, dict[str, str | None]]:
    return {name: {"version": _version(name), "use": use} for name, use in OPTIONAL.items()}


def _conflicts() -> list[str]:
    """What shadows this package's name: another project has the same import name and command."""
    found = []
    for other in importlib.metadata.distributions():
        scripts = {entry.name: entry.value for entry in other.entry_points if entry.group == "console_scripts"}
        foreign = not scripts.get("fastgen", "fastgen.cli.main:main").startswith("fastgen.cli.main:")
        name = other.metadata["Name"] or ""
        if name.lower() != DISTRIBUTION and (name.lower() == "fastgen" or foreign):
            found.append(
                f"the distribution {name} {other.version} is another project with the same import name or command: "
                f"pip uninstall {name}, then install {DISTRIBUTION} again"
            )
    command = shutil.which("fastgen")
    if command is not None and b"fastgen.cli.main" not in Path(command).read_bytes():
        found.append(f"the command {command} belongs to another project; `python -m fastgen` runs this one")
    return found


def _lines(info: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Sections of (name, text) rows for people."""

    def rows(part: Any, text: Callable[[dict[str, Any]], str]) -> list[tuple[str, str]]:
        if "error" in part:
            return [("failed", str(part["error"]))]
        return [(name, str(item["error"]) if "error" in item else text(item)) for name, item in part.items()]

    def package(item: dict[str, Any]) -> str:
        state = "" if item["status"] == "ok" else item["status"]
        return "  ".join(filter(None, (item["version"], state, item["detail"])))

    def path(item: dict[str, Any]) -> str:
        word = "yes" if item["available"] else f"no: {item['reason']}"
        return f"{word} ({item['detail']})" if item["detail"] else word

    def model(item: dict[str, Any]) -> str:
        return "  ".join(filter(None, (f"{item['bytes'] / 1e6:.1f} MB", item["status"], item["detail"])))

    devices = info["devices"]
    if "error" in devices:
        device_rows = [("failed", str(devices["error"]))]
    else:
        cpu = devices["cpu"]
        device_rows = [("cpu", f"{cpu['name']}, {cpu['cores']} cores, torch uses {cpu['torch_threads']} threads")]
        for index, gpu in enumerate(devices["cuda"]):
            text = f"{gpu['name']}, capability {gpu['capability']}, {gpu['memory_bytes'] / 2**30:.0f} GiB"
            device_rows.append((f"cuda:{index}", text))
        if not devices["cuda"]:
            device_rows.append(("cuda", "none"))
        device_rows.append(("mps", "yes" if devices["mps"] else "none"))

    def optional(item: dict[str, Any]) -> str:
        return f"{item['version'] or 'not installed'}: {item['use']}"

    return [
        ("Packages", rows(info["packages"], package)),
        ("Devices", device_rows),
        ("Fast paths", rows(info["fast_paths"], path)),
        ("Embedded models", rows(info["models"], model) or [("none", "this installation has no embedded models")]),
        (
            "Optional packages",
            rows(info["optional"], optional),
        ),
    ]


@app.command()
def info(
    as_json: JsonOption = False,
) -> None:
    """Show versions, devices and which fast paths are available."""
    found = collect()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    typer.echo(f"fastgen {found['fastgen']}, Python {found['python']}, {found['platform']}")
    conflicts = found["conflicts"]
    for text in conflicts if isinstance(conflicts, list) else [conflicts["error"]]:
        typer.echo(f"warning: {text}", err=True)
    for title, part in _lines(found):
        typer.echo(f"\n{title}")
        width = max(len(name) for name, _ in part)
        for name, text in part:
            typer.echo(f"  {name:<{width}}  {text}")
