"""The source `synthetic`: H&E-like slides of lymph node, generated with their tumour masks.

It replaces PatchCamelyon where no data can be downloaded. Every pixel is a function of
`(seed, split, slide number)`, to the byte under the same numpy, scipy and kind of processor. One
pixel is 1 um wide, as in PatchCamelyon (10x).

A slide is one square tile. Smooth random fields divide it into glass, fat, stroma, lymphoid
tissue, pale follicles and tumour; cells are stamped on it from small banks of generated ones; the
amounts of hematoxylin and eosin become colour by the law of Beer and Lambert. Patches are then cut
so that their centres do not overlap. Amounts of stain are in optical density (natural logarithm).

Values without a reference were chosen by eye beside real patches, and so that the task is neither
trivial nor hopeless: the pale cells of follicles look much like tumour, tumour is often found
beside the centre of a negative, and colour alone does not separate the classes.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from scipy.ndimage import gaussian_filter

from histo_jax.config import DataConfig
from histo_jax.data.example import IMAGE_SIZE, Example, SizedExamples
from histo_jax.errors import DataError
from histo_jax.registry import register_source

SPLITS = ("train", "test")
PATCHES_PER_SLIDE = 64
TILE = 768
CENTRE = 32
# Pixels around the tile, so that no stamp needs clipping; more than half of the widest stamp.
MARGIN = 24
# A positive has tumour in at least this fraction of its centre: one stray pixel is no finding.
MIN_TUMOUR_FRACTION = 0.1

# Tissue of a pixel; a later one covers an earlier one.
LYMPHOID, FOLLICLE, STROMA, FAT, TUMOUR, GLASS = range(6)

# Unit stain vectors (R, G, B; hematoxylin, eosin): Ruifrok & Johnston 2001, Anal Quant Cytol
# Histol 23(4), and the reference of Macenko et al. 2009 (ISBI). Labs lie between the two.
RUIFROK = np.array([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105]])
MACENKO = np.array([[0.5626, 0.7201, 0.4062], [0.2159, 0.8012, 0.5581]])


# Cells generated of each kind, from which all cells of a slide are stamped.
BANK = 48


@register_source("synthetic")
class Synthetic:
    """Synthetic slides.

    Args:
        data: `split_seed` is the seed, `synthetic_slides` the number of training slides.
    """

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


class Bank(NamedTuple):
    """Generated cells, float32[BANK, size, size, 3]: `canvas` becomes `canvas * keep + add`."""

    keep: np.ndarray
    add: np.ndarray


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
    starts = np.arange(0, TILE - IMAGE_SIZE + 1, CENTRE)
    windows = [np.s_[y : y + IMAGE_SIZE, x : x + IMAGE_SIZE] for y in starts for x in starts]
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


def generate_tile(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Returns a whole slide: image uint8[TILE, TILE, 3] and tumour mask bool[TILE, TILE].

    The mask covers the regions of tumour with everything in them (tears, single lymphocytes), and
    tumour cells that cross their border as a whole.
    """
    canvas = _tissue(rng)
    inner = canvas[MARGIN:-MARGIN, MARGIN:-MARGIN]
    return _scan(rng, inner[..., :2]), inner[..., 2] > 0.5


