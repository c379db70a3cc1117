"""The trained networks that `evaluate` and `predict` use: a run's own, or those of several runs."""

from pathlib import Path
from typing import NamedTuple

import pandas as pd
from flax import linen as nn
from jax.sharding import Sharding

from histo_jax import workdir as workdirs
from histo_jax.config import Config, names
from histo_jax.data import splits
from histo_jax.data.builder import Prepared, prepare
from histo_jax.errors import ExpectedError
from histo_jax.metrics import Calibration
from histo_jax.models import create_model
from histo_jax.training.checkpoints import Checkpoints
from histo_jax.training.state import Weights


class Member(NamedTuple):
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


def restore(config: Config, folder: Path, place: Sharding) -> list[Member]:
    """Reads the best checkpoint of each run in `config.predict.checkpoints`, or of `folder`.

    Args:
        config: that of the command.
        folder: its workdir, used where the config names no runs.
        place: where the weights are to lie.

    Raises:
        ExpectedError: a folder is no run, has no checkpoint, or one of another model.
    """
    runs = [Path(run).expanduser() for run in names(config.predict.checkpoints)]
    members = []
    for run in runs or [folder]:
        own = workdirs.load_config(run) if runs else config
        # The folders of other runs are not held: they may be training.
        with Checkpoints.of(run, read_only=bool(runs)) as checkpoints:
            best = checkpoints.restore_best(own, place)
        calibration = Calibration(**best.data.get("calibration", {}))
        members.append(
            Member(
                str(run), own, create_model(own.model), best.state.best_weights, calibration,
                int(best.state.step), best.data["fingerprint"],
            )
        )  # fmt: skip
    return members


def averages(config: Config, member: Member) -> bool:
    """Whether to average over flips and turns: a symmetric network gives all the same logit."""
    return config.predict.tta and member.config.model.name != "five_block_p4m"


def refuse_trained_on(
    members: list[Member], config: Config, prepared: Prepared, side: splits.Side
) -> None:
    """Refuses members that have trained on slides, or on patches, that they are to be judged by.

    Args:
        members: whatever data they come from.
        config: that of the command.
        prepared: its records.
        side: of these records, to be scored.

    Raises:
        ExpectedError: names the run and how many patches, or that its own records are gone.
    """
    judged = prepared.tables[side.records].iloc[side.rows]
    for member in members:
        seen = _trained_on(member, config, prepared)
        known = judged["id"].isin(seen["id"])
        known |= judged["slide"].isin(seen["slide"]) & (judged["slide"] != "")
        if known.any():
            raise ExpectedError(
                f"{member.run} has trained on {known.sum()} of the {len(judged)} patches that are "
                "to be scored, or on others of their slides: take runs with the same config.seed "
                "and config.data as this command"
            )


def _trained_on(member: Member, config: Config, prepared: Prepared) -> pd.DataFrame:
    """Returns the rows of the tables that a member has trained on."""
    # The command's records are looked at first: the member's own may have been moved since.
    if member.config.data.source == config.data.source:
        rows, fingerprint = _training_side(member, prepared)
        if fingerprint == member.fingerprint:
            return rows
    try:
        rows, fingerprint = _training_side(member, prepare(member.config))
    except ExpectedError as error:
        raise ExpectedError(f"what {member.run} has trained on cannot be told: {error}") from None
    if fingerprint != member.fingerprint:
        raise ExpectedError(
            f"what {member.run} has trained on cannot be told: {member.config.data.tfds_dir} no "
            "longer holds it; restore it, or leave this run out"
        )
    return rows


def _training_side(member: Member, prepared: Prepared) -> tuple[pd.DataFrame, str]:
    sides = splits.make_sides(prepared.tables, member.config)
    rows = prepared.tables[sides.train.records].iloc[sides.train.rows]
    return rows, splits.fingerprint(prepared.tables, sides, member.config)
