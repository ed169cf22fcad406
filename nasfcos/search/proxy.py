"""The proxy task: a decoder is trained for a moment on cached maps, and judged by its losses.

As in the paper (section 4): the backbone is frozen and its maps are cached, a trial trains the
decoder only, with Adam and Polyak averaging, and the reward is the negative sum of the losses on
meta-val. Where the paper is silent:

- The weights that are judged are a running average: those after the first iteration, then
  ``avg = POLYAK * avg + (1 - POLYAK) * w`` after each one. Running statistics of batch norms are
  copied, not averaged again: with their momentum of 0.1 they are such an average over the same
  last iterations already. They too start from the first batch, not from zero mean and unit
  variance, of which ten iterations would leave a third.
- All trials of a stage, but for repetitions, see the same batches in the same order. The plain
  head of the FPN stage starts from the same weights in all of them too: with others for each FPN,
  luck with the head would weigh as much in a reward as the FPN does. What is searched starts from
  weights that follow from the genotype.
- Meta-val is judged as if it were one batch: the sum of a loss over all of it, divided by what that
  loss is normalised by over all of it. So the reward does not depend, but for rounding, on how
  meta-val is cut into batches.
- The learning rate is constant and gradients are not clipped.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from yacs.config import CfgNode

from ..config import ConfigError
from ..engine.distributed import resolve_device
from ..engine.monitor import NonFiniteLossError
from ..files import replacing
from ..genotype import Cell, Genotype
from ..models import HEADS, NECKS
from ..models.heads.cells import STRIDES
from ..models.heads.dense import Assignment, DenseHead
from ..models.heads.post_process import PostProcess
from ..models.weights import WeightsError, read_torch_file
from ..transfer import free_gpu_memory, to_device
from .cost import build_objective, latency_ms, multiply_adds
from .features import FeatureCache
from .records import COMPLETE, FAILED, PRUNED, DeviceLost, TrialJob, TrialResult

logger = logging.getLogger(__name__)

# Iterations between two looks at the losses; each makes the host wait for the GPU.
CHECK_EVERY = 10
# Characters of an error's message that a trial's reason quotes.
REASON_LENGTH = 300
# How often the reward is logged while the neck of the head stage is trained.
NECK_REPORTS = 5


class NonFinite(ArithmeticError):
    """A loss that is infinite or not a number."""


# --------------------------------------------------------------------------------------- decoders
def proxy_config(cfg: CfgNode, stage: str, genotype: list) -> CfgNode:
    """The config from which the ordinary builders make a trial's decoder.

    Args:
        cfg: of the search.
        stage: "fpn" (the genotype's cells and the plain head) or "head" (the genotype's head; the
            neck's outputs are cached).
        genotype: the whole decoder, as a nested list.

    Raises:
        GenotypeError: it cannot be built.
        ValueError: another stage, or "head" for a genotype without a head.
    """
    parsed = Genotype.parse(genotype)
    if stage == "head" and not parsed.head_ops:
        raise ValueError(f"the head stage needs a genotype with a head, not {genotype}")
    config = stage_config(cfg, stage)
    config.defrost()
    config.MODEL.GENOTYPE = genotype
    config.freeze()
    return config


def stage_config(cfg: CfgNode, stage: str) -> CfgNode:
    """What `proxy_config` gives for every genotype of a stage."""
    widths = {"fpn": cfg.SEARCH.PROXY.FPN_CHANNELS, "head": cfg.SEARCH.PROXY.HEAD_CHANNELS}
    if stage not in widths:
        raise ValueError(f"the stages are 'fpn' and 'head', not {stage!r}")
    # The size ranges shrink with the images, from those of testing to the crops.
    scale = cfg.SEARCH.CACHE.SIZE / cfg.INPUT.MIN_SIZE_TEST
    config = cfg.clone()
    config.defrost()
    config.MODEL.NECK.NAME = "nas_fpn"
    config.MODEL.NECK.CHANNELS = widths[stage]
    config.MODEL.HEAD.TOWER = {"fpn": "plain", "head": "searched"}[stage]
    config.MODEL.FCOS.SIZE_LIMITS = [limit * scale for limit in cfg.MODEL.FCOS.SIZE_LIMITS]
    config.MODEL.RETINANET.ANCHOR_SIZE = cfg.MODEL.RETINANET.ANCHOR_SIZE * scale
    config.freeze()
    return config


class Decoder(nn.Module):
    """What a trial trains: ``head(neck(maps))``, or the head alone on the maps of a cached neck."""

    def __init__(self, neck: nn.Module | None, head: DenseHead) -> None:
        super().__init__()
        self.neck = nn.Identity() if neck is None else neck
        self.head = head

    def forward(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], ...]:
        """Maps [N, C, H, W] by level to the head's raw outputs."""
        return self.head(self.neck(maps))


def build_decoder(
    cfg: CfgNode, in_channels: Sequence[int] | None, num_classes: int, seed: int
) -> Decoder:
    """A fresh decoder on the CPU, in training mode.

    Args:
        cfg: as `proxy_config` gives it.
        in_channels: of C2..C5; None: without a neck.
        num_classes: object classes, background not counted.
        seed: of the search. The weights follow from it and, of searched parts, from the genotype;
            the global random state is neither used nor changed.
    """
    own = weight_seed(seed, cfg.MODEL.GENOTYPE)
    plain = cfg.MODEL.HEAD.TOWER == "plain"
    generator = torch.random.default_generator
    with torch.random.fork_rng(devices=[]):
        neck = None
        if in_channels is not None:
            generator.manual_seed(own)
            neck = NECKS[cfg.MODEL.NECK.NAME](cfg, in_channels)
        generator.manual_seed(weight_seed(seed, []) if plain else own)
        return Decoder(neck, HEADS[cfg.MODEL.HEAD.NAME](cfg, num_classes, PostProcess()))


def weight_seed(seed: int, genotype: list) -> int:
    """A seed of weights, from the search's seed and a genotype as it is written; [] is none."""
    text = json.dumps([seed, genotype])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


# --------------------------------------------------------------------------------------- examples
class Examples:
    """Cached maps with what a head should predict for them.

    The boxes of a cached crop never change, so each is assigned to the head's places once, not in
    every iteration.

    Args:
        cache: of the maps.
        head: assigns; any head of the search will do.
        device: of the batches.
    """

    def __init__(self, cache: FeatureCache, head: DenseHead, device: torch.device) -> None:
        self.cache = cache
        self.device = device
        shapes = _pyramid_shapes([level.shape[2:] for level in cache.maps])
        head = head.to(device)
        assigned = []
        for target in cache.targets:
            one = head.assign(shapes, [target])
            positive = (one.labels[0] > 0).nonzero().squeeze(1)
            # Half a million labels an image (RetinaNet at 800 pixels) deserve less than int64.
            assigned.append((one.labels.to(torch.int16), positive, one.wanted[0, positive]))
        labels, positive, wanted = zip(*assigned, strict=True)
        self._labels = torch.cat(labels)
        self._positive, self._wanted = list(positive), list(wanted)
        self._memory: list[Tensor] = []

    def __len__(self) -> int:
        return len(self.cache)

    @property
    def channels(self) -> list[int]:
        """Of the maps, by level."""
        return [level.shape[1] for level in self.cache.maps]

    def batch(
        self, indices: Tensor, dtype: torch.dtype = torch.float32
    ) -> tuple[list[Tensor], Assignment]:
        """Some crops (indices on the CPU): maps [B, C, H, W] by level, channels last, on the
        device, and the assignment. Nothing waits for a GPU.

        On a CPU the next batch may overwrite the maps of this one.
        """
        maps = self._in_precision(dtype, self.cache.read(indices.numpy(), self.device))
        rows = indices.tolist()
        counts = torch.tensor([len(self._positive[row]) for row in rows])
        first = torch.arange(len(rows)) * self._labels.shape[1]
        offset = to_device(first.repeat_interleave(counts), self.device)
        labels = self._labels[to_device(indices, self.device)].long()
        wanted = torch.zeros(labels.numel(), 4, device=self.device)
        positive = torch.cat([self._positive[row] for row in rows]) + offset
        wanted[positive] = torch.cat([self._wanted[row] for row in rows])
        return maps, Assignment(labels, wanted.view(*labels.shape, 4))

    def _in_precision(self, dtype: torch.dtype, maps: list[Tensor]) -> list[Tensor]:
        """On a CPU in the memory of the batch before, if that suffices: to have tens of megabytes
        cleared by the system takes several times as long as the conversion."""
        if self.device.type != "cpu":
            return [x.to(dtype, memory_format=torch.channels_last) for x in maps]
        memory = self._memory
        if not memory or memory[0].dtype != dtype or len(memory[0]) < len(maps[0]):
            self._memory = memory = [
                torch.empty_like(x, dtype=dtype, memory_format=torch.channels_last) for x in maps
            ]
        return [place[: len(x)].copy_(x) for place, x in zip(memory, maps, strict=True)]


def _pyramid_shapes(shapes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """(height, width) of P3..P7, from those of C2..C5 or of P3..P7 themselves."""
    if len(shapes) == len(STRIDES):
        return [tuple(shape) for shape in shapes]
    levels = [tuple(shape) for shape in shapes[1:]]
    while len(levels) < len(STRIDES):
        levels.append(tuple(math.ceil(side / 2) for side in levels[-1]))
    return levels


def open_examples(
    cfg: CfgNode, folder: Path, num_classes: int, device: torch.device
) -> Examples:
    """The examples of a cache folder, held in the GPU's memory where they fit.

    Args:
        cfg: as `stage_config` gives it.
    """
    cache = FeatureCache.open(folder)
    cache.to_device(device)
    return Examples(cache, assigning_head(cfg, num_classes), device)


def assigning_head(cfg: CfgNode, num_classes: int) -> DenseHead:
    """A head that says what is to be predicted where, for every genotype of a stage.

    Args:
        cfg: as `stage_config` gives it.
        num_classes: object classes, background not counted.
    """
    plain = cfg.clone()
    plain.defrost()
    plain.MODEL.HEAD.TOWER = "plain"
    return build_decoder(plain, None, num_classes, 0).head


def batch_order(count: int, iterations: int, batch: int, seed: int) -> Tensor:
    """Indices [iterations, batch] below `count`: one permutation after another."""
    generator = torch.Generator().manual_seed(seed)
    epochs = math.ceil(iterations * batch / count)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(epochs)])
    return order[: iterations * batch].view(iterations, batch)