def _tissue(rng: np.random.Generator) -> np.ndarray:
    """Lays out the regions and their cells: float32[side, side, 3] (hematoxylin, eosin, tumour)."""
    side = TILE + 2 * MARGIN
    grain, cracks, lumps = (_field(rng, side, scale) for scale in (2.0, 4.0, 9.0))
    fibres = _field(rng, side, 40.0)

    # Borders by quantile, so that every slide has each kind and enough tumour to cut from.
    tissue = np.full((side, side), LYMPHOID)
    order = _field(rng, side, 60.0) + 0.25 * lumps
    tissue[order < np.quantile(order, rng.uniform(0.15, 0.3))] = FOLLICLE
    tissue[order > np.quantile(order, rng.uniform(0.6, 0.8))] = STROMA
    ground = _field(rng, side, 70.0)
    tissue[ground > np.quantile(ground, rng.uniform(0.85, 0.95))] = FAT
    nests = _field(rng, side, rng.uniform(20.0, 45.0)) + 0.12 * lumps
    tissue[nests > np.quantile(nests, rng.uniform(0.5, 0.65))] = TUMOUR
    tissue[ground < np.quantile(ground, rng.uniform(0.02, 0.08))] = GLASS
    stroma, fat, tumour = (tissue == kind for kind in (STROMA, FAT, TUMOUR))

    # Stroma flows along the contours of a field; the rest is clotted.
    weave = np.sin(fibres * 36.0 + 2.5 * lumps) + grain
    eosin = np.where(stroma, 0.45 + 0.12 * weave, 0.4 + 0.12 * grain + 0.1 * lumps)
    eosin[tumour] += rng.uniform(-0.15, 0.1)
    hematoxylin = 0.12 + 0.05 * grain + np.where(tumour | (tissue == LYMPHOID), 0.1, 0.0)
    # White shows where the tissue is torn, and between the walls of fat.
    torn = np.maximum(lumps - rng.uniform(1.0, 1.8), cracks - rng.uniform(0.5, 2.0))
    wall = np.exp(-(((_fat_gaps(rng, fat) + 1.5 * lumps) / 2.0) ** 2))
    solid = np.where(fat, wall, 1 - 0.85 * np.clip(2.5 * torn, 0, 1)) * (tissue != GLASS)
    canvas = np.stack([hematoxylin * solid, eosin * solid, tumour], -1).clip(0).astype(np.float32)

    # Cells: `crowd` is the chance that a place is taken in each kind of tissue, in their order.
    size = rng.uniform(3.0, 3.6)
    lymph = _draw_cells(rng, size, irregular=0.06, stretch=1.15, rim=1.3, core=1.15)
    crowd = [rng.uniform(0.75, 0.95), 0.1, 0.06, 0.06, rng.uniform(0.02, 0.25), 0]
    points = _scatter(rng, tissue, rng.uniform(7.0, 8.2), crowd, solid)
    _stamp(canvas, lymph, points, rng.integers(BANK, size=len(points)))

    angle = np.linspace(0, np.pi, BANK, endpoint=False)
    spindle = _draw_cells(rng, 3.0, irregular=0.08, stretch=2.6, rim=1.0, core=0.85, angle=angle)
    points = _scatter(rng, tissue, 17.0, [0, 0, 1, 0, 0, 0])
    down, across = (slope[tuple(points.T)] for slope in np.gradient(fibres))
    turn = np.arctan2(across, -down) % np.pi / np.pi
    _stamp(canvas, spindle, points, (turn * BANK).astype(int) % BANK)

    size, rim, core = rng.uniform([4.0, 0.8, 0.3], [5.0, 1.1, 0.7])
    pale = _draw_cells(rng, size, irregular=0.1, stretch=1.25, rim=rim, core=core, nucleoli=0.8)
    stray = rng.uniform(0.03, 0.15)
    points = _scatter(rng, tissue, rng.uniform(2.0, 2.8) * size, [stray, 1, stray, 0, 0, 0])
    _stamp(canvas, pale, points, rng.integers(BANK, size=len(points)))

    size, rim, core, nucleoli = rng.uniform([4.8, 0.8, 0.3, 0.5], [6.8, 1.1, 0.7, 2.0])
    cancer = _draw_cells(
        rng, size, irregular=0.13, stretch=1.3, rim=rim, core=core, nucleoli=nucleoli,
        spread=0.2, body=1.7,
    )  # fmt: skip
    points = _scatter(rng, tissue, rng.uniform(2.1, 2.9) * size, [0, 0, 0, 0, 1, 0])
    _stamp(canvas, cancer, points, rng.integers(BANK, size=len(points)))
    return canvas


