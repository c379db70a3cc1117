"""Scores, confidence intervals and calibration: pure functions of arrays."""

from histo_jax.metrics.calibration import Calibration
from histo_jax.metrics.intervals import (
    FEW_SLIDES,
    bootstrap,
    confidence_intervals,
    difference,
    few_note,
)
from histo_jax.metrics.scores import binary_scores, operating_points

__all__ = [
    "FEW_SLIDES",
    "Calibration",
    "binary_scores",
    "bootstrap",
    "confidence_intervals",
    "difference",
    "few_note",
    "operating_points",
]
