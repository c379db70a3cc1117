"""One patch, as every source yields it."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

SPLITS = ("train", "validation", "test")
UNLABELLED = -1
# What a patch's height and width may be, in pixels: five halvings must leave whole numbers.
SIZES = range(32, 513, 32)


class PatchSpec(NamedTuple):
    """Size and scale of the patches of a network, and the region that their label describes.

    Attributes:
        size: height and width in pixels.
        label_region: width in pixels of the square in the centre that the label describes; None =
            the whole patch.
        mpp: width of a pixel in micrometres; None = not known.
    """

    size: int
    label_region: int | None = None
    mpp: float | None = None

    @property
    def cell(self) -> int:
        """Width in pixels of what the label describes: `label_region`, or the whole patch."""
        return self.label_region or self.size


class Example(NamedTuple):
    """One patch with its label and origin.

    Attributes:
        id: name of the patch, unique in its split; the built-in sources use the SHA-1 of the
            pixels, 40 lower-case hex digits.
        image: uint8[size, size, 3], RGB; the size is the same for all patches of a source, a
            multiple of 32 from 32 to 512.
        label: 1 = positive, 0 = negative, `UNLABELLED` (-1) = not known, which only a test split
            may have.
        slide: name of the slide that the patch was cut from; '' = not known.
        patient: name of the patient; '' = not known.
        path: the file that holds the patch, for people; '' = none. Of a part of a slide, with its
            place as `histo_jax.data.slide_patches` writes it.
    """

    id: str
    image: np.ndarray
    label: int
    slide: str = ""
    patient: str = ""
    path: str = ""


class ReadAgain(Exception):  # noqa: N818 - a request
    """A source must leave out examples that it has yielded already: call its `splits()` again."""


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
