"""Timing side by side: A B C A B C ..., in one process, after a warm-up."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field

import torch

from .memory import peak_bytes
from .statistics import Quartiles, paired_ratio

logger = logging.getLogger(__name__)


class Skip(Exception):
    """Something cannot be measured on this machine; the message says why."""


@dataclass
class Variant:
    """One way to do the work of a case.

    Attributes:
        name: unique within the case.
        run: does the work once.
        theirs: whether it is another library's, measured for comparison.
        amount: amount of work that one call does, in `unit`.
        unit: unit of `amount`; None: the unit of the case.
        limit: name of the variant whose rate bounds the rate of this one; the share of the limit
            that it reaches is reported.
        held_bytes: returns the bytes that are held between calls, such as the weights.
        memory: whether the memory of a call can be measured (not for work in other processes).
        compiles: whether the first calls compile something. They are not counted; the time of the
            very first one is reported.
    """

    name: str
    run: Callable[[], object]
    _: KW_ONLY
    theirs: bool = False
    amount: float | None = None
    unit: str | None = None
    limit: str | None = None
    held_bytes: Callable[[], int] = lambda: 0
    memory: bool = True
    compiles: bool = False


@dataclass
class Case:
    """Variants that are measured side by side.

    Attributes:
        what: description in one line.
        variants: the variants in the order of measurement. Shared state must be unchanged after a
            call.
        rivals: names of the variants by whose times the others' are divided, the main one first.
        parameters: what the measurements depend on; results with other parameters are not compared.
        amount: amount of work that one call of any variant does, in `unit`.
        unit: unit of `amount`.
        unavailable: by name, why a variant cannot be measured here.
    """

    what: str
    variants: list[Variant]
    rivals: Sequence[str] = ()
    parameters: dict[str, object] = field(default_factory=dict)
    amount: float | None = None
    unit: str = ""
    unavailable: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, make: Callable[[], Variant]) -> None:
        """Append the variant that `make` returns; if it raises `Skip`, note why."""
        try:
            self.variants.append(make())
        except Skip as reason:
            self.unavailable[name] = str(reason)


@dataclass(frozen=True)
class Effort:
    """How much time to spend on a case.

    Attributes:
        seconds: time for the timed rounds of a case, within the limits on their number.
        min_rounds, max_rounds: limits on the number of timed rounds.
        warmups: rounds before the timed ones; only one if a round takes longer than `seconds`.
        sample: minimal duration of a sample in seconds; quicker work is repeated within a sample.
    """

    seconds: float
    min_rounds: int
    max_rounds: int
    warmups: int
    sample: float


FULL = Effort(seconds=20, min_rounds=5, max_rounds=50, warmups=2, sample=0.005)
QUICK = Effort(seconds=0.3, min_rounds=2, max_rounds=10, warmups=1, sample=0.001)

COMPILING_CALLS = 4
"""Calls until compilation is complete (CUDA graphs are recorded in the third)."""

Progress = Callable[[str, float], None]
"""Called with a description of the current work and the completed share (0..1) of the case."""


@dataclass
class Timings:
    """The measurements of a case, by name of the variant.

    Attributes:
        seconds: time of a call in each round.
        memory: bytes that a call needs, including those held between calls; None: unknown.
        errors: description of the exception, for variants that raised one; they have no `seconds`.
        first: seconds of the first call, for variants that compile.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)
    memory: dict[str, int | None] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    first: dict[str, float] = field(default_factory=dict)


def measure(
    case: Case, device: torch.device, effort: Effort, progress: Progress = lambda what, done: None
) -> Timings:
    """Time the variants of a case in turns, and measure the memory of one call of each.

    A variant that raises an exception is left out from then on; the others are measured.

    Args:
        case: the case.
        device: device to wait for, and whose memory is measured.
        effort: how much time to spend.
        progress: called before each step.
    """
    timings = Timings()
    variants = list(case.variants)
    calls: dict[str, int] = {}

    def in_turn(what: str, start: float, end: float, action: Callable[[Variant], None]) -> None:
        for index, variant in enumerate(tuple(variants)):
            done = start + (end - start) * index / len(case.variants)
            progress(f"{what}: {variant.name}", done)
            try:
                action(variant)
            except Exception as error:
                logger.warning("%s failed", variant.name, exc_info=True)
                timings.errors[variant.name] = f"{type(error).__name__}: {error}"
                variants.remove(variant)

    def compile(variant: Variant) -> None:
        if variant.compiles:
            timings.first[variant.name] = _seconds(variant.run, 1, device)
            _seconds(variant.run, COMPILING_CALLS - 1, device)

    def warm_up(variant: Variant) -> None:
        seconds = _seconds(variant.run, 1, device)
        # The first call also allocates memory and fills caches, so a quick one is repeated.
        if seconds < effort.sample:
            seconds = _seconds(variant.run, 1, device)
        calls[variant.name] = max(1, math.ceil(effort.sample / max(seconds, 1e-7)))

    def sample(variant: Variant) -> None:
        seconds = _seconds(variant.run, calls[variant.name], device)
        timings.seconds.setdefault(variant.name, []).append(seconds)

    def peak(variant: Variant) -> None:
        extra = peak_bytes(variant.run, device) if variant.memory else None
        timings.memory[variant.name] = None if extra is None else extra + variant.held_bytes()

    in_turn("compiling", 0, 0, compile)
    for number in range(effort.warmups):
        started = time.perf_counter()
        in_turn("warm-up", 0.1 * number, 0.1 * (number + 1), warm_up)
        if time.perf_counter() - started > effort.seconds:
            break
    in_turn("memory", 0.2, 0.3, peak)

    rounds, number, started = effort.min_rounds, 0, time.perf_counter()
    while variants and number < rounds:
        start, step = 0.3 + 0.7 * number / rounds, 0.7 / rounds
        in_turn(f"round {number + 1} of {rounds}", start, start + step, sample)
        number += 1
        if number == 1:
            affordable = int(effort.seconds / (time.perf_counter() - started))
            rounds = min(effort.max_rounds, max(effort.min_rounds, affordable))
    for name in timings.errors:
        timings.seconds.pop(name, None)
    return timings


def ratios(case: Case, seconds: Mapping[str, Sequence[float]]) -> dict[str, dict[str, Quartiles]]:
    """By variant and rival: the variant's time over the rival's in the same rounds."""
    return {
        name: {
            rival: paired_ratio(values, seconds[rival])
            for rival in case.rivals
            if rival in seconds and rival != name
        }
        for name, values in seconds.items()
    }


def shares(case: Case, seconds: Mapping[str, Sequence[float]]) -> dict[str, Quartiles]:
    """By variant with a limit: its rate over the rate of the limit in the same rounds."""
    by_name = {variant.name: variant for variant in case.variants}
    found = {}
    for name, values in seconds.items():
        variant = by_name[name]
        if variant.limit in seconds:
            limit = by_name[variant.limit]
            relative = paired_ratio(seconds[variant.limit], values)
            found[name] = relative.scaled(variant.amount / limit.amount)
    return found


def _seconds(run: Callable[[], object], calls: int, device: torch.device) -> float:
    """Mean seconds of a call over `calls` in a row."""
    synchronize(device)
    started = time.perf_counter()
    for _ in range(calls):
        run()
    synchronize(device)
    return (time.perf_counter() - started) / calls


def synchronize(device: torch.device) -> None:
    """Wait until a CUDA device has completed its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
