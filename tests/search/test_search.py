"""Whole searches, mostly by the command line: results, kill and resume, invalid settings."""

import hashlib
import itertools
import json
import logging
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

pytest.importorskip("optuna")

from nasfcos.config import ConfigError, load_config  # noqa: E402
from nasfcos.config.inheritance import copy_with_bases  # noqa: E402
from nasfcos.engine.launch import USER_ERRORS  # noqa: E402
from nasfcos.engine.monitor import NonFiniteLossError  # noqa: E402
from nasfcos.engine.train import train  # noqa: E402
from nasfcos.genotype import Genotype  # noqa: E402
from nasfcos.models import build_detector  # noqa: E402
from nasfcos.search import select  # noqa: E402
from nasfcos.search.agreement import check_repeatability  # noqa: E402
from nasfcos.search.journal import read_records  # noqa: E402
from nasfcos.search.neck import read_saved  # noqa: E402
from nasfcos.search.prepare import prepare_config  # noqa: E402
from nasfcos.search.proxy import ProxyTask  # noqa: E402
from nasfcos.search.records import COMPLETE, TrialJob  # noqa: E402
from nasfcos.search.search import search, search_status  # noqa: E402
from nasfcos.search.tasks import reopen_task  # noqa: E402

ROOT = Path(__file__).parents[2]

SEARCH = {
    "CACHE": {"SIZE": 64},
    "SPACE": {"CELLS": 4, "HEAD_LAYERS": 2, "HEAD_OPS": ["conv3x3", "skip_connect"]},
    "PROXY": {
        "FPN_CHANNELS": 8,
        "HEAD_CHANNELS": 8,
        "ITERATIONS": 3,
        "BATCH": 4,
        "LR": 0.004,
        "NECK_ITERATIONS": 5,
    },
    "TRIALS": {"FPN": 6, "HEAD": 6},
    "BATCH": 3,
    "PREPARE": {"OVERRIDES": ["SOLVER.MAX_ITER", 4]},
    "SELECT": {
        "CANDIDATES": 2,
        "RETRIALS": 1,
        "FPN": 1,
        "HEAD": 2,
        "OVERRIDES": ["SOLVER.MAX_ITER", 6],
    },
}


@pytest.fixture
def no_report(monkeypatch):
    """For searches in this process whose pictures nobody looks at: drawing takes a third."""
    monkeypatch.setattr("nasfcos.search.search.write_report", lambda *arguments: None)


@pytest.fixture
def search_file(config_file):
    """The config of a search, which inherits from that of the tiny training."""
    path = config_file.with_name("search.yaml")
    path.write_text(
        yaml.safe_dump({"_BASE_": config_file.name, "TEST": {"NMS_IOU": 0.5}, "SEARCH": SEARCH})
    )
    return path


