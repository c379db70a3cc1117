"""Pictures of the attribution of chosen patches."""

import io
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw

from histo_jax import command, ensemble, evaluation_files
from histo_jax.config import Config
from histo_jax.config_values import names
from histo_jax.data.records import Prepared, prepare
from histo_jax.data.source_adapter import patch_spec
from histo_jax.errors import UserError
from histo_jax.predictor import Predictor, TrainedModel
from histo_jax.report import patches
from histo_jax.run import folders
from histo_jax.run.workdir import Workdir

log = logging.getLogger("histo_jax")

# Screen pixels of a patch, about: 4 for each of 96.
_EDGE = 384


def explain(config: Config, workdir: str | os.PathLike[str]) -> pd.DataFrame:
    """Writes `explain/<id>.png` for the patches of `config.explain.ids`.

    Each picture shows the patch, and beside it the same patch in grey with its attribution
    (integrated gradients): orange where pixels raise the predicted probability of label 1, blue
    where they lower it. The region that the label describes is framed. Without ids the patches are
    those of the report's galleries. With `config.predict.checkpoints` the mean of these runs is
    shown.

    `explain/patches.csv` has one row per picture. Pictures of the same checkpoint accumulate; those
    of other checkpoints are removed.

    Args:
        config: settings of the run; folders may differ.
        workdir: folder of a trained run; any folder with `predict.checkpoints`.

    Returns:
        The rows added to `explain/patches.csv`: `id`; `slide`; `label`, -1 = not known; calibrated
        `probability`, as evaluated, or computed for the given ids; `tta`, whether test-time
        augmentation was used for it; `checkpoint`, the step and a digest of the weights, of each
        run of an ensemble.

    Raises:
        UserError: an id is in no split, or there is no checkpoint; without ids, nothing was
            evaluated, or another checkpoint was.
        OSError: a file cannot be written.
    """
    with command.start(config, workdir, "explain") as run:
        return explain_in(run, config)


def explain_in(run: Workdir, config: Config) -> pd.DataFrame:
    """Does the work of `explain` in an open folder."""
    folder = run.path
    predictor = ensemble.load_predictor(config, folder)
    prepared = prepare(config.data, config.data_seed, folder, raw_may_be_gone=True)
    ensemble.check_size(predictor, config, prepared)
    if config.explain.ids:
        chosen, tta = _gather_by_id(predictor, config, prepared), config.predict.tta
    else:
        chosen, tta = _gather_galleries(predictor, config, prepared, folder)
    table = pd.DataFrame([patch[:4] for patch in chosen], columns=patches.Patch._fields[:4])
    table = table.assign(tta=tta, checkpoint=_identify(predictor.trained, folder))
    if run.is_primary:
        region = patch_spec(config.data, prepared.image_size).label_region
        pictures = {f"{patch.id}.png": _draw(patch, region) for patch in chosen}
        ids = {name for rows in prepared.tables.values() for name in rows["id"]}
        _add(folder / "explain", table, pictures, ids)
    log.info("%d patches in %s", len(table), folder / "explain")
    return table


def _gather_galleries(
    predictor: Predictor, config: Config, prepared: Prepared, folder: Path
) -> tuple[list[patches.Patch], bool]:
    """Gathers the patches of the report's galleries.

    Returns:
        The patches, and whether they were evaluated with test-time augmentation.
    """
    split = config.evaluate.split
    table = evaluation_files.read(folder, split)
    scores = evaluation_files.read_scores(folder, split)
    ensemble.check_evaluated(predictor.trained, scores, split)
    subsets = evaluation_files.make_subsets(prepared, config, scores)
    subset = evaluation_files.subset(prepared, subsets, split, table)
    evaluation_files.check_scores(folder, split, table, scores)
    galleries = patches.galleries(table, config.seed)
    chosen = pd.unique(np.concatenate(list(galleries.values())))
    rows, logits = subset.rows[chosen], table["logit"].to_numpy()[chosen]
    networks = patches.scoring_networks(predictor, config, prepared, scores, rows)
    gathered = patches.gather(prepared, subset.records, rows, predictor, logits, networks)
    return gathered, scores.get("tta", False)


