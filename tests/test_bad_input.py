"""Every expected mistake is one line and status 2; nothing is lost, nothing half-written stays."""

import concurrent.futures
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import histo_jax
from histo_jax import main as cli
from histo_jax.config import Config
from histo_jax.errors import UserError
from histo_jax.metrics import Calibration
from histo_jax.run.workdir import Workdir

ROOT = Path(__file__).resolve().parents[1]
CONFIG = """
from histo_jax.config import Config

def get_config():
    config = Config()
    config.data.source, config.data.validation_fraction = "kaggle", 0.25
    config.data.raw_dir, config.data.tfds_dir = "RAW", "TFDS"
    config.model.features, config.model.dense = (2, 2, 2, 2, 2), 4
    config.fit.batch_size, config.fit.epochs = 4, 1
    return config
"""
PROGRESS = re.compile(
    r"preparing |records: |class [01] has |\d+ training and \d+ validation patches"
    r"|resumed from step "
    r"|.* has changed since it was prepared|the score is optimistic"
)
CSVS = {"train": "train_labels.csv", "test": "sample_submission.csv"}


def draw(count: int) -> dict[str, np.ndarray]:
    images = np.random.default_rng(count).integers(0, 256, (count, 96, 96, 3), np.uint8)
    return {hashlib.sha1(image.tobytes()).hexdigest(): image for image in images}


PATCHES = {"train": draw(12), "test": draw(3)}


class Place:
    """A folder with raw data and a config file, and the name of a folder for a run."""

    def __init__(self, root: Path) -> None:
        self.root, self.raw, self.tfds = root, root / "raw", root / "tfds"
        self.workdir, self.config_file = root / "run", root / "tiny.py"
        for split, patches in PATCHES.items():
            (self.raw / split).mkdir(parents=True, exist_ok=True)
            for name, image in patches.items():
                Image.fromarray(image).save(self.raw / split / f"{name}.tif")
            rows = [f"{name},{index % 2}\n" for index, name in enumerate(patches)]
            (self.raw / CSVS[split]).write_text("".join(["id,label\n", *rows]))
        text = CONFIG.replace("RAW", str(self.raw)).replace("TFDS", str(self.tfds))
        self.config_file.write_text(text)

    def config(self) -> Config:
        names: dict = {}
        exec(self.config_file.read_text(), names)
        return names["get_config"]()

    def begin(self) -> "Place":
        """Puts there what an earlier run would have left."""
        run = Workdir(self.workdir)
        with run.session("fit"):
            run.acquire(self.config())
        (self.workdir / "submission.csv").write_text("id,label\nold,0.5\n")
        (self.workdir / "evaluation.json").write_text('{"auc": 0.5}\n')
        return self

    def prepare(self) -> "Place":
        histo_jax.prepare(self.config())
        return self

    def make_other_model(self) -> list[str]:
        """Edits the run's config so that a config of another model passes for the same run."""
        path = self.workdir / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"model.dense": 8}))
        return self.argv("--config.model.dense=8")

    def argv(self, *more: str) -> list[str]:
        return [f"--config={self.config_file}", f"--workdir={self.workdir}", *more]

    def mode(self, mode: str) -> list[str]:
        """The option of a mode, and what it cannot do without."""
        if mode != "heatmap":
            return [f"--mode={mode}"]
        pytest.importorskip("openslide", reason="the extra slides is not installed")
        slide = next(iter(PATCHES["train"]))
        return [f"--mode={mode}", f"--config.heatmap.slides={self.raw}/train/{slide}.tif"]

    def files(self) -> dict[str, bytes | None]:
        """Everything there, with its bytes; None is a folder."""

        def counts(path: Path) -> bool:
            # TFDS leaves the empty folders above the records behind, and they do no harm.
            above = path.is_relative_to(self.tfds) and path.is_dir() and "1.0.0" not in path.name
            return not (
                above or path.name in ("status.json", "lock") or "__pycache__" in path.parts
            )

        return {
            str(path.relative_to(self.root)): path.read_bytes() if path.is_file() else None
            for path in self.root.rglob("*")
            if counts(path)
        }


