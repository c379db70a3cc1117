"""The symmetric network: its logit is the same for all eight flips and quarter turns of an image.

Group convolutions over p4m (Cohen & Welling, "Group Equivariant Convolutional Networks", 2016). A
feature map holds eight orientations of each feature, and a symmetry of the image moves and permutes
them; each layer is one ordinary convolution whose kernel is put together from transformed copies
of a smaller one. Channel `orientation * features + feature`.
"""

import itertools
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from histo_jax.models.block import Block
from histo_jax.models.cnn import FiveBlockCNN


def _tables() -> tuple[np.ndarray, np.ndarray]:
    """The eight symmetries of the square as they act on a 3x3 kernel, and on each other.

    Returns:
        int[8, 9], where each value of the transformed kernel comes from; int[8, 8], the symmetry
        that `inverse(g) h` is.
    """
    grid = np.arange(9).reshape(3, 3)
    actions = []
    for transpose, flip_rows, flip_columns in itertools.product((False, True), repeat=3):
        turned = grid.T if transpose else grid
        turned = turned[::-1] if flip_rows else turned
        actions.append((turned[:, ::-1] if flip_columns else turned).ravel())
    number = {action.tobytes(): i for i, action in enumerate(actions)}
    relative = [[number[h[np.argsort(g)].tobytes()] for h in actions] for g in actions]
    return np.array(actions), np.array(relative)


_ACTIONS, _RELATIVE = _tables()
ORIENTATIONS = len(_ACTIONS)


class P4MBlock(Block):
    """`Block` from an image, or from eight orientations, to eight orientations of `features`."""

    copies = ORIENTATIONS

    def kernel_shape(self, channels: int) -> tuple[int, ...]:
        """Returns [3, 3, channels, features], or [3, 3, 8, channels / 8, features]."""
        is_image = channels == 3
        inputs = (channels,) if is_image else (ORIENTATIONS, channels // ORIENTATIONS)
        return (3, 3, *inputs, self.features)

    def make_kernel(self, weights: Any) -> Float[Array, "3 3 channels outputs"]:
        """Returns the ordinary kernel; orientation g of the output sees the input turned by g."""
        weights = weights.reshape(9, *weights.shape[2:])
        if weights.ndim == 3:
            turned = weights[_ACTIONS]
        else:
            turned = weights[_ACTIONS[:, :, None], _RELATIVE[:, None, :]]
        # [orientation, 9, ..., features] to [9, ..., orientation, features]
        turned = turned.reshape(ORIENTATIONS, 9, -1, self.features).transpose(1, 2, 0, 3)
        return turned.reshape(3, 3, turned.shape[1], -1)


class FiveBlockP4M(FiveBlockCNN):
    """`P4MBlock` five times; mean over orientations and places; dense, ReLU, dropout, logit.

    Attributes are those of `FiveBlockCNN`; `features` counts each feature once, not once an
    orientation. Images must be square; sides that halve without remainder keep pooling exact.
    """

    block = P4MBlock

    def flatten(self, x: Float[Array, "batch h w channels"]) -> Float[Array, "batch features"]:
        """Returns the means over orientations and places, which no symmetry changes."""
        return x.reshape(len(x), -1, x.shape[-1] // ORIENTATIONS).mean(1)
