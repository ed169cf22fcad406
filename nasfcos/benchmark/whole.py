"""Benchmarks of whole detectors: latency, throughput, training, and their stages."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from ..models import export_detector, export_onnx
from ..models.inference import InferenceDetector
from ..search.cost import multiply_adds
from .detectors import (
    CANDIDATES,
    THEIR_FCOS,
    THEIR_RETINANET,
    inference_call,
    optimized_detector,
    our_detector,
    our_step,
    their_detector,
    their_step,
)
from .inputs import NUM_CLASSES, OBJECTS, random_target, smooth_image
from .limits import COPY, GIGABYTES, MULTIPLY_ADDS, copy_limit, matmul_limit, matmul_name
from .measure import Case, Skip, Variant
from .memory import storage_bytes, tensor_bytes
from .setting import Setting

AUTOCAST = "bfloat16 autocast"


def rival_of(name: str) -> str:
    """The torchvision detector that is closest to a config of ours."""
    return THEIR_RETINANET if "retinanet" in name else THEIR_FCOS


def inference(name: str, setting: Setting) -> Case:
    """Latency of a detector of ours in all modes, and of torchvision's."""
    return _inference(name, 1, setting)


def throughput(name: str, setting: Setting) -> Case:
    """`inference` with several images at once."""
    return _inference(name, _batch_size(setting), setting)


def their_inference(setting: Setting) -> Case:
    """Latency of torchvision's two detectors."""
    return _their_inference(1, setting)


def their_throughput(setting: Setting) -> Case:
    """`their_inference` with several images at once."""
    return _their_inference(_batch_size(setting), setting)


def _batch_size(setting: Setting) -> int:
    return 8 if setting.cuda else 2


def _inference(name: str, batch: int, setting: Setting) -> Case:
    case, images = _inference_case(batch, setting, rivals=[rival_of(name)])
    _add_theirs(case, rival_of(name), images, setting)
    model = our_detector(name, setting.image_size(), setting.device)

    def variant(
        mode: str, model: nn.Module, amp: torch.dtype | None = None, compiles: bool = False
    ) -> Variant:
        call = inference_call(model, images, amp)
        return Variant(mode, call, held_bytes=partial(tensor_bytes, model), compiles=compiles)

    case.variants.append(variant("plain float32", model))
    if setting.cuda:
        case.variants.append(variant(f"plain {AUTOCAST}", model, torch.bfloat16))
    for compile in (False, True) if setting.compile else (False,):
        for dtype in (torch.float32, torch.bfloat16):
            mode = f"optimized {str(dtype)[6:]}{', compiled' if compile else ''}"
            case.add(
                mode,
                lambda m=mode, d=dtype, c=compile: variant(
                    m, optimized_detector(model, d, c), compiles=c
                ),
            )
    return case


def _their_inference(batch: int, setting: Setting) -> Case:
    case, images = _inference_case(batch, setting, rivals=[THEIR_FCOS])
    for name in (THEIR_FCOS, THEIR_RETINANET):
        _add_theirs(case, name, images, setting)
    last = copy.deepcopy(their_detector(THEIR_FCOS, setting.image_size(), setting.device))
    call = inference_call(last.to(memory_format=torch.channels_last), images)
    held = partial(tensor_bytes, last)
    case.variants.append(
        Variant(f"{THEIR_FCOS}, channels-last", call, theirs=True, held_bytes=held)
    )
    return case


def _work(height: int, width: int, batch: int, **others: str) -> dict[str, object]:
    """The parameters of a case."""
    return {"image": f"{height}x{width}", "batch": batch, "classes": NUM_CLASSES, **others}


def _inference_case(
    batch: int, setting: Setting, rivals: Sequence[str]
) -> tuple[Case, list[Tensor]]:
    height, width = setting.image_size()
    image = smooth_image(height, width).to(setting.device)
    case = Case(
        "detection in images that are on the device, post-processing included",
        [],
        rivals=list(rivals) + [f"{name}, {AUTOCAST}" for name in rivals if setting.cuda],
        parameters=_work(height, width, batch, candidates=f"{CANDIDATES} an image"),
        amount=batch,
        unit="images",
    )
    return case, [image.clone() for _ in range(batch)]


