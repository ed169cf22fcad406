import json

import pytest

from nasfcos.benchmark.compare import (
    FAILS,
    FASTER,
    GONE,
    NEW,
    OTHER,
    SAME,
    SLOWER,
    ReportError,
    compare,
    format_changes,
    machine_differences,
    read_report,
)
from tests.benchmark.reports import case, report, summary, variant


def verdicts(old, new, threshold=1.1):
    changes = compare(report(*old), report(*new), threshold)
    return {change.name: change.verdict for change in changes}


@pytest.mark.parametrize(
    ("old", "new", "spread", "verdict"),
    [
        (1.0, 1.05, 0.01, SAME),  # below the threshold
        (1.0, 1.2, 0.01, SLOWER),
        (1.0, 1.2, 0.2, SAME),  # within the spread
        (1.2, 1.0, 0.01, FASTER),
        (1.2, 1.0, 0.2, SAME),
        (1.0, 9.0, 0.2, SLOWER),
    ],
)
def test_a_change_counts_beyond_threshold_and_spread(old, new, spread, verdict):
    before, after = (case("a", variant("ours", x, spread=spread)) for x in (old, new))
    assert verdicts([before], [after]) == {"a: ours": verdict}


def test_the_threshold_can_be_chosen():
    before, after = (case("a", variant("ours", x)) for x in (1.0, 1.2))
    assert verdicts([before], [after], threshold=1.3) == {"a: ours": SAME}


def test_ratios_count_where_there_is_a_rival():
    # On a machine half as fast everything takes twice as long.
    old = case("a", variant("rival", 1, theirs=True), variant("ours", 0.5, ratio=0.5))
    new = case("a", variant("rival", 2, theirs=True), variant("ours", 1.0, ratio=0.5))
    assert verdicts([old], [new]) == {"a: ours": SAME}
    worse = case("a", variant("rival", 0.5, theirs=True), variant("ours", 0.5, ratio=1.0))
    (change,) = compare(report(old), report(worse))
    assert (change.verdict, change.figure, change.factor) == (SLOWER, "ratio", 2)


def test_only_the_main_rival_counts():
    def made(main, other):
        ratios = {"rival": summary(main), "other": summary(other)}
        return case("a", {**variant("ours"), "ratios": ratios}, rivals=["rival", "other"])

    assert verdicts([made(1, 1)], [made(1, 5)]) == {"a: ours": SAME}


def test_a_lower_share_of_the_limit_is_slower():
    old = case("a", variant("ours", 1.0, share=summary(0.8), limit="limit"))
    new = case("a", variant("ours", 1.0, share=summary(0.4), limit="limit"))
    (change,) = compare(report(old), report(new))
    assert (change.verdict, change.figure) == (SLOWER, "share")
    assert change.factor == pytest.approx(2)


def test_seconds_count_where_one_report_has_nothing_better():
    old, new = case("a", variant("ours", 1.0)), case("a", variant("ours", 2.0, ratio=0.1))
    (change,) = compare(report(old), report(new))
    assert (change.verdict, change.figure) == (SLOWER, "seconds")


def test_what_others_do_is_not_judged():
    old, new = (case("a", variant("rival", x, theirs=True)) for x in (1, 9))
    assert verdicts([old], [new]) == {}


def test_new_gone_failing_and_other_work():
    old = [
        case("a", variant("kept"), variant("gone"), variant("broken")),
        case("b", variant("ours")),
        case("c", variant("ours")),
        case("d", variant("ours")),
    ]
    broken = {"name": "broken", "theirs": False, "status": "failed", "reason": "x"}
    new = [
        case("a", variant("kept"), variant("fresh"), broken),
        case("b", variant("ours"), parameters={"batch": 2}),
        {"name": "c", "status": "failed", "reason": "x"},
        {"name": "d", "status": "skipped", "reason": "x"},
        case("e", variant("ours")),
    ]
    assert verdicts(old, new) == {
        "a: kept": SAME,
        "a: gone": GONE,
        "a: broken": FAILS,
        "a: fresh": NEW,
        "b: ours": OTHER,
        "c: ours": FAILS,
        "d: ours": GONE,
        "e: ours": NEW,
    }


def test_the_table_has_the_worst_first_and_counts_the_rest():
    old = [case(name, variant("ours", 1.0)) for name in "abcd"]
    new = [case(name, variant("ours", x)) for name, x in zip("abcd", (0.5, 2, 4, 1), strict=True)]
    lines = format_changes(compare(report(*old), report(*new)), 1.1).splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["c:", "b:", "a:"]
    assert lines[1].split()[1:4] == ["ours", "slower", "4.00"]
    assert lines[-1] == "1 of 4 changed by less than 1.1 times or their spread."


def test_machines_that_differ_are_named():
    old, new = report(), report(cores=8, date="2001-01-01", commit="abc")
    assert machine_differences(old, new) == ["cores: 2 -> 8"]


def test_a_report_is_read_back(tmp_path):
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report(case("a", variant("ours", ratio=1.0)))))
    assert compare(read_report(path), read_report(path))[0].verdict == SAME


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("{", "is no report"),
        ("[]", "is no report"),
        ('{"format": 1}', "is no report"),
        ('{"format": 99, "cases": []}', "has format 99"),
        (json.dumps({**report(), "cases": [{"name": "a", "status": "ok"}]}), "is no report"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    path = tmp_path / "file.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ReportError, match=message) as error:
        read_report(path)
    assert str(path) in str(error.value)
