"""Tables of `fastgen bench kernels`."""

from __future__ import annotations

from typing import Any

from fastgen.evaluation.report import table_page

__all__ = ["kernels_markdown"]


def kernels_markdown(data: dict[str, Any]) -> str:
    """A result of `fastgen bench kernels`, of operations or of whole models."""
    if data["benchmark"] == "kernels-end-to-end":
        return _end_to_end_markdown(data)
    rows = []
    for row in data["rows"]:
        times = [_microseconds(row[name]) for name in ("eager", "compiled", "triton")]
        gains = [_ratio(row[f"speedup_{name}"]) for name in ("eager", "compiled")]
        speed = f"{row['bytes_per_second'] / 1e9:.0f}"
        if row.get("flops_per_second"):
            speed += f" ({row['flops_per_second'] / 1e12:.0f} TFLOP/s)"
        share = f"{100 * row['roofline_share']:.0f} %"
        calls = [_call(row, name) for name in ("eager", "compiled", "triton")]
        rows.append([row["op"], row["size"], *times, *gains, speed, share, *calls, row["check"], row["auto"] or "-"])
    limits = data["roofline"]
    note = f"Roofline: a copy moves {limits['bytes_per_second'] / 1e9:.0f} GB/s"
    if limits["flops_per_second"]:
        note += f", a bfloat16 matrix product makes {limits['flops_per_second'] / 1e12:.0f} TFLOP/s"
    note += (
        ". Medians in microseconds of GPU time, with an empty cache, or * in a CUDA graph of 20 calls; GB/s are those "
        "of the Triton kernel, where there is none of the compiled or the eager reference. Calls: wall time of a call "
        "in a row of 20, launches counted, of work below a millisecond. auto is what runs by default in eager "
        "mode.\n\n"
    )
    if "note" in data:
        note += data["note"] + "\n\n"
    header = ["op", "size", "eager", "compiled", "Triton", "x eager", "x compiled", "GB/s", "roofline"]
    header += ["call eager", "call compiled", "call Triton", "check", "auto"]
    return table_page(note, header, rows, data)


def _end_to_end_markdown(data: dict[str, Any]) -> str:
    rows = []
    for row in data["rows"]:
        if "note" in row:
            rows.append([row["model"], row["note"], *[""] * 6])
            continue
        ways = ("eager", "eager_kernels", "compiled", "compiled_kernels")
        times = ["-" if row[way] is None else f"{1e3 * row[way]['p50']:.2f}" for way in ways]
        gains = [_ratio(row[f"speedup_{kind}"]) for kind in ("eager", "compiled")]
        rows.append([row["model"], *times, *gains, "-" if row["rms"] is None else f"{row['rms']:.1e}"])
    note = "Medians in milliseconds of one step, bfloat16, random weights; blocks are compiled one by one.\n\n"
    if "note" in data:
        note += data["note"] + "\n\n"
    header = ["model", "eager", "+ kernels", "compiled", "+ kernels", "x eager", "x compiled", "difference (RMS)"]
    return table_page(note, header, rows, data)


def _microseconds(timing: dict[str, Any] | None) -> str:
    if timing is None:
        return "-"
    return f"{1e6 * timing['p50']:.1f}" + ("*" if timing["method"] == "graph" else "")


def _call(row: dict[str, Any], name: str) -> str:
    seconds = row.get("calls", {}).get(name)
    return "-" if seconds is None else f"{1e6 * seconds:.0f}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
