"""The trained networks that `evaluate` and `predict` use: a run's own, or those of several runs."""

from pathlib import Path
from typing import NamedTuple

from flax import linen as nn
from jax.sharding import Sharding

from histo_jax import workdir as workdirs
from histo_jax.config import Config, names
from histo_jax.data import splits
from histo_jax.data.builder import Prepared
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
    """

    run: str
    config: Config
    model: nn.Module
    weights: Weights
    calibration: Calibration
    step: int


def restore(config: Config, folder: Path, place: Sharding) -> list[Member]:
    """Reads the best checkpoint of each run in `config.predict.checkpoints`, or of `folder`.

    Args:
        config: that of the command.
        folder: its workdir, used where the config names no runs.
        place: where the weights are to lie.

    Raises:
        ExpectedError: a folder is no run, has no checkpoint, or one of another model.
    """
    runs = [Path(run) for run in names(config.predict.checkpoints)]
    members = []
    for run in runs or [folder]:
        own = workdirs.load_config(run) if runs else config
        with Checkpoints.of(run) as checkpoints:
            best = checkpoints.restore_best(own, place)
        calibration = Calibration(**best.data.get("calibration", {}))
        members.append(
            Member(
                str(run), own, create_model(own.model), best.state.best_weights, calibration,
                int(best.state.step),
            )
        )  # fmt: skip
    return members


def averages(config: Config, member: Member) -> bool:
    """Whether to average over flips and turns: a symmetric network gives all the same logit."""
    return config.predict.tta and member.config.model.name != "five_block_p4m"


def refuse_trained_on(members: list[Member], prepared: Prepared, side: splits.Side) -> None:
    """Refuses members that have trained on slides, or on patches, that they are to be judged by.

    Raises:
        ExpectedError: names the run and how many patches.
    """
    judged = prepared.tables[side.records].iloc[side.rows]
    for member in members:
        own = splits.make_sides(prepared.tables, member.config).train
        seen = prepared.tables[own.records].iloc[own.rows]
        known = judged["id"].isin(seen["id"])
        known |= judged["slide"].isin(seen["slide"]) & (judged["slide"] != "")
        if known.any():
            raise ExpectedError(
                f"{member.run} has trained on {known.sum()} of the {len(judged)} patches that are "
                "to be scored, or on others of their slides: take runs with the same config.seed "
                "and config.data as this command"
            )
