"""The report of a run: one page that opens with the answer."""

from dit_accel.eval.report.build import render, write

__all__ = ["render", "write"]
