"""Measurements: benchmarks, metrics and reports."""
