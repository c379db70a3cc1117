"""Scores maps of annotated slides as CAMELYON16 does: mode `evaluate` with `evaluate.slides`."""

import logging
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from histo_jax import command, ensemble
from histo_jax.config import Config
from histo_jax.data import slide_patches
from histo_jax.data.names import identity
from histo_jax.data.slide_tables import AnnotatedSlide, SlideAreas, list_slides, read_areas
from histo_jax.data.source_adapter import class_names
from histo_jax.errors import ConfigError, DataError, UserError
from histo_jax.metrics import bootstrap, few_note, froc
from histo_jax.metrics.scores import weighted_scores
from histo_jax.predictor import Predictor
from histo_jax.run import files
from histo_jax.run.workdir import Workdir
from histo_jax.slides import annotations, lesions, libraries, reader
from histo_jax.slides.search import SlideFile
from histo_jax.wsi import detections, heatmap, slide_map

log = logging.getLogger("histo_jax")

# What `per_slide` counts.
_COUNTS = ("lesions", "isolated_cells", "lesions_found", "false_positives")
# Bytes of slides with one name that tell whether they are one.
_HEAD = 2**20
_UNCHECKED = "whether the network was trained on these slides was not checked"


def evaluate_slides(config: Config, workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """Scores the maps of the annotated slides of `config.evaluate.slides`.

    Maps that are missing are made as by `heatmap`, with `config.heatmap`. Slides of which a network
    has seen training patches are left out. Writes `evaluation_slides.json`.

    Args:
        config: settings of the run; what is evaluated and the maps' may differ.
        workdir: folder of a trained run; any folder with `predict.checkpoints`.

    Returns:
        Numbers of slides and lesions; the scores of `metrics.froc` and `slide_auc`, and the ends
        of their 95% intervals, such as `froc_low` and `froc_high`; how many lesions are found and
        how many false positives there are at the maps' `threshold`; how it was done; and
        `per_slide`. What cannot be computed is nan, and `note` says why.

    Raises:
        UserError: a setting, a slide or an annotation is wrong, or no slide is left.
        OSError: a file cannot be written.
        Preempted: a signal has asked this process to stop.
    """
    assert config.evaluate.slides
    libraries.check()
    place = files.expand(config.evaluate.slides, "--config.evaluate.slides").absolute()
    listed = list_slides(place)
    heatmap.check_mask(config.heatmap.tissue, listed)
    with command.start(config, workdir, "evaluate", _check_processes) as run:
        predictor = ensemble.load_predictor(config, run.path, config.predict.prior)
        trained_on = _trained_on(predictor)
        listed = _leave_out(listed, trained_on or (), place)
        drawn = _read_annotations(listed, predictor, config, place)
        slides = [SlideFile(slide.path, slide.mpp or config.heatmap.mpp) for slide in listed]
        names = heatmap.run_in(run, config, predictor, slides)["name"]
        maps = (slide_map.read(run.path / heatmap.FOLDER / name) for name in names)
        scored = [_score(*each) for each in zip(names, drawn, maps, strict=True)]
        result = _result(scored, config, trained_on)
        run.write_json("evaluation_slides.json", result)
        _log(result)
        return result


def _check_processes(_: Workdir) -> None:
    if jax.process_count() > 1:
        raise ConfigError(
            "config.evaluate.slides needs one process: make the maps by --mode=heatmap first, and "
            "leave out --multihost"
        )


class _Scored(NamedTuple):
    """What is found on a slide.

    Attributes:
        name: of its map.
        listed: where the slide is.
        is_positive: whether it has annotations of a positive class.
        threshold: of its map.
        diameter: of each lesion, in micrometres.
        probability: of each detection.
        lesion: of each detection, -1 = none.
    """

    name: str
    listed: AnnotatedSlide
    is_positive: bool
    threshold: float
    diameter: np.ndarray
    probability: np.ndarray
    lesion: np.ndarray

    def describe(self) -> dict[str, Any]:
        """Returns what `per_slide` of the result says of the slide."""
        is_lesion = self.diameter >= froc.MIN_DIAMETER
        is_alarm = self.probability >= np.float32(self.threshold)
        found = np.unique(self.lesion[is_alarm & (self.lesion >= 0)])
        return {
            "name": self.name,
            "slide": str(self.listed.path),
            "positive": self.is_positive,
            "probability": self.highest,
            "lesions": int(is_lesion.sum()),
            "isolated_cells": int((~is_lesion).sum()),
            "lesions_found": int(is_lesion[found].sum()),
            "false_positives": int((is_alarm & (self.lesion < 0)).sum()),
        }

    @property
    def highest(self) -> float:
        """The highest probability, 0 where the map is empty."""
        return float(self.probability.max(initial=0))


def _trained_on(predictor: Predictor) -> set[Path] | None:
    """Returns the slides whose patches a network was trained on; None = not known for all."""
    slides: set[Path] = set()
    for trained in predictor.trained:
        settings = trained.config.data
        if settings.source != "slides":
            return None
        try:
            data = ensemble.read_training_data(trained)
        except (UserError, OSError):
            return None
        subset = data.subsets.train
        patches = data.prepared.tables[subset.records]["path"].iloc[subset.rows]
        folder = Path(settings.raw_dir or Path(settings.table or "").parent).expanduser()
        slides |= {folder / slide for slide in slide_patches.slide_paths(patches).unique()}
    return slides


def _leave_out(
    listed: list[AnnotatedSlide], trained_on: Collection[Path], place: Path
) -> list[AnnotatedSlide]:
    """Returns the slides that were not trained on, by their names and beginnings."""
    by_name: dict[str, list[Path]] = {}
    for path in trained_on:
        by_name.setdefault(identity(path.stem), []).append(path)

    def is_known(slide: Path) -> bool:
        return any(_is_same(slide, path) for path in by_name.get(identity(slide.stem), ()))

    kept = [slide for slide in listed if not is_known(slide.path)]
    if not kept:
        raise DataError(
            f"{place}: the network was trained on all {len(listed)} slides: set "
            "--config.evaluate.slides to others"
        )
    if len(kept) < len(listed):
        log.info(
            "%s: %d of %d slides are left out, as the network was trained on them",
            place, len(listed) - len(kept), len(listed),
        )  # fmt: skip
    return kept


def _is_same(slide: Path, other: Path) -> bool:
    """Returns whether slides with one name are one; also if the other cannot be read any more."""
    try:
        if slide.samefile(other):
            return True
        heads = []
        for path in (slide, other):
            with path.open("rb") as file:
                heads.append((path.stat().st_size, file.read(_HEAD)))
        return heads[0] == heads[1]
    except OSError:
        return True


def _read_annotations(
    listed: list[AnnotatedSlide], predictor: Predictor, config: Config, place: Path
) -> list[SlideAreas]:
    """Reads what was drawn on the slides."""
    data = predictor.trained[0].config.data
    name = class_names(data)[1]
    positive = config.evaluate.positive or slide_map.QUPATH_CLASSES.get(name, name)
    exclude = data.exclude if config.evaluate.exclude is None else config.evaluate.exclude
    drawn, found = [], set()
    for each in listed:
        with reader.open_slide(each.path) as slide:
            areas = read_areas(each, slide.size, slide.offset)
        found |= set(areas)
        area, excluded = annotations.regions(areas, positive, exclude)
        drawn.append(SlideAreas(each, area.difference(excluded), excluded))
    if found:
        annotations.check_classes(found, positive, exclude, str(place), "evaluate")
    return drawn


def _score(name: str, drawn: SlideAreas, found: slide_map.SlideMap) -> _Scored:
    """Finds the detections on a slide, and the lesion of each."""
    shapely = libraries.load("shapely")
    values, grid, spacing = found.probabilities, found.grid, found.spacing
    if not drawn.excluded.is_empty:
        rows, columns = np.nonzero(~np.isnan(values))
        x, y, width, height = grid.rectangles(rows, columns)
        shapely.prepare(drawn.excluded)
        is_out = shapely.contains_xy(drawn.excluded, x + width / 2, y + height / 2)
        values[rows[is_out], columns[is_out]] = np.nan
    maxima = detections.find(values, grid, spacing)
    own = lesions.find(drawn.positive, (spacing.x, spacing.y))
    return _Scored(
        name,
        drawn.listed,
        not drawn.positive.is_empty,
        found.threshold,
        np.array([lesion.diameter for lesion in own]),
        maxima.probability,
        lesions.locate(own, maxima.x * spacing.x, maxima.y * spacing.y),
    )


def _result(scored: list[_Scored], config: Config, trained_on: set[Path] | None) -> dict[str, Any]:
    """Returns what `evaluate_slides` returns."""
    per_slide = [slide.describe() for slide in scored]
    totals = {name: sum(row[name] for row in per_slide) for name in _COUNTS}
    positive = sum(slide.is_positive for slide in scored)
    patients = np.array([identity(slide.listed.patient) for slide in scored])
    groups = patients if all(patients) else None
    compute = _scores(scored)
    scores = compute(np.ones((1, len(scored))))
    intervals = bootstrap(compute, groups, len(scored), config.seed)
    notes = [
        "froc is not known: there are no lesions" * (not totals["lesions"]),
        "slide_auc is not known: all slides are normal" * (not positive),
        "slide_auc is not known: no slide is normal" * (positive == len(scored)),
        _UNCHECKED * (trained_on is None),
    ]
    return {
        "slides": len(scored),
        "positive_slides": positive,
        **totals,
        **{name: float(value[0]) for name, value in scores.items()},
        **{f"{name}_low": low for name, (low, _) in intervals.items()},
        **{f"{name}_high": high for name, (_, high) in intervals.items()},
        "interval_over": "slides" if groups is None else "patients",
        "resampled": len(scored) if groups is None else len(np.unique(groups)),
        "threshold": scored[0].threshold,
        "tta": config.predict.tta,
        "prior": config.predict.prior,
        "slide_disjoint": None if trained_on is None else True,
        "note": "; ".join(filter(None, notes)),
        "per_slide": per_slide,
    }


def _scores(scored: list[_Scored]) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """Returns the function from weightings of the slides to the scores."""
    indices = np.arange(len(scored))
    counts = [len(slide.diameter) for slide in scored]
    # The index of a lesion is that among all slides.
    starts = np.cumsum([0, *counts[:-1]])
    lesion = [
        np.where(slide.lesion < 0, -1, slide.lesion + start)
        for slide, start in zip(scored, starts, strict=True)
    ]
    all_lesions = froc.Lesions(
        np.repeat(indices, counts), np.concatenate([slide.diameter for slide in scored])
    )
    all_detections = froc.Detections(
        np.repeat(indices, [len(slide.lesion) for slide in scored]),
        np.concatenate([slide.probability for slide in scored]),
        np.concatenate(lesion),
    )
    highest = np.array([slide.highest for slide in scored])
    labels = np.array([slide.is_positive for slide in scored], np.float64)

    def compute(weights: np.ndarray) -> dict[str, np.ndarray]:
        auc = weighted_scores(highest, labels, weights)["auc"]
        return {**froc.weighted_froc(all_detections, all_lesions, weights), "slide_auc": auc}

    return compute


def _log(result: dict[str, Any]) -> None:
    log.info(
        "slides: FROC %.4f (95%% %.4f to %.4f, over %s), slide AUC %.4f on %d slides with %d "
        "lesions; at the threshold %.3g, %d lesions are found, with %d false positives",
        result["froc"], result["froc_low"], result["froc_high"], result["interval_over"],
        result["slide_auc"], result["slides"], result["lesions"], result["threshold"],
        result["lesions_found"], result["false_positives"],
    )  # fmt: skip
    if result["note"]:
        log.warning("%s", result["note"])
    if few := few_note(result["resampled"], result["interval_over"]):
        log.warning("%s", few)