def _add_theirs(case: Case, name: str, images: list[Tensor], setting: Setting) -> None:
    model = their_detector(name, setting.image_size(), setting.device)
    modes = {name: None, **({f"{name}, {AUTOCAST}": torch.bfloat16} if setting.cuda else {})}
    for mode, amp in modes.items():
        call = inference_call(model, images, amp)
        case.variants.append(
            Variant(mode, call, theirs=True, held_bytes=partial(tensor_bytes, model))
        )


def onnx(name: str, setting: Setting) -> Case:
    """Latency of a detector of ours, and of its exported ONNX file in ONNX Runtime.

    Raises:
        Skip: on a GPU, or if packages are missing.
    """
    if setting.cuda:
        raise Skip("ONNX Runtime is measured on the CPU only")
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise Skip(f"{error.name} is not installed") from error
    rival = f"ONNX Runtime {onnxruntime.__version__}"
    case, images = _inference_case(1, setting, rivals=[rival])
    model = our_detector(name, setting.image_size(), setting.device)
    fast, canvases = optimized_detector(model, torch.float32, False), torch.stack(images)
    file = setting.folder / "detector.onnx"
    export_onnx(export_detector(fast, canvases), file)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Otherwise its threads busy-wait on the cores that our threads need.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    sizes = np.array([images[0].shape[1:]], dtype=np.int64)
    inputs = {"images": canvases.numpy(), "sizes": sizes}
    case.variants += [
        Variant("optimized float32", inference_call(fast, images)),
        Variant(rival, lambda: session.run(None, inputs), theirs=True),
    ]
    return case


@dataclass(frozen=True)
class _TrainingWork:
    """What the training steps of a case are measured on.

    Attributes:
        images, targets: of one step, on the device; all images have `size` (height, width).
        modes: the name of each precision, and the dtype of its autocast.
    """

    size: tuple[int, int]
    images: list[Tensor]
    targets: list[dict[str, Tensor]]
    modes: dict[str, torch.dtype | None]


def training(name: str, setting: Setting) -> Case:
    """Training steps of a detector of ours, and of torchvision's."""
    case, work = _training_case(setting, rivals=[rival_of(name)])
    _add_steps(case, rival_of(name), their_step, work, theirs=True)
    _add_steps(case, name, our_step, work, theirs=False)
    return case


def their_training(setting: Setting) -> Case:
    """Training steps of torchvision's two detectors, and of variations of one of them."""
    case, work = _training_case(setting, rivals=[THEIR_FCOS])
    for name in (THEIR_FCOS, THEIR_RETINANET):
        _add_steps(case, name, their_step, work, theirs=True)
    unfrozen = partial(their_step, frozen=False)
    _add_steps(case, THEIR_FCOS, unfrozen, work, theirs=True, label="nothing frozen, ")
    last = partial(their_step, memory_format=torch.channels_last)
    _add_steps(case, THEIR_FCOS, last, work, theirs=True, label="channels-last, ")
    return case


def _training_case(setting: Setting, rivals: list[str]) -> tuple[Case, _TrainingWork]:
    batch = 4 if setting.cuda else 2
    height, width = setting.image_size((800, 1333) if setting.cuda else (512, 512))
    image = smooth_image(height, width).to(setting.device)
    targets = [
        random_target(height, width, seed=seed, device=setting.device) for seed in range(batch)
    ]
    modes = {"float32": None, **({AUTOCAST: torch.bfloat16} if setting.cuda else {})}
    case = Case(
        "a training step: forward, backward, SGD; batch norms of the backbone and its first two "
        "stages frozen; images on the device",
        [],
        rivals=[f"{name}, {mode}" for mode in reversed(modes) for name in rivals],
        parameters=_work(height, width, batch, objects=f"{OBJECTS} an image"),
        amount=batch,
        unit="images",
    )
    return case, _TrainingWork((height, width), [image] * batch, targets, modes)


def _add_steps(
    case: Case, name: str, build: Callable, work: _TrainingWork, theirs: bool, label: str = ""
) -> None:
    """A variant for each precision; `build` is `our_step` or `their_step`."""
    for mode, amp in work.modes.items():
        model, optimizer, step = build(name, work.size, work.images, work.targets, amp)
        held = partial(tensor_bytes, model, optimizer)
        case.variants.append(
            Variant(f"{name}, {label}{mode}", step, theirs=theirs, held_bytes=held)
        )


