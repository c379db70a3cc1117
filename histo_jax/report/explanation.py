"""Pictures of where the network looked, for chosen patches."""

import hashlib
import io
import logging
import os
from pathlib import Path

import jax
import numpy as np
import pandas as pd
from jax.sharding import SingleDeviceSharding
from PIL import Image, ImageDraw

from histo_jax import command, ensemble, evaluation_files
from histo_jax.config import Config
from histo_jax.config_values import names
from histo_jax.data.records import Prepared, prepare
from histo_jax.ensemble import TrainedModel
from histo_jax.errors import UserError
from histo_jax.report import folder as folders
from histo_jax.report import patches
from histo_jax.run.workdir import Workdir

log = logging.getLogger("histo_jax")

_ENLARGED = 4


def explain(config: Config, workdir: str | os.PathLike[str]) -> pd.DataFrame:
    """Writes `explain/<id>.png` for the patches of `config.explain.ids`.

    Each shows the patch beside itself in grey, with what speaks for tumour in orange and what
    against it in blue (integrated gradients), the centre framed. Without ids the patches are those
    of the report's galleries. With `config.predict.checkpoints` the mean of these runs is shown.

    `explain/patches.csv` has one row for each picture. Pictures of one checkpoint accumulate; those
    of another checkpoint are removed.

    Args:
        config: that of the run; folders may differ.
        workdir: folder of a run that `fit` has trained; with `predict.checkpoints` any.

    Returns:
        What was added to `explain/patches.csv`: `id`; `slide`; `label`, -1 = not known; calibrated
        `probability`, as evaluated, or for given ids of one pass; `tta`, whether it is a mean over
        symmetries; `checkpoint`, the step and a digest of the weights, of each run of an ensemble.

    Raises:
        UserError: an id is in no split, or there is no checkpoint; without ids, nothing was
            evaluated, or another checkpoint.
        OSError: a file cannot be written.
    """
    with command.start(config, workdir, "explain") as run:
        return explain_in(run, config)


def explain_in(run: Workdir, config: Config) -> pd.DataFrame:
    """Does the work of `explain` in an open folder."""
    folder, tta = run.path, False
    trained = ensemble.restore(config, folder, SingleDeviceSharding(jax.local_devices()[0]))
    prepared = prepare(config.data, config.data_seed, folder, raw_may_be_gone=True)
    if config.explain.ids:
        found = _gather_by_id(trained, config, prepared)
    else:
        split = config.evaluate.split
        table = evaluation_files.read(folder, split)
        scores = evaluation_files.read_scores(folder, split)
        ensemble.check_evaluated(trained, scores, split)
        tta = scores.get("tta", False)
        subsets = evaluation_files.make_subsets(prepared, config, scores)
        subset = evaluation_files.subset(prepared, subsets, split, table)
        evaluation_files.check_scores(folder, split, table, scores)
        chosen = pd.unique(np.concatenate(list(patches.galleries(table, config.seed).values())))
        logits = table["logit"].to_numpy()[chosen]
        rows = subset.rows[chosen]
        owners = patches.owners(trained, config, prepared, scores, rows)
        found = patches.gather(prepared, subset.records, rows, trained, logits, owners)
    table = pd.DataFrame([patch[:4] for patch in found], columns=patches.Patch._fields[:4])
    table = table.assign(tta=tta, checkpoint=_identify(trained, folder))
    if run.is_primary:
        drawn = {f"{patch.id}.png": _draw(patch) for patch in found}
        ours = {name for rows in prepared.tables.values() for name in rows["id"]}
        _add(folder / "explain", table, drawn, ours)
    log.info("%d patches in %s", len(table), folder / "explain")
    return table


def _identify(trained: list[TrainedModel], folder: Path) -> str:
    """Returns the steps of the checkpoints, each with a digest of what was trained."""
    names = []
    for member in trained:
        digest = hashlib.sha256(repr(member.calibration).encode())
        for leaf in jax.tree.leaves(member.weights):
            digest.update(np.asarray(leaf).tobytes())
        run = "" if Path(member.run) == folder else f"{member.run} "
        names.append(f"{run}step {member.step} weights {digest.hexdigest()[:8]}")
    return " + ".join(names)


