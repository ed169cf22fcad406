"""Formatting of a report as text tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from .memory import RESOLUTION
from .statistics import Quartiles

RATIO_NOTE = (
    "Medians, with quartiles in brackets. A ratio is the time over the rival's in the same rounds: "
    "below 1 is faster.\nMemory is the peak of a call beyond what was in use before, plus the "
    "weights (in training also the optimizer's state);\non CUDA of PyTorch's tensors, on the CPU "
    "resident memory."
)
STATUS_NOTES = {"skipped": "skipped", "failed": "FAILED"}


def format_report(report: dict[str, Any]) -> str:
    """Text of a report: the machine, a table for each case, and what was left out."""
    machine = report["machine"]
    gpu = f", {machine['gpu']}" if machine["gpu"] else ""
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads{gpu}",
        f"torch {machine['torch']}, torchvision {machine['torchvision']}, "
        f"Python {machine['python']}, commit {machine['commit'] or 'unknown'}, {machine['date']}",
        RATIO_NOTE,
    ]
    if report["quick"]:
        lines.append("--quick: small work, few repetitions; these figures say little.")
    if report["interrupted"]:
        lines.append("Interrupted: the rest was not measured.")
    return "\n".join(lines) + "\n\n" + "\n\n".join(map(format_case, report["cases"]))


def format_case(case: dict[str, Any]) -> str:
    """Heading and table of a case."""
    if case["status"] != "ok":
        return f"{case['name']}\n  {STATUS_NOTES[case['status']]}: {case['reason']}"
    parameters = ", ".join(f"{key} {value}" for key, value in case["parameters"].items())
    heading = [case["name"], f"  {case['what']}"] + ([f"  {parameters}"] if parameters else [])
    measured = [v for v in case["variants"] if v["status"] == "ok"]
    rivals = [name for name in case["rivals"] if any(name in v["ratios"] for v in measured)]
    columns: list[list[str]] = [["", *(v["name"] for v in measured)]]
    columns.append(["time", *(_with_quartiles(v["seconds"], seconds_text) for v in measured)])
    for rival in rivals:
        cells = [
            "1" if v["name"] == rival else _with_quartiles(v["ratios"].get(rival), _number)
            for v in measured
        ]
        columns.append([f"/ {rival}", *cells])
    if any("rate" in v for v in measured):
        columns.append(
            ["rate", *(f"{_number(v['rate']['median'])} {v['unit']}" if "rate" in v else ""
                       for v in measured)]
        )  # fmt: skip
    if any("share" in v for v in measured):
        cells = [_with_quartiles(v.get("share"), _percent) for v in measured]
        columns.append(["of the limit", *cells])
    if any("first_call_seconds" in v for v in measured):
        cells = [seconds_text(v["first_call_seconds"]) if "first_call_seconds" in v else ""
                 for v in measured]  # fmt: skip
        columns.append(["first call", *cells])
    if any(v["memory_bytes"] is not None for v in measured):
        columns.append(["memory", *(bytes_text(v["memory_bytes"]) for v in measured)])
    left_out = [
        f"  {v['name']}: {STATUS_NOTES[v['status']]}: {v['reason']}"
        for v in case["variants"]
        if v["status"] != "ok"
    ]
    return "\n".join(heading + aligned(columns) + left_out)


def aligned(columns: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table from the cells of its columns: the first flush left, others flush right."""
    widths = [max(map(len, column)) for column in columns]
    return [
        "  " + "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in zip(*columns, strict=True)
    ]  # fmt: skip


def seconds_text(seconds: float) -> str:
    """A time with three significant digits and a unit."""
    for unit, factor in (("s", 1), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 0.9995 or unit == "us":
            return f"{_number(seconds * factor)} {unit}"
    raise AssertionError("unreachable")


def bytes_text(size: int | None) -> str:
    """A size in MiB; empty if unknown."""
    if size is None:
        return ""
    if size < RESOLUTION:
        return f"< {_number(RESOLUTION / 2**20)} MiB"
    return f"{_number(size / 2**20)} MiB"


def _number(value: float) -> str:
    """A number with three significant digits, or more if it has more integer digits."""
    if value == 0 or not math.isfinite(value):
        return f"{value:.0f}"
    rounded = float(f"{value:.3g}")  # 0.9996 is 1.00
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(rounded))))}f}"


def _percent(share: float) -> str:
    return f"{_number(100 * share)}%"


def _with_quartiles(value: dict[str, float] | None, text: Callable[[float], str]) -> str:
    """Median and quartiles, formatted by `text`; empty for None."""
    if value is None:
        return ""
    summary = Quartiles.from_json(value)
    low, high = text(summary.q1), text(summary.q3)
    if low.split(" ")[1:] == high.split(" ")[1:]:  # name the unit once
        low = low.split(" ")[0]
    return f"{text(summary.median)} ({low} to {high})"
