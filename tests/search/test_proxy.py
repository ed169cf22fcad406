"""A trial on tiny caches: what it trains, what it returns, and that it repeats itself."""

import json
import math
import pickle
import sys

import numpy as np
import pytest
import torch

from nasfcos.config import ConfigError, get_defaults
from nasfcos.engine.monitor import NonFiniteLossError
from nasfcos.genotype import Genotype, GenotypeError
from nasfcos.models.heads.locations import STRIDES
from nasfcos.search.cache import FeatureCache
from nasfcos.search.decoder import build_decoder, proxy_config, stage_config, weight_seed
from nasfcos.search.examples import Examples, open_examples
from nasfcos.search.executors import LocalExecutor
from nasfcos.search.neck import train_neck
from nasfcos.search.proxy import ProxyTask
from nasfcos.search.records import COMPLETE, FAILED, PRUNED, TrialJob
from nasfcos.search.training import Training, batch_order, build_training

CPU = torch.device("cpu")
SIZE, CLASSES, WIDTHS = 64, 3, (4, 6, 8, 10)
CELLS = [[[2, 3, 0, 1, 0]], [[1, 3, 2, 4, 1]], [[0, 2, 3, 3, 1]]]
OTHER = [[[1, 1, 4, 0, 1]], [[3, 2, 3, 3, 0]], [[2, 2, 1, 0, 1]]]
HEAD = [*CELLS, [1], [0, 5]]
MAPS = [(width, SIZE // 4 >> i, SIZE // 4 >> i) for i, width in enumerate(WIDTHS)]
PYRAMID = [(8, math.ceil(SIZE / stride), math.ceil(SIZE / stride)) for stride in STRIDES]


def write_cache(folder, count, shapes, seed, empty=False, size=SIZE):
    """A cache as `nasfcos.search.cache.store` lays it out, of random maps and boxes."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for level, shape in enumerate(shapes):
        maps = rng.standard_normal((count, *shape)).astype(np.float16)
        np.save(folder / f"level{level}.npy", np.ascontiguousarray(maps.transpose(0, 2, 3, 1)))
    counts = np.zeros(count, np.int64) if empty else np.arange(count, dtype=np.int64) % 3
    corner = rng.random((counts.sum(), 2)) * 0.5 * SIZE
    boxes = np.concatenate([corner, corner + 4 + rng.random(corner.shape) * 0.4 * SIZE], 1)
    labels = rng.integers(1, CLASSES + 1, counts.sum())
    np.savez(
        folder / "targets.npz", boxes=boxes.astype(np.float32), labels=labels, counts=counts
    )
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    meta = {"count": count, "size": size, "shapes": shapes, "files": files}
    (folder / "cache.json").write_text(json.dumps(meta))
    return folder


def config(head="fcos", **settings):
    cfg = get_defaults()
    cfg.MODEL.HEAD.NAME = head
    cfg.MODEL.HEAD.NUM_CONVS = 1
    cfg.INPUT.MIN_SIZE_TEST = 128
    cfg.SEARCH.CACHE.SIZE = SIZE
    for key, value in {
        "FPN_CHANNELS": 8, "HEAD_CHANNELS": 8, "ITERATIONS": 6, "BATCH": 4, "NECK_ITERATIONS": 5,
        "LR": 0.01, **settings,
    }.items():  # fmt: skip
        cfg.SEARCH.PROXY[key] = value
    return cfg


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("caches")
    return {
        stage: (
            write_cache(root / stage / "train", 10, shapes, 0),
            write_cache(root / stage / "val", 7, shapes, 1),
        )
        for stage, shapes in (("fpn", MAPS), ("head", PYRAMID))
    }


def task(folders, stage="fpn", head="fcos", seed=3, **settings):
    return ProxyTask(config(head, **settings), stage, *folders[stage], CLASSES, "cpu", seed)


# ------------------------------------------------------------------------------------------ config
def test_config_of_the_fpn_stage():
    cfg = config()
    found = proxy_config(cfg, "fpn", CELLS)
    assert (found.MODEL.NECK.NAME, found.MODEL.NECK.CHANNELS) == ("nas_fpn", 8)
    assert found.MODEL.HEAD.TOWER == "plain"
    assert found.MODEL.FCOS.SIZE_LIMITS == [32, 64, 128, 256]
    assert found.MODEL.RETINANET.ANCHOR_SIZE == 16
    assert cfg.MODEL.FCOS.SIZE_LIMITS == [64, 128, 256, 512]
    decoder = build_decoder(found, WIDTHS, CLASSES, 0)
    assert len(decoder.head.cls_tower.layers) == cfg.MODEL.HEAD.NUM_CONVS
    assert decoder.head.size_ranges[1] == (32, 64)


def test_config_of_the_head_stage():
    found = proxy_config(config(HEAD_CHANNELS=16), "head", HEAD)
    assert (found.MODEL.NECK.CHANNELS, found.MODEL.HEAD.TOWER) == (16, "searched")
    with pytest.raises(ValueError, match="needs a genotype with a head"):
        proxy_config(config(), "head", CELLS)
    with pytest.raises(GenotypeError):
        proxy_config(config(), "fpn", CELLS[:2])


OWN_HEAD = """
from nasfcos.models import HEADS
from nasfcos.models.heads.fcos import build_fcos_head


@HEADS.register("sharper")
def build_sharper(cfg, num_classes, post_process):
    head = build_fcos_head(cfg, num_classes, post_process)
    head.focal_gamma = cfg.MODEL.CUSTOM.GAMMA
    return head
"""


def test_own_heads_are_tried_in_worker_processes(folders, tmp_path, monkeypatch):
    """Which import them for themselves; this process has not."""
    (tmp_path / "worker_parts.py").write_text(OWN_HEAD)
    monkeypatch.syspath_prepend(tmp_path)
    losses = []
    for gamma in (2.0, 0.0):
        cfg = config("sharper")
        cfg.MODEL.IMPORTS, cfg.MODEL.CUSTOM.GAMMA = ("worker_parts",), gamma
        own = ProxyTask(cfg, "fpn", *folders["fpn"], CLASSES, "cpu", 3)
        with LocalExecutor(own, workers=1) as executor:
            [(_, result)] = executor.run([TrialJob(0, CELLS)])
        assert result.status == COMPLETE, result.reason
        losses.append(result.losses["loss_cls"])
    assert "worker_parts" not in sys.modules
    assert losses[0] == pytest.approx(
        task(folders).run(TrialJob(0, CELLS)).losses["loss_cls"], rel=1e-3
    )
    assert losses[1] > 1.2 * losses[0]  # an ordinary cross-entropy


# ---------------------------------------------------------------------------------------- examples
@pytest.mark.parametrize("head", ["fcos", "retinanet"])
@pytest.mark.parametrize("size", [SIZE, SIZE - 14])  # of crops that were padded, too
def test_assigned_once_gives_the_losses_of_every_time(tmp_path, head, size):
    cfg = proxy_config(config(head), "fpn", CELLS)
    folder = write_cache(tmp_path / "cache", 10, MAPS, 0, size=size)
    examples = open_examples(cfg, folder, CLASSES, CPU)
    decoder = build_decoder(cfg, WIDTHS, CLASSES, 0)
    cache = FeatureCache.open(folder)
    for rows in ([5, 2, 9, 2], [0, 3], [1]):  # with and without boxes, one twice
        maps, assignment = examples.batch(torch.tensor(rows))
        outputs = decoder(maps)
        once = decoder.head.loss_terms(outputs, assignment)
        every_time = decoder.head.losses(outputs, [cache.targets[row] for row in rows])
        assert {name: term.loss.item() for name, term in once.items()} == {
            name: loss.item() for name, loss in every_time.items()
        }


def test_a_batch_has_the_maps_of_its_crops(folders):
    """Whatever the batch before was, in whose memory they may be."""
    examples = open_examples(stage_config(config(), "fpn"), folders["fpn"][0], CLASSES, CPU)
    for rows, dtype in (
        ([3, 1], torch.float32),
        ([0, 2, 5, 4], torch.float32),
        ([1], torch.float32),
        ([2, 0], torch.bfloat16),
        ([4, 5], torch.float32),
    ):
        maps, _ = examples.batch(torch.tensor(rows), dtype)
        for found, stored in zip(maps, examples.cache.read(rows), strict=True):
            assert found.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(found, stored.to(dtype))


def test_order_goes_through_all_images_again_and_again():
    order = batch_order(10, 5, 4, seed=1)
    assert order.shape == (5, 4)
    flat = order.flatten().tolist()
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
    assert flat[:10] != flat[10:]
    assert torch.equal(order, batch_order(10, 5, 4, seed=1))
    assert not torch.equal(order, batch_order(10, 5, 4, seed=2))


@pytest.mark.parametrize("head", ["fcos", "retinanet"])
def test_reward_does_not_depend_on_the_batches_of_meta_val(folders, head):
    """Uneven batches, some of them without a box, against all images as one."""
    losses = []
    for batch in (1, 3, 7):
        cfg = config(head, BATCH=batch, ITERATIONS=1)
        decoder = build_decoder(proxy_config(cfg, "fpn", CELLS), WIDTHS, CLASSES, 0)
        val = open_examples(stage_config(cfg, "fpn"), folders["fpn"][1], CLASSES, CPU)
        training = build_training(cfg, decoder, val, 1, 0)
        losses.append(training.evaluate(val))
        if batch == 7:
            with torch.no_grad():
                maps, assignment = val.batch(torch.arange(7))
                terms = decoder.eval().head.loss_terms(decoder(maps), assignment)
            expected = {name: term.loss.item() for name, term in terms.items()}
            assert losses[-1] == pytest.approx(expected, rel=1e-6)
    for other in losses[:2]:
        assert other == pytest.approx(losses[2], rel=1e-5)


# ---------------------------------------------------------------------------------------- training
def test_the_averaged_weights_are_judged(folders):
    """Against a plain loop with the running average written out."""
    cfg = config(POLYAK=0.7)
    build = lambda: build_decoder(proxy_config(cfg, "fpn", CELLS), WIDTHS, CLASSES, 5)  # noqa: E731
    examples = open_examples(stage_config(cfg, "fpn"), folders["fpn"][0], CLASSES, CPU)
    training = build_training(cfg, build(), examples, 4, seed=2)
    training.advance(4)

    decoder = build().to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(
        [p for p in decoder.parameters() if p.requires_grad], lr=cfg.SEARCH.PROXY.LR, fused=True
    )
    average = None
    for indices in batch_order(len(examples), 4, 4, seed=2):
        maps, assignment = examples.batch(indices)
        for norm in decoder.modules():
            if isinstance(norm, torch.nn.BatchNorm2d):
                norm.momentum = 1.0 if average is None else 0.1
        terms = decoder.head.loss_terms(decoder(maps), assignment)
        optimizer.zero_grad()
        sum(term.loss for term in terms.values()).backward()
        optimizer.step()
        now = {name: p.detach().clone() for name, p in decoder.named_parameters()}
        if average is None:
            average = now
        average = {name: 0.7 * average[name] + 0.3 * p for name, p in now.items()}
    for name, parameter in training.averaged.named_parameters():
        torch.testing.assert_close(parameter, average[name], msg=name)
    for (name, mine), other in zip(
        training.averaged.named_buffers(), decoder.buffers(), strict=True
    ):
        assert torch.equal(mine, other), name


def test_training_helps(folders):
    def reward(iterations):
        return task(folders, ITERATIONS=iterations).run(TrialJob(0, CELLS)).reward

    assert reward(30) > reward(3)


# ------------------------------------------------------------------------------------------ trials
@pytest.mark.parametrize("head", ["fcos", "retinanet"])
@pytest.mark.parametrize("stage, genotype", [("fpn", CELLS), ("head", HEAD)])
def test_result(folders, stage, genotype, head):
    result = task(folders, stage, head).run(TrialJob(0, genotype))
    assert result.status == COMPLETE, result.reason
    assert result.reward == -sum(result.losses.values())
    assert len(result.losses) == (3 if head == "fcos" else 2)
    decoder = build_decoder(
        proxy_config(config(head), stage, genotype), WIDTHS if stage == "fpn" else None, CLASSES, 0
    )
    trained = [p for p in decoder.parameters() if p.requires_grad]
    assert result.params == sum(p.numel() for p in trained)
    assert result.flops > 0 and math.isnan(result.latency) and result.seconds > 0


def test_repeats_to_the_last_bit(folders):
    """Whatever ran before, in this process or in one that got the task by pickle, and whatever the
    global random state."""
    one = task(folders)
    first = one.run(TrialJob(0, CELLS))
    other = one.run(TrialJob(1, OTHER))
    torch.manual_seed(99)
    state = torch.random.get_rng_state()
    again = one.run(TrialJob(7, CELLS))
    assert torch.equal(torch.random.get_rng_state(), state)
    elsewhere = pickle.loads(pickle.dumps(one)).run(TrialJob(0, CELLS))
    assert first.losses == again.losses == elsewhere.losses
    assert other.reward != first.reward
    assert task(folders, seed=4).run(TrialJob(0, CELLS)).reward != first.reward


@pytest.mark.gpu
@pytest.mark.parametrize("head", ["fcos", "retinanet"])
@pytest.mark.parametrize("stage, genotype", [("fpn", CELLS), ("head", HEAD)])
def test_a_gpu_finds_the_cpus_reward(folders, stage, genotype, head):
    want = task(folders, stage, head, ITERATIONS=2).run(TrialJob(0, genotype))
    found = task(folders, stage, head, ITERATIONS=2)
    found.device = "cuda"
    found = found.run(TrialJob(0, genotype))
    assert found.status == COMPLETE, found.reason
    assert found.reward == pytest.approx(want.reward, rel=1e-2)


def test_seed_of_the_weights():
    assert weight_seed(0, CELLS) == weight_seed(0, [list(map(list, cell)) for cell in CELLS])
    assert len({weight_seed(s, g) for s in (0, 1) for g in (CELLS, OTHER)}) == 4
    assert weight_seed(0, CELLS) == 7265537962440769494


def first_weights(genotype, seed=0, stage="fpn"):
    """Of the layers that start with random weights."""
    widths = WIDTHS if stage == "fpn" else None
    decoder = build_decoder(proxy_config(config(), stage, genotype), widths, CLASSES, seed)
    return {n: p for n, p in decoder.named_parameters() if p.dim() > 1 and p.std() > 0}


def test_plain_heads_of_all_trials_start_alike():
    one, other, reseeded = (
        first_weights(genotype, seed) for genotype, seed in ((CELLS, 0), (OTHER, 0), (CELLS, 1))
    )
    assert {name.split(".")[0] for name in one} == {"neck", "head"}
    for name in one.keys() & other.keys():
        assert torch.equal(one[name], other[name]) == name.startswith("head"), name
    for name, weight in one.items():
        assert not torch.equal(weight, reseeded[name]), name


def test_searched_heads_have_first_weights_of_their_own():
    one = first_weights(HEAD, stage="head")
    other = first_weights([*CELLS, [1], [0, 1]], stage="head")
    assert "head.cls_logits.weight" in one.keys() & other.keys()
    for name in one.keys() & other.keys():
        assert not torch.equal(one[name], other[name]), name


def test_thresholds(folders):
    one = task(folders)
    full = one.run(TrialJob(0, CELLS))
    watched = one.run(TrialJob(0, CELLS, ((2, -math.inf), (4, -math.inf), (6, math.inf))))
    assert watched.status == COMPLETE and watched.losses == full.losses
    assert [iteration for iteration, _ in watched.curve] == [2, 4]
    reward = watched.curve[1][1]
    stopped = one.run(TrialJob(0, CELLS, ((2, -math.inf), (4, math.nextafter(reward, 0)))))
    assert stopped.status == PRUNED
    assert stopped.curve == watched.curve and stopped.reward == reward
    assert one.run(TrialJob(0, CELLS, ((4, reward),))).status == COMPLETE


def test_thresholds_are_of_the_objective(folders):
    one = task(folders)
    full = one.run(TrialJob(0, CELLS, ((2, -math.inf),)))
    threshold = full.curve[0][1] - 0.5  # the reward at the rung is better
    assert one.run(TrialJob(0, CELLS, ((2, threshold),))).status == COMPLETE
    objective = one.cfg.SEARCH.OBJECTIVE
    objective.COST, objective.WEIGHT = "flops", 0.49
    objective.TARGET = full.flops / 2
    assert one.run(TrialJob(0, CELLS, ((2, threshold),))).status == COMPLETE
    objective.WEIGHT = 0.51
    stopped = one.run(TrialJob(0, CELLS, ((2, threshold),)))
    assert stopped.status == PRUNED and stopped.reward == full.curve[0][1]


def test_bf16_is_near(folders):
    exact = task(folders).run(TrialJob(0, CELLS)).reward
    rough = task(folders, AMP="bf16").run(TrialJob(0, CELLS))
    assert rough.status == COMPLETE, rough.reason
    assert rough.reward != exact and rough.reward == pytest.approx(exact, rel=0.1)


@pytest.mark.parametrize("stage, decoder", [("fpn", CELLS), ("fpn", OTHER), ("head", HEAD)])
def test_bf16_maps_are_what_autocast_makes_of_them(folders, monkeypatch, stage, decoder):
    found = task(folders, stage, AMP="bf16").run(TrialJob(0, decoder))
    batch = Examples.batch
    monkeypatch.setattr(Examples, "batch", lambda self, rows, dtype=None: batch(self, rows))
    assert task(folders, stage, AMP="bf16").run(TrialJob(0, decoder)).losses == found.losses


def test_latency_on_request(folders):
    one = task(folders)
    expected = one.run(TrialJob(0, CELLS))
    one.cfg.SEARCH.OBJECTIVE.COST = "latency"
    timed = one.run(TrialJob(0, CELLS))
    assert timed.latency > 0 and math.isnan(expected.latency)
    assert timed.losses == expected.losses


# ---------------------------------------------------------------------------------------- failures
def test_divergence_fails_the_trial(folders):
    result = task(folders, LR=1e30).run(TrialJob(0, CELLS))
    assert result.status == FAILED and math.isnan(result.reward)
    assert "iteration" in result.reason and "NonFinite" in result.reason


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory.\nTried 7 GiB"), ZeroDivisionError("odd")]
)
def test_any_error_fails_the_trial_alone(folders, monkeypatch, error):
    one = task(folders)
    expected = one.run(TrialJob(0, CELLS))

    def broken(*args):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_step", broken)
        result = one.run(TrialJob(0, CELLS))
    assert result.status == FAILED and result.seconds > 0
    assert result.reason.startswith(type(error).__name__) and "\n" not in result.reason
    assert str(error).split()[-1] in result.reason
    assert one.run(TrialJob(0, CELLS)).losses == expected.losses


@pytest.mark.parametrize("needed", [1, 2, 3])
def test_a_trial_that_needs_the_memory_of_the_caches_gets_it(folders, monkeypatch, needed):
    one = task(folders)
    expected = one.run(TrialJob(0, CELLS))
    caches = [examples.cache for examples in one.examples]
    for cache in caches:  # as if on a GPU
        monkeypatch.setattr(cache, "_held", [torch.from_numpy(a.copy()) for a in cache._arrays])
    step = Training._step

    def short_of_memory(*args):
        if sum(cache._held is None for cache in caches) < needed:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(*args)

    monkeypatch.setattr(Training, "_step", short_of_memory)
    result = one.run(TrialJob(0, CELLS))
    if needed > len(caches):
        assert result.status == FAILED
    else:
        assert result.status == COMPLETE and result.losses == expected.losses
    assert (caches[0]._held is None, caches[1]._held is None) == (needed > 1, True)


def test_an_impossible_genotype_fails(folders):
    result = task(folders).run(TrialJob(0, CELLS[:2]))
    assert result.status == FAILED and "GenotypeError" in result.reason


@pytest.mark.parametrize("signal", [KeyboardInterrupt, SystemExit])
def test_interrupts_pass_through(folders, monkeypatch, signal):
    def interrupted(*args):
        raise signal

    monkeypatch.setattr(Training, "_step", interrupted)
    with pytest.raises(signal):
        task(folders).run(TrialJob(0, CELLS))


def test_images_without_boxes(tmp_path):
    """Meta-train and meta-val may have none at all."""
    both = [write_cache(tmp_path / name, 5, MAPS, 0, empty=True) for name in ("a", "b")]
    result = ProxyTask(config(), "fpn", *both, CLASSES, "cpu", 0).run(TrialJob(0, CELLS))
    assert result.status == COMPLETE, result.reason
    assert result.losses["loss_box"] == 0 and result.losses["loss_cls"] > 0


# -------------------------------------------------------------------------------------------- neck
def test_neck_of_the_head_stage(folders, tmp_path, monkeypatch):
    cfg = config(HEAD_CHANNELS=16)
    caches = tuple(map(FeatureCache.open, folders["fpn"]))
    cells = Genotype.parse(CELLS).cells
    neck = train_neck(cfg, caches, cells, CLASSES, CPU, tmp_path)
    assert not neck.training
    levels = neck([level.float() for level in caches[0].read([0, 1])])
    assert [tuple(x.shape[1:]) for x in levels] == [(16, *shape[1:]) for shape in PYRAMID]

    def broken(*args):
        raise AssertionError("is trained again")

    monkeypatch.setattr(Training, "_step", broken)
    again = train_neck(cfg, caches, cells, CLASSES, CPU, tmp_path)
    for name, value in neck.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    cfg.SEARCH.PROXY.NECK_ITERATIONS += 1
    with pytest.raises(AssertionError, match="trained again"):
        train_neck(cfg, caches, cells, CLASSES, CPU, tmp_path)


def test_a_neck_that_diverges_says_what_may_help(folders, tmp_path):
    caches = tuple(map(FeatureCache.open, folders["fpn"]))
    cells = Genotype.parse(CELLS).cells
    with pytest.raises(NonFiniteLossError, match=r"FPN of the head stage.*NECK_ITERATIONS"):
        train_neck(config(LR=1e30), caches, cells, CLASSES, CPU, tmp_path)
    assert not (tmp_path / "neck.pth").exists()


@pytest.mark.parametrize("needed", [2, 3])
def test_the_neck_gets_the_memory_of_the_caches_too(folders, tmp_path, monkeypatch, needed):
    caches = tuple(map(FeatureCache.open, folders["fpn"]))
    cells = Genotype.parse(CELLS).cells
    expected = train_neck(config(), caches, cells, CLASSES, CPU, tmp_path / "expected")
    opened = []

    def held(cache, device):  # as if on a GPU
        cache._held = [torch.from_numpy(array.copy()) for array in cache._arrays]
        opened.append(cache)

    step = Training._step

    def short_of_memory(*args):
        if sum(cache._held is None for cache in opened) < needed:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(*args)

    monkeypatch.setattr(FeatureCache, "to_device", held)
    monkeypatch.setattr(Training, "_step", short_of_memory)
    if needed > 2:
        with pytest.raises(ConfigError, match="memory.*SEARCH.PROXY.BATCH"):
            train_neck(config(), caches, cells, CLASSES, CPU, tmp_path / "again")
        return
    again = train_neck(config(), caches, cells, CLASSES, CPU, tmp_path / "again")
    for name, value in expected.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


@pytest.mark.parametrize("damage", ["truncated", "changed", "empty", "other"])
def test_a_damaged_neck_is_trained_anew(folders, tmp_path, caplog, damage):
    cfg = config(HEAD_CHANNELS=16)
    caches = tuple(map(FeatureCache.open, folders["fpn"]))
    cells = Genotype.parse(CELLS).cells
    neck = train_neck(cfg, caches, cells, CLASSES, CPU, tmp_path)
    path = tmp_path / "neck.pth"
    content = path.read_bytes()
    if damage == "other":
        torch.save([1, 2], path)
    else:
        middle = len(content) // 2
        changed = content[:middle] + bytes(64) + content[middle + 64 :]
        path.write_bytes({"truncated": content[:-100], "changed": changed, "empty": b""}[damage])
    again = train_neck(cfg, caches, cells, CLASSES, CPU, tmp_path)
    assert f"{path} is damaged" in caplog.text
    for name, value in neck.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    caplog.clear()
    train_neck(cfg, caches, cells, CLASSES, CPU, tmp_path)
    assert "damaged" not in caplog.text