# --------------------------------------------------------------------------------------- training
class Training:
    """Trains a decoder step by step, and judges the average of its weights at any time.

    Args:
        decoder: is trained in place, on the examples' device.
        examples: to train on.
        order: [iterations, batch] indices of the examples.
        lr: of Adam.
        polyak: factor of the running average of the weights.
        bf16: mixed precision.

    Attributes:
        done: finished iterations.
        averaged: the decoder with averaged weights.
    """

    def __init__(
        self,
        decoder: Decoder,
        examples: Examples,
        order: Tensor,
        lr: float,
        polyak: float,
        bf16: bool = False,
    ) -> None:
        self.decoder = decoder.to(examples.device, memory_format=torch.channels_last).train()
        self.examples = examples
        self.order = order
        self.done = 0
        # Of the maps: every decoder begins with convolutions, which autocast runs in bfloat16.
        self._dtype = torch.bfloat16 if bf16 else torch.float32
        trained = [p for p in self.decoder.parameters() if p.requires_grad]
        self._optimizer = torch.optim.Adam(trained, lr=lr, fused=True)
        self.averaged = copy.deepcopy(self.decoder)
        self._average = get_ema_multi_avg_fn(polyak)
        both = self.averaged, self.decoder
        self._parameters = [list(model.parameters()) for model in both]
        self._buffers = list(zip(*(model.buffers() for model in both), strict=True))
        self._losses = torch.zeros(len(order), device=examples.device)

    def advance(self, until: int) -> None:
        """Train until so many iterations are done.

        Raises:
            NonFinite: the loss was infinite or not a number.
        """
        while self.done < until:
            with _momentum(self.decoder, 1.0 if self.done == 0 else None):
                loss = self._step(self.order[self.done])
            self._losses[self.done] = loss
            self.done += 1
            if self.done % CHECK_EVERY == 0 or self.done == until:
                self._check()

    def _step(self, indices: Tensor) -> Tensor:
        maps, assignment = self.examples.batch(indices, self._dtype)
        with self._autocast():
            terms = self.decoder.head.loss_terms(self.decoder(maps), assignment)
            loss = sum(term.loss for term in terms.values())
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        self._update_average()
        return loss.detach()

    @torch.no_grad()
    def _update_average(self) -> None:
        """As PyTorch's AveragedModel does it, which lets the host wait for a GPU in every step."""
        if self.done == 0:
            torch._foreach_copy_(*self._parameters)
        else:
            self._average(*self._parameters, None)  # how many there were before does not matter
        for own, buffer in self._buffers:
            own.copy_(buffer)

    def _check(self) -> None:
        finite = self._losses[: self.done].isfinite()
        if not finite.all():
            first = int(finite.long().argmin())
            value = self._losses[first].item()
            raise NonFinite(f"the loss is {value} at iteration {first + 1}")

    @torch.no_grad()
    def evaluate(self, examples: Examples) -> dict[str, float]:
        """The averaged decoder's loss terms on all of the examples.

        Raises:
            NonFinite: one of them is infinite or not a number.
        """
        model = self.averaged.eval()
        totals: dict[str, Tensor] = {}
        for indices in torch.arange(len(examples)).split(self.order.shape[1]):
            maps, assignment = examples.batch(indices, self._dtype)
            with self._autocast():
                terms = model.head.loss_terms(model(maps), assignment)
            for name, (loss, weight) in terms.items():
                weight = torch.as_tensor(weight, dtype=torch.float64, device=loss.device)
                totals[name] = totals.get(name, 0) + torch.stack((loss * weight, weight))
        sums = {name: total.tolist() for name, total in totals.items()}
        losses = {name: loss / weight if weight else 0.0 for name, (loss, weight) in sums.items()}
        if not math.isfinite(sum(losses.values())):
            parts = ", ".join(f"{name} {value}" for name, value in losses.items())
            raise NonFinite(f"after iteration {self.done} the losses on meta-val are: {parts}")
        return losses

    def _autocast(self) -> torch.autocast:
        bf16 = self._dtype == torch.bfloat16
        return torch.autocast(self.examples.device.type, torch.bfloat16, enabled=bf16)


