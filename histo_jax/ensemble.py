"""The trained networks that `evaluate` and `predict` use: a run's own, or those of several runs."""

import contextlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import linen as nn
from jax.sharding import Sharding

from histo_jax import settings
from histo_jax.config import Config
from histo_jax.config_values import folders, parse_fold
from histo_jax.data import splits
from histo_jax.data.records import Prepared, existing
from histo_jax.errors import UserError
from histo_jax.metrics import Calibration
from histo_jax.models import create_model
from histo_jax.run import files
from histo_jax.training.checkpoints import Checkpoints
from histo_jax.training.state import Weights


class TrainedModel(NamedTuple):
    """A trained network.

    Attributes:
        run: folder it comes from.
        config: of that run.
        model: maps normalised images to logits.
        weights: of the best checkpoint.
        calibration: of these weights.
        step: that the checkpoint was saved at.
        fingerprint: of the examples that it has trained on, see `splits.fingerprint`.
    """

    run: str
    config: Config
    model: nn.Module
    weights: Weights
    calibration: Calibration
    step: int
    fingerprint: str


def restore(config: Config, folder: Path, place: Sharding) -> list[TrainedModel]:
    """Reads the best checkpoint of each run in `config.predict.checkpoints`, or of `folder`.

    Args:
        config: that of the command.
        folder: its workdir, used where the config names no runs.
        place: where the weights are to lie.

    Raises:
        UserError: a folder is no run, has no checkpoint, or one of another model.
    """
    runs = [
        files.expand(run, "--config.predict.checkpoints").absolute()
        for run in folders(config.predict.checkpoints)
    ]
    twice = [
        run
        for number, run in enumerate(runs)
        if run.resolve() in {other.resolve() for other in runs[:number]}
    ]
    if twice:
        raise UserError(
            f"config.predict.checkpoints names {twice[0]} twice, which would count double: leave "
            "one out"
        )
    members = []
    for run in runs or [folder]:
        own = settings.load_run_config(run) if runs else config
        # The folders of other runs are not held: they may be training.
        with Checkpoints.of(run, read_only=bool(runs)) as checkpoints:
            best = checkpoints.restore_best(own, place)
        calibration = Calibration(**best.data.get("calibration", {}))
        members.append(
            TrainedModel(
                str(run), own, create_model(own.model), best.state.eval_weights, calibration,
                int(best.state.step), best.data["fingerprint"],
            )
        )  # fmt: skip
    return members


def uses_tta(config: Config, member: TrainedModel) -> bool:
    """Whether to average over the eight symmetries: a D4-invariant network gives all one logit."""
    return config.predict.tta and not getattr(member.model, "is_d4_invariant", False)


def check_evaluated(members: list[TrainedModel], scores: dict[str, Any], split: str) -> None:
    """Refuses networks that are not those which were scored: one has been trained further.

    Args:
        members: what `restore` returns; none of them, nothing is refused.
        scores: what `evaluate` has returned.
        split: that it has scored.

    Raises:
        UserError: names the run and the remedy.
    """
    scored = scores.get("members", [scores])
    runs = [member.run for member in members]
    if members and "members" in scores and runs != [score["run"] for score in scored]:
        raise UserError(
            f"what was evaluated is the mean of {', '.join(score['run'] for score in scored)}: set "
            "--config.predict.checkpoints to these runs, or run --mode=evaluate again"
        )
    if len(members) > len(scored):
        raise UserError(
            f"what was evaluated is one run alone, not the mean of {', '.join(runs)}: leave out "
            "--config.predict.checkpoints, or run --mode=evaluate with it"
        )
    for member, score in zip(members, scored, strict=bool(members)):
        if member.step != score["checkpoint_step"]:
            raise UserError(
                f"the best checkpoint of {member.run} is of step {member.step} and what was "
                f"evaluated of step {score['checkpoint_step']}: run --mode=evaluate "
                f"--config.evaluate.split={split} again"
            )


