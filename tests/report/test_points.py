"""The worst errors of each slide as points for QuPath."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest

from histo_jax.report import points, report


@pytest.fixture
def table():
    return pd.DataFrame(
        {
            "id": [str(number) for number in range(6)],
            "label": [0, 1, 0, 1, 0, 1],
            "slide": ["a", "a", "a", "a", "b", "b"],
            "logit": [1.0, -2.0, -1.0, 3.0, -1.0, 4.0],
            "path": [f"x/a.svs#xywh={number * 100 - 32},64,96,96" for number in range(4)]
            + [f"x/b.svs#xywh={number * 100},64,96,96" for number in range(2)],
        }
    )


def test_wrong_patches_become_points_the_worst_first(table, tmp_path):
    (tmp_path / "errors").mkdir()
    (tmp_path / "errors" / "old.geojson").write_text("")
    points.write(tmp_path, table, tmp_path)
    assert [path.name for path in (tmp_path / "errors").iterdir()] == ["a.geojson"]
    content = json.loads((tmp_path / "errors" / "a.geojson").read_text())
    assert content["type"] == "FeatureCollection"
    first, second = content["features"]
    assert first["geometry"] == {"type": "Point", "coordinates": [116, 112]}
    assert second["geometry"]["coordinates"] == [16, 112]
    assert first["properties"]["classification"]["name"] == "False negative"
    assert second["properties"]["classification"]["name"] == "False positive"
    assert first["properties"]["measurements"]["Probability"] == round(1 / (1 + np.exp(2)), 6)


@pytest.mark.parametrize("paths", [None, "a.png"])
def test_patches_without_a_position_write_nothing(table, tmp_path, paths):
    table = table.drop(columns="path") if paths is None else table.assign(path=paths)
    points.write(tmp_path, table, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_report_writes_points_where_positions_are_known(config, run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    predictions = folder / "predictions_validation.csv"
    header, *rows = predictions.read_text().splitlines()
    rows = [f'{row},"{row.split(",")[2]}.svs#xywh=0,0,96,96"' for row in rows]
    predictions.write_text("\n".join([f"{header},path", *rows, ""]))
    report(config, folder)
    written = [path.stem for path in (folder / "errors").iterdir()]
    assert written
    assert set(written) <= {row.split(",")[2] for row in rows}
