"""Benchmarks against peers: the same client, the same run, ratios instead of bare figures.

Suites are modules, each with ``main(argv)``; :mod:`pmemkit.cli.run_bench` lists them.
Results of a debug build mean nothing, so every suite refuses one.
"""

__all__: list[str] = []