@contextmanager
def _momentum(model: nn.Module, momentum: float | None) -> Iterator[None]:
    """Batch norms with this momentum; None: with their own."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and momentum is not None]
    own = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = momentum
    yield
    for norm, value in zip(norms, own, strict=True):
        norm.momentum = value


def build_training(
    cfg: CfgNode, decoder: Decoder, examples: Examples, iterations: int, seed: int
) -> Training:
    """As the config's proxy task says, for so many iterations."""
    proxy = cfg.SEARCH.PROXY
    order = batch_order(len(examples), iterations, proxy.BATCH, seed)
    return Training(decoder, examples, order, proxy.LR, proxy.POLYAK, proxy.AMP == "bf16")


# ------------------------------------------------------------------------------------------ trials
@dataclass
class ProxyTask:
    """All that a worker needs to run trials of a stage; picklable.

    Attributes:
        cfg: of the search.
        stage: "fpn" or "head".
        train, val: folders of the caches of meta-train and meta-val: of C2..C5, in the head stage
            of P3..P7.
        num_classes: object classes, background not counted.
        device: that the trials run on, as MODEL.DEVICE names it: "auto" is for the worker to find.
        seed: of the search.
        examples: of the two; None: opened from the folders by the first trial, as they are by that
            of a pickled task, with which they do not go.
    """

    cfg: CfgNode
    stage: str
    train: Path
    val: Path
    num_classes: int
    device: str
    seed: int
    examples: tuple[Examples, Examples] | None = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "examples": None}

    def run(self, job: TrialJob) -> TrialResult:
        """Run one trial. Its result follows from the seed, the job, the caches and, on CPUs, the
        number of threads, to the last bit (GPUs add in varying order).

        Trouble of the trial is a result. What no other trial could run with either is raised: a
        cache that does not open, a GPU that has failed (`DeviceLost`).
        """
        started = time.perf_counter()
        device = resolve_device(self.device)
        if self.examples is None:
            cfg = stage_config(self.cfg, self.stage)
            self.examples = tuple(
                open_examples(cfg, folder, self.num_classes, device)
                for folder in (self.train, self.val)
            )
        result = None
        while result is None:
            result = self._try(job, *self.examples)
            if device.type == "cuda" and (result is None or result.status == FAILED):
                free_gpu_memory()
        return replace(result, seconds=time.perf_counter() - started)

    def _try(self, job: TrialJob, train: Examples, val: Examples) -> TrialResult | None:
        """None: the GPU's memory did not suffice, and a cache has left it: to be tried again."""
        training = None
        seed = self.seed + job.repeat
        try:
            decoder = build_decoder(
                proxy_config(self.cfg, self.stage, job.genotype),
                train.channels if self.stage == "fpn" else None,
                self.num_classes,
                seed,
            )
            iterations = self.cfg.SEARCH.PROXY.ITERATIONS
            training = build_training(self.cfg, decoder, train, iterations, seed)
            maps, _ = val.batch(torch.zeros(1, dtype=torch.int64))
            flops, latency = multiply_adds(decoder, maps), self._latency(decoder, maps)
            # Costs are known before the training, so that it may be judged by the objective.
            penalty = build_objective(self.cfg, self.stage).penalty(flops, latency)
            status, reward, losses, curve = _judge(
                training, val, iterations, job.thresholds, penalty
            )
            return TrialResult(
                status,
                reward,
                losses,
                curve,
                params=sum(p.numel() for p in decoder.parameters() if p.requires_grad),
                flops=flops,
                latency=latency,
            )
        except Exception as error:
            if train.device.type == "cuda":
                _check_gpu(train.device)
            if isinstance(error, torch.OutOfMemoryError) and _make_room(train, val):
                return None
            message = " ".join(str(error).split())
            reason = f"{type(error).__name__}: {message[:REASON_LENGTH]}"
            if training is not None:
                reason += f" (after {training.done} iterations)"
            expected = isinstance(error, (NonFinite, torch.OutOfMemoryError))
            logger.warning("trial %d: %s", job.index, reason, exc_info=not expected)
            return TrialResult(FAILED, reason=reason)

    def _latency(self, decoder: Decoder, maps: list[Tensor]) -> float:
        if self.cfg.SEARCH.OBJECTIVE.COST != "latency":
            return math.nan
        milliseconds = latency_ms(decoder.eval(), maps)
        decoder.train()
        return milliseconds


