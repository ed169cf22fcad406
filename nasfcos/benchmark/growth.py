"""Measure how time and memory grow with the size of the work, one axis at a time."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..ops import batched_nms
from . import machine
from .detectors import inference_call, optimized_detector, our_detector, our_training, training_call
from .inputs import (
    NUM_CLASSES,
    generator,
    head_outputs,
    map_shapes,
    random_target,
    smooth_image,
)
from .measure import QUICK, Case, Effort, Skip, Variant, measure
from .memory import RESOLUTION
from .parts import HEADS, head_maps, our_head
from .report import aligned, bytes_text, seconds_text
from .setting import Setting
from .statistics import Quartiles, growth_exponent

logger = logging.getLogger(__name__)

GROWTH_FORMAT = 1
EFFORT = Effort(seconds=15, min_rounds=3, max_rounds=9, warmups=1, sample=0.002)
MODEL = "R_50_NAS_head"
SMALL = (128, 128)
"""(height, width) of images on axes that do not depend on their size."""
MEDIUM = (512, 640)
LABELS = {"fcos": "FCOS", "retinanet": "RetinaNet"}


@dataclass(frozen=True)
class Axis:
    """A quantity that grows.

    Attributes:
        name: name for --only and for the file of its plot.
        label: label for plots, with the unit.
        what: one line on what is measured.
        values: values of the axis, in rising order.
        prepare: returns a function from a value to the case to measure there. Both may raise
            `Skip` if something cannot be measured.
    """

    name: str
    label: str
    what: str
    values: tuple[int, ...]
    prepare: Callable[[Setting], Callable[[int], Case]]


# ------------------------------------------------------------------------------------------- cases
def _image_sizes(setting: Setting) -> Callable[[int], Case]:
    largest_trained = 384 if setting.device.type == "cpu" else 1024
    model_case = _model_cases(setting)

    def case(pixels: int) -> Case:
        side = math.isqrt(pixels)
        return model_case((side, side), 1, training=side <= largest_trained)

    return case


def _batches(setting: Setting) -> Callable[[int], Case]:
    model_case = _model_cases(setting)
    return lambda images: model_case(SMALL, images, training=True)


def _model_cases(setting: Setting) -> Callable[..., Case]:
    device = setting.device
    plain = our_detector(MODEL, MEDIUM, device)
    fast = optimized_detector(plain, torch.float32, False)
    trained = our_training(MODEL, SMALL, device)

    def case(size: tuple[int, int], batch: int, training: bool) -> Case:
        images = [smooth_image(*size).to(device) for _ in range(batch)]
        targets = [random_target(*size, seed=i, device=device) for i in range(batch)]
        variants = [
            Variant("inference, plain", inference_call(plain, images)),
            Variant("inference, optimized", inference_call(fast, images)),
        ]
        if training:
            step = training_call(*trained, images, targets)
            variants.append(Variant("training step", step))
        return Case("", variants)

    return case


def _objects(setting: Setting) -> Callable[[int], Case]:
    def case(objects: int) -> Case:
        made = Case("", [])
        for name in HEADS:
            target = random_target(*MEDIUM, objects=objects, device=setting.device)
            _add_losses(made, name, target, NUM_CLASSES, MEDIUM, setting)
        return made

    return case


def _classes(setting: Setting) -> Callable[[int], Case]:
    size = (256, 320)

    def case(classes: int) -> Case:
        made = Case("", [])
        for name in HEADS:
            target = random_target(*size, classes=classes, device=setting.device)
            head, maps = _add_losses(made, name, target, classes, size, setting)
            detached = tuple([x.detach() for x in levels] for levels in maps)
            detect = torch.inference_mode()(lambda h=head, m=detached: h.detect(m, [size]))
            made.variants.append(Variant(f"{LABELS[name]}: post-processing", detect))
        return made

    return case


def _add_losses(
    case: Case,
    name: str,
    target: dict[str, Tensor],
    classes: int,
    size: tuple[int, int],
    setting: Setting,
) -> tuple[torch.nn.Module, tuple[list[Tensor], ...]]:
    """Add target assignment, and losses with gradients; return the head and its output maps."""
    maps = head_maps(name, size, setting.device, classes=classes)
    leaves = [x.requires_grad_() for levels in maps for x in levels]
    head = our_head(name, classes, setting.device)
    shapes = map_shapes(*size)

    def losses() -> None:
        sum(head.losses(maps, [target]).values()).backward()
        for leaf in leaves:
            leaf.grad = None

    label = LABELS[name]
    case.variants.append(Variant(f"{label}: assignment", lambda: head.assign(shapes, [target])))
    case.variants.append(Variant(f"{label}: assignment and losses", losses))
    return head, maps


def _detections(setting: Setting) -> Callable[[int], Case]:
    return lambda count: _detection_case(count, setting.device)


def _detection_case(count: int, device: torch.device) -> Case:
    random = generator(count)
    maps = head_outputs(*MEDIUM, objects=0)
    total = sum(x.numel() for x in maps[0])
    sure = torch.randperm(total, generator=random)[:count].sort().values
    first = 0
    for level in maps[0]:
        own = sure[(sure >= first) & (sure < first + level.numel())] - first
        level.fill_(-10.0).view(-1)[own] = torch.rand(len(own), generator=random) * 4 - 2
        first += level.numel()
    maps = tuple([x.to(device) for x in levels] for levels in maps)
    head = our_head("fcos", NUM_CLASSES, device)

    objects = random_target(800, 1088, objects=max(1, count // 10), seed=1)
    which = torch.arange(count) % len(objects["boxes"])
    near = objects["boxes"][which] + torch.randn(count, 4, generator=random)
    near, labels = near.to(device), objects["labels"][which].to(device)
    scores = torch.rand(count, generator=random).to(device)
    place = torch.arange(count)
    corner = 10.0 * torch.stack((place % 1000, place // 1000), dim=1)
    apart = torch.cat((corner, corner + 5), dim=1).to(device)
    one_class = torch.ones_like(labels)
    calls = {
        "post-processing": torch.inference_mode()(lambda: head.detect(maps, [MEDIUM])),
        "NMS, 80 classes, ten boxes an object": lambda: batched_nms(
            near, scores, labels, 0.6, legacy=True
        ),
        "NMS, one class, no overlap": lambda: batched_nms(
            apart, scores, one_class, 0.6, legacy=True
        ),
    }
    return Case("", [Variant(name, call) for name, call in calls.items()])


AXES = (
    Axis("image", "image size (pixels)", f"{MODEL}: one square image",
         tuple(side**2 for side in (128, 192, 256, 384, 512, 768)), _image_sizes),
    Axis("batch", "images in a batch", f"{MODEL}: images of {SMALL[0]}x{SMALL[1]}",
         (1, 2, 4, 8), _batches),
    Axis("objects", "objects in the image",
         f"one image of {MEDIUM[0]}x{MEDIUM[1]}, {NUM_CLASSES} classes",
         (1, 3, 10, 30, 100, 300, 1000), _objects),
    Axis("classes", "classes", "one image of 256x320 with ten objects",
         (1, 3, 10, 30, 100, 300, 1200), _classes),
    Axis("detections", "candidates (post-processing) or boxes (NMS)",
         f"one image of {MEDIUM[0]}x{MEDIUM[1]}, {NUM_CLASSES} classes",
         (10, 30, 100, 300, 1000, 3000, 10000), _detections),
)  # fmt: skip
PROCESSES = (1, 2)


# --------------------------------------------------------------------------------------- measuring
def measure_growth(names: Sequence[str], setting: Setting) -> dict[str, Any]:
    """Measure the axes of these names (without names: all), with progress on stderr.

    Values that cannot be measured, or raise an exception, are reported with the axis, and the
    others are measured. Ctrl-C ends the run: the report has the axes that are done, and
    `interrupted` is true.

    Returns:
        The content of the JSON file.

    Raises:
        ValueError: unknown name.
    """
    known = [axis.name for axis in AXES] + ["processes"]
    for name in names:
        if name not in known:
            raise ValueError(f"no axis is called {name!r}; there are {', '.join(known)}")
    chosen = [axis for axis in AXES if not names or axis.name in names]
    report = {
        "format": GROWTH_FORMAT,
        "machine": machine.describe(setting.device),
        "interrupted": False,
        "axes": [],
    }
    try:
        for axis in chosen:
            report["axes"].append(_measure_axis(axis, setting))
        if not names or "processes" in names:
            report["axes"].append(_measure_processes(setting))
    except KeyboardInterrupt:
        report["interrupted"] = True
    return report


def _measure_axis(axis: Axis, setting: Setting) -> dict[str, Any]:
    """Measure all values in turns, so that a slowdown of the machine does not bend the curves."""
    entry = _new_entry(axis.name, axis.label, axis.what)
    together = Case("", [])
    points: list[tuple[str, str, int]] = []  # unique name, curve, value
    with _noting_failure(entry, "all values"):
        make = axis.prepare(setting)
        for value in axis.values[:3] if setting.quick else axis.values:
            with _noting_failure(entry, str(value)):
                for variant in make(value).variants:
                    unique = f"{variant.name}, {value}"
                    points.append((unique, variant.name, value))
                    together.variants.append(replace(variant, name=unique))
    bar_format = "{desc} {percentage:3.0f}% |{bar:20}| {elapsed}, about {remaining} to go"
    watched = sys.stderr.isatty()
    if not watched:
        print(axis.name, file=sys.stderr, flush=True)
    with tqdm(total=1.0, desc=axis.name, bar_format=bar_format, disable=not watched) as bar:
        effort = QUICK if setting.quick else EFFORT
        timings = measure(
            together, setting.device, effort, lambda _, done: bar.update(done - bar.n)
        )
    entry["errors"] |= timings.errors
    for unique, curve, value in points:
        if unique in timings.seconds:
            _add_point(entry, curve, value, timings.seconds[unique], timings.memory[unique])
    return _finish(entry)


@contextmanager
def _noting_failure(entry: dict[str, Any], key: str) -> Iterator[None]:
    """Note an exception in the block under `key` in the axis' entry, and continue after it."""
    try:
        yield
    except Skip as reason:
        entry["left_out"][key] = str(reason)
    except Exception as error:
        logger.warning("%s, %s failed", entry["name"], key, exc_info=True)
        entry["errors"][key] = f"{type(error).__name__}: {error}"