def real(argv: list[str]) -> tuple[int, str]:
    """Runs the command in a process of its own; returns its status and its stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "histo_jax.main", *argv],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stderr


@pytest.fixture
def here(run_command) -> Callable[[list[str]], tuple[int, str]]:
    """Runs the command in this process; returns its status and its stderr."""

    def run(argv: list[str]) -> tuple[int, str]:
        ended = run_command(*argv)
        return ended.status, ended.stderr

    return run


def refuses(run: Callable, place: Place, argv: list[str], *words: str) -> None:
    """Asserts status 2, one line with all the words, and that every file is as it was."""
    before = place.files()
    status, stderr = run(argv)
    lines = [line for line in stderr.splitlines() if line and not PROGRESS.match(line)]
    assert (status, len(lines)) == (2, 1), stderr
    assert lines[0].startswith("histo_jax: ")
    assert "Traceback" not in lines[0]
    assert not [word for word in words if word not in lines[0]], lines[0]
    after = place.files()
    assert after == before, sorted(before.keys() ^ after.keys())


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


# --- the command line. Left: what is typed; right: what the one line contains -------------

MISTYPED = """
--config.fit.epoch=3                     | config.fit.epoch --help
--config.nope.x=3                        | config.nope --help
--config.fit=3                           | config.fit --help
--config.seed.x=3                        | config.seed.x --help
--config.model.features[0]=3             | config.model.features[0] --help
--config.fit.epochs=ten                  | config.fit.epochs ten
--config.fit.epochs=3.5                  | config.fit.epochs 3.5
--config.fit.epochs=None                 | config.fit.epochs None whole number
--config.fit.epochs=                     | config.fit.epochs
--config.fit.epochs                      | config.fit.epochs --help
--config.data.source=None                | config.data.source None text
--config.optimizer.learning_rate=x       | config.optimizer.learning_rate x
--config.model.kwargs=3                  | config.model.kwargs=3 JSON object {"width": 32}
--config.model.kwargs={"a":NaN}          | config.model.kwargs = {"a":NaN} finite
--config.augment.extra=blur              | config.augment.extra = 'blur' registered
--config.fit.loss=bce                    | config.fit.loss = 'bce' binary_cross_entropy registered
--config.model.features=a,b              | config.model.features=a,b five whole numbers
--config.model.features=1.5,2,2,2,2      | config.model.features=1.5 five whole numbers
--config.predict.tta=yes                 | config.predict.tta=yes true false
--epochs=3                               | epochs --help
--mode=train                             | --mode=train run prepare fit evaluate predict
fit                                      | 'fit' --help
--workdir=                               | --workdir
"""
MISTYPED_TOO = """
--config.fit.epoch=3                     | did you mean config.fit.epochs?
--noconfig.predict.ta                    | did you mean config.predict.tta?
--noconfig.seed                          | --noconfig.seed true or false
--epochs=3                               | --epochs did you mean --config.fit.epochs?
--work_dir=x                             | --work_dir did you mean --workdir?
--modes=fit                              | --modes did you mean --mode?
--mode=evalute                           | --mode=evalute must be one of did you mean evaluate?
--mode=Fit                               | did you mean fit?
--multihost=slrum                        | --multihost=slrum did you mean slurm?
--process_count=two                      | --process_count=two must be a whole number
--config.data.placement=devcie           | 'devcie' must be one of did you mean device?
--config.fit.epochs=1e400                | --config.fit.epochs=1e400 must be a whole number
--config.fit.epochs=nan                  | --config.fit.epochs=nan must be a whole number
--config.fit.epochs=-1e0                 | config.fit.epochs = -1e0 must be at least 1
--config.optimizer.learning_rate=0,1     | learning_rate=0,1 must be a number
--config.optimizer.learning_rate=0       | learning_rate = 0 must be above 0
--config.data.validation_fraction=0      | fraction = 0 must be above 0 and below 1
--config.model.features=8,8              | config.model.features = 8,8 must be five whole numbers
--config.data.raw_dir=                   | config.data.raw_dir = '' must be a folder
--config.data.tfds_dir=$PLACE/records    | $PLACE/records was not expanded by the shell
predict                                  | 'predict' did you mean --mode=predict?
--workdir=$PLACE/run                     | --workdir=$PLACE/run was not expanded by the shell
--workdir='run'                          | --workdir='run' is in quotes
--workdir=~no-such-user/run              | no-such-user/run such home folder
--workdir --mode=fit                     | --workdir has no value before --mode=fit
--config --workdir=run                   | --config has no value
--flagfile=/no/such                      | --flagfile: No such file /no/such
--flagfile=FOLDER                        | --flagfile: Is a directory
--flagfile=FOLDER/train/ID.tif           | --flagfile is not a text
"""
OUT_OF_RANGE = """seed=-1 data.source=pictures data.samples_per_class=0 data.validation_fraction=1
data.split_by=hospital data.split_seed=-1 data.fold=6/5 data.fold=1/1 data.fold=half
data.placement=gpu data.synthetic_slides=1 model.name=resnet
model.features=8,8 model.dense=0 model.dropout=1 optimizer.learning_rate=nan fit.batch_size=0
fit.epochs=0 fit.steps_per_epoch=0 augment.shift=5 augment.stain=1
augment.brightness=-1 augment.mixup=-1 optimizer.schedule=step optimizer.warmup=1
optimizer.name=sgd fit.crop_epochs=-1 fit.crop_size=48
optimizer.weight_decay=-1 optimizer.ema_decay=1 predict.prior=1 compare.runs=one
early_stopping.patience=0 early_stopping.min_delta=-1 evaluate.split=train predict.batch_size=0"""
LEFT_OUT = """
                                         | --config --help
