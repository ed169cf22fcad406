import itertools

import pytest
import torch

from nasfcos.benchmark.measure import Case, Effort, Skip, Variant, measure, ratios, shares
from nasfcos.benchmark.statistics import Quartiles

CPU = torch.device("cpu")
ONE_CALL = Effort(seconds=0, min_rounds=3, max_rounds=5, warmups=2, sample=0)


def recorder(log, name, fail_at=None):
    calls = itertools.count()

    def run():
        log.append(name)
        if next(calls) == fail_at:
            raise RuntimeError(f"{name} breaks")

    return Variant(name, run)


def test_variants_take_turns():
    log = []
    case = Case("", [recorder(log, name) for name in "ABC"])
    timings = measure(case, CPU, ONE_CALL)
    # A warm-up (as it takes longer than 0 s, no second one), the memory, and three rounds.
    assert log == list("ABC") * 5
    assert list(timings.seconds) == list("ABC")
    for values in timings.seconds.values():
        assert len(values) == 3
    assert not timings.errors


def test_rounds_fill_the_time_up_to_the_most():
    log = []
    effort = Effort(seconds=60, min_rounds=3, max_rounds=11, warmups=1, sample=0)
    timings = measure(Case("", [recorder(log, "A")]), CPU, effort)
    assert len(timings.seconds["A"]) == 11


def test_first_calls_that_compile_do_not_count():
    log = []
    compiled = recorder(log, "B")
    compiled.compiles = True
    timings = measure(Case("", [recorder(log, "A"), compiled]), CPU, ONE_CALL)
    assert log == ["B"] * 4 + list("AB") * 5
    assert timings.first.keys() == {"B"}
    assert len(timings.seconds["B"]) == 3


def test_quick_work_is_repeated_within_a_sample():
    log = []
    effort = Effort(seconds=0, min_rounds=1, max_rounds=1, warmups=1, sample=0.002)
    measure(Case("", [recorder(log, "A")]), CPU, effort)
    assert len(log) > 10


@pytest.mark.parametrize("fail_at", [0, 1, 3])
def test_others_go_on_when_one_fails(fail_at, caplog):
    log = []
    case = Case("", [recorder(log, "A"), recorder(log, "B", fail_at), recorder(log, "C")], ["A"])
    timings = measure(case, CPU, ONE_CALL)
    assert timings.errors == {"B": "RuntimeError: B breaks"}
    assert timings.seconds.keys() == {"A", "C"}
    assert log.count("B") == fail_at + 1
    assert len(timings.seconds["A"]) == len(timings.seconds["C"]) == 3
    assert ratios(case, timings.seconds).keys() == {"A", "C"}
    assert "B failed" in caplog.text


def test_progress_goes_from_0_to_1():
    told = []
    case = Case("", [recorder([], name) for name in "AB"])
    measure(case, CPU, ONE_CALL, lambda what, done: told.append((what, done)))
    shares = [done for _, done in told]
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] <= 1
    assert told[2][0] == "warm-up: A" and told[-1][0] == "round 3 of 3: B"


def test_ratios_to_each_rival():
    case = Case("", [recorder([], name) for name in "ABC"], rivals=["A", "B", "gone"])
    seconds = {"A": [1.0, 2.0], "B": [2.0, 4.0], "C": [3.0, 6.0]}
    found = ratios(case, seconds)
    assert found["A"] == {"B": Quartiles(0.5, 0.5, 0.5, 2)}
    assert found["C"] == {"A": Quartiles(3, 3, 3, 2), "B": Quartiles(1.5, 1.5, 1.5, 2)}


def test_share_is_of_the_limits_rate():
    limit = Variant("limit", lambda: None, amount=8.0)
    stage = Variant("stage", lambda: None, amount=2.0, limit="limit")
    free = Variant("free", lambda: None, amount=2.0, limit="not measured")
    # 8 in 1 s is the limit; 2 in 0.5 s is half of that.
    found = shares(
        Case("", [limit, stage, free]), {"limit": [1.0, 2.0], "stage": [0.5, 1.0], "free": [1.0]}
    )
    assert found == {"stage": Quartiles(0.5, 0.5, 0.5, 2)}


def test_memory_adds_what_is_held():
    def run():
        torch.ones(2**22)  # 16 MiB

    case = Case(
        "",
        [
            Variant("A", run),
            Variant("B", run, held_bytes=lambda: 2**30),
            Variant("C", run, memory=False),
        ],
    )
    memory = measure(case, CPU, ONE_CALL).memory
    assert memory["C"] is None
    if memory["A"] is not None:
        for found, held in ((memory["A"], 0), (memory["B"], 2**30)):
            assert abs(found - held - 2**24) < 2**21


def test_what_cannot_be_had_is_noted():
    case = Case("", [])

    def missing():
        raise Skip("no such library")

    case.add("A", missing)
    case.add("B", lambda: recorder([], "B"))
    assert [variant.name for variant in case.variants] == ["B"]
    assert case.unavailable == {"A": "no such library"}
