"""The command `report`: reads the results of a run and writes `report.html` and its figures."""

import dataclasses
import datetime
import itertools
import json
import logging
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pandas as pd

from histo_jax import command, ensemble, evaluation_files
from histo_jax.config import Config
from histo_jax.data import groups, leakage, splits
from histo_jax.data.records import Prepared, prepare
from histo_jax.data.source_adapter import class_names, patch_spec
from histo_jax.distributed import runtime
from histo_jax.errors import UserError
from histo_jax.predictor import Predictor, TrainedModel
from histo_jax.report import page, patches, points
from histo_jax.report.result import Report
from histo_jax.run import folders, saved_config
from histo_jax.run.workdir import Workdir

log = logging.getLogger("histo_jax")


class _Evaluation(NamedTuple):
    """The last evaluation of a split, and the patches that were evaluated."""

    table: pd.DataFrame
    scores: dict[str, Any]
    prepared: Prepared
    subsets: splits.Subsets
    subset: splits.Subset


def report(config: Config, workdir: str | os.PathLike[str]) -> Report:
    """Writes `report.html`, a single self-contained page, and its figures into `report/`.

    Shows the last evaluation of `config.evaluate.split`, with an attribution of example patches by
    the networks that were evaluated.

    Args:
        config: settings of the run; `evaluate.split` names the split.
        workdir: folder of the run.

    Returns:
        The path of the page, which notebooks display.

    Raises:
        UserError: the split was not evaluated, or with another checkpoint or on other patches.
        OSError: a file cannot be written.
    """

    def check(run: Workdir) -> None:
        evaluation_files.read(run.path, config.evaluate.split)
        evaluation_files.read_scores(run.path, config.evaluate.split)

    with command.start(config, workdir, "report", check) as run:
        return Report(report_in(run, config))


def report_in(run: Workdir, config: Config) -> Path:
    """Does the work of `report` in an open folder."""
    evaluation = _read_evaluation(config, run.path)
    predictor = _load_evaluated(config, run.path, evaluation.scores)
    if predictor:
        ensemble.check_size(predictor, config, evaluation.prepared)
        ensemble.check_evaluated(predictor.trained, evaluation.scores, config.evaluate.split)
    text, svgs = page.render(_collect(config, run, evaluation, predictor))
    if run.is_primary:
        contents = {f"{name}.svg": svg.encode() for name, svg in svgs.items()}
        folders.update(run.path / "report", contents, {f"{name}.svg" for name in page.FIGURES})
        start = config.data.raw_dir or os.path.dirname(config.data.table or "")
        points.write(run.path, evaluation.table, Path(start).expanduser())
    run.write_text("report.html", text)
    path = run.path / "report.html"
    log.info("report in %s", path)
    return path


def _read_evaluation(config: Config, folder: Path) -> _Evaluation:
    split = config.evaluate.split
    table = evaluation_files.read(folder, split)
    scores = evaluation_files.read_scores(folder, split)
    prepared = prepare(config.data, config.data_seed, folder, raw_may_be_gone=True)
    subsets = evaluation_files.make_subsets(prepared, config, scores)
    subset = evaluation_files.subset(prepared, subsets, split, table)
    evaluation_files.check_scores(folder, split, table, scores)
    return _Evaluation(table, scores, prepared, subsets, subset)


def _load_evaluated(config: Config, folder: Path, scores: dict[str, Any]) -> Predictor | None:
    """Returns the evaluated networks, None if their checkpoints are missing."""
    predict = dataclasses.replace(config.predict, checkpoints=_runs(scores))
    try:
        return ensemble.load_predictor(dataclasses.replace(config, predict=predict), folder)
    except UserError as error:
        log.warning("the report shows no attribution: %s", error)
        return None


def _runs(scores: dict[str, Any]) -> str:
    return ",".join(run["run"] for run in scores.get("runs", []))


