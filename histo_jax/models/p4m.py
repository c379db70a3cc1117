"""The D4-invariant network: its logit is the same for all eight flips and rotations of an image.

Group convolutions over p4m (Cohen & Welling, "Group Equivariant Convolutional Networks", 2016). A
feature map holds eight orientations of each feature. A symmetry of the image transforms each
orientation and permutes them. Each layer is one ordinary convolution whose kernel consists of
transformed copies of a smaller one. The channel index is `orientation * features + feature`.
"""

from jaxtyping import Array, Float

from histo_jax import symmetries
from histo_jax.models.block import Block
from histo_jax.models.cnn import FiveBlockCNN
from histo_jax.registry import register_model

# Index of each value of a transformed 3x3 kernel in the original, and the composition table of D4.
_ACTIONS, _RELATIVE = symmetries.permutations(3), symmetries.relative()
ORIENTATIONS = len(_ACTIONS)


class P4MBlock(Block):
    """`Block` from an image, or from eight orientations, to eight orientations of `features`."""

    orientations = ORIENTATIONS

    def kernel_shape(self, channels: int) -> tuple[int, ...]:
        """Returns the shape of the parameter `kernel`.

        It is [3, 3, channels, features] for an image and [3, 3, 8, channels / 8, features] for a
        feature map.
        """
        is_image = channels == 3
        inputs = (channels,) if is_image else (ORIENTATIONS, channels // ORIENTATIONS)
        return (3, 3, *inputs, self.features)

    def make_kernel(self, weights: Float[Array, "..."]) -> Float[Array, "3 3 channels outputs"]:
        """Returns the kernel of the ordinary convolution.

        Output orientation `g` is computed with the parameter `kernel` transformed by symmetry `g`.

        Args:
            weights: the parameter `kernel`.
        """
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
    """Five equivariant blocks, mean over orientations and positions, dense, ReLU, dropout, logit.

    Has the attributes of `FiveBlockCNN`; `features` counts each feature once, not once per
    orientation. Images must be square, and their height must be divisible by 2 once per block.
    """

    is_d4_invariant = True
    block = P4MBlock

    def flatten(self, x: Float[Array, "batch h w channels"]) -> Float[Array, "batch features"]:
        """Returns the mean over orientations and positions, which is invariant to D4."""
        return x.reshape(x.shape[0], -1, x.shape[-1] // ORIENTATIONS).mean(1)