def stages(name: str, setting: Setting) -> Case:
    """How close each stage of a detector of ours comes to the limits of the machine."""
    case, images = _stages_case(setting)
    plain = our_detector(name, setting.image_size(), setting.device)
    with torch.inference_mode():
        batch, _ = plain.preprocess(images)
        features = plain.backbone(batch)
        pyramid = plain.neck(features)
    work = {
        "backbone": multiply_adds(plain.backbone, batch),
        "neck": multiply_adds(plain.neck, features),
        "head": multiply_adds(plain.head, pyramid),
    }
    _add_stages(case, "plain float32", plain, images, work, torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        mode = f"optimized {str(dtype)[6:]}"
        try:
            _add_stages(case, mode, optimized_detector(plain, dtype, False), images, work, dtype)
        except Skip as reason:
            case.unavailable[mode] = str(reason)
    return case


def their_stages(setting: Setting) -> Case:
    """`stages` of torchvision's FCOS, whose backbone includes the neck."""
    case, images = _stages_case(setting)
    model = their_detector(THEIR_FCOS, setting.image_size(), setting.device)
    with torch.inference_mode():
        inputs, _ = model.transform(images)
        pyramid = list(model.backbone(inputs.tensors).values())
        outputs = model.head(pyramid)
        anchors = model.anchor_generator(inputs, pyramid)
    sizes = [x.shape[-2] * x.shape[-1] for x in pyramid]
    by_level = {name: list(x.split(sizes, dim=1)) for name, x in outputs.items()}
    level_anchors = [list(x.split(sizes)) for x in anchors]
    limit = matmul_name(torch.float32)

    def add(name: str, run: Callable[[], object], amount: float, unit: str, limit: str) -> None:
        run = torch.inference_mode()(run)
        full = f"{THEIR_FCOS}: {name}"
        case.variants.append(Variant(full, run, theirs=True, amount=amount, unit=unit, limit=limit))

    work = multiply_adds(model.backbone, inputs.tensors), multiply_adds(model.head, pyramid)
    add("backbone and neck", lambda: model.backbone(inputs.tensors), work[0], MULTIPLY_ADDS, limit)
    add("head", lambda: model.head(pyramid), work[1], MULTIPLY_ADDS, limit)
    add(
        "post-processing",
        lambda: model.postprocess_detections(by_level, level_anchors, inputs.image_sizes),
        storage_bytes(outputs.values()) / 1e9,
        GIGABYTES,
        COPY,
    )
    return case


def _stages_case(setting: Setting) -> tuple[Case, list[Tensor]]:
    """A case that measures the limits, and the images for the stages."""
    height, width = setting.image_size()
    case = Case(
        "the stages of a detector by themselves, and the share of the measured rate of matrix "
        "products (post-processing: of copying) that each reaches",
        [],
        parameters={
            "image": f"{height}x{width}",
            "batch": 1,
            "classes": NUM_CLASSES,
            "candidates": f"{CANDIDATES} an image",
        },
    )
    for dtype in (torch.float32, torch.bfloat16):
        case.add(matmul_name(dtype), lambda d=dtype: matmul_limit(d, setting))
    case.variants.append(copy_limit(setting))
    return case, [smooth_image(height, width).to(setting.device)]


@torch.inference_mode()
def _add_stages(
    case: Case,
    mode: str,
    model: nn.Module,
    images: list[Tensor],
    work: dict[str, float],
    dtype: torch.dtype,
) -> None:
    """Add a variant for each stage, applied to the outputs of the stages before it."""
    batch, sizes = model.preprocess(images)
    if isinstance(model, InferenceDetector):
        batch = batch.to(dtype=model.dtype, memory_format=torch.channels_last)
    features = model.backbone(batch)
    pyramid = model.neck(features)
    outputs = model.head(pyramid)
    maps = [x for levels in outputs for x in levels]
    calls = {
        "backbone": lambda: model.backbone(batch),
        "neck": lambda: model.neck(features),
        "head": lambda: model.head(pyramid),
    }
    for name, call in calls.items():
        case.variants.append(
            Variant(
                f"{mode}: {name}",
                torch.inference_mode()(call),
                amount=work[name],
                unit=MULTIPLY_ADDS,
                limit=matmul_name(dtype),
            )
        )
    case.variants.append(
        Variant(
            f"{mode}: post-processing",
            torch.inference_mode()(lambda: model.head.detect(outputs, sizes)),
            amount=storage_bytes(maps) / 1e9,
            unit=GIGABYTES,
            limit=COPY,
        )
    )
