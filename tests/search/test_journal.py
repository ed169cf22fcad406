import csv
import json
import logging
import math
import multiprocessing
import random
import shutil
import signal
import sqlite3
import threading
import time
from pathlib import Path
from wsgiref.util import setup_testing_defaults

import pytest

optuna = pytest.importorskip("optuna")

from optuna.storages import RDBStorage  # noqa: E402

from nasfcos.search.journal import (  # noqa: E402
    Journal,
    JournalError,
    check_settings,
    file,
    has_trials,
    read_records,
    read_settings,
    writing,
)
from nasfcos.search.records import COMPLETE, FAILED, PRUNED, TrialResult  # noqa: E402
from nasfcos.search.space import FPNSpace, HeadSpace  # noqa: E402
from tests.known import PUBLISHED  # noqa: E402

SPACE = HeadSpace(PUBLISHED.cells, 2)
SETTINGS = {"SEARCH.BATCH": 4, "SEARCH.PROXY.LR": 8e-4, "SEARCH.PRUNING.RUNGS": (10, 20)}
BATCH = 4


def proposals(batch, count=BATCH):
    rng = random.Random(batch)
    return [SPACE.sample(rng) for _ in range(count)]


def result_of(index):
    """A result that depends on the index only; all kinds occur."""
    rng = random.Random(index)
    curve = ((10, -rng.random() - 1), (20, -rng.random()))
    if index % 4 == 3:
        return TrialResult(FAILED, seconds=0.1, reason="CUDA out of memory")
    if index % 4 == 2:
        return TrialResult(
            PRUNED, curve[0][1], {"cls": 0.1}, curve[:1], 10, rng.random(), seconds=rng.random()
        )
    return TrialResult(
        COMPLETE, curve[1][1], {"cls": rng.random(), "box": 0.2}, curve, 2**33 + index, 1.5, 0.25,
        rng.random(),
    )  # fmt: skip


def objective_of(index):
    result = result_of(index)
    return result.reward - 0.125 if result.status != FAILED else math.nan


def open_journal(path):
    return Journal(path, SPACE, retries=2, settings=SETTINGS)


def go_on(journal, batches=2, on_finished=lambda index: None):
    """Continue a search whose trials take no time, from the state of its journal."""
    for batch in range(batches):
        journal.propose(batch, proposals(batch))
        finished = {record.index for record in journal.records()}
        for index in range(batch * BATCH, (batch + 1) * BATCH):
            if index not in finished:
                journal.start(index)
                original = 0 if index == 5 else None
                journal.finish(index, result_of(original or index), objective_of(index), original)
                on_finished(index)
        journal.note_batch(batch, {"entropy": 1 / (batch + 1)})
    return journal


def run(path, batches=2, on_finished=lambda index: None):
    return go_on(open_journal(path), batches, on_finished)


def comparable(records):
    """Records as text, without times; so a nan equals a nan."""
    return [repr(record)[: repr(record).rindex("finished=")] for record in records]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "search.db"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return comparable(run(tmp_path_factory.mktemp("journal") / "search.db").records())


def test_what_goes_in_comes_out(path):
    began = time.time()
    journal = run(path)
    records = journal.records()
    assert [record.index for record in records] == list(range(8))
    for record in records:
        expected = result_of(record.index)
        assert record.choices == (proposals(0) + proposals(1))[record.index]
        assert record.key == SPACE.key(record.choices)
        assert record.genotype == SPACE.genotype(record.choices).to_list()
        assert record.batch == record.index // BATCH
        assert record.duplicate_of == (0 if record.index == 5 else None)
        assert began <= record.finished <= time.time()
        if record.index != 5:
            assert repr(record.result) == repr(expected)
        if record.result.status != FAILED:
            assert record.objective == objective_of(record.index)
    again = open_journal(path)
    assert repr(again.records()) == repr(read_records(path, "head")) == repr(records)
    assert again.batch_stats() == journal.batch_stats() == [{"entropy": 1.0}, {"entropy": 0.5}]
    assert (again.batch_size(1), again.batch_size(2)) == (4, 0)


def test_stages_share_the_file(path):
    run(path)
    fpn = FPNSpace(3)
    journal = Journal(path, fpn, retries=2, settings={})
    choices = fpn.sample(random.Random(0))
    journal.propose(0, [choices])
    journal.start(0)
    record = journal.finish(0, TrialResult(COMPLETE, -1.0), -1.0)
    assert record.choices == choices
    assert len(read_records(path, "fpn")) == 1
    assert len(read_records(path, "head")) == 8