def _draw_cells(
    rng: np.random.Generator,
    radius: float,
    *,
    irregular: float,
    stretch: float,
    rim: float,
    core: float,
    nucleoli: float = 0.0,
    spread: float = 0.08,
    body: float = 0.0,
    angle: np.ndarray | None = None,
) -> Bank:
    """Draws a bank of cells to stamp.

    Args:
        rng: the slide's generator.
        radius: mean radius of the nuclei, pixels.
        irregular: relative deviation of the outline's waves (2, 3 and 4 a turn).
        stretch: long over short axis.
        rim: hematoxylin at the nuclear membrane, optical density.
        core: the same inside.
        nucleoli: mean number of nucleoli in a nucleus, at most 3.
        spread: relative deviation of the radius.
        body: radius of the cell over that of its nucleus; 0 draws no cytoplasm. A cell with a body
            is tumour and marks the third channel.
        angle: float[BANK] direction of the long axis, radians; random if None.
    """
    half = math.ceil((1.5 * math.sqrt(stretch) + max(body - 1, 0)) * radius + 1)
    axis = np.arange(-half, half + 1)

    def draw() -> np.ndarray:
        return rng.standard_normal((BANK, 1, 1))

    angle = rng.uniform(0, np.pi, BANK) if angle is None else angle
    cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    along, across = cos * axis + sin * axis[:, None], cos * axis[:, None] - sin * axis
    around = np.arctan2(across, along)
    waves = sum(draw() * np.cos(k * around + 6.3 * draw()) for k in (2, 3, 4))
    outline = np.exp(spread * draw()) * (1 + irregular * waves / np.sqrt(3))
    outline = radius * outline.clip(0.5, 1.5)
    depth = outline - np.hypot(along / np.sqrt(stretch), across * np.sqrt(stretch))

    inside = np.clip(depth / 1.1 + 0.5, 0, 1)
    chromatin = gaussian_filter(rng.standard_normal(depth.shape), (0, 1, 1))
    stain = core + (rim - core) * np.exp(-np.clip(depth, 0, None) / 1.1) + 0.4 * chromatin
    for _ in range(3):
        far = np.hypot(axis[:, None] - 0.3 * radius * draw(), axis - 0.3 * radius * draw())
        stain += 0.7 * (rng.random((BANK, 1, 1)) < nucleoli / 3) * np.exp(-((far / 1.4) ** 2))
    stain *= np.exp(0.12 * draw())

    cell = 0.6 * np.clip((depth + (body - 1) * radius) / 1.5, 0, 1) if body else 0 * depth
    keep = np.stack([1 - inside, (1 - cell) * (1 - inside), 1 - (cell > 0)], -1)
    pink = inside * 0.35 + (1 - inside) * cell * 0.45
    add = np.stack([inside * stain, pink, cell > 0], -1)
    return Bank(keep.astype(np.float32), add.astype(np.float32))


