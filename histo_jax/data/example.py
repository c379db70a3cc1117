"""One patch, as every source yields it."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

IMAGE_SIZE = 96
IMAGE_SHAPE = (IMAGE_SIZE, IMAGE_SIZE, 3)
UNLABELLED = -1


class Example(NamedTuple):
    """One patch with its label and origin.

    Attributes:
        id: name of the patch, unique in its split; the built-in sources use the SHA-1 of the
            pixels, 40 lower-case hex digits.
        image: uint8[96, 96, 3], RGB.
        label: 1 = tumour in the centre 32x32, 0 = none, `UNLABELLED` (-1) = not known, which only
            a test split may have.
        slide: name of the slide that the patch was cut from; '' = not known.
    """

    id: str
    image: np.ndarray
    label: int
    slide: str = ""


class SizedExamples(Iterable[Example]):
    """An iterator of examples whose number is known.

    Args:
        examples: can be read once.
        length: their number.
    """

    def __init__(self, examples: Iterator[Example], length: int) -> None:
        self._examples, self._length = examples, length

    def __iter__(self) -> Iterator[Example]:
        return self._examples

    def __len__(self) -> int:
        return self._length