def _collect(
    config: Config, run: Workdir, evaluation: _Evaluation, predictor: Predictor | None
) -> page.Contents:
    table, scores, prepared, subsets, _ = evaluation
    folder, split = run.path, config.evaluate.split
    train = prepared.tables[subsets.train.records].iloc[subsets.train.rows]
    validation = prepared.tables[subsets.validation.records].iloc[subsets.validation.rows]
    # The runs of an ensemble have a history each.
    history = None if "runs" in scores else folder / "history.csv"
    audit = _read_json(folder / "audit.json")
    is_own_audit = _is_audit_of(audit, train, validation)
    settings = _settings(config, folder, scores)
    return page.Contents(
        workdir=folder.absolute().name,
        source=config.data.source,
        classes=class_names(config.data),
        patch_spec=patch_spec(config.data, prepared.image_size),
        split=split,
        scores=scores,
        table=table,
        has_slides=groups.are_known(table, "slide"),
        date=_date(folder / f"evaluation_{split}.json"),
        history=pd.read_csv(history) if history and history.exists() else None,
        galleries=_gather_galleries(config, evaluation, predictor),
        audit=_summarise_audit(audit, class_names(config.data)) if audit and is_own_audit else None,
        # An audit covers one training and validation split; folds have several.
        has_other_audit=bool(audit and not is_own_audit and not scores.get("out_of_fold")),
        training=page.Training(
            records=f"{prepared.directory.parent.name} {prepared.directory.name}",
            fingerprint=splits.fingerprint(
                prepared.tables, subsets, config.seed, config.fit.batch_size
            )[:16],
            patches=len(train),
            slides=train["slide"][train["slide"] != ""].nunique(),
            parameters=[_count_parameters(each) for each in predictor.trained] if predictor else [],
            versions=run.status().get("trained_with"),
        ),
        settings=settings,
        changed_settings=_changed_settings(settings),
        versions=runtime.versions(),
    )


def _gather_galleries(
    config: Config, evaluation: _Evaluation, predictor: Predictor | None
) -> dict[str, list[patches.Patch]]:
    """Returns the patches of each gallery, by its title."""
    table, scores, prepared, _, subset = evaluation
    galleries = patches.galleries(table, config.seed)
    # All galleries together, so that the networks are compiled once.
    places = np.concatenate(list(galleries.values()))
    logits, rows = table["logit"].to_numpy()[places], subset.rows[places]
    networks = patches.scoring_networks(predictor, config, prepared, scores, rows)
    gathered = iter(patches.gather(prepared, subset.records, rows, predictor, logits, networks))
    return {title: list(itertools.islice(gathered, len(own))) for title, own in galleries.items()}


def _count_parameters(model: TrainedModel) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(model.weights.params))


def _is_audit_of(
    audit: dict[str, Any] | None, train: pd.DataFrame, validation: pd.DataFrame
) -> bool:
    """Whether these patches were audited."""
    audited = audit.get("subsets", {}) if audit else {}
    return all(
        audited.get(name, {}).get("digest") == leakage.digest(table)
        for name, table in {"train": train, "validation": validation}.items()
    )


def _summarise_audit(audit: dict[str, Any], classes: tuple[str, str]) -> page.Audit:
    return page.Audit(
        # Without its note, which the page itself states.
        text=leakage.table(audit | {"note": ""}, classes),
        has_leak=leakage.has_leak(audit),
        knows_slides=all(pair["shared_slides"] for pair in audit["pairs"].values()),
        knows_patients=all(pair.get("shared_patients") for pair in audit["pairs"].values()),
        color_auc=audit["colour_histogram_baseline"]["validation_auc"],
    )


def _settings(config: Config, folder: Path, scores: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings of training as `fit` saved them, and of evaluation as they were."""
    settings = saved_config.plain(config)
    saved = _read_json(folder / "config.json") or {}
    is_training = {key: not key.startswith(("evaluate.", "predict.")) for key in settings}
    settings |= {key: value for key, value in saved.items() if is_training.get(key)}
    settings["predict.tta"] = scores.get("tta", settings["predict.tta"])
    settings["predict.checkpoints"] = _runs(scores)
    return settings


def _changed_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings that differ from the default, without folders."""
    default = saved_config.plain(Config())
    return {
        name: value
        for name, value in settings.items()
        if name not in default or (value != default[name] and not name.endswith("_dir"))
    }


def _read_json(path: Path) -> dict[str, Any] | None:
    """Returns the contents of a file, or None if it is missing or corrupt."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _date(path: Path) -> str:
    """Returns the date of a file in UTC: unlike today's, it is the same in each rendering."""
    return datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.UTC).date().isoformat()
