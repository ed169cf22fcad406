"""The list of all benchmarks, and the function that runs them."""

from __future__ import annotations

import contextlib
import gc
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import files, limits, machine, parts, whole
from .detectors import OURS
from .measure import Case, Progress, Skip, Timings, measure, ratios, shares
from .setting import Setting
from .statistics import Quartiles

logger = logging.getLogger(__name__)

REPORT_FORMAT = 1
"""Version of the JSON file; raised when the meaning of its content changes."""


@dataclass(frozen=True)
class Benchmark:
    """A benchmark.

    Attributes:
        name: words separated by slashes, the more general first.
        build: makes the case; raises `Skip` if it cannot be measured.
        weight: approximate duration relative to the others, for the progress bar.
    """

    name: str
    build: Callable[[Setting], Case]
    weight: float = 2.5


def _all() -> Iterator[Benchmark]:
    """All benchmarks, grouped by detector so that few detectors are in memory at a time."""
    yield Benchmark("limits", limits.limits)
    for name in OURS:
        yield Benchmark(f"inference/{name}", partial(whole.inference, name), 9)
        yield Benchmark(f"throughput/{name}", partial(whole.throughput, name), 18)
        yield Benchmark(f"onnx/{name}", partial(whole.onnx, name), 6)
        yield Benchmark(f"stages/{name}", partial(whole.stages, name), 8)
        yield Benchmark(f"training/{name}", partial(whole.training, name), 8)
    yield Benchmark("inference/torchvision", whole.their_inference, 6)
    yield Benchmark("throughput/torchvision", whole.their_throughput, 11)
    yield Benchmark("stages/torchvision", whole.their_stages, 3)
    yield Benchmark("training/torchvision", whole.their_training, 11)
    yield Benchmark("data/train", partial(files.data_loading, True), 4)
    yield Benchmark("data/test", partial(files.data_loading, False), 4)
    for head in parts.HEADS:
        yield Benchmark(f"assignment/{head}", partial(parts.assignment, head))
    for head in parts.HEADS:
        yield Benchmark(f"losses/{head}", partial(parts.losses, head))
    yield Benchmark("focal_loss", parts.focal_loss)
    for head in parts.HEADS:
        yield Benchmark(f"postprocess/{head}", partial(parts.post_processing, head))
    for count in (1000, 5000):
        yield Benchmark(f"nms/{count}", partial(parts.nms, count))
    yield Benchmark("deform_conv/forward", partial(parts.deform_conv, False))
    yield Benchmark("deform_conv/backward", partial(parts.deform_conv, True))
    for part in (
        *(parts.conv3x3, parts.depthwise_conv, parts.concat, parts.weighted_sum),
        *(parts.norm_relu, parts.group_norm_relu),
    ):
        yield Benchmark(f"{part.__name__}/forward", partial(part, False))
        yield Benchmark(f"{part.__name__}/backward", partial(part, True))
    yield Benchmark("evaluation", files.evaluation, 5)
    yield Benchmark("checkpoint/weights", files.weights)
    yield Benchmark("checkpoint/resume", files.checkpoint)
    yield Benchmark("import", files.start_up, 5)


BENCHMARKS = tuple(_all())


def choose(patterns: Sequence[str]) -> list[Benchmark]:
    """Select benchmarks, in their usual order.

    Args:
        patterns: names, their parts before a slash ("inference"), or glob patterns
            ("*/R_50_NAS_head"). Without any, all are selected.

    Raises:
        ValueError: a pattern matches none of them.
    """
    if not patterns:
        return list(BENCHMARKS)

    def fits(name: str, pattern: str) -> bool:
        return name == pattern or name.startswith(f"{pattern}/") or fnmatch(name, pattern)

    for pattern in patterns:
        if not any(fits(b.name, pattern) for b in BENCHMARKS):
            names = ", ".join(b.name for b in BENCHMARKS)
            raise ValueError(f"no benchmark is called {pattern!r}; there are {names}")
    return [b for b in BENCHMARKS if any(fits(b.name, pattern) for pattern in patterns)]


