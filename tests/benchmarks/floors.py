"""The least that a training step can take: its operations, and its bytes.

The network is the five-block one: per block a 3x3 convolution that keeps height and width, then a
pooling that halves them; a dense layer; a logit.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

SIZE = 96  # pixels of a patch's side


class Layer(NamedTuple):
    """A layer with weights, and what BatchNorm, ReLU and pooling behind it do in the same pass.

    Attributes:
        inputs: numbers read for one image.
        outputs: numbers written for one image.
        products: multiplications for one image, forward.
        parameters: of the layer, with BatchNorm's scale and shift.
    """

    inputs: int
    outputs: int
    products: int
    parameters: int


def layers(features: Sequence[int], dense: int) -> list[Layer]:
    """Returns the layers from image to logit."""
    result, subset = [], SIZE
    for before, after in pairwise((3, *features)):
        pixels, weights = subset * subset, 9 * before * after
        result.append(Layer(pixels * before, pixels * after, pixels * weights, weights + 2 * after))
        subset //= 2
    for before, after in pairwise((subset * subset * features[-1], dense, 1)):
        result.append(Layer(before, after, before * after, before * after + after))
    return result


def operations(features: Sequence[int], dense: int, batch: int) -> int:
    """Returns the operations of one step: two a product, forward and for both gradients.

    The gradient of the image itself is not needed. Everything but products counts as free.
    """
    first, *others = layers(features, dense)
    return batch * (2 * 2 * first.products + 3 * 2 * sum(layer.products for layer in others))


def transferred(features: Sequence[int], dense: int, batch: int, width: int) -> int:
    """Returns the bytes of one step, each layer's input and output once forward and twice backward.

    Besides them parameters, gradients and two moments, once each in float32.

    Args:
        features: channels of the blocks.
        dense: units of the dense layer.
        batch: images.
        width: bytes of a number in the type that the network computes in.
    """
    every = layers(features, dense)
    numbers = sum(layer.inputs + layer.outputs for layer in every)
    parameters = sum(layer.parameters for layer in every)
    return 3 * batch * width * numbers + 4 * 4 * parameters
