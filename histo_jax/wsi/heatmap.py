"""Maps of slides: the command `heatmap`, and the same from Python."""

import contextlib
import logging
import os
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
from scipy.special import expit, logit

from histo_jax import command, ensemble, environment, evaluation_files
from histo_jax.config import TISSUE_WORDS, Config, HeatmapConfig
from histo_jax.config_checks import validate
from histo_jax.config_values import folders, names
from histo_jax.data.source_adapter import class_names
from histo_jax.distributed import consensus, runtime
from histo_jax.errors import ConfigError, DataError, UserError, one_line
from histo_jax.metrics import Calibration
from histo_jax.predictor import Predictor, load
from histo_jax.run import files, progress, signals
from histo_jax.run.folders import recover
from histo_jax.run.workdir import Workdir
from histo_jax.slides import libraries, search, tissue
from histo_jax.wsi import index, results, slide_map

log = logging.getLogger("histo_jax")

FOLDER = "heatmaps"
_DEFAULT_THRESHOLD = 0.5
_SHOWN = 3


def run(config: Config, workdir: str | os.PathLike[str]) -> pd.DataFrame:
    """Makes the maps of `config.heatmap.slides`, in `heatmaps/` of the workdir.

    Args:
        config: settings of the run.
        workdir: folder of a trained run; any folder with `predict.checkpoints`.

    Returns:
        See `heatmap`.

    Raises:
        UserError: a setting or the folder is wrong; or slides have failed, after all others are
            done.
        OSError: a file cannot be written.
        Preempted: a signal has asked this process to stop.
    """
    options = config.heatmap
    paths = folders(options.slides)
    if not paths:
        raise ConfigError(
            "config.heatmap.slides is empty: give slides, folders of slides, or a CSV with the "
            "columns slide,mpp"
        )
    libraries.check()
    slides = search.find(paths, options.mpp)
    check_mask(options.tissue, slides)
    with command.start(config, workdir, "heatmap") as session:
        predictor = ensemble.load_predictor(config, session.path, config.predict.prior)
        return run_in(session, config, predictor, slides)


def run_in(
    session: Workdir, config: Config, predictor: Predictor, slides: list[search.SlideFile]
) -> pd.DataFrame:
    """Does the work of `run` in an open folder."""
    if config.predict.checkpoints:
        session.acquire(config)
        session.save_config(config)
    settings = _settings(predictor, config.heatmap, session.path)
    table = _make_all(predictor, slides, settings, session.path / FOLDER)
    _raise_failures(len(slides), session.path / FOLDER)
    return table


def heatmap(
    predictor: Predictor | str | os.PathLike[str],
    slides: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    options: HeatmapConfig | None = None,
) -> pd.DataFrame:
    """Makes a map of each slide: the probability of each cell, as tables, GeoJSON and pictures.

    Slides that are finished in `out` with the same networks and settings are skipped. A slide that
    fails does not stop the others.

    Example:
        >>> histo_jax.heatmap("runs/kaggle", "slides", "maps")

    Args:
        predictor: the networks, or the folder of a run.
        slides: slides, folders that are searched, and tables `slide[,mpp]`.
        out: folder of the results, one folder for each slide, and `index.html`.
        options: `config.heatmap`; its `slides` are not used.

    Returns:
        One row for each slide: `name`, `slide`, `error` ('' = none), and the numbers of
        `slide.json`.

    Raises:
        UserError: an option is wrong, no slide is named, or the extra `slides` is not installed.
        OSError: a file cannot be written.
    """
    libraries.check()
    options = options or HeatmapConfig()
    validate(Config(heatmap=options))
    names = [slides] if isinstance(slides, str | os.PathLike) else slides
    found = search.find([os.fspath(name) for name in names], options.mpp)
    check_mask(options.tissue, found)
    with environment.defaults(), runtime.jax_defaults(), signals.watch():
        if isinstance(predictor, Predictor):
            run = Path(predictor.trained[0].run)
        else:
            run, predictor = Path(predictor).expanduser(), load(predictor)
        settings = _settings(predictor, options, run)
        return _make_all(predictor, found, settings, files.expand(out, "out"))