def _measure_processes(setting: Setting) -> dict[str, Any]:
    """Measure training steps of one and of two processes under torchrun, one image each."""
    entry = _new_entry(
        "processes",
        "processes",
        f"{MODEL}: a training step of one image of {SMALL[0]}x{SMALL[1]} for each process, one "
        "thread each, through torchrun",
    )
    for count in PROCESSES:
        print(f"processes: {count}", file=sys.stderr, flush=True)
        with TemporaryDirectory(dir=setting.folder) as folder:
            result = Path(folder) / "result.json"
            command = [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
                *(f"--nproc_per_node={count}", "-m", "nasfcos.benchmark.scaling"),
                *(setting.device.type, MODEL, *map(str, SMALL), str(result)),
            ]
            if setting.cuda and torch.cuda.device_count() < count:
                entry["left_out"][str(count)] = f"{torch.cuda.device_count()} GPUs"
                continue
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0 or not result.exists():
                logger.warning("%d processes failed:\n%s", count, done.stderr)
                entry["errors"][str(count)] = f"torchrun ended with code {done.returncode}"
                continue
            found = json.loads(result.read_text())
            if found["processes"] != count or not found["agree"]:
                entry["errors"][str(count)] = "the processes did not train together"
                continue
        _add_point(entry, "training step", count, found["seconds"], found["memory_bytes"])
    return _finish(entry)