def refuse_trained_on(
    members: list[TrainedModel], config: Config, prepared: Prepared, subset: splits.Subset
) -> bool | None:
    """Refuses members that have trained on slides, or on patches, that they are to be judged by.

    Args:
        members: whatever data they come from.
        config: that of the command.
        prepared: its records.
        subset: of these records, to be scored.

    Returns:
        Whether none has trained on the slides that are to be scored; None = not known.

    Raises:
        UserError: names the run and how many patches, or that its own records are gone.
    """
    table = prepared.tables[subset.records]
    judged = table.iloc[subset.rows]
    slide_disjoint = []
    for member in members:
        records, subsets = _origin(member, config, prepared)
        own = records.tables[subsets.train.records]
        seen = own.iloc[subsets.train.rows]
        known = judged["id"].isin(splits.shared_ids(judged, seen))
        slides = splits.slide_identities(judged)
        known |= slides.isin(splits.slide_identities(seen)) & (slides != "")
        if known.any():
            hint = (
                "leave out --config.data.fold to evaluate runs of all folds out of fold"
                if config.data.fold
                else "take runs of the same config.data and data.split_seed (None = seed) as this "
                "command, or of all folds"
            )
            raise UserError(
                f"{member.run} has trained on {known.sum()} of the {len(judged)} patches that are "
                f"to be scored, or on others of their slides: {hint}"
            )
        value = splits.disjoint((own, subsets.train.rows), (table, subset.rows))
        if value is None and judged["id"].isin(own["id"]).all():
            value = subsets.slide_disjoint  # one data set, which this run has divided
        slide_disjoint.append(value)
    return splits.combine(slide_disjoint)


def are_folds(members: list[TrainedModel], config: Config) -> bool:
    """Whether the runs of an ensemble are folds, whose validation patches are asked for."""
    is_ensemble = bool(config.predict.checkpoints) and config.data.fold is None
    asked = is_ensemble and config.evaluate.split == "validation"
    return asked and all(member.config.data.fold for member in members)


def fold_subsets(
    members: list[TrainedModel], config: Config, prepared: Prepared
) -> list[splits.Subsets]:
    """Returns each run's sides of a cross-validation, in which each patch validates once.

    Args:
        members: runs with `data.fold`.
        config: that of the command.
        prepared: its records.

    Raises:
        UserError: a fold is missing or there twice, or the runs have divided other patches.
    """
    runs: dict[int, str] = {}
    folds = {parse_fold(member.config.data.fold or "")[1] for member in members}
    if len(folds) > 1:
        raise UserError(
            f"config.predict.checkpoints names runs of {min(folds)} and of {max(folds)} folds: "
            "give those of one division"
        )
    for member in members:
        number = parse_fold(member.config.data.fold or "")[0]
        if number in runs:
            raise UserError(
                f"{runs[number]} and {member.run} both validate on fold {member.config.data.fold}: "
                "give one run for each fold"
            )
        runs[number] = member.run
    (count,) = folds
    missing = [f"{number}/{count}" for number in range(1, count + 1) if number not in runs]
    if missing:
        raise UserError(
            f"config.predict.checkpoints names no run with data.fold = {', '.join(missing)}: add "
            "it, so that each patch is scored once"
        )
    divided = [_origin(member, config, prepared) for member in members]
    for member, (records, _) in zip(members, divided, strict=True):
        if records is not prepared:
            raise UserError(
                f"{member.run} was trained on other records or slides than {prepared.name}: give "
                "this command the config.data of that run, without its fold"
            )
    rows = np.sort(np.concatenate([subsets.validation.rows for _, subsets in divided]))
    sample = splits.draw_sample(
        prepared.tables, members[0].config.data, members[0].config.data_seed
    )
    if not np.array_equal(rows, sample.rows):
        raise UserError(
            "the runs of config.predict.checkpoints have not divided the same patches into folds: "
            "train all with one config.data, and one data.split_seed where their seeds differ"
        )
    return [subsets for _, subsets in divided]


def _origin(
    member: TrainedModel, config: Config, prepared: Prepared
) -> tuple[Prepared, splits.Subsets]:
    """Returns the records that a member comes from, and its sides of them."""

    def divided(records: Prepared) -> tuple[Prepared, splits.Subsets]:
        own = member.config
        subsets = splits.make_subsets(records.tables, own.data, own.data_seed)
        actual = splits.fingerprint(records.tables, subsets, own.seed, own.fit.batch_size)
        splits.check_fingerprint(member.fingerprint, actual, own.data.tfds_dir)
        return records, subsets

    # The command's are looked at first: the member's own may have been moved since.
    if member.config.data.source == config.data.source:
        with contextlib.suppress(UserError):
            return divided(prepared)
    reason: Exception = UserError(f"{member.config.data.tfds_dir} holds none of its records")
    try:
        for records in existing(member.config.data, member.config.data_seed, Path(member.run)):
            try:
                return divided(records)
            except UserError as error:
                reason = error
    except (UserError, OSError) as error:
        reason = error
    raise UserError(
        f"what {member.run} has trained on cannot be told ({reason}): restore its records, or "
        "leave this run out"
    )
