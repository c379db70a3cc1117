"""The command: a folder that proves itself, appears whole or not at all, and goes anywhere."""

import csv
import dataclasses
import hashlib
import importlib.util
import io
import json
import shutil

import flax.linen as nn
import huggingface_hub
import jax.numpy as jnp
import numpy as np
import onnx
import pytest

import histo_jax
from histo_jax.errors import ParityError, UserError
from histo_jax.export import exporting, function, parity, processes
from histo_jax.metrics import Calibration
from histo_jax.serve import model_info

DEFAULT = {
    "README.md", "config.json", "model.onnx", "model.py", "model.safetensors", "model.stablehlo",
    "parity.json",
}  # fmt: skip


def read(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def config(make_tiny_config):
    return make_tiny_config()


@pytest.fixture(scope="module")
def run(config, save_run, run_command, tmp_path_factory):
    """An evaluated and exported run."""
    folder = save_run(
        config, tmp_path_factory.mktemp("exported") / "run", Calibration(1.5, 0.2, 0.4)
    )
    assert run_command("--workdir", folder, "--mode=evaluate").status == 0
    done = run_command("--workdir", folder, "--mode=export")
    assert done.status == 0, done.stderr
    return folder


@pytest.fixture
def copied(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")


def test_the_default_formats_agree_with_the_predictor_in_clean_processes(run):
    assert {path.name for path in (run / "export").iterdir()} >= DEFAULT
    measured = json.loads((run / "export" / "parity.json").read_text())
    assert measured["patches"] == {"source": "validation patches of the run", "count": 10}
    formats = measured["formats"]
    assert {"onnx", "stablehlo", "safetensors"} <= formats.keys()
    assert ("pytorch" in formats) == parity.has_pytorch()
    assert formats["onnx"]["versions"].keys() == {"onnxruntime", "numpy"}
    assert formats["stablehlo"]["versions"].keys() == {"jax", "numpy"}
    for values in formats.values():
        assert 0 <= values["largest_relative_difference"] <= values["tolerance"]
        assert values["largest_difference_in_probability"] < 1e-5
    assert [f["tolerance"] for f in formats.values()][:3] == [1e-4, 1e-5, 1e-5]


def test_a_file_cannot_use_what_its_users_do_not_have(run, tmp_path):
    np.save(tmp_path / "images.npy", np.zeros((1, 96, 96, 3), np.uint8))
    model = tmp_path / "model.py"
    model.write_text("import histo_jax")
    with pytest.raises(processes.ProcessError, match=r"histo_jax|torch"):
        processes.run("parity_script.py", "pytorch", model, tmp_path / "images.npy", tmp_path / "o")


def test_an_interrupt_reaches_the_command_and_not_the_clean_process(tmp_path, monkeypatch):
    script = tmp_path / "script.py"
    script.write_text("import os, sys; sys.exit(os.getsid(0) != os.getpid())")
    processes.run(str(script))
    script.write_text("import time; time.sleep(60)")
    monkeypatch.setattr(processes.signals, "requested", lambda: True)
    with pytest.raises(processes.signals.Preempted, match="before the export was complete"):
        processes.run(str(script))


def test_the_folder_works_anywhere_without_the_run(run, tmp_path):
    moved = shutil.copytree(run / "export", tmp_path / "elsewhere")
    images = np.random.default_rng(0).integers(0, 256, (5, 96, 96, 3), np.uint8)
    predictor = histo_jax.load(moved, batch_size=8)
    np.testing.assert_allclose(predictor(images), histo_jax.load(run)(images), rtol=1e-6)
    text = "".join((moved / name).read_text() for name in ("README.md", "config.json"))
    assert str(run.parent) not in text
    # It may be part of an ensemble.
    both = histo_jax.load(moved, run, batch_size=8)
    np.testing.assert_allclose(both(images), predictor(images), rtol=1e-6)


def test_onnx_says_what_it_is(run, config):
    model = onnx.load(run / "export" / "model.onnx")
    weights = (run / "export" / "model.safetensors").read_bytes()
    assert {entry.key: entry.value for entry in model.metadata_props} == {
        "class_names": "no tumour,tumour",
        "patch_size_pixels": "96",
        "micrometres_per_pixel": "0.972",
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "histo_jax_version": histo_jax.__version__,
    }


def test_the_model_card_has_the_scores_of_the_evaluation(run):
    card = huggingface_hub.ModelCard.load(run / "export" / "README.md")
    data, scores = card.data, json.loads((run / "evaluation.json").read_text())
    assert (data.library_name, data.pipeline_tag) == ("histo_jax", "image-classification")
    assert data.license == "unknown"
    results = {result.metric_type: result for result in data.eval_results}
    assert len(results) == 8
    for name, result in results.items():
        assert result.metric_value == scores[name]
        assert result.dataset_split == "validation"
        interval = [scores[f"{name}_low"], scores[f"{name}_high"]]
        if None not in interval:
            assert result.metric_args["interval_95"] == interval
    for text in ("not a medical device", "0.972 micrometres", "Operating points", "audited"):
        assert text in card.text
    assert f"| AUC | {scores['auc']:.4f} |" in card.text
    # The server's page reads them from the card.
    (shown,) = model_info.describe(histo_jax.load(run / "export"), [run / "export"]).scores
    assert shown == {"name": "export", **{key: scores[key] for key in shown.keys() - {"name"}}}
    assert shown["slide_disjoint"] is not None


def test_options_and_an_ensemble_are_inside_all_files(
    run, save_run, run_command, tmp_path, make_tiny_config, monkeypatch
):
    monkeypatch.setattr(exporting, "class_names", lambda data: ("no", f"class {data.split_seed}"))
    other = make_tiny_config()
    other.seed, other.data.split_seed = 1, 0
    second = save_run(other, tmp_path / "second", Calibration(0.7, -0.1, 0.6))
    done = run_command(
        "--config", run / "config.json", "--workdir", tmp_path / "both", "--mode=export",
        f"--config.predict.checkpoints={run},{second}", "--config.predict.prior=0.1",
        "--config.export.formats=safetensors", "--config.export.license=cc-by-4.0",
    )  # fmt: skip
    assert done.status == 0, done.stderr
    assert "the runs name their classes differently (no, class None; no, class 0)" in done.stderr
    folder = tmp_path / "both" / "export"
    images = np.random.default_rng(0).integers(0, 256, (5, 96, 96, 3), np.uint8)
    loaded, expected = histo_jax.load(folder, batch_size=8), histo_jax.load(run, second, prior=0.1)
    assert loaded.prior == 0.1
    np.testing.assert_allclose(loaded(images), expected(images), rtol=1e-6)
    assert not (folder / "model.onnx").exists()
    assert "license: cc-by-4.0" in (folder / "README.md").read_text()
    # The folder of the ensemble stands for it.
    assert json.loads((tmp_path / "both" / "config.json").read_text())["predict.prior"] == 0.1


def test_without_records_random_pixels_are_compared(copied, config, log, monkeypatch):
    names = "a, b", 'c`d\n<e> "f"'
    monkeypatch.setattr(exporting, "class_names", lambda data: names)
    copied = copied.rename(copied.with_name("#1 <b> *run*: [x]"))
    own = dataclasses.replace(config, data=dataclasses.replace(config.data))
    own.data.tfds_dir, own.data.raw_dir = str(copied / "none"), None
    own.export.formats = "onnx"
    histo_jax.export(own, copied)
    measured = json.loads((copied / "export" / "parity.json").read_text())
    assert measured["patches"]["count"] == 256
    assert "random" in measured["patches"]["source"]
    assert "the run's own patches are not compared" in log.text
    # Names may contain what the formats use themselves.
    (classes,) = (
        entry.value
        for entry in onnx.load(copied / "export" / "model.onnx").metadata_props
        if entry.key == "class_names"
    )
    assert tuple(next(csv.reader(io.StringIO(classes, newline="")))) == names
    card = huggingface_hub.ModelCard.load(copied / "export" / "README.md")
    assert r"# \#1 \<b\> \*run\*: \[x\]" in card.text.splitlines()
    assert 'class `` c`d <e> "f" ``' in card.text


def test_another_file_than_the_predictor_fails_and_changes_nothing(
    copied, run_command, monkeypatch
):
    old, affine = read(copied / "export"), function.affine

    def wrong(trained, prior):
        scale, bias = affine(trained, prior)
        return scale, bias + np.float32(1e-3)

    monkeypatch.setattr(function, "affine", wrong)
    done = run_command("--workdir", copied, "--mode=export", "--config.export.formats=onnx")
    assert done.status == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "histo_jax: the export differs from the predictor in a logit: onnx by 1.0e-03"
    )
    assert "Traceback" not in done.stderr
    assert read(copied / "export") == old
    assert not [path for path in copied.iterdir() if path.name.endswith(".part")]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "formats=onnx,tflite",
            "config.export.formats = onnx,tflite must be one or more of onnx, stablehlo,",
        ),
        ("formats=,", "config.export.formats = , must be one or more of"),
        ("license=My Own", "config.export.license = My Own must be a name that Hugging Face knows"),
    ],
)
def test_an_unknown_format_or_license_is_refused(run, run_command, option, message):
    done = run_command("--workdir", run, "--mode=export", f"--config.export.{option}")
    assert done.status == 2
    assert message in done.stderr