def _settings(predictor: Predictor, options: HeatmapConfig, folder: Path) -> slide_map.Settings:
    """Returns how the maps are made.

    Args:
        predictor: the networks.
        options: of the command.
        folder: where `evaluate` has scored the networks, if it has.
    """
    patch = predictor.patch
    if patch.mpp is None:
        raise ConfigError(
            f"{predictor.trained[0].run}: micrometres a pixel of its patches are not known: set "
            "--config.data.mpp=..., also for this command alone"
        )
    cell = patch.cell
    stride = options.stride or cell
    if stride % cell:
        raise ConfigError(
            f"config.heatmap.stride = {stride} must be a multiple of the cell, {cell} pixels"
        )
    threshold, source = decision_threshold(predictor, options.threshold, folder)
    data = predictor.trained[0].config.data
    _, positive = class_names(data)
    if data.source == "slides":  # where several classes may be positive; QuPath gives an area one
        positive = names(positive)[0]
    return slide_map.Settings(
        patch=patch,
        stride=stride,
        threshold=threshold,
        threshold_source=source,
        tissue=tissue.Options(options.tissue, options.min_tissue_area, options.max_hole_area),
        positive=positive,
    )


def check_mask(mask: str, slides: Sequence[Any]) -> None:
    """Refuses a mask that is missing, and one mask for several slides."""
    if mask in TISSUE_WORDS:
        return
    path = files.expand(mask, "--config.heatmap.tissue")
    if not path.exists():
        raise ConfigError(
            f"config.heatmap.tissue = {mask} does not exist: give auto, all, a mask image, a "
            "GeoJSON, or a folder of such files"
        )
    if len(slides) > 1 and path.is_file():
        raise ConfigError(
            f"config.heatmap.tissue = {mask} is one mask for {len(slides)} slides: give a folder "
            "of masks with the slides' names"
        )


def decision_threshold(
    predictor: Predictor, given: float | None, folder: Path
) -> tuple[float, str]:
    """Returns the decision threshold and where it comes from.

    Args:
        predictor: the networks.
        given: by the user; None = that of the evaluation, 0.5 without one.
        folder: where `evaluate` has scored the networks, if it has.
    """
    if given is not None:
        return given, "given"
    try:
        scores = evaluation_files.read_scores(folder, "validation")
        ensemble.check_evaluated(predictor.trained, scores, "validation")
        threshold = scores["threshold_at_95_specificity"]
    except (UserError, KeyError):
        threshold = None
    if threshold is None:
        log.info("the networks were not evaluated: the decision threshold is 0.5")
        return _DEFAULT_THRESHOLD, "default"
    if predictor.prior is not None and 0 < threshold < 1:
        # Evaluation knows no prior: the threshold moves as the probabilities do.
        shifts = [
            Calibration(prior=trained.calibration.prior).apply(
                np.array([logit(threshold)]), predictor.prior
            )
            for trained in predictor.trained
        ]
        threshold = float(expit(np.mean(shifts)))
    return threshold, "95% specificity in validation"


def _make_all(
    predictor: Predictor, slides: list[search.SlideFile], settings: slide_map.Settings, out: Path
) -> pd.DataFrame:
    """Makes the maps; each process makes its share, and the page shows all that are finished."""
    out.mkdir(parents=True, exist_ok=True)
    is_primary = jax.process_index() == 0
    with results.locked(out) if is_primary else contextlib.nullcontext():
        if is_primary:
            results.forget_failures(out)
        consensus.global_minimum(len(slides))  # before another process records a failure
        rows = _make_share(predictor, slides, settings, out)
        consensus.global_minimum(len(rows))  # all processes have finished
        if is_primary:
            index.write(out, settings.positive)
    log.info("%d slides in %s", len(rows), out / index.NAME)
    return pd.DataFrame(rows).drop(columns=["inputs"], errors="ignore")


