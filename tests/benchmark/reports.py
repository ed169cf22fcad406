"""Synthetic reports."""

from nasfcos.benchmark.statistics import Quartiles


def summary(median, spread=0.01):
    return Quartiles(median, median * (1 - spread), median * (1 + spread), 5).to_json()


def variant(name, seconds=1.0, ratio=None, theirs=False, spread=0.01, **further):
    return {
        "name": name,
        "theirs": theirs,
        "status": "ok",
        "seconds": summary(seconds, spread),
        "memory_bytes": 2**20,
        "ratios": {} if ratio is None else {"rival": summary(ratio, spread)},
        **further,
    }


def case(name, *variants, **further):
    return {
        "name": name,
        "status": "ok",
        "what": "some work",
        "parameters": {"batch": 1},
        "rivals": ["rival"],
        "variants": list(variants),
        **further,
    }


MACHINE = {
    "cpu": "a processor", "cores": 2, "threads": 2, "gpu": None, "torch": "2.0",
    "torchvision": "0.1", "python": "3.10", "compiled_operators": ["nms"], "commit": None,
    "date": "2000-01-01T00:00:00+00:00", "command": "benchmark.py",
}  # fmt: skip


def report(*cases, **machine):
    return {
        "format": 1,
        "machine": {**MACHINE, **machine},
        "quick": False,
        "interrupted": False,
        "cases": list(cases),
    }