--workdir=RUN                            | --config missing
--config.seed=1 --workdir=RUN            | --config missing
--config=tiny.py                         | --workdir missing
--config=/no/such.py --workdir=RUN       | /no/such.py configs/quickstart.py
--config /no/such.py --workdir=RUN       | /no/such.py configs/quickstart.py
--config= --workdir=RUN                  | --config=: configs/quickstart.py
--config.seed=1 --config=tiny.py         | --workdir missing
"""


def table(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in row.split("|")] for row in text.strip("\n").splitlines()]


@pytest.mark.parametrize(("typed", "words"), table(MISTYPED))
def test_mistyped(place: Place, here, typed: str, words: str) -> None:
    refuses(here, place.begin(), place.argv("--mode=evaluate", typed), *words.split())


@pytest.mark.parametrize(("typed", "words"), table(MISTYPED_TOO))
def test_mistyped_in_words(place: Place, here, typed: str, words: str, monkeypatch) -> None:
    monkeypatch.setenv("PLACE", str(place.root))
    typed = typed.replace("FOLDER", str(place.raw)).replace("ID", ID)
    refuses(here, place, place.argv(*typed.split()), *words.split())


@pytest.mark.parametrize("setting", OUT_OF_RANGE.split())
def test_out_of_range(place: Place, here, setting: str) -> None:
    field, _, value = setting.partition("=")
    argv = place.begin().argv(f"--config.{setting}")
    refuses(here, place, argv, f"config.{field} = ", value.split(",")[0], " must be ")


@pytest.mark.parametrize(("typed", "words"), table(LEFT_OUT))
def test_left_out(place: Place, here, typed: str, words: str) -> None:
    typed = typed.replace("RUN", str(place.workdir)).replace("tiny.py", str(place.config_file))
    refuses(here, place, typed.split(), *words.split())


CONFIG_FILES = {
    "syntax-error": ("def get_config(:\n", "tiny.py", "SyntaxError"),
    "no-text": ("\0\1\2", "tiny.py", "null bytes"),
    "value-error": ("def get_config():\n  raise ValueError('too\\nbig')", "tiny.py", "too big"),
    "key-error": ("def get_config(): return {}['NO_SUCH']", "tiny.py", "KeyError", "NO_SUCH"),
    "os-error": ("def get_config(): open('/no/such')", "tiny.py", "/no/such"),
    "no-get-config": ("x = 1", "tiny.py", "get_config"),
    "dict": ("def get_config(): return {'seed': 1}", "tiny.py", "dict", "histo_jax.Config"),
    "nothing": ("def get_config(): pass", "tiny.py", "None", "histo_jax.Config"),
    "missing-import": ("import no_such_module", "tiny.py", "no_such_module"),
    "unknown-field": (CONFIG.replace("fit.epochs", "fit.epoch"), "config.fit.epoch"),
    "wrong-type": (CONFIG.replace("4, 1\n", "4, '1'\n"), "config.fit.epochs", "'1' ", "whole"),
}


@pytest.mark.parametrize("override", [[], ["--config.seed=1"]], ids=["plain", "override"])
@pytest.mark.parametrize("name", CONFIG_FILES)
def test_broken_config_file(place: Place, here, name: str, override: list[str]) -> None:
    text, *words = CONFIG_FILES[name]
    place.config_file.write_text(text)
    refuses(here, place, place.argv("--mode=predict", *override), *words)


def test_help_is_no_mistake(here) -> None:
    assert here(["--help"]) == (0, "")


def test_without_options_one_line_says_what_to_try(here) -> None:
    status, stderr = here([])
    assert status == 2
    assert stderr.count("\n") == 1
    assert "--config=configs/quickstart.py --workdir=" in stderr


def test_ctrl_c_while_a_config_file_is_read_is_one_line(place: Place, here) -> None:
    place.config_file.write_text("raise KeyboardInterrupt")
    assert here(place.argv()) == (130, "histo_jax: interrupted while the config file was read\n")


# --- the workdir ------------------------------------------------------------------------------

IDENTITY = """seed=1 data.source='synthetic' data.samples_per_class=5 data.validation_fraction=0.5
data.split_by='image' data.split_seed=5 data.fold='1/2' data.synthetic_slides=3
model.features=[2,2,2,2,4] model.dense=8
model.dropout=0.1 optimizer.learning_rate=0.5 fit.batch_size=8 fit.steps_per_epoch=2
optimizer.ema_decay=0.5 augment.shift=1"""


@pytest.mark.parametrize("setting", IDENTITY.split())
def test_workdir_of_another_run(place: Place, here, setting: str) -> None:
    field, _, new = setting.partition("=")
    old = json.loads((place.begin().workdir / "config.json").read_text())[field]
    argv = place.argv(f"--config.{field}={new.strip(chr(39) + '[]')}")
    now = new.replace(",", ", ")
    words = (str(place.workdir), field, f"was {old!r}", f"is {now}", "choose another --workdir")
    refuses(here, place, argv, *words)


def test_lengths_and_folders_may_change(place: Place) -> None:
    config = place.begin().config()
    config.data.raw_dir, config.data.tfds_dir, config.fit.epochs = None, "elsewhere", 9
    config.data.placement = "disk"
    config.early_stopping.patience, config.evaluate.split = 9, "test"
    config.predict.batch_size, config.predict.tta = 9, True
    Workdir(place.workdir).check_compatible(config)
    config.seed = 1
    with pytest.raises(UserError, match="seed"):
        Workdir(place.workdir).check_compatible(config)


def test_a_schedule_ties_the_run_to_its_length(place: Place) -> None:
    config = place.config()
    config.optimizer.schedule = "one_cycle"
    run = Workdir(place.workdir)
    with run.session("fit"):
        run.acquire(config)
    config.fit.epochs = 9
    with pytest.raises(UserError, match=r"fit\.epochs was .* and is 9"):
        Workdir(place.workdir).check_compatible(config)


@pytest.fixture
def parse(here, monkeypatch) -> Callable[[list[str]], Config]:
    """Returns the settings that the command line gives to its mode."""

    def run(argv: list[str]) -> Config:
        calls: list[Config] = []
        monkeypatch.setattr(cli, "load_command", lambda _: lambda config, *_: calls.append(config))
        monkeypatch.setattr(cli, "_show", lambda *_: 0)
        status, stderr = here(argv)
        monkeypatch.undo()
        assert (status, len(calls)) == (0, 1), stderr
        return calls[0]

    return run


def test_options_in_any_form_and_order(place: Place, parse) -> None:
    flagfile = place.root / "flags"
    flagfile.write_text(f"# said\n--config={place.config_file}\n--config.fit.epochs=2\n")
    run = f"--workdir={place.workdir}"
    for argv in (
        [f"--config={place.config_file}", run, "--config.fit.epochs=3"],
        ["--config.fit.epochs=3", run, "--config", str(place.config_file)],
        ["-config", str(place.config_file), "-workdir", str(place.workdir), "-config.fit.epochs=3"],
        ["--config=nowhere.py", "--config.fit.epochs=9", *place.argv(), "--config.fit.epochs", "3"],
        [f"--flagfile={flagfile}", run, "--config.fit.epochs=3.0"],
        ["--config.fit.epochs=3e0", f"--config={place.config_file}", "--workdir", run[10:]],
    ):
        assert parse(argv).fit.epochs == 3
    values = ["predict.tta", "model.features=[1, 2,3 ,4,5]", "fit.batch_size=1_000"]
    config = parse(place.argv(*(f"--config.{value}" for value in values), "--noconfig.predict.tta"))
    assert (config.predict.tta, config.fit.batch_size) == (False, 1000)
    assert config.model.features == (1, 2, 3, 4, 5)
    assert parse(place.argv('--config.model.kwargs={"a": [1]}')).model.kwargs == {"a": [1]}
    twice = ["--config.model.features=1,1,1,1,1", "--config.model.features=2,2,2,2,2"]
    assert parse(place.argv(*twice)).model.features == (2, 2, 2, 2, 2)


@pytest.mark.parametrize("mode", cli.COMMANDS)
def test_a_run_needs_no_config(place: Place, parse, mode: str) -> None:
    config = place.begin().config()
    argv = [f"--workdir={place.workdir}", f"--mode={mode}", "--config.predict.tta"]
    parsed = parse(argv)
    assert parsed.predict.tta
    parsed.predict.tta = False
    assert parsed == config


@pytest.mark.parametrize(
    "mode", ["evaluate", "predict", "audit", "report", "explain", "heatmap", "fit"]
)
def test_an_option_of_another_run_is_refused_without_a_config_too(
    place: Place, here, parse, mode
) -> None:
    argv = [f"--workdir={place.begin().workdir}", *place.mode(mode), "--config.model.dense=9"]
    refuses(here, place, argv, "model.dense was 4 there and is 9 here")
    if mode != "fit":  # which takes only folders from the file
        place.config_file.write_text(place.config_file.read_text().replace("), 4", "), 8"))
        assert parse(place.argv(f"--mode={mode}")).model.dense == 4


def test_compare_needs_neither_config_nor_workdir(place: Place, here, parse) -> None:
    assert parse(["--mode=compare", "--config.compare.runs=a,b"]).compare.runs == "a,b"
    refuses(here, place, ["--mode=compare", "--workdir="], "--workdir is empty")


def test_compare_without_two_runs(place: Place, here) -> None:
    refuses(here, place, place.argv("--mode=compare"), "config.compare.runs=RUN1,RUN2")
    argv = place.argv("--mode=compare", "--config.compare.runs=here,there")
    refuses(here, place, argv, "here/predictions_validation.csv is missing", "--mode=evaluate")


@pytest.mark.parametrize("below", ["", "/run", "/deeper/run"])
def test_workdir_that_cannot_be_written(place: Place, here, below: str) -> None:
    (place.root / "file").write_text("not a folder")
    argv = place.argv(f"--workdir={place.root}/file{below}")
    refuses(here, place, argv, f"--workdir={place.root}/file{below} cannot be written", "choose")


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b""])
def test_corrupt_config_json(place: Place, here, content: bytes) -> None:
    path = place.begin().workdir / "config.json"
    path.write_bytes(content)
    refuses(here, place, place.argv(), str(path), "corrupt", "choose another --workdir")


# --- the raw data -----------------------------------------------------------------------------

ID, SECOND = list(PATCHES["train"])[:2]
LABELS, SAMPLE, FILE = *CSVS.values(), f"train/{ID}.tif"
TEST_FILE = f"test/{list(PATCHES['test'])[-1]}.tif"
Spoiler = Callable[[Path], object]


def content(name: str, change: Callable[[bytes], bytes]) -> Spoiler:
    return lambda raw: (raw / name).write_bytes(change((raw / name).read_bytes()))


def row(text: str) -> Spoiler:
    """Makes a spoiler of the first row."""
    return content(LABELS, lambda old: old.replace(f"{ID},0\n".encode(), f"{text}\n".encode()))


def image(kind: str, mode: str, *size: int) -> Spoiler:
    return lambda raw: Image.new(mode, size).save(raw / FILE, format=kind)


def gone(name: str, *, and_back: bool = False) -> Spoiler:
    def spoil(raw: Path) -> None:
        shutil.rmtree(raw / name) if (raw / name).is_dir() else (raw / name).unlink()
        if and_back:
            (raw / name).mkdir()

    return spoil


ROW, HEX = f"{LABELS}, line 2", "40 hex digits"
TIFF = (FILE, "not a readable TIFF", "download it again")
SIZE = (FILE, "96x96 RGB", "download it")
RAW: dict[str, tuple] = {
    "no-folder": (gone("."), "raw: no such folder", "--config.data.raw_dir"),
    "no-train-csv": (gone(LABELS), LABELS, "missing", "unpack"),
    "no-test-csv": (gone(SAMPLE), SAMPLE, "missing", "unpack"),
    "no-test-folder": (gone("test"), "raw/test", "missing", "unpack"),
    "empty-test-folder": (gone("test", and_back=True), "raw/test", "empty", "unpack"),
    "no-header": (content(LABELS, lambda old: old[9:]), LABELS, "id,label", "correct the header"),
    "other-header": (
        content(SAMPLE, lambda old: b"x" + old),
        SAMPLE,
        "columns id",
        "xid,label",
        "correct the header",
    ),
    "header-alone": (content(SAMPLE, lambda old: old[:9]), SAMPLE, "no patches", "again"),
    "empty-csv": (content(LABELS, lambda _: b""), LABELS, "not a readable CSV"),
    "zeros-csv": (content(LABELS, lambda _: bytes(999)), LABELS),
    "binary-csv": (content(LABELS, lambda _: bytes(range(256)) * 9), LABELS),
    "not-utf-8-csv": (content(SAMPLE, lambda old: old + b"\xe9,0\n"), SAMPLE, "save it as UTF-8"),
    "ragged-csv": (content(LABELS, lambda old: old + b"a,b,c\n"), LABELS, "not a readable CSV"),
    "label-2": (row(f"{ID},2"), ROW, "'2'", "0 or 1", "correct the row"),
    "label-half": (row(f"{ID},0.5"), ROW, "'0.5'", "0 or 1", "correct the row"),
    "label-empty": (row(f"{ID},"), ROW, "0 or 1", "correct the row"),
    "label-left-out": (row(ID), ROW, "0 or 1", "correct the row"),
    "id-a-path": (row("../../etc/passwd,0"), ROW, "../../etc/passwd", HEX, "correct the row"),
    "id-too-short": (row(f"{ID[1:]},0"), ROW, ID[1:], HEX, "correct the row"),
    "id-empty": (row(",0"), ROW, HEX, "correct the row"),
    "id-twice": (row(f"{SECOND},1"), f"{LABELS}, line 3", "duplicate id", SECOND, "remove the row"),
    "no-file": (gone(FILE), ROW, FILE, "missing", "restore it"),
    "cut-in-half": (content(FILE, lambda old: old[: len(old) // 2]), *TIFF),
    "cut-in-header": (content(FILE, lambda old: old[:100]), *TIFF),
    "last-byte-cut": (content(FILE, lambda old: old[:-1]), *TIFF),
    "empty-file": (content(FILE, lambda _: b""), *TIFF),
    "text-file": (content(FILE, lambda _: b"<html>log in</html>"), *TIFF),
    "png-inside": (image("PNG", "RGB", 96, 96), *TIFF),
    "wrong-size": (image("TIFF", "RGB", 96, 95), "96x95", *SIZE),
    "grey": (image("TIFF", "L", 96, 96), "96x96 L", *SIZE),
    "transparent": (image("TIFF", "RGBA", 96, 96), "RGBA", *SIZE),
    "cut-test-file": (content(TEST_FILE, lambda old: old[:9999]), TEST_FILE, "not a readable TIFF"),
}


@pytest.mark.parametrize("begun", [False, True], ids=["fresh", "begun"])
@pytest.mark.parametrize("name", RAW)
def test_bad_raw_data(place: Place, here, name: str, begun: bool) -> None:
    spoil, *words = RAW[name]
    if begun:
        place.begin()
    spoil(place.raw)
    refuses(here, place, place.argv(), *words)


@pytest.mark.parametrize("label", "01")
def test_one_class_only(place: Place, here, label: str) -> None:
    content(LABELS, lambda old: re.sub(rb",\d\n", f",{label}\n".encode(), old))(place.raw)
    words = ("training set has", "9 of label 1" if label == "1" else "0 of label 1", "both")
    refuses(here, place.prepare(), place.argv(), *words, "give more patches")


INDIVISIBLE = """
data.samples_per_class=1 | 2 patches config.data.validation_fraction
data.fold=1/99           | config.data.fold 99 9 fewer
data.split_by=slide      | config.data.split_by slide 'auto' 'image'
fit.batch_size=12        | config.fit.batch_size 12 9 smaller more
"""


@pytest.mark.parametrize(("setting", "words"), table(INDIVISIBLE))
def test_data_that_cannot_be_divided(place: Place, here, setting: str, words: str) -> None:
    refuses(here, place.prepare(), place.argv(f"--config.{setting}"), *words.split())


def test_records_of_other_files(place: Place, here) -> None:
    """A new run would get records of its own; this one began with others."""
    place.begin().prepare()
    (records,) = (path.name for path in (place.tfds / "histopathology").iterdir())
    Workdir(place.workdir).update_status(records=records)
    content(LABELS, lambda old: old[:-43])(place.raw)
    refuses(here, place, place.argv(), "other data", str(place.raw), records, "--workdir")


def test_neither_raw_files_nor_records(place: Place, here) -> None:
    argv = place.argv("--config.data.raw_dir=None")
    refuses(here, place, argv, "set --config.data.raw_dir")


@pytest.mark.parametrize("below", ["", "/records"])
def test_records_folder_that_cannot_be_written(place: Place, here, below: str) -> None:
    (place.root / "file").write_text("not a folder")
    argv = place.argv("--mode=prepare", f"--config.data.tfds_dir={place.root}/file{below}")
    refuses(here, place, argv, f"{place.root}/file{below}", "data.tfds_dir")


# --- checkpoints ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, save_run: Callable) -> Place:
    place = Place(tmp_path_factory.mktemp("trained"))
    save_run(place.config(), place.workdir, Calibration(1.0, 0.0))
    return place


@pytest.fixture
def copy(trained: Place, tmp_path: Path) -> Place:
    """A place of its own with the trained run and an earlier submission and evaluation."""
    shutil.copytree(trained.root, tmp_path, dirs_exist_ok=True)
    return Place(tmp_path).begin()


def test_raw_data_that_is_typed_must_be_the_runs(copy: Place, here) -> None:
    """The run's own `config.json` may name a folder that is gone; a command line may not."""
    refuses(here, copy, copy.argv("--mode=predict", "--config.data.raw_dir=nope"), "nope", "folder")
    shutil.rmtree(copy.raw)
    typed = f"--config.data.raw_dir={copy.raw}"
    refuses(here, copy, copy.argv("--mode=predict", typed), str(copy.raw), "no such folder")


