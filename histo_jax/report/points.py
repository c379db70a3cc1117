"""The worst errors on each slide as points for QuPath, where positions of patches are known."""

import contextlib
import json
import logging
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import expit

from histo_jax.errors import UserError
from histo_jax.metrics.scores import per_patch_loss
from histo_jax.run import files, folders
from histo_jax.slides import reader

log = logging.getLogger("histo_jax")

_FOLDER = "errors"
# Points of each slide, the worst ones.
_MOST = 100
# As `histo_jax.data.slide_patches` writes the place of a patch.
_PLACE = r"(?P<path>.+)#xywh=(?P<x>-?\d+),(?P<y>-?\d+),(?P<width>\d+),(?P<height>\d+)"
# By label; from the palette of Okabe & Ito, which is safe for colour blindness.
_CLASSES = {0: ("False positive", [213, 94, 0]), 1: ("False negative", [0, 114, 178])}


def write(folder: Path, table: pd.DataFrame, slides: Path) -> None:
    """Writes `errors/SLIDE.geojson` for each slide with errors; nothing without positions.

    Args:
        folder: of the run.
        table: result of `evaluation_files.read`.
        slides: folder that the paths of slides start from.

    Raises:
        OSError: a file cannot be written.
    """
    if "path" not in table:
        return
    places = table["path"].str.extract(f"^{_PLACE}$")
    if places.isna().any(axis=None):
        return
    logits, labels = table["logit"].to_numpy(), table["label"].to_numpy()
    order = np.argsort(-per_patch_loss(logits, labels), kind="stable")
    numbers = places.drop(columns="path").astype(int)
    is_wrong = (logits > 0) != (labels == 1)
    wrong = table.assign(path=places["path"]).join(numbers).iloc[order[is_wrong[order]]]
    with folders.replacing(folder / _FOLDER) as new:
        for path, rows in wrong.groupby("path"):
            name = rows["slide"].iloc[0].replace("/", "-")
            files.write_text(new / f"{name}.geojson", _collection(rows[:_MOST], slides / str(path)))
    log.info("%d wrong patches of %d slides: points for QuPath in %s", len(wrong),
             wrong["path"].nunique(), folder / _FOLDER)  # fmt: skip


def _collection(rows: pd.DataFrame, slide: Path) -> str:
    offset = (0, 0)
    # Without the slide, points of the few formats that QuPath crops are shifted.
    with contextlib.suppress(UserError, OSError), reader.open_slide(slide) as opened:
        offset = opened.offset
    features = [_point(row, offset) for row in rows.to_dict("records")]
    return json.dumps({"type": "FeatureCollection", "features": features}, indent=1) + "\n"


def _point(row: dict[Any, Any], offset: tuple[int, int]) -> dict[str, Any]:
    name, colour = _CLASSES[row["label"]]
    centre = row["x"] + row["width"] / 2, row["y"] + row["height"] / 2
    return {
        "type": "Feature",
        "id": str(uuid.uuid5(uuid.NAMESPACE_OID, row["id"])),
        "geometry": {
            "type": "Point",
            "coordinates": [side - start for side, start in zip(centre, offset, strict=True)],
        },
        "properties": {
            "objectType": "annotation",
            "classification": {"name": name, "color": colour},
            "measurements": {"Probability": round(float(expit(row["logit"])), 6)},
        },
    }
