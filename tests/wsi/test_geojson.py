"""The GeoJSON files against RFC 7946, and against what QuPath documents.

The schemas have the parts of https://geojson.org/schema/FeatureCollection.json that these files
use, and QuPath's properties as its documentation and its own exports (0.4 to 0.5) have them.
"""

import json

import jsonschema
import numpy as np
import pytest

from histo_jax.slides.grid import Grid
from histo_jax.slides.reader import Spacing
from histo_jax.wsi import regions, tables

shapely = pytest.importorskip("shapely", reason="the extra slides is not installed")

UUID = "^[0-9a-f]{8}-[0-9a-f]{4}-[1-5][0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$"
POSITION = {"type": "array", "minItems": 2, "maxItems": 3, "items": {"type": "number"}}
POLYGON = {
    "type": "object",
    "required": ["type", "coordinates"],
    "properties": {
        "type": {"const": "Polygon"},
        "coordinates": {
            "type": "array",
            "minItems": 1,
            "items": {"type": "array", "minItems": 4, "items": POSITION},
        },
    },
}
GEOJSON = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "required": ["type", "features"],
    "properties": {
        "type": {"const": "FeatureCollection"},
        "features": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["type", "properties", "geometry"],
                "properties": {
                    "type": {"const": "Feature"},
                    "id": {"type": ["number", "string"]},
                    "properties": {"type": ["object", "null"]},
                    "geometry": POLYGON,
                },
            },
        },
    },
}
QUPATH = {
    "type": "object",
    "required": ["id", "properties"],
    "properties": {
        "id": {"pattern": UUID},
        "properties": {
            "type": "object",
            "required": ["objectType", "classification", "measurements"],
            "additionalProperties": False,
            "properties": {
                "objectType": {"enum": ["annotation", "detection", "tile"]},
                "classification": {
                    "type": "object",
                    "required": ["name", "color"],
                    "additionalProperties": False,
                    "properties": {
                        "name": {"type": "string", "minLength": 1},
                        "color": {
                            "type": "array",
                            "minItems": 3,
                            "maxItems": 3,
                            "items": {"type": "integer", "minimum": 0, "maximum": 255},
                        },
                    },
                },
                "measurements": {
                    "type": "object",
                    "minProperties": 1,
                    "additionalProperties": {"type": "number"},
                },
            },
        },
    },
}  # fmt: skip
# A ring with a hole in which another region lies, and one that touches it at a corner.
POSITIVE = """
11111..
1...1..
1.1.1..
1...1..
11111..
.....1.
"""


def write(folder, offset):
    """Writes both files; returns the features of each."""
    lines = POSITIVE.split()
    values = np.array([[0.9 if cell == "1" else 0.1 for cell in line] for line in lines])
    values = values.astype(np.float32)
    values[0, 6] = np.nan
    grid = Grid(96, 32, 32, (2.3, 2.7), (7 * 32 * 2, 6 * 32 * 2))
    labels = tables.Labels(0.5, "Tumor")
    found = regions.find(values, 0.5, grid, Spacing(0.4, 0.4, "given"))
    tables.write_cells(folder, values, grid, labels, "slide", offset)
    tables.write_regions(folder / "regions.geojson", found, labels, "slide", offset)
    files = [json.loads((folder / f"{name}.geojson").read_text()) for name in ("cells", "regions")]
    for content in files:
        jsonschema.Draft202012Validator.check_schema(GEOJSON)
        jsonschema.validate(content, GEOJSON, jsonschema.Draft202012Validator)
    return [content["features"] for content in files]


@pytest.mark.parametrize("offset", [(0, 0), (512, 100)])
def test_both_files_are_valid_geojson_as_qupath_takes_it(tmp_path, offset):
    cells, found = write(tmp_path, offset)
    assert (len(cells), len(found)) == (41, 3)
    for feature in (*cells, *found):
        jsonschema.validate(feature, QUPATH)
        outer, *holes = feature["geometry"]["coordinates"]
        assert shapely.from_geojson(json.dumps(feature)).is_valid
        for ring in (outer, *holes):
            assert ring[0] == ring[-1]
        assert shapely.LinearRing(outer).is_ccw
        assert not any(shapely.LinearRing(hole).is_ccw for hole in holes)
    assert {feature["properties"]["objectType"] for feature in cells} == {"tile"}
    assert {feature["properties"]["objectType"] for feature in found} == {"annotation"}
    assert [len(feature["geometry"]["coordinates"]) for feature in found] == [2, 1, 1]
    assert len({feature["id"] for feature in (*cells, *found)}) == 44
    assert cells[0]["geometry"]["coordinates"][0][0] == [-offset[0], -offset[1]]


def test_the_schemas_refuse_what_qupath_would_misread(tmp_path):
    """As other tools write it: no UUID, `objectType` outside of the properties, a list."""
    cell = write(tmp_path, (0, 0))[0][0]
    inner = cell["properties"]
    for wrong in (
        cell | {"id": "patch_0"},
        cell | {"properties": {k: v for k, v in inner.items() if k != "objectType"}},
        cell | {"properties": inner | {"measurements": [{"name": "Probability", "value": 0.5}]}},
        cell | {"properties": inner | {"measurements": {"Probability": "0.5"}}},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, QUPATH)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"type": "FeatureCollection", "features": [{}]}, GEOJSON)