@pytest.mark.parametrize("mode", ["evaluate", "predict", "heatmap"])
@pytest.mark.parametrize("left", ["nothing", "config", "folder"])
def test_no_checkpoint(place: Place, here, mode: str, left: str) -> None:
    if left != "nothing":
        place.begin()
    if left == "folder":
        (place.workdir / "checkpoints").mkdir()
    argv = place.argv(*place.mode(mode))
    refuses(here, place, argv, str(place.workdir), "no checkpoint", "--mode=fit")


@pytest.mark.parametrize("mode", ["fit", "evaluate", "predict", "heatmap"])
def test_checkpoint_of_another_model(copy: Place, here, mode: str) -> None:
    argv = [*copy.make_other_model(), *copy.mode(mode)]
    refuses(here, copy, argv, "checkpoints/0", "another model", "config.model", "--workdir")


def test_checkpoints_in_a_folder_without_config(copy: Place, here) -> None:
    (copy.workdir / "config.json").unlink()
    refuses(here, copy, copy.argv(), str(copy.workdir), "no config.json", "another --workdir")


def test_test_patches_without_labels(copy: Place, here) -> None:
    argv = copy.argv("--mode=evaluate", "--config.evaluate.split=test")
    refuses(here, copy, argv, "no labels", "--mode=predict", "--config.evaluate.split=validation")


