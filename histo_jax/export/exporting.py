"""The command `export`: writes `export/`, with the trained network in formats of other programs."""

import csv
import hashlib
import io
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from histo_jax import command, ensemble, exported, provenance
from histo_jax.config import Config
from histo_jax.config_values import names
from histo_jax.data.source_adapter import class_names
from histo_jax.errors import UserError
from histo_jax.export import model_card, onnx, parity, safetensors, stablehlo, torchscript
from histo_jax.exported import Exported, Network
from histo_jax.predictor import Predictor
from histo_jax.run import files, folders
from histo_jax.run.saved_config import is_identity
from histo_jax.run.workdir import Workdir
from histo_jax.version import VERSION

log = logging.getLogger("histo_jax")

FOLDER = "export"
# Patches on which the files are compared with the predictor.
_COMPARED = 256
_ONNX, _STABLEHLO, _WSINFER, _CARD = "model.onnx", "model.stablehlo", "wsinfer", "README.md"
# What the folder may contain: Python writes the last one where `model.py` is imported.
_WRITTEN = (
    _ONNX, _STABLEHLO, _WSINFER, _CARD, exported.CONFIG_NAME, exported.WEIGHTS_NAME,
    safetensors.MODEL_NAME, parity.PARITY_NAME, "__pycache__",
)  # fmt: skip


def export(config: Config, workdir: str | os.PathLike[str]) -> Path:
    """Writes the best checkpoint of `workdir` into `export/`, in `config.export.formats`.

    Each file computes what the predictor does, with normalisation, calibration, `predict.tta` and
    `predict.prior` inside, and for `predict.checkpoints` the mean of an ensemble. Each is loaded in
    a process of its own and compared; the folder appears when all agree. It may be copied anywhere.

    Args:
        config: settings of the run; what is predicted and exported may differ.
        workdir: folder of a trained run; any folder with `predict.checkpoints`.

    Returns:
        The path of the folder.

    Raises:
        UserError: there is no checkpoint, a format cannot hold the network or its package is not
            installed, or `export/` is that of another run.
        ParityError: a file computes something else.
        OSError: a file cannot be written.
    """

    def check(_: Workdir) -> None:
        if "torchscript" in names(config.export.formats):
            torchscript.check_installed()

    with command.start(config, workdir, "export", check) as run:
        return export_in(run, config)


def export_in(run: Workdir, config: Config) -> Path:
    """Does the work of `export` in an open folder."""
    predictor = ensemble.load_predictor(config, run.path, config.predict.prior)
    network = type(predictor.trained[0].model)
    provenance.warn_of_changed_network(run, network, config.config_file)
    contents, folder = _describe(predictor, config), run.path / FOLDER
    _check_replaceable(folder, contents)
    if config.predict.checkpoints:
        run.acquire(config)
        run.save_config(config)
    if not run.is_primary:
        return folder
    formats, data = names(config.export.formats), _read_training_data(predictor)
    patches = _patches(data, contents.patch.size, config.seed)
    with files.naming(folder), folders.replacing(folder) as new:
        paths, weights = _write(new, predictor, contents, formats)
        compared = parity.measure(predictor, patches, paths)
        parity.check(compared)
        files.write_json(new / parity.PARITY_NAME, compared)
        card = model_card.render(run.path, config, predictor, contents, data, compared, weights)
        files.write_text(new / _CARD, card)
    for name, values in compared["formats"].items():
        log.info("%s: logits differ by %.1e", name, values["largest_difference_in_logit"])
    log.info("export in %s", folder)
    return folder


def _describe(predictor: Predictor, config: Config) -> Exported:
    networks = [
        Network(each.config, each.weights, each.calibration, each.step, each.fingerprint)
        for each in predictor.trained
    ]
    classes = [class_names(each.config.data) for each in predictor.trained]
    if len(set(classes)) > 1:
        log.warning(
            "the runs name their classes differently (%s): the files name those of the first",
            "; ".join(", ".join(names) for names in dict.fromkeys(classes)),
        )
    return Exported(networks, predictor.tta, predictor.prior, predictor.patch, classes[0])