def _make_share(
    predictor: Predictor, slides: list[search.SlideFile], settings: slide_map.Settings, out: Path
) -> list[dict[str, Any]]:
    """Makes the maps that are this process's; returns a row for each."""
    taken = {name: Path(summary["slide"]) for name, summary in results.read_all(out).items()}
    named = search.assign_names(slides, taken)
    own = named[jax.process_index() :: jax.process_count()]
    rows: list[dict[str, Any]] = []
    began = time.monotonic()
    for number, (name, slide) in enumerate(own, start=1):
        if signals.requested():
            raise signals.Preempted(f", with {number - 1} of {len(own)} slides finished")
        row: dict[str, Any] = {"name": name, "slide": _text(slide.path), "error": ""}
        try:
            summary = _make_one(predictor, slide, settings, out / name, f"{number}/{len(own)}")
            row |= {key: value for key, value in summary.items() if key not in row}
        except Exception as error:
            if _is_of_all_slides(error):
                raise
            row["error"] = _text(_record(error, slide.path, name, out))
        rows.append(row)
        index.write(out, settings.positive)
        if number < len(own):
            left = (time.monotonic() - began) / number * (len(own) - number)
            log.info("%d of %d slides, about %.0f min left", number, len(own), left / 60)
    return rows


def _text(value: object) -> str:
    """Returns a text that pandas takes: the name of a file may not be UTF-8."""
    return str(value).encode(errors="backslashreplace").decode()


def _is_of_all_slides(error: Exception) -> bool:
    """Returns whether the next slide would fail as well.

    Of files, those of the results are the reason: what reads slides and masks raises `DataError`.
    """
    is_setting = isinstance(error, UserError) and not isinstance(error, DataError)
    return is_setting or isinstance(error, OSError | jax.errors.JaxRuntimeError)


def _record(error: Exception, slide: Path, name: str, out: Path) -> str:
    """Keeps why a slide failed, and returns it as one line."""
    reason, trace = str(error), None
    if not isinstance(error, DataError):
        trace = "".join(traceback.format_exception(error))
        reason = (
            f"{slide} failed with {type(error).__name__} ({one_line(error)}): leave it out, and "
            f"report the traceback in {results.failure_file(out, name)}"
        )
        if isinstance(error, MemoryError):
            reason = f"{slide} needs more memory than is free: close other programs"
    log.warning("%s", reason)
    results.record_failure(out, name, slide, reason, trace)
    return reason


def _make_one(
    predictor: Predictor,
    slide: search.SlideFile,
    settings: slide_map.Settings,
    folder: Path,
    position: str,
) -> dict[str, Any]:
    """Makes the map of one slide unless it is finished."""
    recover(folder)
    finished = results.read_summary(folder)
    if finished and slide.path.exists():
        if finished["inputs"] == settings.inputs(predictor, slide, folder.name):
            log.info("%s is finished: skipped", folder.name)
            return finished
        log.info("%s was made with other settings or networks: it is made again", folder.name)
    log.info("slide %s: %s", position, slide.path)

    def open_bar(cells: int) -> Any:
        name = f"slide {position} {folder.name}"
        return progress.bar(name, cells, unit=" cells", leave=False)

    summary = slide_map.make(predictor, slide, settings, folder, open_bar)
    log.info(
        "%s: %d cells, highest probability %s, %d regions above %.3g",
        folder.name, summary["cells"],
        "-" if summary["highest"] is None else f"{summary['highest']:.3f}",
        summary["regions"], settings.threshold,
    )  # fmt: skip
    if not summary["cells"]:
        log.warning(
            "%s: no tissue was found; if there is some, set --config.heatmap.tissue=all or give a "
            "mask", slide.path,
        )  # fmt: skip
    return summary


def _raise_failures(slides: int, out: Path) -> None:
    """Raises an error that names the slides that have failed in any process, if there are some."""
    failed = results.read_failures(out)
    if not failed:
        return
    reasons = "; ".join(failure["reason"] for failure in failed[:_SHOWN])
    more = f"; {len(failed) - _SHOWN} more" if len(failed) > _SHOWN else ""
    raise DataError(
        f"{len(failed)} of {slides} slides failed ({reasons}{more}): see {out / index.NAME}, "
        "correct this and rerun the command"
    )