def test_a_full_device_memory_is_one_line(place: Place, here, monkeypatch) -> None:
    full = lambda *_: jnp.zeros((2**20, 2**20, 2**10)) + 1  # noqa: E731
    monkeypatch.setattr(cli, "load_command", lambda _: full)
    refuses(here, place, place.argv("--mode=fit"), "memory", "config.fit.batch_size", "placement")


def test_the_home_folder_may_be_written_as_a_tilde(place: Place, here, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(place.root))
    calls = []
    monkeypatch.setattr(cli, "load_command", lambda _: lambda _, workdir: calls.append(workdir))
    assert here(place.argv("--mode=fit", "--workdir=~/runs/x")) == (0, "")
    assert calls == [place.root / "runs" / "x"]


def test_the_heavy_ones_in_real_processes(copy: Place, tmp_path_factory) -> None:
    """With the interpreter, the logs and the exit of the real command line."""
    typed, broken, other, cut = [Place(tmp_path_factory.mktemp("place")).begin() for _ in range(4)]
    jobs = [
        (typed, typed.argv("--mode=evaluate", "--config.fit.epochs=ten"), "config.fit.epochs ten"),
        (other, other.argv("--config.seed=1"), "seed was 0 there and is 1 here"),
    ]
    broken.config_file.write_text("def get_config(:\n")
    jobs.append((broken, broken.argv("--mode=predict"), "tiny.py, line 1 SyntaxError"))
    spoil, *words = RAW["cut-in-header"]
    spoil(cut.raw)
    jobs.append((cut, cut.argv("--mode=prepare"), " ".join(words[:1])))
    argv = [*copy.make_other_model(), "--mode=evaluate"]
    jobs.append((copy, argv, "checkpoints/0 another model"))
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(refuses, real, p, argv, *w.split()) for p, argv, w in jobs]:
            done.result()
