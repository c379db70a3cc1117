"""Pictures of where the network looked, for chosen patches."""

import io
import logging
import os

import jax
import numpy as np
import pandas as pd
from jax.sharding import SingleDeviceSharding
from PIL import Image, ImageDraw

from histo_jax import files, members, predictions
from histo_jax import workdir as workdirs
from histo_jax.config import Config, names, validate
from histo_jax.data import splits
from histo_jax.data.builder import Prepared, prepare
from histo_jax.errors import ExpectedError
from histo_jax.report import patches
from histo_jax.training import runtime

log = logging.getLogger("histo_jax")

_ENLARGED = 4


@runtime.session
def explain(config: Config, workdir: str | os.PathLike[str]) -> pd.DataFrame:
    """Writes `explain/<id>.png` for the patches of `config.explain.ids`.

    Each shows the patch beside itself in grey, with what speaks for tumour in orange and what
    against it in blue (integrated gradients), the centre framed. Without ids the patches are those
    of the report's galleries. With `config.predict.checkpoints` the mean of these runs is shown.

    Args:
        config: that of the run; folders may differ.
        workdir: folder of a run that `fit` has trained; with `predict.checkpoints` any.

    Returns:
        `id`, `slide`, `label` (-1: not known) and calibrated `probability` of each, as evaluated,
        or for given ids of one pass, without `predict.tta`; also written to `explain/patches.csv`.

    Raises:
        ExpectedError: an id is in no split, or there is no checkpoint; without ids, nothing was
            evaluated, or another checkpoint.
        OSError: a file cannot be written.
    """
    validate(config)
    runtime.set_up()
    folder = files.expand(workdir, "--workdir")
    workdirs.check(folder, config)
    with workdirs.tracked(folder, "explain"):
        trained = members.restore(config, folder, SingleDeviceSharding(jax.local_devices()[0]))
        prepared = prepare(config)
        if config.explain.ids:
            found = [
                patch
                for split, rows in _find(prepared, names(config.explain.ids)).items()
                for patch in patches.gather(prepared, split, rows, trained)
            ]
        else:
            split = config.evaluate.split
            table = predictions.read(folder, split)
            members.check_evaluated(trained, predictions.read_scores(folder, split), split)
            sides = splits.make_sides(prepared.tables, config)
            side = predictions.side(prepared, sides, split, table)
            chosen = pd.unique(np.concatenate(list(patches.galleries(table, config.seed).values())))
            logits = table["logit"].to_numpy()[chosen]
            found = patches.gather(prepared, side.records, side.rows[chosen], trained, logits)
        table = pd.DataFrame([patch[:4] for patch in found], columns=patches.Patch._fields[:4])
        if workdirs.is_writer():
            (folder / "explain").mkdir(parents=True, exist_ok=True)
            for patch in found:
                files.write_bytes(folder / "explain" / f"{patch.id}.png", _draw(patch))
        workdirs.write_text(folder / "explain" / "patches.csv", table.to_csv(index=False))
    log.info("%d patches in %s", len(table), folder / "explain")
    return table


def _find(prepared: Prepared, wanted: list[str]) -> dict[str, np.ndarray]:
    """Returns the rows of these ids, by split."""
    rows = {
        split: np.flatnonzero(table["id"].isin(wanted)) for split, table in prepared.tables.items()
    }
    known = {
        name for split, places in rows.items() for name in prepared.tables[split]["id"].iloc[places]
    }
    for name in wanted:
        if name not in known:
            raise ExpectedError(
                f"config.explain.ids: no patch of {prepared.directory} has the id {name!r}"
            )
    return {split: places for split, places in rows.items() if len(places)}


def _draw(patch: patches.Patch) -> bytes:
    """Returns the patch and what spoke for tumour side by side, as PNG."""
    assert patch.saliency is not None
    side = patch.image.shape[0] * _ENLARGED
    sheet = Image.new("RGB", (2 * side + _ENLARGED, side), "white")
    pen = ImageDraw.Draw(sheet)
    for left, pixels in ((0, patch.image), (side + _ENLARGED, patch.saliency)):
        enlarged = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
        sheet.paste(enlarged, (left, 0))
        third = side // 3
        # Black around white, to be seen on glass and on nuclei; to its end the last pixel counts.
        for around, color in ((1, "black"), (0, "white")):
            start, end = third - around, 2 * third - 1 + around
            pen.rectangle((left + start, start, left + end, end), outline=color)
    file = io.BytesIO()
    sheet.save(file, "PNG")
    return file.getvalue()