def run(benchmarks: Sequence[Benchmark], setting: Setting) -> dict[str, Any]:
    """Run benchmarks, with progress on stderr, and return the content of the JSON file.

    A benchmark that cannot be measured is `skipped`, and one that raises an exception `failed`; the
    others are run. Ctrl-C ends the run: the report has what was measured until then, and
    `interrupted` is true.
    """
    report = {
        "format": REPORT_FORMAT,
        "machine": machine.describe(setting.device),
        "quick": setting.quick,
        "interrupted": False,
        "cases": [],
    }
    with _Bar(benchmarks) as bar:
        try:
            for benchmark in benchmarks:
                with tempfile.TemporaryDirectory(dir=setting.folder) as folder:
                    own = replace(setting, folder=Path(folder))
                    report["cases"].append(_run_one(benchmark, own, bar.enter(benchmark)))
                gc.collect()
                if setting.cuda:
                    torch.cuda.empty_cache()
        except KeyboardInterrupt:
            report["interrupted"] = True
    return report


def has_failures(report: dict[str, Any]) -> bool:
    """Whether anything in a report raised an exception."""
    return any(
        "failed" in (case["status"], *(v["status"] for v in case.get("variants", ())))
        for case in report["cases"]
    )


def _run_one(benchmark: Benchmark, setting: Setting, progress: Progress) -> dict[str, Any]:
    try:
        progress("preparing", 0)
        case = benchmark.build(setting)
    except Skip as reason:
        return {"name": benchmark.name, "status": "skipped", "reason": str(reason)}
    except Exception as error:
        logger.warning("%s failed", benchmark.name, exc_info=True)
        reason = f"{type(error).__name__}: {error}"
        return {"name": benchmark.name, "status": "failed", "reason": reason}
    timings = measure(case, setting.device, setting.effort, progress)
    return describe_case(benchmark.name, case, timings)


def describe_case(name: str, case: Case, timings: Timings) -> dict[str, Any]:
    """The entry of a case in the report."""
    by_rival, by_limit = ratios(case, timings.seconds), shares(case, timings.seconds)
    variants = []
    for variant in case.variants:
        entry: dict[str, Any] = {"name": variant.name, "theirs": variant.theirs}
        variants.append(entry)
        if variant.name in timings.errors:
            entry |= {"status": "failed", "reason": timings.errors[variant.name]}
            continue
        amount = case.amount if variant.amount is None else variant.amount
        seconds = Quartiles.of(timings.seconds[variant.name])
        entry |= {
            "status": "ok",
            "seconds": seconds.to_json(),
            "memory_bytes": timings.memory.get(variant.name),
            "ratios": {rival: r.to_json() for rival, r in by_rival[variant.name].items()},
        }
        if variant.name in timings.first:
            entry["first_call_seconds"] = timings.first[variant.name]
        if amount is not None:
            rate = seconds.inverse().scaled(amount)
            entry |= {"rate": rate.to_json(), "unit": f"{variant.unit or case.unit}/s"}
        if variant.name in by_limit:
            entry |= {"limit": variant.limit, "share": by_limit[variant.name].to_json()}
    variants += [
        {"name": key, "theirs": False, "status": "skipped", "reason": reason}
        for key, reason in case.unavailable.items()
    ]
    return {
        "name": name,
        "status": "ok",
        "what": case.what,
        "parameters": case.parameters,
        "rivals": list(case.rivals),
        "variants": variants,
    }


class _Bar(contextlib.AbstractContextManager):
    """Progress on stderr: a bar on a terminal, otherwise a line for each benchmark."""

    def __init__(self, benchmarks: Sequence[Benchmark]) -> None:
        self.benchmarks = list(benchmarks)
        self.watched = sys.stderr.isatty()
        self.bar = tqdm(
            total=sum(b.weight for b in benchmarks),
            disable=not self.watched,
            bar_format="{percentage:3.0f}% |{bar:20}| {elapsed}, about {remaining} to go: {desc}",
        )

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def enter(self, benchmark: Benchmark) -> Progress:
        """Start a benchmark, and return the function to report its progress to."""
        number = self.benchmarks.index(benchmark)
        before = sum(b.weight for b in self.benchmarks[:number])
        if not self.watched:
            place = f"[{number + 1}/{len(self.benchmarks)}]"
            print(f"{place} {benchmark.name}", file=sys.stderr, flush=True)

        def progress(what: str, done: float) -> None:
            self.bar.n = before + benchmark.weight * done
            self.bar.set_description_str(f"{benchmark.name}: {what}")

        return progress