def _add(folder: Path, table: pd.DataFrame, drawn: dict[str, bytes], ours: set[str]) -> None:
    """Adds rows and pictures; all others that are not of the same checkpoint are removed.

    Args:
        folder: of the pictures.
        table: the new rows of `patches.csv`.
        drawn: the new pictures, by file name.
        ours: ids of all patches; a picture of another name is the user's own.
    """
    folders.recover(folder)
    known = _read_rows(folder / "patches.csv")
    pictures = {path.stem for path in folder.glob("*.png")}
    kept = known[
        (known["checkpoint"] == table["checkpoint"].iloc[0])
        & ~known["id"].isin(table["id"])
        & known["id"].isin(pictures)
    ]
    rows = pd.concat([kept, table]) if len(kept) else table
    csv = rows.to_csv(index=False, columns=list(table.columns)).encode()
    obsolete = {f"{name}.png" for name in pictures & (ours | set(known["id"])) - set(kept["id"])}
    folders.update(folder, {**drawn, "patches.csv": csv}, obsolete)


def _read_rows(path: Path) -> pd.DataFrame:
    """Returns the rows of `patches.csv` as text; those of 0.1.0 name no checkpoint."""
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, na_filter=False)
    except (OSError, ValueError):
        table = pd.DataFrame()
    return table.reindex(
        columns=["id", *table.columns.difference(["id", "checkpoint"]), "checkpoint"]
    )


def _gather_by_id(
    trained: list[TrainedModel], config: Config, prepared: Prepared
) -> list[patches.Patch]:
    """Gathers the patches of `config.explain.ids`; those of a fold by the run that scores it."""
    found = []
    for split, rows in _find(prepared, _ids(config.explain.ids)).items():
        is_scored = np.zeros(len(rows), bool)
        if split == "train" and ensemble.are_folds(trained, config):
            folds = ensemble.fold_subsets(trained, config, prepared)
            is_scored = np.isin(rows, np.concatenate([fold.validation.rows for fold in folds]))
        if is_scored.any():
            scored = rows[is_scored]
            owners = patches.owners(trained, config, prepared, {"out_of_fold": True}, scored)
            found += patches.gather(prepared, split, scored, trained, owners=owners)
        if not is_scored.all():
            found += patches.gather(prepared, split, rows[~is_scored], trained)
    return found


def _ids(text: str) -> list[str]:
    """Returns the ids as the records hold them; file names of Kaggle's patches serve, too."""
    return [name.lower().removesuffix(".tif") for name in names(text)]


def _find(prepared: Prepared, wanted: list[str]) -> dict[str, np.ndarray]:
    """Returns the rows of these ids, by split; of several patches of the same pixels the first."""
    rows: dict[str, np.ndarray] = {}
    known: set[str] = set()
    for split, table in prepared.tables.items():
        is_new = table["id"].isin(wanted) & ~table["id"].isin(known) & ~table["id"].duplicated()
        rows[split] = np.flatnonzero(is_new)
        known |= set(table["id"].iloc[rows[split]])
    for name in wanted:
        if name not in known:
            raise UserError(
                f"config.explain.ids: no patch of {prepared.directory} has the id {name!r}"
            )
    return {split: places for split, places in rows.items() if len(places)}


def _draw(patch: patches.Patch) -> bytes:
    """Returns the patch and what spoke for tumour side by side, as PNG."""
    assert patch.saliency is not None
    size = patch.image.shape[0] * _ENLARGED
    sheet = Image.new("RGB", (2 * size + _ENLARGED, size), "white")
    pen = ImageDraw.Draw(sheet)
    for left, pixels in ((0, patch.image), (size + _ENLARGED, patch.saliency)):
        enlarged = Image.fromarray(pixels).resize((size, size), Image.Resampling.NEAREST)
        sheet.paste(enlarged, (left, 0))
        third = size // 3
        # Black around white, to be seen on glass and on nuclei; to its end the last pixel counts.
        for around, color in ((1, "black"), (0, "white")):
            start, end = third - around, 2 * third - 1 + around
            pen.rectangle((left + start, start, left + end, end), outline=color)
    file = io.BytesIO()
    sheet.save(file, "PNG")
    return file.getvalue()