def test_a_missing_extra_is_named_before_anything_is_done(copied, run_command, monkeypatch):
    old, find = read(copied / "export"), importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "torch" else find(n, *a)
    )
    done = run_command("--workdir", copied, "--mode=export", "--config.export.formats=torchscript")
    assert done.status == 2
    assert "pip install 'histo_jax[torch]'" in done.stderr.strip().splitlines()[-1]
    assert read(copied / "export") == old


def test_a_run_without_a_checkpoint_is_refused(copied, run_command):
    shutil.rmtree(copied / "checkpoints")
    done = run_command("--workdir", copied, "--mode=export")
    assert (done.status, len(done.stderr.strip().splitlines())) == (2, 1)
    assert "checkpoint" in done.stderr


def test_an_export_of_another_run_is_not_replaced(copied, run_command):
    path = copied / "export" / "config.json"
    content = json.loads(path.read_text())
    content["networks"][0]["settings"]["seed"] = 5
    path.write_text(json.dumps(content))
    old = read(copied / "export")
    done = run_command("--workdir", copied, "--mode=export", "--config.export.formats=onnx")
    assert done.status == 2
    assert "is an export of another run: seed was 5 there and is 0 here" in done.stderr
    path.write_text(json.dumps(content | {"networks": [None]}))
    done = run_command("--workdir", copied, "--mode=export", "--config.export.formats=onnx")
    assert done.status == 2
    assert "is an export of an unknown run (config.json is corrupt)" in done.stderr
    (copied / "export" / ".git").mkdir()
    done = run_command("--workdir", copied, "--mode=export", "--config.export.formats=onnx")
    assert done.status == 2
    assert "also contains .git, which is not from an export and would be lost" in done.stderr
    path.unlink()
    done = run_command("--workdir", copied, "--mode=export", "--config.export.formats=onnx")
    assert done.status == 2
    assert "is not an export, and would be replaced: move it away" in done.stderr
    assert read(copied / "export").items() <= old.items()


