"""Renders synthetic H&E slides of lymph node with their tumour masks.

A slide is one square tile. Smooth random fields divide it into glass, fat, stroma, lymphoid
tissue, pale follicles and tumour; cells are stamped on it from small banks of generated ones; the
amounts of hematoxylin and eosin become colour by the law of Beer and Lambert.
Amounts of stain are in optical density (natural logarithm).

Values without a reference were chosen by eye beside real patches, and so that the task is neither
trivial nor hopeless: the pale cells of follicles look much like tumour, tumour is often found
beside the centre of a negative, and colour alone does not separate the classes.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.ndimage import gaussian_filter

TILE = 768  # pixels
# Pixels around the tile, so that no stamp needs clipping; more than half of the widest stamp.
MARGIN = 24

# Tissue of a pixel; a later one covers an earlier one.
LYMPHOID, FOLLICLE, STROMA, FAT, TUMOUR, GLASS = range(6)

# Unit stain vectors (R, G, B; hematoxylin, eosin): Ruifrok & Johnston 2001, Anal Quant Cytol
# Histol 23(4), and the reference of Macenko et al. 2009 (ISBI). Labs are between the two.
RUIFROK = np.array([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105]])
MACENKO = np.array([[0.5626, 0.7201, 0.4062], [0.2159, 0.8012, 0.5581]])


# Cells generated of each kind, from which all cells of a slide are stamped.
BANK = 48


class Bank(NamedTuple):
    """Generated cells, float32[BANK, size, size, 3]: `canvas` becomes `canvas * keep + add`."""

    keep: np.ndarray
    add: np.ndarray


def generate_tile(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Returns a whole slide: image uint8[TILE, TILE, 3] and tumour mask bool[TILE, TILE].

    The mask covers the regions of tumour with everything in them (tears, single lymphocytes), and
    tumour cells that cross their border as a whole.
    """
    canvas = _tissue(rng)
    inner = canvas[MARGIN:-MARGIN, MARGIN:-MARGIN]
    return _scan(rng, inner[..., :2]), inner[..., 2] > 0.5


class _Noise(NamedTuple):
    """Smooth noise, float32[size, size] each, by increasing scale."""

    grain: np.ndarray
    cracks: np.ndarray
    lumps: np.ndarray
    fibres: np.ndarray


def _tissue(rng: np.random.Generator) -> np.ndarray:
    """Returns regions and cells: float32[size, size, 3] (hematoxylin, eosin, tumour)."""
    size = TILE + 2 * MARGIN
    noise = _Noise(*(_field(rng, size, scale) for scale in (2.0, 4.0, 9.0, 40.0)))
    tissue = _regions(rng, noise.lumps)
    canvas, solid = _paint_regions(rng, tissue, noise)
    _add_lymphocytes(rng, canvas, tissue, solid)
    _add_spindle_cells(rng, canvas, tissue, noise.fibres)
    _add_pale_cells(rng, canvas, tissue)
    _add_tumour_cells(rng, canvas, tissue)
    return canvas


def _regions(rng: np.random.Generator, lumps: np.ndarray) -> np.ndarray:
    """Returns the tissue of each pixel, int[size, size]."""
    # Borders by quantile, so that every slide has each kind and enough tumour to cut from.
    size = len(lumps)
    tissue = np.full((size, size), LYMPHOID)
    order = _field(rng, size, 60.0) + 0.25 * lumps
    tissue[order < np.quantile(order, rng.uniform(0.15, 0.3))] = FOLLICLE
    tissue[order > np.quantile(order, rng.uniform(0.6, 0.8))] = STROMA
    ground = _field(rng, size, 70.0)
    tissue[ground > np.quantile(ground, rng.uniform(0.85, 0.95))] = FAT
    nests = _field(rng, size, rng.uniform(20.0, 45.0)) + 0.12 * lumps
    tissue[nests > np.quantile(nests, rng.uniform(0.5, 0.65))] = TUMOUR
    tissue[ground < np.quantile(ground, rng.uniform(0.02, 0.08))] = GLASS
    return tissue


