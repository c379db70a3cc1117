"""What people look at: the page `report.html`, and pictures of where the network looked."""

from histo_jax.report.explanation import explain
from histo_jax.report.page import report

__all__ = ["explain", "report"]
