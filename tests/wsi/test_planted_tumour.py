"""Tumour whose outline is known is found on a slide, with the network of the quick start."""

import json
import zlib

import numpy as np
import pytest

import histo_jax
from histo_jax.config import Config, HeatmapConfig
from histo_jax.data.sources.synthetic import MIN_TUMOUR_FRACTION
from histo_jax.data.synthetic_tissue import TILE, generate_tile

tifffile = pytest.importorskip("tifffile", reason="the extra slides is not installed")
pytestmark = pytest.mark.slow

SIZE, BLOCK, MPP = 20_000, 512, 0.5  # half the network's spacing
# Tiles of tissue, and the corner of the first, all on cells of 32 pixels of 1 um.
ROWS, COLUMNS, CORNER = 4, 6, 4096


def plant():
    """Tissue and mask of tumour, in pixels of 1 um."""
    tiles = [generate_tile(np.random.default_rng(1000 + k)) for k in range(ROWS * COLUMNS)]
    image, mask = (
        np.stack(parts)
        .reshape(ROWS, COLUMNS, TILE, TILE, -1)
        .swapaxes(1, 2)
        .reshape(ROWS * TILE, COLUMNS * TILE, -1)
        for parts in zip(*tiles, strict=True)
    )
    return image, mask[..., 0]


def write(path, image):
    """Writes the tissue at half the spacing, on glass."""
    image = image.repeat(2, 0).repeat(2, 1)
    glass = zlib.compress(np.full((BLOCK, BLOCK, 3), 244, np.uint8).tobytes())

    def blocks():
        for top in range(-CORNER, SIZE - CORNER, BLOCK):
            for left in range(-CORNER, SIZE - CORNER, BLOCK):
                inside = image[
                    max(top, 0) : max(top + BLOCK, 0), max(left, 0) : max(left + BLOCK, 0)
                ]
                whole = inside.shape[:2] == (BLOCK, BLOCK)
                yield zlib.compress(inside.tobytes(), 1) if whole else glass

    tifffile.imwrite(
        path, blocks(), shape=(SIZE, SIZE, 3), dtype=np.uint8, tile=(BLOCK, BLOCK),
        photometric="rgb", compression="zlib", resolution=(1e4 / MPP,) * 2,
        resolutionunit="CENTIMETER", metadata=None,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The quick start's network, trained and evaluated."""
    folder = tmp_path_factory.mktemp("planted")
    config: Config = histo_jax.recipe("quickstart")
    config.data.tfds_dir = str(folder / "records")
    histo_jax.fit(config, folder / "run")
    histo_jax.evaluate(config, folder / "run")
    return folder / "run"


def test_planted_tumour_is_found(trained, tmp_path):
    image, mask = plant()
    write(tmp_path / "planted.tif", image)
    table = histo_jax.heatmap(trained, tmp_path / "planted.tif", tmp_path / "out", HeatmapConfig())
    assert list(table["error"]) == [""]
    assert table["threshold_source"].item() == "95% specificity in validation"
    values = tifffile.imread(tmp_path / "out/planted/heatmap.ome.tif")
    first = CORNER // 64
    rows, columns = (side // 32 for side in mask.shape)
    inside = values[first : first + rows, first : first + columns]
    is_positive = inside >= table["threshold"].item()
    fractions = mask.reshape(rows, 32, columns, 32).mean((1, 3))
    is_tumour, is_free = fractions >= MIN_TUMOUR_FRACTION, fractions == 0
    known = is_tumour | is_free
    overlap = (is_positive & is_tumour & known).sum() / ((is_positive | is_tumour) & known).sum()
    false_positives = (is_positive & is_free).sum() / is_free.sum()
    print(json.dumps({"iou": float(overlap), "false_positive_rate": float(false_positives)}))
    assert overlap >= 0.7
    assert false_positives <= 0.08
    outside = values.copy()
    outside[first - 1 : first + rows + 1, first - 1 : first + columns + 1] = np.nan
    assert np.isnan(outside).all()
