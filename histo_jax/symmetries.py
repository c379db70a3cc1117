"""The eight symmetries of the square (the dihedral group D4), for images, kernels and spectra.

Imports NumPy only, and works on JAX arrays as well. The order is always that of `ELEMENTS`, whose
first is the identity.
"""

import itertools
from typing import Any

import numpy as np
from jaxtyping import Int

# (transpose, flip rows, flip columns), applied in this order.
ELEMENTS = tuple(itertools.product((False, True), repeat=3))


def _where(condition: Any, changed: Any, unchanged: Any) -> Any:
    if isinstance(condition, bool):
        return changed if condition else unchanged
    return unchanged.__array_namespace__().where(condition, changed, unchanged)


def transform(images: Any, transpose: Any, flip_rows: Any, flip_columns: Any) -> Any:
    """Returns images [batch, size, size, ...] under a symmetry; views of NumPy arrays.

    Args:
        images: NumPy or JAX array, square.
        transpose: bool, or a bool array that broadcasts against `images`.
        flip_rows: likewise.
        flip_columns: likewise.
    """
    images = _where(transpose, images.swapaxes(1, 2), images)
    images = _where(flip_rows, images[:, ::-1], images)
    return _where(flip_columns, images[:, :, ::-1], images)


def transform_dct(coefficients: Any, transpose: bool, flip_rows: bool, flip_columns: bool) -> Any:
    """Returns the DCT-II [batch, size, size] of transformed images, from that of the images.

    A transposition transposes it, and a flip changes the sign of the odd frequencies.
    """
    sign = (-1.0) ** np.arange(coefficients.shape[-1], dtype=coefficients.dtype)
    coefficients = coefficients.swapaxes(1, 2) if transpose else coefficients
    coefficients = coefficients * sign[:, None] if flip_rows else coefficients
    return coefficients * sign if flip_columns else coefficients


def permutations(size: int) -> Int[np.ndarray, "8 places"]:
    """Returns for each symmetry the source index of each value of a flat [size, size] array."""
    grid = np.arange(size * size).reshape(1, size, size)
    return np.array([transform(grid, *element).ravel() for element in ELEMENTS])


def relative() -> Int[np.ndarray, "8 8"]:
    """Returns the number of the symmetry `inverse(g) h` in row g and column h."""
    actions = permutations(3)
    number = {action.tobytes(): i for i, action in enumerate(actions)}
    return np.array([[number[h[np.argsort(g)].tobytes()] for h in actions] for g in actions])