def test_what_was_proposed_stands(path):
    run(path, batches=1)
    journal = open_journal(path)
    before = journal.proposed(0)
    journal.propose(0, proposals(9))
    assert journal.proposed(0) == before == proposals(0)
    assert journal.proposed(1) == []


def test_other_settings_are_refused_and_named(path):
    run(path, batches=1)
    changed = {**SETTINGS, "SEARCH.BATCH": 8, "SEED": 1}
    with pytest.raises(JournalError) as caught:
        Journal(path, SPACE, retries=2, settings=changed)
    message = str(caught.value)
    assert "SEARCH.BATCH was 4 and is now 8" in message
    assert "SEED was (nothing) and is now 1" in message
    assert "SEARCH.PROXY.LR" not in message
    assert "OUTPUT_DIR" in message and "--resume" in message
    larger = HeadSpace(PUBLISHED.cells, 3)
    with pytest.raises(JournalError, match="decisions was"):
        Journal(path, larger, retries=2, settings=SETTINGS)


def test_settings_are_refused_before_the_search_goes_on(tmp_path, path):
    check_settings(path, "head", {"SEARCH.BATCH": 8})
    assert not has_trials(path, "head") and not path.exists()
    open_journal(path)
    check_settings(path, "head", {"SEARCH.BATCH": 8})
    assert not has_trials(path, "head")
    changed = {**SETTINGS, "SEARCH.BATCH": 5}
    Journal(path, SPACE, retries=2, settings=changed)
    open_journal(path)
    run(path, batches=1)
    content = path.read_bytes()
    check_settings(path, "head", {"SEARCH.BATCH": 4, "SEARCH.PRUNING.RUNGS": (10, 20)})
    check_settings(path, "fpn", {"SEARCH.BATCH": 8})
    assert has_trials(path, "head") and not has_trials(path, "fpn")
    with pytest.raises(JournalError, match=r"stage with other settings: SEARCH.BATCH was 4 and is "
                       r"now 8; SEED was \(nothing\) and is now 1\. .*OUTPUT_DIR"):  # fmt: skip
        check_settings(path, "head", {"SEARCH.BATCH": 8, "SEED": 1})
    assert path.read_bytes() == content
    # The file of a search that was killed while creating it.
    (tmp_path / "new.db").write_bytes(b"")
    check_settings(tmp_path / "new.db", "head", {"SEARCH.BATCH": 8})
    assert not has_trials(tmp_path / "new.db", "head")


def test_a_worker_that_dies_costs_a_try(path):
    journal = open_journal(path)
    journal.propose(0, proposals(0))
    journal.start(1)
    assert journal.requeue(1, "killed by SIGSEGV")
    # A kill of the search forgets no death, and does not count as one.
    journal.start(1)
    journal = open_journal(path)
    journal.propose(0, proposals(0))
    journal.start(1)
    assert journal.requeue(1, "killed by SIGSEGV")
    assert journal.records() == []
    journal.start(1)
    assert not journal.requeue(1, "killed by SIGKILL")
    (record,) = journal.records()
    assert (record.index, record.choices) == (1, proposals(0)[1])
    assert record.result.status == FAILED
    assert record.result.reason == "the worker died 3 times, at last: killed by SIGKILL"
    assert repr(read_records(path, "head")) == repr([record])
    study = optuna.load_study(study_name="head", storage=f"sqlite:///{path}")
    assert study.trials[-1].system_attrs["retry_history"] == [1, 4, 5]


def test_without_retries_the_first_death_is_final(path):
    journal = Journal(path, SPACE, retries=0, settings=SETTINGS)
    journal.propose(0, proposals(0))
    journal.start(0)
    assert not journal.requeue(0, "exit code 3")
    assert journal.records()[0].result.reason == "the worker died once, at last: exit code 3"


def test_running_trials_of_a_killed_search_are_tried_again(path, caplog):
    journal = Journal(path, SPACE, retries=0, settings=SETTINGS)
    journal.propose(0, proposals(0))
    for _ in range(5):
        journal.start(2)
        with caplog.at_level(logging.WARNING):
            journal = Journal(path, SPACE, retries=0, settings=SETTINGS)
        journal.propose(0, proposals(0))
    assert "trial 2 was running" in caplog.messages[0]
    assert "SEARCH.EXECUTOR local" not in caplog.messages[0]
    assert "SEARCH.EXECUTOR local" in caplog.messages[-1]
    journal.start(2)
    assert journal.finish(2, result_of(0), 1.0).index == 2
    assert len(journal.records()) == 1