def start(tool, config, *arguments):
    return subprocess.Popen(
        [sys.executable, ROOT / "tools" / tool, "--config-file", config, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(tool, config, *arguments, code=0):
    process = start(tool, config, *arguments)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output
    return output


def trials(folder, stage):
    """The finished trials of a stage, without durations and times."""
    return [
        (r.index, r.choices, r.result.status, r.result.reward, r.result.losses, r.duplicate_of)
        for r in read_records(folder / "search.db", stage)
    ]


def test_from_the_data_to_a_detector_that_trains(search_file, tmp_path, caplog, one_thread):
    out = tmp_path / "out"
    whole = run("search_net.py", search_file)
    assert "2.6e+" not in whole and re.search(r"head layers: 2", whole)
    assert [len(trials(out, stage)) for stage in ("fpn", "head")] == [6, 6]
    assert {t[2] for stage in ("fpn", "head") for t in trials(out, stage)} == {COMPLETE}

    # best.yaml is an ordinary config, and names the architecture that was trained.
    cfg = load_config(out / "best.yaml")
    assert yaml.safe_load((out / "best.yaml").read_text())["_BASE_"] == "base/tiny.yaml"
    assert cfg.TEST.NMS_IOU == 0.5 and cfg.SOLVER.MAX_ITER == 6
    genotype = Genotype.parse(cfg.MODEL.GENOTYPE)
    assert len(genotype.cells) == 4 and len(genotype.head_ops) == 2
    assert cfg.MODEL.NECK.NAME == "nas_fpn" and cfg.MODEL.HEAD.TOWER == "searched"
    ranking = json.loads((out / "ranking.json").read_text())
    assert ranking[0]["genotype"] == cfg.MODEL.GENOTYPE
    trained = [row for row in ranking if row["AP"] is not None]
    assert len(trained) == 2 and trained[0]["AP"] >= trained[1]["AP"]
    assert [row["stage"] for row in ranking] == ["head", "head", "fpn"]
    # The two best of each stage were re-evaluated, and only the new rewards count.
    again = re.findall(r"(fpn|head) trial (\d+) again: reward (\S+) \(\d/2 done\)", whole)
    for stage in ("fpn", "head"):
        rewards = sorted((float(reward) for s, _, reward in again if s == stage), reverse=True)
        ranks = {row["rank"]: row["reward"] for row in ranking if row["stage"] == stage}
        assert len(rewards) == 2
        assert [ranks[rank] for rank in sorted(ranks)] == pytest.approx(
            rewards[: len(ranks)], abs=1e-4
        )
    # Both heads are on top of the best FPN.
    assert ranking[0]["genotype"][:4] == ranking[2]["genotype"]

    tested = run("test_net.py", out / "best.yaml", "MODEL.WEIGHT", out / "best.pth")
    metrics = json.loads((out / "best" / "inference" / "val" / "metrics.json").read_text())
    assert metrics["AP"] == pytest.approx(ranking[0]["AP"], abs=1e-6), tested
    run("train_net.py", out / "best.yaml", "--skip-test", "SOLVER.MAX_ITER", 2)
    assert (out / "best" / "model_final.pth").exists()

    page = (out / "report" / "report.html").read_text()
    assert "<img" in page
    # The base64 text of an image may contain these letters by chance.
    assert "http" not in re.sub(r"base64,[\w+/=]+|http://www\.w3\.org\S*", "", page)
    status = run("search_net.py", search_file, "--status")
    assert "finished" in status and "fpn: 6 of 6 trials" in status

    check_trials_again(search_file)

    # Resuming a finished search repeats nothing; without --resume nothing is overwritten.
    before = {stage: trials(out, stage) for stage in ("fpn", "head")}
    assert "another folder" in run("search_net.py", search_file, code=2)
    again = run("search_net.py", search_file, "--resume")
    assert "training from iteration" not in again and "/h, " not in again
    assert {stage: trials(out, stage) for stage in ("fpn", "head")} == before

    # With more trials and another schedule, full trainings are identified by the architecture, not
    # by its rank, and are repeated with the new schedule.
    more = run(
        "search_net.py", search_file, "--resume", "SEARCH.TRIALS.HEAD", 9, "SEARCH.SELECT.HEAD", 3,
        "SEARCH.SELECT.OVERRIDES", "['SOLVER.MAX_ITER', 7]",
    )  # fmt: skip
    assert trials(out, "head")[:6] == before["head"] and len(trials(out, "head")) == 9
    assert more.count("iteration 7/7") == 3
    for row in json.loads((out / "ranking.json").read_text())[:3]:
        folder = out / row["folder"]
        assert load_config(folder / "config.yaml").MODEL.GENOTYPE == row["genotype"]
        metrics = json.loads((folder / "inference" / "val" / "metrics.json").read_text())
        assert metrics["AP"] == pytest.approx(row["AP"], abs=1e-6)

    refused_changes(search_file, tmp_path)
    moved_and_tidied(search_file, tmp_path, caplog)


def go_on(config, *overrides, resume=True):
    """Run the search as the tool does, but in this process."""
    cfg = load_config(config, overrides)
    return search(cfg, torch.device("cpu"), config, overrides, resume)


def refused_changes(search_file, tmp_path):
    """Settings that make it another search are refused before any file is changed."""
    out = tmp_path / "out"
    same = ("SEARCH.TRIALS.HEAD", 9, "SEARCH.SELECT.HEAD", 3)
    data = tmp_path / "other"
    shutil.copytree(load_config(search_file).DATASETS.ROOT, data)
    tree = json.loads((data / "train/annotations.json").read_text())
    tree["annotations"][0]["bbox"][2] -= 1
    (data / "train/annotations.json").write_text(json.dumps(tree))
    with Image.open(data / "val/images/001.png") as picture:
        picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(data / "val/images/001.png")
    content = contents(out)
    for changed, message in (
        (("SEARCH.PROXY.LR", 0.001), "SEARCH.PROXY.LR was 0.004 and is now 0.001"),
        (("SEARCH.META_VAL", 0.4), "SEARCH.META_VAL was 0.3 and is now 0.4"),
        (("SEARCH.CACHE.SIZE", 96), "SEARCH.CACHE.SIZE was 64 and is now 96"),
        (("SEARCH.PREPARE.WEIGHT", out / "best.pth"), "SEARCH.PREPARE.WEIGHT was none and is now"),
        (("SEARCH.TRIALS.FPN", 12), r"TRIALS.FPN \(which chose .*\) was 6 and is now 12"),
        (("SEARCH.SELECT.FPN", 2), r"SELECT.FPN \(which chose .*\) was 1 and is now 2"),
        (("SEARCH.STAGES", "['head']"), r'SEARCH.STAGES was \["fpn", "head"\] and is now \["head'),
        (("SOLVER.BASE_LR", 0.006), r"backbone.*SOLVER.BASE_LR: 0.005 -> 0.006\."),
        (("DATASETS.ROOT", data), "the split of the data .* was .* and is now"),
    ):
        with pytest.raises(ConfigError, match=f"(?s){message}.*OUTPUT_DIR"):
            go_on(search_file, *same, *map(str, changed))
        assert contents(out) == content, changed
    status = search_status(load_config(search_file, ["SEARCH.TRIALS.HEAD", 99]))
    assert "finished" in status and "head: 9 of 9 trials" in status and "left" not in status


def contents(folder):
    """Hashes of all files except for the tools' logs and the lock."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {
        path: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.name not in ("log.txt", "lock")
    }


def moved_and_tidied(search_file, tmp_path, caplog):
    """A search can be resumed in another place, and without the checkpoints of its trainings."""
    out, moved = tmp_path / "out", tmp_path / "else/where"
    moved.parent.mkdir()
    out.rename(moved)
    (tmp_path / "tiny.yaml").rename(tmp_path / "moved.yaml")
    best = load_config(moved / "best.yaml")
    (tmp_path / "moved.yaml").rename(tmp_path / "tiny.yaml")
    for path in moved.glob("select/*/*/model_*.pth"):
        path.unlink()
    weights = torch.load(moved / "best.pth", weights_only=True)
    again = (
        search_file, "OUTPUT_DIR", str(moved), "SEARCH.TRIALS.HEAD", 9, "SEARCH.SELECT.HEAD", 3,
        "SEARCH.SELECT.OVERRIDES", "['SOLVER.MAX_ITER', 7]",
    )  # fmt: skip
    caplog.set_level(logging.INFO)
    caplog.clear()
    go_on(*again)
    assert "iteration 1/" not in caplog.text and "/h, " not in caplog.text
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    found = torch.load(moved / "best.pth", weights_only=True)
    assert all(torch.equal(found["model"][name], x) for name, x in weights["model"].items())
    assert load_config(moved / "best.yaml").MODEL.GENOTYPE == best.MODEL.GENOTYPE

    # If best.pth is gone, too, the architecture is trained again.
    (moved / "best.pth").write_bytes(b"")
    caplog.clear()
    go_on(*again)
    assert "they are trained again" in caplog.text and caplog.text.count("iteration 7/7") == 1
    found = torch.load(moved / "best.pth", weights_only=True)
    for name, x in weights["model"].items():
        torch.testing.assert_close(found["model"][name], x)


def check_trials_again(config_file):
    """tools/check_proxy.py --again re-evaluates trials of a finished search and changes nothing."""
    cfg, device = load_config(config_file), torch.device("cpu")
    folder = Path(cfg.OUTPUT_DIR)

    def kept():
        files = [folder / x for x in ("search.db", "neck/neck.pth", "backbone/model_final.pth")]
        return [file.read_bytes() for file in files], sorted(os.listdir(folder / "cache"))

    before = kept()
    for stage in ("fpn", "head"):
        records = [r for r in read_records(folder / "search.db", stage) if r.duplicate_of is None]
        rewards = {record.index: record.result.reward for record in records}
        task = reopen_task(cfg, device, stage)
        for record in records[:2]:
            again = task.run(TrialJob(record.index, record.genotype))
            assert again.reward == record.result.reward
        # With another seed the rewards differ.
        tau = check_repeatability(cfg, device, folder, stage, 2)
        found = json.loads((folder / f"agreement/{stage}_again.json").read_text())
        assert found["tau"] == tau and len(found["rows"]) == 2
        for row in found["rows"]:
            assert row["reward"] == rewards[row["trial"]] != row["again"]
        assert (folder / f"agreement/{stage}_again.png").stat().st_size > 5000
    other = ("SEARCH.PROXY.ITERATIONS", 2, "SOLVER.BASE_LR", 0.1)
    output = run("check_proxy.py", config_file, "--again", "--count", 2, *other)
    assert re.search(r"trial \d+: reward .* \(2 of 2\)", output)
    assert re.search(r"differ.*: SEARCH\.PROXY\.ITERATIONS was 3 and is now 2$", output, re.M)
    assert kept() == before
    (folder / "cache").rename(folder / "moved")
    with pytest.raises(ConfigError, match=r"SEARCH\.CACHE\.FOLDER.*--resume"):
        reopen_task(cfg, device, "fpn")
    (folder / "moved").rename(folder / "cache")


def test_the_configs_below_travel_with_the_best(tmp_path):
    """Bases that are relative, in a folder of the same name, behind a link, absolute, or a list."""
    configs = tmp_path / "configs"
    files = {
        "base/part.yaml": "SOLVER: {MAX_ITER: 11}",
        "demo/part.yaml": "_BASE_: ../base/part.yaml\nSOLVER: {BASE_LR: 0.25}",
        "demo/more.yaml": f"_BASE_: '{configs}/base/part.yaml'\nSOLVER: {{AMP: off}}",
        "demo/both.yaml": "_BASE_: [part.yaml, more.yaml]  # two\nSOLVER: {GAMMA: 0.5}",
    }
    for name, text in files.items():
        (configs / name).parent.mkdir(parents=True, exist_ok=True)
        (configs / name).write_text(text)
    (tmp_path / "link").symlink_to(configs / "demo")
    expected = load_config(configs / "demo/both.yaml")
    out = tmp_path / "out"
    copy = copy_with_bases(tmp_path / "link/both.yaml", out / "base")
    assert copy == out / "base/demo/both.yaml" and "# two" in copy.read_text()
    assert copy_with_bases(tmp_path / "link/both.yaml", out / "base") == copy
    shutil.rmtree(configs)
    out.rename(tmp_path / "new")
    assert load_config(tmp_path / "new/base/demo/both.yaml") == expected


def test_a_search_from_the_given_decoder(search_file, tmp_path, monkeypatch, caplog, one_thread):
    """It is tried first, and is trained in full, though the search found other cells."""
    caplog.set_level("INFO")
    cells = [[0, 1, 0, 0, 0], [1, 2, 0, 0, 0], [2, 3, 0, 0, 0], [3, 3, 0, 0, 0]]
    given = [*([cell] for cell in cells), [1], [1, 2]]
    settings = (
        search_file, "MODEL.GENOTYPE", str(given), "SEARCH.FROM_GENOTYPE", True,
        "SEARCH.STRATEGY", "evolution", "SEARCH.SPACE.HEAD_OPS", "['sep_conv_3x3', 'conv3x3']",
        "SEARCH.TRIALS.FPN", 3, "SEARCH.TRIALS.HEAD", 3,
    )  # fmt: skip
    run_trial, train_in_full = ProxyTask.run, select.train_in_full
    monkeypatch.setattr(  # the last trial is the best, so that other cells are found
        ProxyTask, "run", lambda task, job: replace(run_trial(task, job), reward=job.index - 99.0)
    )
    out = tmp_path / "out"
    for its_AP, surpassed in ((9.0, False), (-9.0, True)):

        def judged(cfg, device, its_AP=its_AP):
            found = train_in_full(cfg, device)
            return found | {"AP": its_AP} if cfg.OUTPUT_DIR.endswith("given") else found

        monkeypatch.setattr(select, "train_in_full", judged)
        go_on(*settings)
        fpn, head = (read_records(out / "search.db", stage) for stage in ("fpn", "head"))
        assert fpn[0].genotype == given[:4] and head[0].genotype[4:] == given[4:]
        found = fpn[2].genotype
        assert found != given[:4] and head[0].genotype[:4] == found
        assert "fpn trial 0 again" in caplog.text  # though two others are better

        ranking = json.loads((out / "ranking.json").read_text())
        (row,) = (row for row in ranking if row["given"])
        assert row == ranking[2 if surpassed else 0]
        assert (row["genotype"], row["rank"], row["folder"]) == (given, 0, "select/head/given")
        assert row["reward"] is None and row["params"] == head[0].result.params > 0
        best = load_config(out / "best.yaml").MODEL.GENOTYPE
        assert best == (ranking[0]["genotype"] if surpassed else given)
        assert ("not surpassed" in (out / "best.yaml").read_text()) != surpassed
        assert "Head stage, given" in (out / "report/report.html").read_text()


@pytest.mark.usefixtures("no_report")
def test_several_seeds_choose_by_their_mean(search_file, tmp_path, monkeypatch, one_thread):
    out = tmp_path / "out"
    settings = (search_file, "SEARCH.STAGES", "('fpn',)", "SEARCH.TRIALS.FPN", 3)
    settings += ("SEARCH.SELECT.FPN", 2, "SEARCH.SELECT.SEEDS")
    train_in_full, trained, names = select.train_in_full, [], []
    # APs of two architectures, in the order of their training, by seed. The first one is better
    # with two seeds, the second one with three; with four, the second one diverges.
    APs = [[0.2, 0.6, 0.1, 0.5], [0.1, 0.5, 0.5, math.nan]]

    def judged(cfg, device):
        found = train_in_full(cfg, device)
        run = Path(cfg.OUTPUT_DIR).name
        name, _, seed = run.partition("_seed_")
        names.extend([name] * (name not in names))
        trained.append((run, cfg.SEED))
        if math.isnan(AP := APs[names.index(name)][int(seed or 0)]):
            raise NonFiniteLossError("as if it had diverged")
        return found | {"AP": AP}

    monkeypatch.setattr(select, "train_in_full", judged)
    go_on(*settings, 2)
    one, other = names
    assert trained == [(one, 0), (f"{one}_seed_1", 1), (other, 0), (f"{other}_seed_1", 1)]
    ranking = json.loads((out / "ranking.json").read_text())
    assert [row["folder"] for row in ranking] == [
        f"select/fpn/{name}_seed_1" for name in (one, other)
    ]
    assert ranking[0]["APs"] == [0.2, 0.6] and ranking[0]["AP"] == pytest.approx(0.4)
    # best.yaml names the seed with which the best weights were trained.
    best = load_config(out / "best.yaml")
    assert best.SEED == 1 and best.MODEL.GENOTYPE == ranking[0]["genotype"]
    weights = [
        read_saved(path)["model"]
        for path in (out / "best.pth", out / ranking[0]["folder"] / "model_final.pth")
    ]
    assert all(torch.equal(*pair) for pair in zip(*(w.values() for w in weights), strict=True))
    assert "mean of 2 trainings" in (out / "best.yaml").read_text()

    times = {path: path.stat().st_mtime_ns for path in out.glob("select/fpn/*/model_final.pth")}
    assert len(times) == 4
    go_on(*settings, 3)
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    ranking = json.loads((out / "ranking.json").read_text())
    assert [row["folder"] for row in ranking] == [
        f"select/fpn/{name}_seed_1" for name in (other, one)
    ]
    go_on(*settings, 4)  # an architecture with a training that diverges is out of the ranking
    ranking = json.loads((out / "ranking.json").read_text())
    assert [row["AP"] for row in ranking] == [pytest.approx(0.35), None]
    assert ranking[0]["folder"] == f"select/fpn/{one}_seed_1" and ranking[1]["folder"] == ""


@pytest.mark.usefixtures("no_report")
def test_the_fpn_below_the_head_is_not_chosen_anew(
    search_file, tmp_path, monkeypatch, one_thread
):
    train_in_full = select.train_in_full

    steps = iter([0.1, 0.2] + 9 * [0.0])  # the second FPN is best at first, the first one later

    def judged(cfg, device):
        is_head = "select/head" in cfg.OUTPUT_DIR
        return train_in_full(cfg, device) | {"AP": 0.4 if is_head else 0.5 + next(steps)}

    monkeypatch.setattr(select, "train_in_full", judged)
    settings = (search_file, "SEARCH.TRIALS.FPN", 3, "SEARCH.TRIALS.HEAD", 3)
    settings += ("SEARCH.SELECT.FPN", 2, "SEARCH.SELECT.HEAD", 1)
    go_on(*settings)
    ranking = json.loads((tmp_path / "out/ranking.json").read_text())
    fpns = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/select/fpn/*/*.pth")}
    assert len({path.parent for path in fpns}) == 2
    (head,) = tmp_path.glob("out/select/head/*/model_final.pth")
    before = head.stat().st_mtime_ns
    go_on(*settings, "SEARCH.SELECT.OVERRIDES", ["SOLVER.MAX_ITER", 5])
    assert all(path.stat().st_mtime_ns == time for path, time in fpns.items())
    assert not list(tmp_path.glob("out/select/fpn/*/earlier_*"))
    assert head.stat().st_mtime_ns > before
    after = json.loads((tmp_path / "out/ranking.json").read_text())
    assert [row["stage"] for row in ranking] == ["fpn", "fpn", "head"]
    # The AP of an FPN with the old schedule cannot be compared with the head's new one.
    assert [(row["stage"], row["AP"]) for row in after] == [("head", 0.4)] + 2 * [("fpn", None)]
    assert load_config(tmp_path / "out/best.yaml").MODEL.HEAD.TOWER == "searched"
    # A run of the FPN stage alone does not change the FPN below the head either.
    go_on(*settings, "SEARCH.STAGES", ["fpn"])
    again = json.loads((tmp_path / "out/ranking.json").read_text())
    assert again[0]["genotype"] != ranking[0]["genotype"]
    go_on(*settings)
    # Without its file, the ranking is made of the full trainings that are there.
    (tmp_path / "out/ranking.json").unlink()
    go_on(*settings)
    ranking = json.loads((tmp_path / "out/ranking.json").read_text())
    fpns = [row for row in ranking if row["stage"] == "fpn"]
    assert len(fpns) == 2
    for row in fpns:
        assert row["folder"].startswith("select/fpn/")
        summary = tmp_path / "out" / row["folder"] / "selected.json"
        assert row["AP"] == json.loads(summary.read_text())["AP"]


@pytest.mark.slow
@pytest.mark.usefixtures("no_report")
def test_only_the_planned_trials_choose(search_file, tmp_path, monkeypatch, one_thread):
    run_trial = ProxyTask.run
    # Rewards that rise with the index, independently of the machine's arithmetic.
    monkeypatch.setattr(
        ProxyTask, "run", lambda task, job: replace(run_trial(task, job), reward=job.index - 99.0)
    )
    given = (search_file, "SEARCH.STAGES", "('fpn',)", "SEARCH.TRIALS.FPN")
    go_on(*given, 3)
    first = json.loads((tmp_path / "out/ranking.json").read_text())
    go_on(*given, 12)
    records = read_records(tmp_path / "out/search.db", "fpn")
    assert len(records) == 12
    assert max(r.objective for r in records) > max(r.objective for r in records[:3])
    # TensorBoard shows the trials of both runs as one curve.
    board = EventAccumulator(str(tmp_path / "out/tensorboard/fpn")).Reload()
    for curve in ("reward", "best"):
        assert [event.step for event in board.Scalars(f"fpn/{curve}")] == list(range(12))
    rewards = [event.value for event in board.Scalars("fpn/reward")]
    assert rewards == [record.result.reward for record in records]
    best = list(itertools.accumulate(rewards, max))
    assert [event.value for event in board.Scalars("fpn/best")] == best
    go_on(*given, 3)
    assert json.loads((tmp_path / "out/ranking.json").read_text()) == first
    assert "fpn: 3 of 3 trials" in search_status(load_config(search_file))


@pytest.mark.usefixtures("no_report")
def test_what_happens_while_the_best_are_trained(search_file, tmp_path, monkeypatch, one_thread):
    """The ranking grows with each training, and the config files may be changed or deleted."""
    out, tiny = tmp_path / "out", search_file.with_name("tiny.yaml")
    settings = ("SEARCH.STAGES", "('fpn',)", "SEARCH.TRIALS.FPN", 3, "SEARCH.SELECT.FPN", 2)
    asked, base, text = load_config(search_file), tiny.read_text(), search_file.read_text()
    train_in_full, ranked = select.train_in_full, []

    def meanwhile(cfg, device):
        search_file.unlink(missing_ok=True)
        tiny.write_text("SOLVER: {BASE_LR: 99.0}")
        found = out / "ranking.json"
        ranked.append(len(json.loads(found.read_text())) if found.exists() else 0)
        return train_in_full(cfg, device)

    with monkeypatch.context() as patch:
        patch.setattr(select, "train_in_full", meanwhile)
        go_on(search_file, *settings)
    assert ranked == [0, 1]
    best = load_config(out / "best.yaml")
    assert best.SOLVER.BASE_LR == asked.SOLVER.BASE_LR and best.DATASETS == asked.DATASETS

    # The FPN's trials do not depend on the settings of the head stage.
    tiny.write_text(base)
    search_file.write_text(text)
    go_on(search_file, *settings, "SEARCH.SPACE.HEAD_LAYERS", 3, "SEARCH.PROXY.NECK_ITERATIONS", 9)
    with pytest.raises(ConfigError, match=r"SEARCH\.PROXY\.FPN_CHANNELS was 8 and is now 16"):
        go_on(search_file, *settings, "SEARCH.PROXY.FPN_CHANNELS", 16)


@pytest.mark.usefixtures("no_report")
def test_other_weights_are_refused_before_they_are_cached(search_file, tmp_path, one_thread):
    weights, out = tmp_path / "weights.pth", tmp_path / "out"
    given = (search_file, "SEARCH.PREPARE.WEIGHT", str(weights), "SEARCH.STAGES", "('fpn',)",
             "SEARCH.TRIALS.FPN", 2)  # fmt: skip
    plain = prepare_config(load_config(search_file, given[1:]), out)
    model = build_detector(plain)
    torch.save({"model": model.state_dict()}, weights)
    go_on(*given)
    content = contents(out)
    next(model.backbone.parameters()).data.mul_(1.5)
    torch.save({"model": model.state_dict()}, weights)
    with pytest.raises(ConfigError, match="features of meta-train .*PREPARE.* was .* and is now"):
        go_on(*given)
    changed = {path for path, value in contents(out).items() if content.get(path) != value}
    assert {path.name for path in changed} == {"progress.json"}


def test_the_report_tells_of_a_bad_end(search_file, tmp_path, one_thread):
    with pytest.raises(ConfigError, match="no trial of the fpn stage is complete"):
        go_on(search_file, "SEARCH.PROXY.LR", 1e30, "SEARCH.REPORT_PERIOD", 9999)
    assert "6 of 6" in (tmp_path / "out/report/report.html").read_text()


def test_a_search_killed_anywhere_ends_as_one_undisturbed(search_file, tmp_path):
    started = time.monotonic()
    run("search_net.py", search_file, "OUTPUT_DIR", tmp_path / "whole")
    # The first seconds are spent on imports.
    whole = max(1, time.monotonic() - started - 4)
    seconds = float(os.environ.get("NASFCOS_KILL_WITHIN", whole))
    rng = random.Random(int(os.environ.get("NASFCOS_KILL_SEED", 0)))
    wanted = int(os.environ.get("NASFCOS_KILLS", 2))
    kills = 0
    killed = ("search_net.py", search_file, "--resume", "OUTPUT_DIR", tmp_path / "cut")
    while kills < wanted:
        process = start(*killed)
        time.sleep(3 + rng.random() * seconds)
        if process.poll() is not None:
            process.communicate()
            if kills:
                break
            shutil.rmtree(tmp_path / "cut")  # it ended before the kill: try again
            continue
        before = {stage: finished(tmp_path / "cut", stage) for stage in ("fpn", "head")}
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        for stage, records in before.items():  # no finished trial is lost
            assert finished(tmp_path / "cut", stage)[: len(records)] == records
        kills += 1
    print(f"killed {kills} times")
    assert kills
    run(*killed)
    for stage in ("fpn", "head"):
        assert trials(tmp_path / "cut", stage) == trials(tmp_path / "whole", stage)
    one, other = (json.loads((tmp_path / f / "ranking.json").read_text()) for f in ("whole", "cut"))
    assert one == other


def finished(folder, stage):
    return trials(folder, stage) if (folder / "search.db").exists() else []


def test_the_head_alone_with_retinanet_in_worker_processes(search_file, tmp_path):
    run(
        "search_net.py", search_file, "SEARCH.STAGES", "('head',)", "MODEL.HEAD.NAME", "retinanet",
        "SEARCH.EXECUTOR", "local", "SEARCH.WORKERS", 2, "SEARCH.SELECT.HEAD", 1,
        "SEARCH.STRATEGY", "evolution", "SEARCH.PRUNING.RUNGS", "(1, 2)",
        "SEARCH.PRUNING.STARTUP", 2, "SEARCH.OBJECTIVE.COST", "flops",
        "SEARCH.OBJECTIVE.TARGET_HEAD", 0.0001, "SEARCH.OBJECTIVE.WEIGHT", 0.1,
    )  # fmt: skip
    records = read_records(tmp_path / "out" / "search.db", "head")
    assert len(records) == 6
    cfg = load_config(tmp_path / "out" / "best.yaml")
    given = load_config(search_file).MODEL.GENOTYPE
    assert cfg.MODEL.GENOTYPE[: len(given)] == given and cfg.MODEL.HEAD.NAME == "retinanet"
    own = [r for r in records if r.duplicate_of is None]
    assert all(len(r.result.curve) >= 1 for r in own)
    costly = [r for r in own if r.result.flops > 0.0001]
    assert costly and all(r.objective < r.result.reward for r in costly)
    assert set(own[0].result.losses) == {"loss_cls", "loss_box"}


def test_a_full_training_that_diverges_costs_its_own_place_only(search_file, tmp_path):
    settings = ("SEARCH.STAGES", "('fpn',)", "SEARCH.TRIALS.FPN", 3, "SEARCH.SELECT.FPN", 2)
    diverges = ("SEARCH.SELECT.OVERRIDES", "['SOLVER.BASE_LR', 1e30]")
    output = run("search_net.py", search_file, *settings, *diverges, code=1)
    assert output.count("is out of the ranking") == 2 and "SEARCH.SELECT.OVERRIDES" in output
    assert not (tmp_path / "out" / "best.yaml").exists()
    run("search_net.py", search_file, "--resume", *settings)
    assert (tmp_path / "out" / "best.yaml").exists()


@pytest.mark.parametrize(
    "overrides, message",
    [
        (("SEARCH.SELECT.OVERRIDES", "['SOLVER.MAX_ITR', 3]"), r"SELECT\.OVERRIDES.*SOLVER\.MAX_"),
        (("SEARCH.PREPARE.OVERRIDES", "['SOLVER.MAX_ITER']"), r"PREPARE\.OVERRIDES.*pairs"),
        (("SEARCH.SELECT.OVERRIDES", "['OUTPUT_DIR', 'here']"), r"SELECT\.OVERRIDES.*OUTPUT_DIR"),
        (("SEARCH.STAGES", "('head',)", "MODEL.GENOTYPE", "[]", "MODEL.NECK.NAME", "fpn"),
         r"MODEL\.GENOTYPE must name the cells"),
        (("DATASETS.TEST", "()"), r"DATASETS\.TEST is empty"),
        (("DATASETS.TEST", "('vall',)"), r"vall.*val"),
        (("SEED", -1), r"SEED is -1"),
        (("SEED", 2**31 - 1, "SEARCH.SELECT.SEEDS", 2), r"SELECT\.SEEDS is 2, .* 2147483647"),
        (("SEARCH.PREPARE.OVERRIDES", "['SEED', -1]"), r"PREPARE\.OVERRIDES: SEED is -1"),
        (("SEARCH.SELECT.OVERRIDES", "['SEED', -1]"), r"SELECT\.OVERRIDES: SEED is -1"),
        (("SEARCH.SELECT.OVERRIDES", "['MODEL.WEIGHT', 'gone.pth']"), r"gone\.pth does not exist"),
        (("SEARCH.SELECT.OVERRIDES", "['SOLVER.ACCUMULATE', 3]"), r"SOLVER\.ACCUMULATE"),
        (("SEARCH.SELECT.OVERRIDES", "['MODEL.NUM_CLASSES', 80]"), r"MODEL\.NUM_CLASSES is 80"),
        (("SEARCH.SELECT.OVERRIDES", "['MODEL.BACKBONE.NAME', 'resnt']"), r"resnt.*resnet"),
        (("SEARCH.PREPARE.WEIGHT", "nowhere.pth"), r"nowhere\.pth"),
        (("SEARCH.FROM_GENOTYPE", True, "SEARCH.SPACE.CELLS", 5),
         r"FROM_GENOTYPE: the fpn stage .*MODEL\.GENOTYPE.* has 5 cells, not"),
        (("SEARCH.FROM_GENOTYPE", True, "MODEL.GENOTYPE", "[]", "MODEL.NECK.NAME", "fpn"),
         r"FROM_GENOTYPE.*MODEL\.GENOTYPE is empty"),
    ],
)  # fmt: skip
def test_mistakes_are_found_before_the_search_begins(search_file, tmp_path, overrides, message):
    with pytest.raises(USER_ERRORS, match=message):
        go_on(search_file, *overrides, resume=False)
    assert not (tmp_path / "out" / "search.db").exists()


@pytest.mark.parametrize(
    "file, message",
    [
        ("model_final.pth", r"holds a training"),
        ("ranking.json", r"holds the results of a search, but not its journal search\.db"),
    ],
)
def test_files_of_others_are_not_replaced(search_file, tmp_path, file, message):
    out = tmp_path / "out"
    out.mkdir()
    (out / file).write_text("[]")
    with pytest.raises(ConfigError, match=message):
        go_on(search_file)
    assert [path.name for path in out.iterdir()] == [file]


def test_no_training_in_the_folder_of_a_search(search_file, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/search.db").touch()
    cfg = load_config(search_file)
    with pytest.raises(ConfigError, match=r"holds an architecture search \(search\.db\)"):
        train(cfg, torch.device("cpu"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["search.db"]


def test_a_mistake_ends_the_tool_with_a_message(search_file, tmp_path):
    output = run("search_net.py", search_file, "DATASETS.TEST", "()", code=2)
    assert re.search(r"DATASETS\.TEST is empty", output) and "Traceback" not in output
    assert not (tmp_path / "out" / "search.db").exists()