def _stamp(canvas: np.ndarray, bank: Bank, points: np.ndarray, which: np.ndarray) -> None:
    """Stamps cell int[n] `which` of the bank centred on each of int[n, 2] points, in place."""
    size = bank.keep.shape[1]
    for (y, x), k in zip((points - size // 2).tolist(), which.tolist(), strict=True):
        view = canvas[y : y + size, x : x + size]
        view *= bank.keep[k]
        view += bank.add[k]


def _scatter(
    rng: np.random.Generator,
    tissue: np.ndarray,
    spacing: float,
    crowd: Sequence[float],
    solid: np.ndarray | None = None,
) -> np.ndarray:
    """Scatters points int[n, 2] on a shaken hexagonal grid, at least MARGIN from the edge.

    A place is taken with the chance `crowd[kind of tissue]`, and never where `solid` is below 1/2.
    The order is random, so that no direction is always on top.
    """
    side = len(tissue)
    row, column = np.mgrid[0 : side / spacing / 0.866, 0 : side / spacing]
    points = np.stack([row * 0.866, column + 0.5 * (row % 2)], -1).reshape(-1, 2) * spacing
    points = (points + rng.normal(0, 0.16 * spacing, points.shape)).round().astype(int)
    points = points[((points >= MARGIN) & (points < side - MARGIN)).all(1)]
    y, x = points.T
    taken = rng.random(len(points)) < np.asarray(crowd)[tissue[y, x]]
    if solid is not None:
        taken &= solid[y, x] > 0.5
    return rng.permutation(points[taken])


def _field(rng: np.random.Generator, side: int, scale: float) -> np.ndarray:
    """Smooth normal noise float32[side, side], unit variance, correlated over `scale` pixels."""
    knots = np.arange(-3 * scale, side + 3 * scale, scale)
    kernel = np.exp(-0.5 * ((np.arange(side)[:, None] - knots) / scale) ** 2)
    kernel = (kernel / np.linalg.norm(kernel, axis=1, keepdims=True)).astype(np.float32)
    return kernel @ rng.standard_normal((len(knots), len(knots)), dtype=np.float32) @ kernel.T


def _fat_gaps(rng: np.random.Generator, fat: np.ndarray) -> np.ndarray:
    """How much farther the second nearest fat cell is than the nearest: float32 >= 0.

    The walls of a Voronoi diagram are its zeros; cells are about 60 pixels wide. Holds in bool
    `fat` only: elsewhere the work is saved.
    """
    side = len(fat)
    near = np.full((2, side, side), 1e3, np.float32)
    down, across = np.ogrid[:side, :side]
    reach = 76
    everywhere = np.zeros(fat.shape, int)
    for y, x in _scatter(rng, everywhere, 60.0, [1]):
        rows, columns = (slice(max(0, c - reach), c + reach) for c in (y, x))
        if not fat[rows, columns].any():
            continue
        first, second = near[:, rows, columns]
        far = np.hypot(down[rows] - y, across[:, columns] - x)
        np.minimum(second, np.maximum(first, far), out=second)
        np.minimum(first, far, out=first)
    return near[1] - near[0]


def _scan(rng: np.random.Generator, stain: np.ndarray) -> np.ndarray:
    """Turns amounts of stain float32[h, w, 2] into uint8[h, w, 3], by Beer-Lambert and a scanner.

    The lab sets the hue of both stains and their strength; the scanner the white, blur and noise.
    """
    # Bounded draws: one outlier among ten slides would decide the AUC of a whole test split.
    lab = rng.uniform(0, 0.7, (2, 1))
    vectors = lab * RUIFROK + (1 - lab) * MACENKO + rng.uniform(-0.06, 0.06, (2, 3))
    vectors = vectors.clip(0.03) / np.linalg.norm(vectors, axis=1, keepdims=True)
    strength = np.exp(rng.uniform(-1, 1, (2, 1)) * [[0.3], [0.45]]) * [[1.8], [1.1]]
    light = stain @ (strength * vectors).astype(np.float32)
    light = np.exp(-light, out=light)
    blur = rng.uniform(0.35, 0.7)
    light = gaussian_filter(light, (blur, blur, 0), truncate=2.5)
    white = (rng.uniform(228, 248) + rng.normal(0, 2.5, 3)).astype(np.float32)
    noise = rng.standard_normal(light.shape, dtype=np.float32) * np.float32(rng.uniform(1.5, 4.0))
    return (light * white + noise).clip(0, 255).astype(np.uint8)


def _centre(patch: np.ndarray) -> np.ndarray:
    """The centre 32x32 of a [96, 96, ...] patch, which decides the label."""
    edge = (IMAGE_SIZE - CENTRE) // 2
    return patch[edge : edge + CENTRE, edge : edge + CENTRE]
