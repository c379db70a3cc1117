"""Which trained networks a command uses, and which patches they may be scored on."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from histo_jax.config import Config
from histo_jax.config_values import parse_fold
from histo_jax.data import splits
from histo_jax.data.records import Prepared, existing
from histo_jax.errors import CheckpointError, DataError, UserError
from histo_jax.predictor import Predictor, TrainedModel, read_best, read_runs, run_folders
from histo_jax.run.workdir import Workdir


def load_predictor(config: Config, folder: Path, prior: float | None = None) -> Predictor:
    """Returns the predictor of `config.predict.checkpoints`, or of the run in `folder`.

    Args:
        config: settings of the command.
        folder: its workdir, which this process holds.
        prior: see `Predictor`.

    Raises:
        UserError: a folder is not that of a run, or has no usable checkpoint.
    """
    predict = config.predict
    if runs := run_folders(predict.checkpoints):
        trained = read_runs(runs, "config.predict.checkpoints")
    else:
        trained = [read_best(folder, config, read_only=False)]
    return Predictor(trained, tta=predict.tta, prior=prior, batch_size=predict.batch_size)


def acquire(run: Workdir, config: Config, prepared: Prepared) -> None:
    """Makes the folder that of the ensemble of `config.predict.checkpoints`, if there is one."""
    if config.predict.checkpoints:
        run.acquire(config)
        run.save_config(config)
        run.update_status(records=prepared.name)


def check_size(predictor: Predictor, config: Config, prepared: Prepared) -> None:
    """Refuses records whose patches have another size than those of the networks."""
    splits.check_size(predictor.patch.size, prepared.image_size, config.data.tfds_dir)


def check_evaluated(trained: Sequence[TrainedModel], scores: dict[str, Any], split: str) -> None:
    """Refuses networks other than those that were evaluated, such as a run trained further since.

    Args:
        trained: the networks; none of them is always accepted.
        scores: result of `evaluate`.
        split: the split that was evaluated.

    Raises:
        UserError: names the run and the fix.
    """
    evaluated = scores.get("runs", [scores])
    runs = [model.run for model in trained]
    if trained and "runs" in scores and runs != [run["run"] for run in evaluated]:
        raise UserError(
            f"the evaluated ensemble is the mean of {', '.join(run['run'] for run in evaluated)}: "
            "set --config.predict.checkpoints to these runs, or rerun --mode=evaluate"
        )
    if len(trained) > len(evaluated):
        raise UserError(
            f"a single run was evaluated, not the mean of {', '.join(runs)}: leave out "
            "--config.predict.checkpoints, or run --mode=evaluate with it"
        )
    for model, run in zip(trained, evaluated, strict=bool(trained)):
        if model.step != run["checkpoint_step"]:
            raise CheckpointError(
                f"the best checkpoint of {model.run} is of step {model.step}, but the evaluated "
                f"one is of step {run['checkpoint_step']}: rerun --mode=evaluate "
                f"--config.evaluate.split={split}"
            )


def check_unseen(
    trained: Sequence[TrainedModel], config: Config, prepared: Prepared, subset: splits.Subset
) -> bool | None:
    """Refuses networks that were trained on the patches to be scored, or on their slides.

    Args:
        trained: networks, each trained on any data.
        config: settings of the command.
        prepared: its records.
        subset: the patches to be scored.

    Returns:
        Whether no network was trained on the slides to be scored; None = not known.

    Raises:
        UserError: names the run and the number of patches, or a run whose records are missing.
    """
    return splits.combine([_check_unseen_by(model, config, prepared, subset) for model in trained])


def _check_unseen_by(
    model: TrainedModel, config: Config, prepared: Prepared, subset: splits.Subset
) -> bool | None:
    """Does what `check_unseen` does for one network."""
    table = prepared.tables[subset.records]
    scored = table.iloc[subset.rows]
    origin = _training_data(model, config, prepared)
    own, subsets = origin.prepared.tables[origin.subsets.train.records], origin.subsets
    train = own.iloc[subsets.train.rows]
    slides = splits.slide_identities(scored)
    is_seen = scored["id"].isin(splits.shared_ids(scored, train))
    is_seen |= slides.isin(splits.slide_identities(train)) & (slides != "")
    if is_seen.any():
        fix = (
            "leave out --config.data.fold to evaluate the runs of all folds out of fold"
            if config.data.fold
            else "use runs with the config.data and data.split_seed (None = seed) of this command, "
            "or the runs of all folds"
        )
        raise UserError(
            f"{model.run} was trained on {is_seen.sum()} of the {len(scored)} patches to be "
            f"scored, or on other patches of their slides: {fix}"
        )
    is_disjoint = splits.disjoint((own, subsets.train.rows), (table, subset.rows))
    if is_disjoint is None and scored["id"].isin(own["id"]).all():
        return subsets.slide_disjoint  # one dataset, which this run has split
    return is_disjoint


def are_folds(trained: Sequence[TrainedModel], config: Config) -> bool:
    """Whether the networks are the folds of a cross-validation whose validation is evaluated."""
    is_ensemble = bool(config.predict.checkpoints) and config.data.fold is None
    is_validation = is_ensemble and config.evaluate.split == "validation"
    return is_validation and all(model.config.data.fold for model in trained)


def fold_subsets(
    trained: Sequence[TrainedModel], config: Config, prepared: Prepared
) -> list[splits.Subsets]:
    """Returns each run's split in a cross-validation, where each patch validates exactly once.

    Args:
        trained: networks of runs with `data.fold`.
        config: settings of the command.
        prepared: its records.

    Raises:
        UserError: a fold is missing or duplicate, or the runs have split different patches.
    """
    _check_folds(trained)
    origins = [_training_data(model, config, prepared) for model in trained]
    for model, origin in zip(trained, origins, strict=True):
        if origin.prepared is not prepared:
            raise DataError(
                f"{model.run} was trained on other records or slides than {prepared.name}: give "
                "this command the config.data of that run, without its fold"
            )
    rows = np.sort(np.concatenate([origin.subsets.validation.rows for origin in origins]))
    first = trained[0].config
    sample = splits.draw_sample(prepared.tables, first.data, first.data_seed)
    if not np.array_equal(rows, sample.rows):
        raise UserError(
            "the runs of config.predict.checkpoints have not split the same patches into folds: "
            "train all with one config.data, and with one data.split_seed if their seeds differ"
        )
    return [origin.subsets for origin in origins]


def _check_folds(trained: Sequence[TrainedModel]) -> None:
    """Refuses runs that are not exactly one for each fold."""
    folds = [parse_fold(model.config.data.fold or "") for model in trained]
    counts = {count for _, count in folds}
    if len(counts) > 1:
        raise UserError(
            f"config.predict.checkpoints names runs of {min(counts)} and of {max(counts)} folds: "
            "give the runs of one cross-validation"
        )
    runs: dict[int, str] = {}
    for model, (number, _) in zip(trained, folds, strict=True):
        if number in runs:
            raise UserError(
                f"{runs[number]} and {model.run} both validate on fold {model.config.data.fold}: "
                "give one run per fold"
            )
        runs[number] = model.run
    (count,) = counts
    missing = [f"{number}/{count}" for number in range(1, count + 1) if number not in runs]
    if missing:
        raise UserError(
            f"config.predict.checkpoints has no run with data.fold = {', '.join(missing)}: add it, "
            "so that each patch is scored once"
        )


class _TrainingData(NamedTuple):
    """The records that a run was trained on, and how it has split them."""

    prepared: Prepared
    subsets: splits.Subsets


def _training_data(model: TrainedModel, config: Config, prepared: Prepared) -> _TrainingData:
    """Returns what a network was trained on.

    The command's records come first, since the run's own may have been moved.
    """
    if model.config.data.source == config.data.source:
        with contextlib.suppress(UserError):
            return _split_as_trained(model, prepared)
    reason: Exception = DataError(f"{model.config.data.tfds_dir} has none of its records")
    try:
        for records in existing(model.config.data, model.config.data_seed, Path(model.run)):
            try:
                return _split_as_trained(model, records)
            except UserError as error:
                reason = error
    except (UserError, OSError) as error:
        reason = error
    raise DataError(
        f"the training patches of {model.run} are not known ({reason}): restore its records, or "
        "leave this run out"
    )


def _split_as_trained(model: TrainedModel, prepared: Prepared) -> _TrainingData:
    config = model.config
    subsets = splits.make_subsets(prepared.tables, config.data, config.data_seed)
    fingerprint = splits.fingerprint(prepared.tables, subsets, config.seed, config.fit.batch_size)
    splits.check_fingerprint(model.fingerprint, fingerprint, config.data.tfds_dir)
    return _TrainingData(prepared, subsets)
