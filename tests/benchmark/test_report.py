import re

import pytest

from nasfcos.benchmark.report import aligned, bytes_text, format_report, seconds_text
from tests.benchmark.reports import case, report, summary, variant


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (12.345, "12.3 s"),
        (123.4, "123 s"),
        (1234, "1234 s"),
        (0.9996, "1.00 s"),
        (0.012345, "12.3 ms"),
        (4.2e-5, "42.0 us"),
        (4.2e-8, "0.0420 us"),
    ],
)
def test_times_have_three_digits(seconds, text):
    assert seconds_text(seconds) == text


def test_sizes():
    assert bytes_text(3 * 2**19) == "1.50 MiB"
    assert bytes_text(0) == "< 0.250 MiB"
    assert bytes_text(None) == ""


def test_columns_are_aligned():
    lines = aligned([["", "a", "long"], ["time", "1", "20.5"]])
    assert lines == ["        time", "  a        1", "  long  20.5"]


def test_a_case_as_a_table():
    limited = variant("ours", 0.5, 0.25, share=summary(0.5), limit="limit")
    limited |= {"rate": summary(8.0), "unit": "images/s", "first_call_seconds": 61.5}
    rival = variant("rival", 2.0, theirs=True)
    broken = {"name": "other", "theirs": False, "status": "failed", "reason": "OSError: x"}
    text = format_report(report(case("inference/model", rival, limited, broken)))
    lines = text.splitlines()
    start = lines.index("inference/model")
    assert lines[start + 1 : start + 3] == ["  some work", "  batch 1"]
    heading, first, second, failure = lines[start + 3 : start + 7]
    expected = ["time", "/ rival", "rate", "of the limit", "first call", "memory"]
    assert re.split(r"\s{2,}", heading.strip()) == expected
    assert first.split()[:2] == ["rival", "2.00"] and " 1  " in first
    assert "500 ms (495 to 505 ms)" in second
    assert "0.250 (0.247 to 0.253)" in second
    assert "8.00 images/s" in second and "61.5 s" in second
    assert "50.0%" in second and second.endswith("1.00 MiB")
    assert len({line.rindex("MiB") for line in (first, second)}) == 1
    assert failure == "  other: FAILED: OSError: x"


def test_cases_that_were_not_measured_say_why():
    skipped = {"name": "a", "status": "skipped", "reason": "no GPU"}
    failed = {"name": "b", "status": "failed", "reason": "ValueError: no"}
    text = format_report(report(skipped, failed))
    assert "a\n  skipped: no GPU" in text
    assert "b\n  FAILED: ValueError: no" in text


def test_the_machine_is_named():
    text = format_report(report(gpu="A GPU", commit="abc+"))
    assert text.startswith("a processor, 2 cores, 2 threads, A GPU\n")
    assert "commit abc+" in text
