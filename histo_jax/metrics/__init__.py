"""Scores and their uncertainty: pure functions over arrays."""

from histo_jax.metrics.calibration import Calibration
from histo_jax.metrics.intervals import difference, with_intervals
from histo_jax.metrics.scores import binary_scores

__all__ = ["Calibration", "binary_scores", "difference", "with_intervals"]
