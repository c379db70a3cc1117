"""Synthetic slides with annotations, and how well maps of them agree, for docs/slides.md.

    .venv/bin/python tests/benchmarks/annotated_slides.py write FOLDER
    .venv/bin/python tests/benchmarks/annotated_slides.py compare RUN FOLDER/test

`write` makes 24 slides to train on and 6 others, of 0.5 micrometres a pixel, with their tumour as
GeoJSON of QuPath; and beside the 6 as many normal ones, with a table of these 12. `compare` prints
the intersection over the union of the regions of the run's maps and the annotations: of the cells
that they touch, and of their areas. An area of whole cells cannot follow an outline: the last
number is what maps without any error would reach.
"""

import json
import sys
import unittest.mock
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
SLIDES, TRAINING, SEED = 30, 24, 7
SCALE = 2  # pixels of a slide in one of the generator, which is 1 micrometre wide
CELL = 32 * SCALE


def write(folder: Path) -> None:
    """Writes the slides and their annotations."""
    import shapely

    from histo_jax.data.synthetic_tissue import generate_tile
    from histo_jax.slides import masks

    for number in range(SLIDES):
        pixels, tumour = generate_tile(np.random.default_rng([SEED, number]))
        place = folder / ("train" if number < TRAINING else "test")
        place.mkdir(parents=True, exist_ok=True)
        write_slide(place / f"s{number:02d}.tif", pixels)
        area = masks.outline(tumour, (SCALE, SCALE)).simplify(1.0)
        feature = {
            "type": "Feature",
            "geometry": json.loads(shapely.to_geojson(area)),
            "properties": {"objectType": "annotation", "classification": {"name": "Tumor"}},
        }
        content = {"type": "FeatureCollection", "features": [feature]}
        (place / f"s{number:02d}.geojson").write_text(json.dumps(content))
    table = ["slide,annotation"]
    for number in range(TRAINING, SLIDES):
        write_slide(folder / f"test/n{number:02d}.tif", generate_normal(number))
        table += [f"s{number:02d}.tif,s{number:02d}.geojson", f"n{number:02d}.tif,"]
    (folder / "test/slides.csv").write_text("\n".join(table) + "\n")


def write_slide(path: Path, pixels: np.ndarray) -> None:
    """Writes the pixels of a tile as a slide."""
    import tifffile

    tifffile.imwrite(
        path, pixels.repeat(SCALE, 0).repeat(SCALE, 1), tile=(256, 256), photometric="rgb",
        metadata=None, compression="zlib", resolution=(SCALE * 1e4, SCALE * 1e4),
        resolutionunit="CENTIMETER",
    )  # fmt: skip


def generate_normal(number: int) -> np.ndarray:
    """Returns a tile with lymphoid tissue in place of tumour."""
    from histo_jax.data import synthetic_tissue as tissue

    regions = tissue._regions

    def without_tumour(*arguments: Any) -> np.ndarray:
        kinds = regions(*arguments)
        return np.where(kinds == tissue.TUMOUR, tissue.LYMPHOID, kinds)

    with unittest.mock.patch.object(tissue, "_regions", without_tumour):
        return tissue.generate_tile(np.random.default_rng([SEED, SLIDES + number]))[0]


def compare(run: Path, slides: Path) -> None:
    """Prints the agreement of each slide, and the mean."""
    import shapely

    from histo_jax.data.synthetic_tissue import TILE
    from histo_jax.slides.annotations import read_annotations
    from histo_jax.slides.overlap import overlaps

    size = TILE * SCALE
    cells = size // CELL
    rows = []
    for path in sorted(slides.glob("*.geojson")):
        regions = run / "heatmaps" / path.stem / "regions.geojson"
        drawn, found = (
            shapely.union_all(list(read_annotations(file, (size, size)).values()))
            for file in (path, regions)
        )
        is_drawn, is_found = (
            overlaps(area, (cells, cells), (CELL, CELL)) * (CELL / SCALE) ** 2 > 1
            for area in (drawn, found)
        )
        of_cells = (is_drawn & is_found).sum() / (is_drawn | is_found).sum()
        of_areas = drawn.intersection(found).area / drawn.union(found).area
        rows.append((of_cells, of_areas, drawn.area / (is_drawn.sum() * CELL**2)))
        print(path.stem, *(f"{value:.3f}" for value in rows[-1]))
    print("mean", *(f"{value:.3f}" for value in np.mean(rows, axis=0)))


if __name__ == "__main__":
    {"write": write, "compare": compare}[sys.argv[1]](*map(Path, sys.argv[2:]))
