"""One page that shows what a run reached: `report.html`, with its figures also in `report/`."""

from histo_jax.report.page import report

__all__ = ["report"]
