"""Roofline of a training step: the least number of operations and of bytes that it needs.

For the five-block network: in each block a 3x3 convolution that keeps height and width, and a
pooling that halves them; then a dense layer and a logit.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

SIZE = 96  # height and width of a patch, pixels


class Layer(NamedTuple):
    """A layer with weights; the BatchNorm, ReLU and pooling after it are fused into it.

    Attributes:
        inputs: numbers read per image.
        outputs: numbers written per image.
        products: multiplications per image in the forward pass.
        parameters: number of parameters, including the scale and bias of BatchNorm.
    """

    inputs: int
    outputs: int
    products: int
    parameters: int


def layers(features: Sequence[int], dense: int) -> list[Layer]:
    """Returns the layers, from image to logit."""
    result, size = [], SIZE
    for before, after in pairwise((3, *features)):
        pixels, weights = size * size, 9 * before * after
        result.append(Layer(pixels * before, pixels * after, pixels * weights, weights + 2 * after))
        size //= 2
    for before, after in pairwise((size * size * features[-1], dense, 1)):
        result.append(Layer(before, after, before * after, before * after + after))
    return result


def operations(features: Sequence[int], dense: int, batch: int) -> int:
    """Returns the operations of one step: two per product, forward and for both gradients.

    The gradient of the image is not needed. Only products count.
    """
    first, *others = layers(features, dense)
    return batch * (2 * 2 * first.products + 3 * 2 * sum(layer.products for layer in others))


def transferred(features: Sequence[int], dense: int, batch: int, width: int) -> int:
    """Returns the bytes of one step.

    Counts the input and output of each layer once forward and twice backward, and parameters,
    gradients and two moments once each, in float32.

    Args:
        features: channels of the blocks.
        dense: units of the dense layer.
        batch: number of images.
        width: bytes per number of the dtype of the computation.
    """
    all_layers = layers(features, dense)
    numbers = sum(layer.inputs + layer.outputs for layer in all_layers)
    parameters = sum(layer.parameters for layer in all_layers)
    return 3 * batch * width * numbers + 4 * 4 * parameters