def _make_room(train: Examples, val: Examples) -> bool:
    """Send a cache from the GPU's memory back to the disk, if there is one.

    What is read once a trial goes first. The caches stay there from then on: other trials would
    need the room as well, and some would fail for it that are as good as any.
    """
    for name, examples in (("meta-val", val), ("meta-train", train)):
        if examples.cache.release():
            logger.info("the GPU's memory is needed: %s is read from the disk now", name)
            return True
    return False


def _check_gpu(device: torch.device) -> None:
    """Raises `DeviceLost` where nothing will run in this process any more."""
    try:
        torch.cuda.synchronize(device)
    except Exception as error:
        raise DeviceLost(f"{device} has failed: {error}") from error


def _judge(
    training: Training,
    val: Examples,
    iterations: int,
    thresholds: Sequence[tuple[int, float]],
    penalty: float,
) -> tuple[str, float, dict[str, float], tuple[tuple[int, float], ...]]:
    """Train to the end, or to the first threshold that the reward less the penalty misses; each is
    judged on all of val.

    Returns:
        Status, reward, losses and the curve.
    """
    curve = []
    rungs = [rung for rung in thresholds if rung[0] < iterations]
    for iteration, threshold in (*rungs, (iterations, -math.inf)):
        training.advance(iteration)
        losses = training.evaluate(val)
        reward = -sum(losses.values())
        if iteration < iterations:
            curve.append((iteration, reward))
        if reward - penalty < threshold:
            return PRUNED, reward, losses, tuple(curve)
    return COMPLETE, reward, losses, tuple(curve)


