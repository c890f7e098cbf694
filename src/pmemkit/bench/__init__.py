"""Benchmarks against peers: the same client, the same run, ratios instead of bare figures.

Suites are modules: :mod:`pmemkit.bench.nbd` and :mod:`pmemkit.bench.medium`, each with
``main(argv)``. Results of a debug build mean nothing, so every suite refuses one.
"""

__all__: list[str] = []