def _check_replaceable(folder: Path, new: Exported) -> None:
    """Refuses to replace what is not an export of the same runs, or has files of the user.

    Raises:
        UserError: names the folder, and the file or setting that differs.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not folder.is_dir() or not exported.is_exported(folder):
        raise UserError(f"{folder} is not an export, and would be replaced: move it away")
    others = sorted(path.name for path in folder.iterdir() if path.name not in _WRITTEN)
    if others:
        raise UserError(
            f"{folder} also contains {others[0]}, which is not from an export and would be lost: "
            "move it away"
        )
    if difference := _difference(exported.read_config(folder), new):
        raise UserError(
            f"{folder} is an export of {difference}; move it away, or choose another --workdir"
        )


def _difference(old: Mapping[str, Any], new: Exported) -> str | None:
    """Returns what an export was made of, in words, if not of the same runs."""
    try:
        before = [(each["settings"].items(), each["fingerprint"]) for each in old["networks"]]
    except (KeyError, TypeError, AttributeError):
        return f"an unknown run ({exported.CONFIG_NAME} is corrupt)"
    own = new.to_json()["networks"]
    if len(before) != len(own):
        return f"{len(before)} networks, not {len(own)}"
    for (settings, fingerprint), network, now in zip(before, new.networks, own, strict=True):
        for name, was in settings:
            value = now["settings"].get(name, was)
            if is_identity(name, network.config) and was != value:
                return f"another run: {name} was {was!r} there and is {value!r} here"
        if fingerprint != now["fingerprint"]:
            return "a run with other patches"
    return None


def _write(
    folder: Path, predictor: Predictor, contents: Exported, formats: list[str]
) -> tuple[dict[str, Path], bytes]:
    """Writes all formats; returns what is to be compared, by its name, and the weights."""
    weights, size, paths = contents.pack(), contents.patch.size, {}
    if "torchscript" in formats:
        torchscript.check(contents)
    safetensors.write_config(folder, contents, weights)
    if "onnx" in formats:
        paths["onnx"] = folder / _ONNX
        onnx.write(paths["onnx"], predictor, size, _metadata(contents, weights))
    if "stablehlo" in formats:
        paths["stablehlo"] = folder / _STABLEHLO
        stablehlo.write(paths["stablehlo"], predictor, size)
    if "safetensors" in formats:
        paths["safetensors"] = folder
        safetensors.write(folder, contents, weights)
        if safetensors.has_pytorch(contents) and parity.has_pytorch():
            paths["pytorch"] = folder / safetensors.MODEL_NAME
    if "torchscript" in formats:
        torchscript.write(folder / _WSINFER, contents, weights)
        paths["torchscript"] = folder / _WSINFER / torchscript.MODEL_NAME
    return paths, weights


def _metadata(contents: Exported, weights: bytes) -> dict[str, str]:
    """Returns what an ONNX file says about itself."""
    patch, line = contents.patch, io.StringIO()
    csv.writer(line, lineterminator="").writerow(contents.class_names)  # quoted where necessary
    return {
        "class_names": line.getvalue(),
        "patch_size_pixels": str(patch.size),
        "micrometres_per_pixel": "unknown" if patch.mpp is None else str(patch.mpp),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "histo_jax_version": VERSION,
    }


def _read_training_data(predictor: Predictor) -> ensemble.TrainingData | None:
    """Returns the data of the (first) network, None without its records."""
    try:
        return ensemble.read_training_data(predictor.trained[0])
    except (UserError, OSError) as error:
        log.warning("the run's own patches are not compared: %s", error)
        return None


def _patches(data: ensemble.TrainingData | None, size: int, seed: int) -> parity.Patches:
    """Returns validation patches from all parts of the split, or random ones without records."""
    if data is None:
        rng = np.random.default_rng(seed)
        images = rng.integers(0, 256, (_COMPARED, size, size, 3), np.uint8)
        reason = "the run's records are missing or changed"
        return parity.Patches(images, f"random pixels, because {reason}")
    rows = data.subsets.validation.rows
    chosen = rows[np.linspace(0, len(rows) - 1, min(len(rows), _COMPARED)).astype(int)]
    source = data.prepared.source(data.subsets.validation.records)
    records = source.__getitems__(chosen.tolist())
    images = np.stack([record["image"] for record in records])
    return parity.Patches(images, "validation patches of the run")