def _paint_regions(
    rng: np.random.Generator, tissue: np.ndarray, noise: _Noise
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the canvas without cells, and float[size, size], how solid the tissue is, 0 to 1."""
    grain, cracks, lumps, fibres = noise
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
    canvas = np.stack([hematoxylin * solid, eosin * solid, tumour], -1)
    return canvas.clip(0).astype(np.float32), solid


# In the cells below, a list of six numbers is the chance that a position is occupied in each kind
# of tissue, in the order of the constants.


def _add_lymphocytes(
    rng: np.random.Generator, canvas: np.ndarray, tissue: np.ndarray, solid: np.ndarray
) -> None:
    size = rng.uniform(3.0, 3.6)
    cells = _make_cells(rng, size, irregular=0.06, stretch=1.15, rim=1.3, core=1.15)
    density = [rng.uniform(0.75, 0.95), 0.1, 0.06, 0.06, rng.uniform(0.02, 0.25), 0]
    points = _scatter(rng, tissue, rng.uniform(7.0, 8.2), density, solid)
    _stamp(canvas, cells, points, rng.integers(BANK, size=len(points)))


def _add_spindle_cells(
    rng: np.random.Generator, canvas: np.ndarray, tissue: np.ndarray, fibres: np.ndarray
) -> None:
    angle = np.linspace(0, np.pi, BANK, endpoint=False)
    cells = _make_cells(rng, 3.0, irregular=0.08, stretch=2.6, rim=1.0, core=0.85, angle=angle)
    points = _scatter(rng, tissue, 17.0, [0, 0, 1, 0, 0, 0])
    down, across = (slope[tuple(points.T)] for slope in np.gradient(fibres))
    rotation = np.arctan2(across, -down) % np.pi / np.pi
    _stamp(canvas, cells, points, (rotation * BANK).astype(int) % BANK)


def _add_pale_cells(rng: np.random.Generator, canvas: np.ndarray, tissue: np.ndarray) -> None:
    size, rim, core = rng.uniform([4.0, 0.8, 0.3], [5.0, 1.1, 0.7])
    cells = _make_cells(rng, size, irregular=0.1, stretch=1.25, rim=rim, core=core, nucleoli=0.8)
    stray = rng.uniform(0.03, 0.15)
    points = _scatter(rng, tissue, rng.uniform(2.0, 2.8) * size, [stray, 1, stray, 0, 0, 0])
    _stamp(canvas, cells, points, rng.integers(BANK, size=len(points)))


def _add_tumour_cells(rng: np.random.Generator, canvas: np.ndarray, tissue: np.ndarray) -> None:
    size, rim, core, nucleoli = rng.uniform([4.8, 0.8, 0.3, 0.5], [6.8, 1.1, 0.7, 2.0])
    cells = _make_cells(
        rng,
        size,
        irregular=0.13,
        stretch=1.3,
        rim=rim,
        core=core,
        nucleoli=nucleoli,
        spread=0.2,
        body=1.7,
    )
    points = _scatter(rng, tissue, rng.uniform(2.1, 2.9) * size, [0, 0, 0, 0, 1, 0])
    _stamp(canvas, cells, points, rng.integers(BANK, size=len(points)))


def _make_cells(
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
    """Returns a bank of cells to stamp.

    Args:
        rng: the slide's generator.
        radius: mean radius of the nuclei, pixels.
        irregular: relative deviation of the outline's waves (2, 3 and 4 per rotation).
        stretch: long over short axis.
        rim: hematoxylin at the nuclear membrane, optical density.
        core: the same inside.
        nucleoli: mean number of nucleoli in a nucleus, at most 3.
        spread: relative deviation of the radius.
        body: radius of the cell over that of its nucleus; 0 makes no cytoplasm. A cell with a body
            is tumour and marks the third channel.
        angle: float[BANK] direction of the long axis, radians; random if None.
    """
    half = math.ceil((1.5 * math.sqrt(stretch) + max(body - 1, 0)) * radius + 1)
    axis = np.arange(-half, half + 1)
    depth = _nuclear_depth(rng, axis, radius, irregular, stretch, spread, angle)
    inside = np.clip(depth / 1.1 + 0.5, 0, 1)
    chromatin = gaussian_filter(rng.standard_normal(depth.shape), (0, 1, 1))
    stain = core + (rim - core) * np.exp(-np.clip(depth, 0, None) / 1.1) + 0.4 * chromatin
    for _ in range(3):
        y, x = axis[:, None] - 0.3 * radius * _normal(rng), axis - 0.3 * radius * _normal(rng)
        exists = rng.random((BANK, 1, 1)) < nucleoli / 3
        stain += 0.7 * exists * np.exp(-((np.hypot(y, x) / 1.4) ** 2))
    stain *= np.exp(0.12 * _normal(rng))

    cell = 0.6 * np.clip((depth + (body - 1) * radius) / 1.5, 0, 1) if body else 0 * depth
    keep = np.stack([1 - inside, (1 - cell) * (1 - inside), 1 - (cell > 0)], -1)
    pink = inside * 0.35 + (1 - inside) * cell * 0.45
    add = np.stack([inside * stain, pink, cell > 0], -1)
    return Bank(keep.astype(np.float32), add.astype(np.float32))


def _nuclear_depth(
    rng: np.random.Generator,
    axis: np.ndarray,
    radius: float,
    irregular: float,
    stretch: float,
    spread: float,
    angle: np.ndarray | None,
) -> np.ndarray:
    """Returns float[BANK, size, size]: pixels to the nuclear membrane, positive inside."""
    angle = rng.uniform(0, np.pi, BANK) if angle is None else angle
    cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    along, across = cos * axis + sin * axis[:, None], cos * axis[:, None] - sin * axis
    around = np.arctan2(across, along)
    waves = sum(_normal(rng) * np.cos(k * around + 6.3 * _normal(rng)) for k in (2, 3, 4))
    outline = np.exp(spread * _normal(rng)) * (1 + irregular * waves / np.sqrt(3))
    outline = radius * outline.clip(0.5, 1.5)
    return outline - np.hypot(along / np.sqrt(stretch), across * np.sqrt(stretch))


def _normal(rng: np.random.Generator) -> np.ndarray:
    """Returns one normal number for each cell of a bank, float[BANK, 1, 1]."""
    return rng.standard_normal((BANK, 1, 1))


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
    density: Sequence[float],
    solid: np.ndarray | None = None,
) -> np.ndarray:
    """Returns points int[n, 2] of a jittered hexagonal grid, at least MARGIN from the edge.

    A point exists with the probability `density[tissue]`, and never where `solid` is below 1/2.
    The order is random, so that no direction is always on top.
    """
    size = len(tissue)
    row, column = np.mgrid[0 : size / spacing / 0.866, 0 : size / spacing]
    points = np.stack([row * 0.866, column + 0.5 * (row % 2)], -1).reshape(-1, 2) * spacing
    points = (points + rng.normal(0, 0.16 * spacing, points.shape)).round().astype(int)
    points = points[((points >= MARGIN) & (points < size - MARGIN)).all(1)]
    y, x = points.T
    exists = rng.random(len(points)) < np.asarray(density)[tissue[y, x]]
    if solid is not None:
        exists &= solid[y, x] > 0.5
    return rng.permutation(points[exists])


def _field(rng: np.random.Generator, size: int, scale: float) -> np.ndarray:
    """Returns smooth normal noise float32[size, size] of unit variance, correlated over `scale`."""
    knots = np.arange(-3 * scale, size + 3 * scale, scale)
    kernel = np.exp(-0.5 * ((np.arange(size)[:, None] - knots) / scale) ** 2)
    kernel = (kernel / np.linalg.norm(kernel, axis=1, keepdims=True)).astype(np.float32)
    return kernel @ rng.standard_normal((len(knots), len(knots)), dtype=np.float32) @ kernel.T


def _fat_gaps(rng: np.random.Generator, fat: np.ndarray) -> np.ndarray:
    """Returns how much farther the second nearest fat cell is than the nearest: float32 >= 0.

    Its zeros are the walls of a Voronoi diagram; cells are about 60 pixels wide. Valid where bool
    `fat` is true: elsewhere it is not computed.
    """
    size = len(fat)
    distances = np.full((2, size, size), 1e3, np.float32)
    down, across = np.ogrid[:size, :size]
    reach = 76
    everywhere = np.zeros(fat.shape, int)
    for y, x in _scatter(rng, everywhere, 60.0, [1]):
        rows, columns = (slice(max(0, c - reach), c + reach) for c in (y, x))
        if not fat[rows, columns].any():
            continue
        first, second = distances[:, rows, columns]
        far = np.hypot(down[rows] - y, across[:, columns] - x)
        np.minimum(second, np.maximum(first, far), out=second)
        np.minimum(first, far, out=first)
    return distances[1] - distances[0]


def _scan(rng: np.random.Generator, stain: np.ndarray) -> np.ndarray:
    """Converts amounts of stain float32[h, w, 2] to uint8[h, w, 3], by Beer-Lambert and a scanner.

    The lab determines hue and strength of both stains; the scanner determines white, blur, noise.
    """
    # Bounded distributions: one outlier of ten slides would decide the AUC of a whole test split.
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
