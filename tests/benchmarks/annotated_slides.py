"""Synthetic slides with annotations, and how well maps of them overlap, for docs/slides.md.

    .venv/bin/python tests/benchmarks/annotated_slides.py write FOLDER
    .venv/bin/python tests/benchmarks/annotated_slides.py compare RUN FOLDER/test

`write` makes slides of about 1 square millimetre at 0.5 micrometres a pixel, with their tumour as
GeoJSON of QuPath: 24 to train on, and 24 others, with a table. Of the others 8 each have large
tumours, small groups of scattered tumour cells, and none. `compare` prints the intersection over
the union of the regions of the run's maps and the annotations: of the cells that they touch, and of
their areas. An area of whole cells cannot follow an outline: the last number is what maps without
any error would reach.
"""

import json
import sys
import unittest.mock
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
SEED = 7
TILE = 1024  # pixels of the generator, which are 1 micrometre wide
SCALE = 2  # pixels of a slide in one of these
CELL = 32 * SCALE
TRAINING = ("large", "large", "scattered") * 8
TEST = ("large", "scattered", "normal") * 8
# Fraction of the slide that is tumour, lowest and highest.
FRACTIONS = {"large": (0.35, 0.5), "scattered": (0.02, 0.06), "normal": (0.0, 0.0)}
# Width of its regions, as the correlation of a random field, in micrometres.
WIDTH = (110.0, 160.0)
# Of scattered cells: the fraction of the tumour's area, and the width of a group.
SCATTERED, GROUP = (0.1, 0.25), 8.0


def write(folder: Path) -> None:
    """Writes the slides and their annotations."""
    table = ["slide,annotation"]
    for number, kind in enumerate((*TRAINING, *TEST)):
        place = folder / ("train" if number < len(TRAINING) else "test")
        place.mkdir(parents=True, exist_ok=True)
        name = f"{kind}{number:02d}"
        pixels, tumour = generate(np.random.default_rng([SEED, number]), kind)
        write_slide(place / f"{name}.tif", pixels)
        if tumour.any():
            write_annotation(place / f"{name}.geojson", tumour)
        if place.name == "test":
            table.append(f"{name}.tif,{name}.geojson" if tumour.any() else f"{name}.tif,")
    (folder / "test/slides.csv").write_text("\n".join(table) + "\n")


def generate(rng: np.random.Generator, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the pixels of a slide, and its mask of tumour."""
    from histo_jax.data import synthetic_tissue as tissue

    fraction, width = rng.uniform(*FRACTIONS[kind]), rng.uniform(*WIDTH)
    regions = tissue._regions

    def with_larger_tumour(rng: np.random.Generator, lumps: np.ndarray) -> np.ndarray:
        kinds = regions(rng, lumps)
        kinds = np.where(kinds == tissue.TUMOUR, tissue.LYMPHOID, kinds)
        nests = tissue._field(rng, len(lumps), width) + 0.03 * lumps
        is_tumour = (nests > np.quantile(nests, 1 - fraction)) & (kinds != tissue.GLASS)
        if kind == "scattered":
            groups = tissue._field(rng, len(lumps), GROUP)
            is_tumour &= groups > np.quantile(groups, 1 - rng.uniform(*SCATTERED))
        return np.where(is_tumour, tissue.TUMOUR, kinds)

    with (
        unittest.mock.patch.object(tissue, "TILE", TILE),
        unittest.mock.patch.object(tissue, "_regions", with_larger_tumour),
    ):
        return tissue.generate_tile(rng)


def write_slide(path: Path, pixels: np.ndarray) -> None:
    """Writes the pixels of a tile as a slide."""
    import tifffile

    tifffile.imwrite(
        path, pixels.repeat(SCALE, 0).repeat(SCALE, 1), tile=(256, 256), photometric="rgb",
        metadata=None, compression="zlib", resolution=(SCALE * 1e4, SCALE * 1e4),
        resolutionunit="CENTIMETER",
    )  # fmt: skip


def write_annotation(path: Path, tumour: np.ndarray) -> None:
    """Writes a mask as an annotation of QuPath."""
    import shapely

    from histo_jax.slides import masks

    area = masks.outline(tumour, (SCALE, SCALE)).simplify(1.0)
    feature = {
        "type": "Feature",
        "geometry": json.loads(shapely.to_geojson(area)),
        "properties": {"objectType": "annotation", "classification": {"name": "Tumor"}},
    }
    path.write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))


def compare(run: Path, slides: Path) -> None:
    """Prints the overlap on each slide with tumour, and the means."""
    rows: dict[str, list[tuple[float, float, float]]] = {}
    for path in sorted(slides.glob("*.geojson")):
        row = overlap_of(path, run / "heatmaps" / path.stem / "regions.geojson")
        rows.setdefault(path.stem.rstrip("0123456789"), []).append(row)
        print(path.stem, *(f"{value:.3f}" for value in row))
    for kind, values in rows.items():
        print(f"mean of {kind}", *(f"{value:.3f}" for value in np.mean(values, axis=0)))


def overlap_of(annotation: Path, regions: Path) -> tuple[float, float, float]:
    """Returns the intersection over union of cells, of areas, and of areas without any error."""
    import shapely

    from histo_jax.slides.annotations import read_annotations
    from histo_jax.slides.overlap import overlaps

    def area(path: Path) -> Any:
        return shapely.union_all(list(read_annotations(path, (TILE * SCALE,) * 2).values()))

    def touched(area: Any) -> np.ndarray:
        cells = TILE * SCALE // CELL
        return overlaps(area, (cells, cells), (CELL, CELL)) * (CELL / SCALE) ** 2 > 1

    drawn, found = area(annotation), area(regions)
    is_drawn, is_found = touched(drawn), touched(found)
    return (
        (is_drawn & is_found).sum() / (is_drawn | is_found).sum(),
        drawn.intersection(found).area / drawn.union(found).area,
        drawn.area / (is_drawn.sum() * CELL**2),
    )


if __name__ == "__main__":
    {"write": write, "compare": compare}[sys.argv[1]](*map(Path, sys.argv[2:]))
