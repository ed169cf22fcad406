"""How fast the detectors and their parts are, beside the usual libraries.

`tools/benchmark.py` measures, `tools/compare_benchmarks.py` says what changed between two runs, and
`tools/measure_growth.py` shows how time and memory grow with the size of the work. What can be
measured is listed in `suite.BENCHMARKS`; how, in `measure`. Nothing here judges a figure, and no
test depends on one.
"""
