"""Scores images of a folder or a table with a trained run: no records are prepared or needed."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
from jaxtyping import Bool, Int, UInt8
from scipy.special import expit

from histo_jax import ensemble, provenance
from histo_jax.config import Config
from histo_jax.data.image_files import ImageFile, describe_conversions, read_images
from histo_jax.data.image_list import ImageList
from histo_jax.data.image_tables import binary_labels, list_images
from histo_jax.errors import ConfigError, DataError, one_line
from histo_jax.metrics import binary_scores
from histo_jax.predictor import Predictor
from histo_jax.run import files, progress, signals
from histo_jax.run.workdir import Workdir

log = logging.getLogger("histo_jax")

_UNCHECKED = "whether the network was trained on these images, or on their slides, was not checked"


def predict_images(run: Workdir, config: Config) -> pd.DataFrame:
    """Scores the images of `config.predict.images`; writes `predictions.csv` and `.json`.

    Reads nothing of the run but its best checkpoint (that of each run of an ensemble), and changes
    nothing else in the folder.

    Args:
        run: folder of the run.
        config: its settings.

    Returns:
        `path` and `probability` of each image that could be read; where labels are known also
        `label`: 1, 0 or, not known, <NA>.

    Raises:
        UserError: there is no checkpoint, or no image could be read.
        OSError: a file cannot be written.
    """
    if jax.process_count() > 1:
        raise ConfigError("config.predict.images needs one process: leave out --multihost")
    assert config.predict.images
    place = files.expand(config.predict.images, "--config.predict.images").absolute()
    images = list_images(place, has_splits=False)
    if images.table is None:
        images = images._replace(rows=images.rows.sort_values("path"))
    predictor = ensemble.load_predictor(config, run.path, config.predict.prior, read_only=True)
    network = type(predictor.trained[0].model)
    provenance.warn_of_changed_network(run, network, config.config_file)
    reader = _Reader(images, predictor)
    log.info("compiling the prediction step")
    with progress.bar("predicting", len(images.rows), unit=" img", leave=False) as bar:
        logits = predictor.logits(progress.counted(bar, reader.read()))
    reader.check(place)
    table = pd.DataFrame(
        {"path": images.rows["path"].to_numpy()[reader.is_read], "probability": expit(logits)}
    )
    scores: dict[str, Any] = {}
    labels = _labels(images, predictor.trained[0].config)[reader.is_read]
    if (labels >= 0).any():
        table["label"] = pd.Series(labels, dtype="Int64").where(labels >= 0)
        scores = binary_scores(logits[labels >= 0], labels[labels >= 0].astype(np.float64))
    _write(run, config, table, scores, unreadable=int((~reader.is_read).sum()))
    return table


class _Reader:
    """Reads image files ahead of their use.

    Args:
        images: the files.
        predictor: its networks decide which size the images must have, or are scaled to.

    Attributes:
        is_read: bool[n], whether each file could be read, once `read` has ended.
    """

    def __init__(self, images: ImageList, predictor: Predictor) -> None:
        self.is_read: Bool[np.ndarray, " n"] = np.zeros(len(images.rows), bool)
        self._folder, self._paths = images.folder, images.rows["path"].tolist()
        self._size = predictor.patch.size
        is_scaled = all(trained.config.data.image_size for trained in predictor.trained)
        self._image_size = self._size if is_scaled else None
        self._conversions: dict[str, int] = {}
        self._first = ""

    def read(self) -> Iterator[UInt8[np.ndarray, "1 size size 3"]]:
        """Yields the images that can be read, in order; logs the others.

        Raises:
            Preempted: a signal has asked this process to stop.
        """
        # One by one: the objects of a million paths take hundreds of MB.
        paths = (self._folder / path for path in self._paths)
        results = signals.stopping(read_images(paths, self._image_size))
        for number, result in enumerate(results):
            problem = self._problem(result)
            if problem:
                line = f"{self._folder / self._paths[number]} {problem}"
                log.warning("left out: %s", line)
                self._first = self._first or line
                continue
            assert isinstance(result, ImageFile)
            for name in result.conversions:
                self._conversions[name] = self._conversions.get(name, 0) + 1
            self.is_read[number] = True
            yield result.pixels[None]

    def check(self, place: Path) -> None:
        """Logs how many images were left out and converted.

        Raises:
            DataError: none could be read.
        """
        left_out = int((~self.is_read).sum())
        if left_out == len(self._paths):
            raise DataError(
                f"{place}: none of {left_out:,} images could be read: {self._first}; set "
                "--config.predict.images to other images"
            )
        if left_out:
            log.warning("%d of %d images could not be read", left_out, len(self._paths))
        if done := describe_conversions(self._conversions, self._image_size):
            log.info("%s", done)

    def _problem(self, result: ImageFile | str | Exception) -> str:
        """Returns why the result of `read_image` cannot be scored; '' = it can."""
        if isinstance(result, Exception):
            number = getattr(result, "errno", None)
            return f"cannot be read ({os.strerror(number) if number else one_line(result)})"
        if isinstance(result, str):
            return result
        height, width, _ = result.pixels.shape
        if (height, width) == (self._size, self._size):
            return ""
        return f"is {width}x{height} pixels; the network needs {self._size}x{self._size}: scale it"


def _labels(images: ImageList, config: Config) -> Int[np.ndarray, " n"]:
    """Returns the label of each image, -1 where it is not known.

    Folders are taken for classes where all images are in one and their names are those of labels.

    Args:
        images: of a table or a folder.
        config: of the run, whose `data.positive` names the positive class.
    """
    unknown = np.full(len(images.rows), -1)
    names = images.rows["label"]
    if (names == "").all() or (images.table is None and (names == "").any()):
        return unknown
    problems = []
    for positive in (config.data.positive, None):  # 0 and 1 need no name
        try:
            return binary_labels(images, positive).to_numpy()
        except DataError as error:
            problems.append(error)
    if images.table is not None:
        log.warning("the labels are not used: %s", problems[0])
    return unknown


def _write(
    run: Workdir, config: Config, table: pd.DataFrame, scores: dict[str, Any], unreadable: int
) -> None:
    run.path.mkdir(parents=True, exist_ok=True)
    # Eight digits are the precision of float32 logits.
    run.write_text("predictions.csv", table.to_csv(index=False, float_format="%.8g"))
    result = {
        "images": config.predict.images,
        "scored": len(table),
        "unreadable": unreadable,
        "tta": config.predict.tta,
        "prior": config.predict.prior,
    }
    if scores:
        result |= {**scores, "slide_disjoint": None, "patient_disjoint": None, "note": _UNCHECKED}
        has_auc = table["label"].nunique() == 2
        log.info(
            "AUC %s, NLL %.4f, accuracy %.4f on %d labelled images; %s",
            f"{scores['auc']:.4f}" if has_auc else "not defined, because all labels are equal",
            scores["nll"], scores["accuracy"], scores["count"], _UNCHECKED,
        )  # fmt: skip
    run.write_json("predictions.json", result)
    log.info("%d predictions in %s", len(table), run.path / "predictions.csv")
