"""Speed and memory of the detectors and their parts, side by side with other libraries.

`tools/benchmark.py` measures, `tools/compare_benchmarks.py` reports changes between two runs, and
`tools/measure_growth.py` shows how time and memory grow with the size of the work.
`suite.BENCHMARKS` lists what can be measured, and `measure` does it. Nothing here judges a
measurement, and no test depends on one.
"""