def test_a_full_disk_leaves_the_old_folder(copied, run_command, monkeypatch):
    old = read(copied / "export")

    def full(path, content):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(exporting.safetensors.files, "write_bytes", full)
    done = run_command("--workdir", copied, "--mode=export", "--config.export.formats=safetensors")
    assert done.status == 2
    assert "No space left on device" in done.stderr.strip().splitlines()[-1]
    assert read(copied / "export") == old


class Sorting(nn.Module):
    """A network with a layer that ONNX's converter does not know."""

    @nn.compact
    def __call__(self, images, train):
        x = jnp.sort(images.mean((2, 3)), 1)[:, :4]
        return nn.Dense(1)(x)[:, 0]


def test_a_registered_network_is_refused_where_it_must_be(
    make_tiny_config, save_run, tmp_path, unregister
):
    histo_jax.register_model("sorting")(Sorting)
    config = make_tiny_config()
    config.model = dataclasses.replace(histo_jax.Config().model, name="sorting")
    folder = save_run(config, tmp_path / "run", Calibration())
    with pytest.raises(UserError, match=r"ONNX cannot hold the operation 'sort' of layer Sorting"):
        histo_jax.export(config, folder)
    assert not (folder / "export").exists()
    config.export.formats = "stablehlo,safetensors"
    assert histo_jax.export(config, folder) == folder / "export"
    assert {path.name for path in (folder / "export").iterdir()} == DEFAULT - {
        "model.onnx", "model.py"
    }  # fmt: skip
    images = np.zeros((2, 96, 96, 3), np.uint8)
    np.testing.assert_allclose(
        histo_jax.load(folder / "export", batch_size=8)(images),
        histo_jax.load(folder)(images),
        rtol=1e-6,
    )


def test_parity_measures_probability_and_logit_and_refuses_nan():
    check = parity.check
    good = {"largest_relative_difference": 1e-6, "tolerance": 1e-5}
    check({"formats": {"onnx": good}})
    for value in (1e-3, float("nan")):
        with pytest.raises(ParityError, match="stablehlo by"):
            check({"formats": {"stablehlo": good | {"largest_relative_difference": value}}})
