"""Measurements: each program checks correctness, times, prints a table and writes JSON."""