def _gather_by_id(predictor: Predictor, config: Config, prepared: Prepared) -> list[patches.Patch]:
    """Gathers the patches of `config.explain.ids`; those of a fold by the run that scores it."""
    gathered = []
    for split, rows in _find_rows(prepared, _parse_ids(config.explain.ids)).items():
        in_fold = np.zeros(len(rows), bool)
        if split == "train" and ensemble.are_folds(predictor.trained, config):
            folds = ensemble.fold_subsets(predictor.trained, config, prepared)
            in_fold = np.isin(rows, np.concatenate([fold.validation.rows for fold in folds]))
        if in_fold.any():
            networks = patches.scoring_networks(
                predictor, config, prepared, {"out_of_fold": True}, rows[in_fold]
            )
            gathered += patches.gather(prepared, split, rows[in_fold], predictor, networks=networks)
        if not in_fold.all():
            gathered += patches.gather(prepared, split, rows[~in_fold], predictor)
    return gathered


def _parse_ids(text: str) -> list[str]:
    """Returns the ids as the records have them; file names of Kaggle's patches are accepted."""
    return [name.lower().removesuffix(".tif") for name in names(text)]


def _find_rows(prepared: Prepared, ids: list[str]) -> dict[str, np.ndarray]:
    """Returns the rows of these ids, by split; of several patches with one id the first."""
    rows: dict[str, np.ndarray] = {}
    found: set[str] = set()
    for split, table in prepared.tables.items():
        is_new = table["id"].isin(ids) & ~table["id"].isin(found) & ~table["id"].duplicated()
        rows[split] = np.flatnonzero(is_new)
        found |= set(table["id"].iloc[rows[split]])
    for name in ids:
        if name not in found:
            raise UserError(
                f"config.explain.ids: no patch of {prepared.directory} has the id {name!r}"
            )
    return {split: positions for split, positions in rows.items() if len(positions)}


def _identify(trained: Sequence[TrainedModel], folder: Path) -> str:
    """Returns the steps of the checkpoints, each with a digest of calibration and weights."""
    checkpoints = []
    for model in trained:
        run = "" if Path(model.run) == folder else f"{model.run} "
        checkpoints.append(f"{run}step {model.step} weights {model.digest()[:8]}")
    return " + ".join(checkpoints)


def _add(folder: Path, table: pd.DataFrame, pictures: dict[str, bytes], ids: set[str]) -> None:
    """Adds rows and pictures, and removes those of other checkpoints.

    Args:
        folder: of the pictures.
        table: the new rows of `patches.csv`.
        pictures: the new pictures, by file name.
        ids: of all patches; a picture of any other name is the user's own.
    """
    folders.recover(folder)
    old_rows = _read_rows(folder / "patches.csv")
    old_pictures = {path.stem for path in folder.glob("*.png")}
    kept = old_rows[
        (old_rows["checkpoint"] == table["checkpoint"].iloc[0])
        & ~old_rows["id"].isin(table["id"])
        & old_rows["id"].isin(old_pictures)
    ]
    rows = pd.concat([kept, table]) if len(kept) else table
    csv = rows.to_csv(index=False, columns=list(table.columns)).encode()
    obsolete = old_pictures & (ids | set(old_rows["id"])) - set(kept["id"])
    folders.update(folder, {**pictures, "patches.csv": csv}, {f"{name}.png" for name in obsolete})


def _read_rows(path: Path) -> pd.DataFrame:
    """Returns the rows of `patches.csv` as text; none if it is missing or corrupt."""
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, na_filter=False)
    except (OSError, ValueError):
        table = pd.DataFrame()
    return table.reindex(
        columns=["id", *table.columns.difference(["id", "checkpoint"]), "checkpoint"]
    )


def _draw(patch: patches.Patch, label_region: int | None) -> bytes:
    """Returns the patch and its attribution side by side, as PNG.

    Args:
        patch: with its attribution.
        label_region: width in pixels of the square in the centre to be framed; None = no frame.
    """
    assert patch.attribution is not None
    edge = len(patch.image)
    scale = max(1, round(_EDGE / edge))
    size, gap = edge * scale, 4
    sheet = Image.new("RGB", (2 * size + gap, size), "white")
    pen = ImageDraw.Draw(sheet)
    for left, pixels in ((0, patch.image), (size + gap, patch.attribution)):
        enlarged = Image.fromarray(pixels).resize((size, size), Image.Resampling.NEAREST)
        sheet.paste(enlarged, (left, 0))
        if label_region in (None, edge):
            continue
        first = (edge - label_region) * scale // 2
        # White inside black is visible on glass and on nuclei. Pillow's end is inclusive.
        for margin, color in ((1, "black"), (0, "white")):
            start, end = first - margin, first + label_region * scale - 1 + margin
            pen.rectangle((left + start, start, left + end, end), outline=color)
    file = io.BytesIO()
    sheet.save(file, "PNG")
    return file.getvalue()
