"""Comparison of two benchmark reports: what became slower or faster."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .machine import SAME_FOR_COMPARISON
from .report import aligned, seconds_text
from .statistics import Quartiles
from .suite import REPORT_FORMAT

SLOWER, FASTER, SAME, NEW, GONE, FAILS, OTHER = (
    "slower", "faster", "as fast", "new", "gone", "fails", "other work",
)  # fmt: skip


class ReportError(ValueError):
    """A file is not a report; the message names the file and the fault."""


@dataclass(frozen=True)
class Change:
    """The change of one variant of one case.

    Attributes:
        name: names of case and variant.
        verdict: `SLOWER` or `FASTER` (by more than the threshold, and beyond the spread of both),
            `SAME`, `NEW`, `GONE`, `FAILS` (was measured before, and now raises an exception), or
            `OTHER` (not comparable, since the parameters changed).
        figure: quantity that is compared: "ratio" (to the main rival), "share" (rate of the limit
            over its own rate, the inverse of the reported share, so that less is better) or
            "seconds".
        old, new: values of the quantity in both reports; None if there is none.
    """

    name: str
    verdict: str
    figure: str = ""
    old: Quartiles | None = None
    new: Quartiles | None = None

    @property
    def factor(self) -> float | None:
        """Factor by which the time grew; None if it is not known in both reports."""
        return None if self.old is None or self.new is None else self.new.median / self.old.median


def read_report(path: str | Path) -> dict[str, Any]:
    """Read a file written by `tools/benchmark.py --json`.

    Raises:
        ReportError: the file cannot be read or is not a report.
    """
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
        if report["format"] != REPORT_FORMAT:
            raise ReportError(
                f"{path} has format {report['format']}, this program reads {REPORT_FORMAT}"
            )
        for case in report["cases"]:
            _figures(case)
        machine_differences(report, report)
    except ReportError:
        raise
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ReportError(f"{path} is no report of tools/benchmark.py: {error!r}") from error
    return report


def machine_differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The differences that affect absolute times (machine, libraries), a line each."""
    return [
        f"{key}: {old['machine'][key]} -> {new['machine'][key]}"
        for key in SAME_FOR_COMPARISON
        if old["machine"][key] != new["machine"][key]
    ]


def compare(old: dict[str, Any], new: dict[str, Any], threshold: float = 1.1) -> list[Change]:
    """The changes of all our variants, case by case.

    The ratio to the main rival is compared if there is one, since it depends least on the machine;
    otherwise the share of a limit, or else seconds. A variant is slower if its median grew by more
    than the factor `threshold` and its lower quartile is above the old upper quartile.
    """
    before, after = ({case["name"]: case for case in report["cases"]} for report in (old, new))
    changes = []
    for name in [*before, *(name for name in after if name not in before)]:
        changes += _compare_case(name, before.get(name), after.get(name), threshold)
    return changes


def _compare_case(
    name: str, old: dict[str, Any] | None, new: dict[str, Any] | None, threshold: float
) -> Iterator[Change]:
    before, after = (_figures(case) if case else {} for case in (old, new))
    changed = before and after and old["parameters"] != new["parameters"]
    for variant in [*before, *(key for key in after if key not in before)]:
        full = f"{name}: {variant}"
        if changed:
            yield Change(full, OTHER)
        elif variant not in before:
            yield Change(full, NEW)
        elif variant not in after:
            yield Change(full, FAILS if _fails(new, variant) else GONE)
        else:
            kinds = ("ratio", "share", "seconds")  # the first that both reports have
            kind = next(k for k in kinds if k in before[variant] and k in after[variant])
            earlier, later = before[variant][kind], after[variant][kind]
            yield Change(full, _verdict(earlier, later, threshold), kind, earlier, later)


def _fails(case: dict[str, Any] | None, variant: str) -> bool:
    if case is None or case["status"] != "ok":
        return case is not None and case["status"] == "failed"
    return any(v["name"] == variant and v["status"] == "failed" for v in case["variants"])


def _verdict(old: Quartiles, new: Quartiles, threshold: float) -> str:
    if new.median > threshold * old.median and new.q1 > old.q3:
        return SLOWER
    if old.median > threshold * new.median and old.q1 > new.q3:
        return FASTER
    return SAME


def _figures(case: dict[str, Any]) -> dict[str, dict[str, Quartiles]]:
    """By variant of ours and kind ("seconds", "ratio", "share"), the values; less is better."""
    if case["status"] != "ok":
        return {}
    figures = {}
    for variant in case["variants"]:
        if variant["status"] != "ok" or variant["theirs"]:
            continue
        figures[variant["name"]] = own = {"seconds": Quartiles.from_json(variant["seconds"])}
        for rival in case["rivals"][:1]:
            if rival in variant["ratios"]:
                own["ratio"] = Quartiles.from_json(variant["ratios"][rival])
        if "share" in variant:
            own["share"] = Quartiles.from_json(variant["share"]).inverse()
    return figures


def format_changes(changes: list[Change], threshold: float) -> str:
    """A table of the changes, worst first, and a line that counts unchanged variants."""
    order = (FAILS, SLOWER, GONE, OTHER, NEW, FASTER)
    shown = sorted(
        (change for change in changes if change.verdict != SAME),
        key=lambda c: (order.index(c.verdict), -(c.factor or 0)),
    )

    def text(change: Change, value: Quartiles | None) -> str:
        if value is None:
            return ""
        show = seconds_text if change.figure == "seconds" else "{:.3g}".format
        return f"{show(value.median)} ({show(value.q1)} to {show(value.q3)})"

    columns = [
        ["", *(c.name for c in shown)],
        ["", *(c.verdict for c in shown)],
        ["factor", *("" if c.factor is None else f"{c.factor:.2f}" for c in shown)],
        ["compared", *(c.figure for c in shown)],
        ["old", *(text(c, c.old) for c in shown)],
        ["new", *(text(c, c.new) for c in shown)],
    ]
    same = len(changes) - len(shown)
    note = f"{same} of {len(changes)} changed by less than {threshold:g} times or their spread."
    return "\n".join([*(aligned(columns) if shown else []), note])
