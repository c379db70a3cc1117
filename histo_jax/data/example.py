"""The one thing every reader yields."""

from typing import NamedTuple

import numpy as np

IMAGE_SIZE = 96
IMAGE_SHAPE = (IMAGE_SIZE, IMAGE_SIZE, 3)
UNLABELLED = -1


class Example(NamedTuple):
    """One patch with what is known about it.

    Attributes:
        id: 40 lower-case hex digits, the SHA-1 of the pixels.
        image: uint8[96, 96, 3], RGB.
        label: 1 = tumour in the centre 32x32, 0 = none, `UNLABELLED` = not known.
        slide: name of the slide the patch was cut from; '' = not known.
    """

    id: str
    image: np.ndarray
    label: int
    slide: str
