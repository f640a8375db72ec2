"""Benchmark of recipes on one model: many prompts and seeds, quality beside cost, intervals, and a page to look at.

:func:`patchkit.evaluation.suite.run` does it; ``patchkit compare A B C`` and ``benchmarks/shapeworld.py`` call it.
"""
