"""The D4-invariant network: its logit is the same for all eight flips and rotations of an image.

Group convolutions over p4m (Cohen & Welling, "Group Equivariant Convolutional Networks", 2016). A
feature map holds eight orientations of each feature, and a symmetry of the image moves and permutes
them; each layer is one ordinary convolution whose kernel consists of transformed copies of a
smaller one. Channel `orientation * features + feature`.
"""

from jaxtyping import Array, Float

from histo_jax import symmetries
from histo_jax.models.block import Block
from histo_jax.models.cnn import FiveBlockCNN
from histo_jax.registry import register_model

# Where each value of a transformed 3x3 kernel comes from, and how the symmetries act on each other.
_ACTIONS, _RELATIVE = symmetries.permutations(3), symmetries.relative()
ORIENTATIONS = len(_ACTIONS)


class P4MBlock(Block):
    """`Block` from an image, or from eight orientations, to eight orientations of `features`."""

    orientations = ORIENTATIONS

    def kernel_shape(self, channels: int) -> tuple[int, ...]:
        """Returns [3, 3, channels, features], or [3, 3, 8, channels / 8, features]."""
        is_image = channels == 3
        inputs = (channels,) if is_image else (ORIENTATIONS, channels // ORIENTATIONS)
        return (3, 3, *inputs, self.features)

    def make_kernel(self, weights: Float[Array, "..."]) -> Float[Array, "3 3 channels outputs"]:
        """Returns the ordinary kernel; output orientation g sees the input transformed by g."""
        weights = weights.reshape(9, *weights.shape[2:])
        if weights.ndim == 3:
            transformed = weights[_ACTIONS]
        else:
            transformed = weights[_ACTIONS[:, :, None], _RELATIVE[:, None, :]]
        # [orientation, 9, ..., features] to [9, ..., orientation, features]
        transformed = transformed.reshape(ORIENTATIONS, 9, -1, self.features).transpose(1, 2, 0, 3)
        return transformed.reshape(3, 3, transformed.shape[1], -1)


@register_model("five_block_p4m")
class FiveBlockP4M(FiveBlockCNN):
    """`P4MBlock` five times; mean over orientations and positions; dense, ReLU, dropout, logit.

    Attributes are those of `FiveBlockCNN`; `features` counts each feature once, not once an
    orientation. Images must be square, and their height must divide by 2 for every block.
    """

    is_d4_invariant = True
    block = P4MBlock

    def flatten(self, x: Float[Array, "batch h w channels"]) -> Float[Array, "batch features"]:
        """Returns the means over orientations and positions, which no symmetry changes."""
        return x.reshape(len(x), -1, x.shape[-1] // ORIENTATIONS).mean(1)