def test_misuse_is_told(path):
    journal = Journal(path, SPACE, retries=0, settings=SETTINGS)
    journal.propose(0, proposals(0))
    journal.start(0)
    with pytest.raises(ValueError, match="trial 0 is not waiting"):
        journal.start(0)
    with pytest.raises(ValueError, match="trial 0 is complete, but its objective is nan"):
        journal.finish(0, result_of(0), math.nan)
    with pytest.raises(ValueError, match="batch 3 is learnt from before batch 0"):
        journal.note_batch(3, {})


def test_a_kill_between_any_two_writes_loses_nothing(tmp_path, path, undisturbed, monkeypatch):
    """Tests every moment: a kill leaves the file as it is before one of the writes."""
    snapshots = []
    finished = set()

    def recording(write):
        def record(*args, **kwargs):
            copy = tmp_path / f"{len(snapshots)}.db"
            shutil.copyfile(path, copy)
            snapshots.append((copy, set(finished)))
            return write(*args, **kwargs)

        return record

    journal = open_journal(path)
    journal.propose(0, proposals(0))
    journal.start(0)
    with monkeypatch.context() as patch:
        for name in (
            "_create_new_trial", "set_study_user_attr", "set_trial_user_attr",
            "set_trial_intermediate_value", "set_trial_state_values",
        ):  # fmt: skip
            patch.setattr(RDBStorage, name, recording(getattr(RDBStorage, name)))
        journal = open_journal(path)  # takes snapshots of the recovery of trial 0, too,
        journal.start(1)
        journal.requeue(1, "killed by SIGKILL")  # and that of a worker's death
        go_on(journal, batches=1, on_finished=finished.add)
    assert len(snapshots) > 30 and finished == set(range(4))
    for number, (copy, known) in enumerate(snapshots):
        journal = open_journal(copy)
        records = journal.records()
        assert known <= {record.index for record in records}
        assert set(comparable(records)) <= set(undisturbed)
        journal.propose(0, proposals(0))
        waiting = [t for t in journal._study.trials if not t.state.is_finished()]
        assert {t.state.name for t in waiting} <= {"WAITING"}
        indices = [t.user_attrs["index"] for t in waiting] + [record.index for record in records]
        assert sorted(indices) == list(range(4)), "each trial is finished or waits, once"
        if number % 8 == 0:
            assert comparable(go_on(journal, batches=1).records()) == undisturbed[:4]


def _search_and_tell(path, pipe):
    run(path, on_finished=pipe.send)
    pipe.send("done")


@pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="needs a cheap process to kill"
)
def test_sigkill_at_random_moments_loses_nothing(path, undisturbed):
    context = multiprocessing.get_context("fork")
    rng = random.Random(0)
    told, met = [], 0
    for kill in range(21):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_search_and_tell, args=(path, theirs))
        process.start()
        theirs.close()
        if kill < 20:
            process.join(rng.uniform(0.05, 0.25))
            process.kill()
        process.join()
        met += process.exitcode == -signal.SIGKILL and path.exists()
        try:
            while True:
                told.append(ours.recv())
        except EOFError:
            pass
        if told:
            assert set(told) - {"done"} <= {r.index for r in read_records(path, "head")}
        if told and told[-1] == "done":
            # The remaining kills are for another search.
            assert comparable(read_records(path, "head")) == undisturbed
            assert sorted(told[:-1]) == sorted(set(told[:-1])), "a trial was done twice"
            path.unlink()
            told.clear()
    assert met >= 5, "kills of a search that had begun"


def test_readers_wait_for_a_lock(path):
    run(path, batches=1)
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN EXCLUSIVE")
    release = threading.Timer(0.5, other.execute, ["ROLLBACK"])
    release.start()
    began = time.monotonic()
    assert len(read_records(path, "head")) == 4
    assert time.monotonic() - began > 0.4
    release.join()
    other.close()


def test_files_that_are_no_journal(tmp_path, path):
    with pytest.raises(JournalError, match="no search in .* search.db is missing"):
        read_records(path, "head")
    assert not path.exists()
    path.write_text("neither SQLite nor anything else\n" * 100)
    for open_it in (
        lambda: read_records(path, "head"),
        lambda: Journal(path, SPACE, retries=0, settings={}),
    ):
        with pytest.raises(JournalError, match="search.db cannot be read as a journal: .*not a da"):
            open_it()


