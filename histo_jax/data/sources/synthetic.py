"""The source `synthetic`: H&E-like slides of lymph node, generated with their tumour masks.

It replaces PatchCamelyon where no data can be downloaded. Every pixel is a function of
`(seed, split, slide number)`, to the byte under the same numpy, scipy and kind of processor. One
pixel is 1 um wide, as in PatchCamelyon (10x).

Patches are cut from the tiles of `histo_jax.data.synthetic_tissue` so that their centres do not
overlap.
"""

import hashlib
from collections.abc import Iterator

import numpy as np

from histo_jax.config import DataConfig
from histo_jax.data.example import Example, SizedExamples
from histo_jax.data.synthetic_tissue import TILE, generate_tile
from histo_jax.errors import DataError
from histo_jax.registry import register_source

SPLITS = ("train", "test")
PATCHES_PER_SLIDE = 64
_SIZE = 96  # height and width of a patch, pixels
CENTRE = 32
# A positive has tumour in at least this fraction of its centre: one stray pixel is no finding.
MIN_TUMOUR_FRACTION = 0.1


@register_source("synthetic")
class Synthetic:
    """Synthetic slides.

    Args:
        data: `split_seed` is the seed, `synthetic_slides` the number of training slides.
    """

    # As PatchCamelyon's; a pixel of the generator is 1 um wide.
    classes = ("no tumour", "tumour")
    image_size, label_region, mpp = _SIZE, CENTRE, 1.0

    origin = "synthetic slides"

    def __init__(self, data: DataConfig) -> None:
        if data.raw_dir is not None:
            raise DataError(
                f"config.data.raw_dir = {data.raw_dir!r} is not read by config.data.source = "
                "'synthetic': set --config.data.source=kaggle or pcam, or leave out raw_dir"
            )
        assert data.split_seed is not None
        self._seed, self._slides = data.split_seed, data.synthetic_slides

    def fingerprint(self) -> str:
        """Returns seed and number of slides, which determine every pixel."""
        return f"seed{self._seed}-slides{self._slides}"

    def splits(self) -> dict[str, SizedExamples]:
        """Returns the training and test patches."""
        return {
            split: SizedExamples(
                generate(self._seed, self._slides, split),
                slide_count(self._slides, split) * PATCHES_PER_SLIDE,
            )
            for split in SPLITS
        }


def generate(seed: int, slides: int, split: str) -> Iterator[Example]:
    """Yields the patches of a split, slide by slide.

    Args:
        seed: any non-negative integer.
        slides: slides of the training split; 'test' has a quarter as many, at least one.
        split: 'train' or 'test'.

    Yields:
        PATCHES_PER_SLIDE examples per slide. Slide k does not depend on `slides`.

    Raises:
        ValueError: there is no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, not {split!r}")
    for number in range(slide_count(slides, split)):
        yield from generate_slide(seed, split, number)


def slide_count(slides: int, split: str) -> int:
    """Returns the number of slides of a split, where `slides` are for training."""
    return slides if split == "train" else max(1, slides // 4)


def generate_slide(seed: int, split: str, number: int) -> list[Example]:
    """Returns one slide's patches; the id is the SHA-1 of the pixels, as Kaggle's."""
    slide = f"synthetic-{split}-{number:03d}"
    return [
        Example(
            id=hashlib.sha1(image.tobytes()).hexdigest(),
            image=image,
            label=int(_centre(mask).any()),
            slide=slide,
        )
        for image, mask in zip(*generate_patches(seed, split, number), strict=True)
    ]


def generate_patches(seed: int, split: str, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns one slide's patches and the masks of their tumour.

    Returns:
        images uint8[PATCHES_PER_SLIDE, 96, 96, 3] and tumour masks bool[PATCHES_PER_SLIDE, 96, 96],
        in random order. Between 3/8 and 5/8 of them have tumour in the centre 32x32; the other
        centres have none.
    """
    rng = np.random.default_rng(
        np.random.SeedSequence(seed, spawn_key=(SPLITS.index(split), number))
    )
    image, mask = generate_tile(rng)

    # Corners a centre's width apart: the centres tile the slide, only their surroundings overlap.
    starts = np.arange(0, TILE - _SIZE + 1, CENTRE)
    windows = [np.s_[y : y + _SIZE, x : x + _SIZE] for y in starts for x in starts]
    fractions = np.array([_centre(mask[window]).mean() for window in windows])
    half = PATCHES_PER_SLIDE // 2
    positives = half + int(rng.integers(-half // 4, half // 4 + 1))
    chosen = np.concatenate(
        [
            rng.choice(np.flatnonzero(fractions >= MIN_TUMOUR_FRACTION), positives, replace=False),
            rng.choice(
                np.flatnonzero(fractions == 0), PATCHES_PER_SLIDE - positives, replace=False
            ),
        ]
    )
    selected = [windows[k] for k in rng.permutation(chosen)]
    return np.stack([image[w] for w in selected]), np.stack([mask[w] for w in selected])


def _centre(patch: np.ndarray) -> np.ndarray:
    """The centre 32x32 of a [96, 96, ...] patch, which decides the label."""
    edge = (_SIZE - CENTRE) // 2
    return patch[edge : edge + CENTRE, edge : edge + CENTRE]