def _new_entry(name: str, label: str, what: str) -> dict[str, Any]:
    return {
        "name": name, "label": label, "what": what, "curves": [], "left_out": {}, "errors": {},
    }  # fmt: skip


def _add_point(
    entry: dict[str, Any], curve: str, x: int, seconds: Sequence[float], memory: int | None
) -> None:
    curves = {c["name"]: c for c in entry["curves"]}
    if curve not in curves:
        entry["curves"].append({"name": curve, "points": []})
        curves[curve] = entry["curves"][-1]
    point = {"x": x, "seconds": Quartiles.of(seconds).to_json(), "memory_bytes": memory}
    curves[curve]["points"].append(point)


def _finish(entry: dict[str, Any]) -> dict[str, Any]:
    """Add the exponents of growth; None for fewer than three measured points."""
    for curve in entry["curves"]:
        points = curve["points"]
        x = [point["x"] for point in points]
        times = [point["seconds"]["median"] for point in points]
        memory = [point["memory_bytes"] or 0 for point in points]
        known = [m if m >= RESOLUTION else 0 for m in memory]
        for key, values in (("time_exponent", times), ("memory_exponent", known)):
            measured = sum(value > 0 for value in values)
            curve[key] = growth_exponent(x, values) if measured >= 3 else None
    return entry


def has_errors(report: dict[str, Any]) -> bool:
    """Whether anything in a report raised an exception."""
    return any(axis["errors"] for axis in report["axes"])


def format_growth(report: dict[str, Any]) -> str:
    """A table for each axis: times and memory along each curve, and their exponents."""
    end = ["Interrupted: the rest was not measured."] if report["interrupted"] else []
    return "\n\n".join([*map(_format_axis, report["axes"]), *end])


def _format_axis(axis: dict[str, Any]) -> str:
    values = sorted({point["x"] for curve in axis["curves"] for point in curve["points"]})
    columns: list[list[str]] = [["", *(str(x) for x in values), "exponent"]]
    for curve in axis["curves"]:
        points = {point["x"]: point for point in curve["points"]}
        times = [seconds_text(points[x]["seconds"]["median"]) if x in points else ""
                 for x in values]  # fmt: skip
        sizes = [bytes_text(points[x]["memory_bytes"]) if x in points else "" for x in values]
        columns.append([curve["name"], *times, _exponent_text(curve["time_exponent"])])
        columns.append(["memory", *sizes, _exponent_text(curve["memory_exponent"])])
    lines = [axis["name"], f"  {axis['what']}; down: {axis['label']}"]
    lines += _stacked(columns)
    lines += [f"  {key}: skipped: {reason}" for key, reason in axis["left_out"].items()]
    lines += [f"  {key}: FAILED: {reason}" for key, reason in axis["errors"].items()]
    return "\n".join(lines)


def _exponent_text(exponent: float | None) -> str:
    return "-" if exponent is None else f"{exponent:.2f}"


def _stacked(columns: list[list[str]], curves: int = 2) -> list[str]:
    """Lines of tables, one below the other, of `curves` curves each, to keep lines short."""
    first, rest = columns[0], columns[1:]
    lines = []
    for start in range(0, len(rest), 2 * curves):
        lines += aligned([first, *rest[start : start + 2 * curves]])
    return lines