def train_neck(
    cfg: CfgNode,
    caches: tuple[FeatureCache, FeatureCache],
    cells: Sequence[Cell],
    num_classes: int,
    device: torch.device,
    folder: Path,
) -> nn.Module:
    """The neck of the head stage: an FPN trained with the plain head, as a trial but at the width
    of the head stage, for SEARCH.PROXY.NECK_ITERATIONS.

    Args:
        cfg: of the search.
        caches: C2..C5 of meta-train and meta-val.
        cells: of the FPN.
        num_classes: object classes, background not counted.
        device: to train on; the neck is left there.
        folder: the neck is kept there as ``neck.pth``, and taken from there if the one that is
            asked for was trained before.

    Returns:
        The neck with averaged weights, in evaluation mode.

    Raises:
        NonFiniteLossError: the training diverged.
        ConfigError: it needs more memory than the GPU has.
    """
    genotype = Genotype(tuple(cells)).to_list()
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SEARCH.PROXY.FPN_CHANNELS = cfg.SEARCH.PROXY.HEAD_CHANNELS
    cfg.freeze()
    config = proxy_config(cfg, "fpn", genotype)
    # Handles of its own, so that what they hold on a GPU is free again afterwards.
    train, val = (
        open_examples(config, cache.folder, num_classes, device) for cache in caches
    )
    path = Path(folder) / "neck.pth"
    made_from = {
        "genotype": genotype,
        "caches": [cache.folder.name for cache in caches],
        "seed": cfg.SEED,
        "num_classes": num_classes,
        "model": [config.MODEL[key].dump() for key in ("HEAD", "FCOS", "RETINANET")],
        "proxy": cfg.SEARCH.PROXY.dump(),
    }
    saved = read_saved(path)
    if saved.get("made_from") == made_from:
        logger.info("the FPN of the head stage is taken from %s", path)
        neck = build_decoder(config, train.channels, num_classes, cfg.SEED).neck
        neck.load_state_dict(saved["neck"])
        return neck.to(device, memory_format=torch.channels_last).eval()
    neck = None
    try:
        while neck is None:
            decoder = build_decoder(config, train.channels, num_classes, cfg.SEED)
            neck = _trained_neck(cfg, decoder, train, val)
    except NonFinite as error:
        raise NonFiniteLossError(
            f"the FPN of the head stage cannot be trained: {error}; fewer "
            "SEARCH.PROXY.NECK_ITERATIONS or a lower SEARCH.PROXY.LR may help"
        ) from error
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            "the FPN of the head stage cannot be trained in the GPU's memory. A search of the head "
            "alone (SEARCH.STAGES (head,)), in another OUTPUT_DIR and on the FPN that was found "
            "(MODEL.GENOTYPE), may have a smaller SEARCH.PROXY.BATCH, or SEARCH.PROXY.AMP bf16. "
            f"{error}"
        ) from error
    with replacing(path) as temporary:
        torch.save({"neck": neck.state_dict(), "made_from": made_from}, temporary)
    return neck


def _trained_neck(
    cfg: CfgNode, decoder: Decoder, train: Examples, val: Examples
) -> nn.Module | None:
    """The averaged neck of a decoder; None: the GPU's memory did not suffice, and a cache has left
    it: to be tried again."""
    iterations = cfg.SEARCH.PROXY.NECK_ITERATIONS
    logger.info("training the FPN of the head stage for %d iterations", iterations)
    try:
        training = build_training(cfg, decoder, train, iterations, cfg.SEED)
        for part in range(1, NECK_REPORTS + 1):
            training.advance(iterations * part // NECK_REPORTS)
            logger.info(
                "FPN of the head stage: iteration %d, reward %.4f",
                training.done, -sum(training.evaluate(val).values()),
            )  # fmt: skip
    except torch.OutOfMemoryError:
        if not _make_room(train, val):
            raise
        return None
    return training.averaged.neck.eval()


def read_saved(path: Path) -> dict:
    """A dict saved by torch; empty where the file is missing or, with a warning, damaged."""
    if not path.exists():
        return {}
    try:
        return dict(read_torch_file(path))
    except (WeightsError, TypeError, ValueError) as error:
        logger.warning("%s is damaged: %s", path, error)
        return {}
