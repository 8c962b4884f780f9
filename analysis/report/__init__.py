"""One page and a folder of figures about some runs, made from their folders alone."""

from analysis.report.build import build_report

__all__ = ["build_report"]
