"""Scores and their uncertainty: pure functions over arrays."""

from histo_jax.metrics.calibration import Calibration
from histo_jax.metrics.intervals import difference, with_intervals
from histo_jax.metrics.scores import binary_scores, operating_points

__all__ = ["Calibration", "binary_scores", "difference", "operating_points", "with_intervals"]