@pytest.mark.parametrize(
    "script", ["", "CREATE TABLE alembic_version (version_num VARCHAR)"], ids=["empty", "begun"]
)
def test_a_file_that_is_being_made_has_no_trials_yet(path, script):
    sqlite3.connect(path).executescript(script)
    path.touch()
    assert read_records(path, "head") == []
    assert read_settings(path, "head") == {}


def test_any_path_will_do(tmp_path):
    path = tmp_path / "50% of {all}?x=1#y é" / "search.db"
    run(path, batches=1)
    assert path.exists()
    assert len(read_records(path, "head")) == 4
    assert read_records(path, "fpn") == []


def test_csv(path):
    journal = run(path)
    for seed_offset, reward in ((2, -1.5), (1, -1.25)):
        journal.note_reevaluation(1, seed_offset, reward)
    target = path.with_name("trials.csv")
    journal.export_csv(target)
    with target.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    for row, record in zip(rows, journal.records(), strict=True):
        assert int(row["index"]) == record.index
        assert row["status"] == record.result.status
        assert repr(float(row["reward"])) == repr(record.result.reward)
        assert json.loads(row["genotype"]) == record.genotype
        names = [row[decision.name] for decision in SPACE.decisions]
        assert names == [
            decision.choices[choice]
            for decision, choice in zip(SPACE.decisions, record.choices, strict=True)
        ]
    assert rows[0]["loss.box"] == "0.2" and rows[2]["loss.box"] == ""
    assert rows[5]["reused"] == "0" and rows[4]["reused"] == ""
    assert rows[3]["reason"] == "CUDA out of memory"
    assert [rows[i]["again"] for i in (0, 1)] == ["[]", "[-1.25, -1.5]"]


def test_optuna_understands_the_file(path):
    """What the dashboard reads: states, values, decisions by name, curves and attributes."""
    run(path, batches=3)
    study = optuna.load_study(study_name="head", storage=f"sqlite:///{path}")
    best = max(objective_of(i) for i in range(12) if i % 4 < 2 and i != 5)
    assert study.best_value == best
    states = [trial.state.name for trial in study.trials[:4]]
    assert states == ["COMPLETE", "COMPLETE", "PRUNED", "FAIL"]
    trial = study.trials[0]
    assert list(trial.params) == [decision.name for decision in SPACE.decisions]
    assert trial.intermediate_values == dict(result_of(0).curve)
    assert trial.user_attrs["params"] == result_of(0).params
    importances = optuna.importance.get_param_importances(
        study, evaluator=optuna.importance.PedAnovaImportanceEvaluator()
    )
    assert set(importances) == {decision.name for decision in SPACE.decisions}


def test_the_dashboard_shows_it(path):
    dashboard = pytest.importorskip("optuna_dashboard")
    run(path, batches=3)
    application = dashboard.wsgi(f"sqlite:///{path}")

    def get(url):
        environ, statuses = {"PATH_INFO": url}, []
        setup_testing_defaults(environ)
        answer = b"".join(application(environ, lambda status, *_: statuses.append(status)))
        assert statuses == ["200 OK"]
        return answer

    assert b"<html" in get("/dashboard/").lower()
    (study,) = json.loads(get("/api/studies"))["study_summaries"]
    assert study["study_name"] == "head"
    trials = json.loads(get(f"/api/studies/{study['study_id']}"))["trials"]
    assert [trial["state"] for trial in trials[:4]] == ["Complete", "Complete", "Pruned", "Fail"]
    assert [p["name"] for p in trials[0]["params"]] == [d.name for d in SPACE.decisions]
    assert trials[0]["values"] == [pytest.approx(objective_of(0))]


def test_nothing_lies_about_after_a_search(path):
    run(path)
    assert [p.name for p in Path(path.parent).iterdir()] == ["search.db"]


def test_a_full_disk_is_said_in_words_and_costs_no_finished_trial(tmp_path, monkeypatch):
    path, engine, finished = tmp_path / "search.db", file._engine, []

    def small(path, mode):
        def connect():
            connection = engine(path, mode)["creator"]()
            connection.execute("PRAGMA max_page_count = 45")
            return connection

        return {"creator": connect}

    with monkeypatch.context() as patch:
        patch.setattr(file, "_engine", small)
        with pytest.raises(JournalError, match=r"cannot be written.*full.*room.*--resume"):
            with writing(path):
                go_on(open_journal(path), 99, finished.append)
    assert finished
    journal = open_journal(path)
    assert [record.index for record in journal.records()] == finished
    go_on(journal, journal.records()[-1].batch + 2)
    assert len(journal.records()) > len(finished)
