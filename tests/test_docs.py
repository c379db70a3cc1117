"""README and docs: their commands and Python run, and what they name exists.

An HTML comment before a block skips it by name, and gives the reason:

    <!-- skip: needs two machines -->           the whole block
    <!-- skip kaggle: needs an account -->      the commands of one program

A Python block whose first line is a comment with a file's name is written to that file. Everything
runs in one folder that looks like a clone, with small data and small networks; commands of
histo_jax are forked from one process that has imported it, which saves seconds for each.
"""

import ast
import functools
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tokenize
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

import histo_jax
from histo_jax.config import Config, flat

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ON_PAGES = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
_FENCE = re.compile(
    r"(?:<!-- skip ?(?P<program>\S*): (?P<reason>.*?) -->\n)?"
    r"```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_FILE_NAME = re.compile(
    r"\.(py|sh|md|(geo)?json|csv|tsv|parquet|html|svg|toml|yaml|png|jpg|tif|gz|onnx|safetensors"
    r"|stablehlo)$"
)
# Makes the configs of the clone small. The network of the exported run must be a built-in one.
_SHRINK = """

import runpy
runpy.run_path({network!r})
_full = get_config


def get_config():
    config = _full()
    config.data.tfds_dir, config.data.synthetic_slides = "runs/records", 4
    if {is_built_in}:
        config.model.features, config.model.dense = (4, 4, 4, 4, 4), 8
    else:
        config.model = type(config.model)(name="tiny")
    config.fit.batch_size, config.fit.epochs, config.fit.steps_per_epoch = 8, 2, 3
    config.predict.batch_size = 8
    return config
"""
# For config files of the docs, which may have networks of their own.
_SMALL = (
    "--config.data.tfds_dir=runs/records", "--config.data.synthetic_slides=4",
    "--config.fit.batch_size=8", "--config.fit.epochs=1", "--config.fit.steps_per_epoch=2",
)  # fmt: skip
_SERVER = """
import json, os, runpy, sys
import histo_jax
for name in histo_jax.__all__:
    getattr(histo_jax, name)
answers = os.fdopen(os.dup(1), "w")
for line in sys.stdin:
    kind, value = json.loads(line)
    child = os.fork()
    if child == 0:
        log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        sys.path[0] = ""
        if kind == "python":
            sys.argv = ["-"]
            exec(compile(value, "<block>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = [value[0], *value[1:]]
            runpy.run_module(value[0], run_name="__main__", alter_sys=True)
        sys.stdout.flush()
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps(status), file=answers, flush=True)
"""


class Block(NamedTuple):
    """A fenced block of a page; `program` and `reason` tell what is skipped, and why."""

    language: str
    text: str
    program: str
    reason: str

    def skips(self, command: str) -> bool:
        return bool(self.reason) and self.program in ("", command.split()[0])

    @property
    def file(self) -> str | None:
        match = re.match(r"# (\w+\.py)\n", self.text)
        return match[1] if self.language == "python" and match else None


def blocks(page: Path) -> list[Block]:
    return [
        Block(found["language"], found["text"], found["program"] or "", found["reason"] or "")
        for found in _FENCE.finditer(page.read_text())
    ]


def commands(text: str) -> list[str]:
    """The commands of a shell block, continued lines joined."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


class Clone:
    """A folder like a clone, with an environment, raw data and small configs."""

    def __init__(self, path: Path, make_kaggle) -> None:
        self.path, self._done = path, set()
        for name in ("histo_jax", "launch", "tests", "docs", "pyproject.toml"):
            (path / name).symlink_to(ROOT / name)
        (path / ".venv").symlink_to(sys.prefix)
        (path / "configs").mkdir()
        for config in (ROOT / "configs").glob("*.py"):
            text = config.read_text()
            is_config = "def get_config" in text
            if is_config:
                text += _SHRINK.format(
                    network=str(ROOT / "tests" / "tiny_network.py"),
                    is_built_in=config.stem == "kaggle",
                )
            (path / "configs" / config.name).write_text(text)
        with zipfile.ZipFile(path / "histopathologic-cancer-detection.zip", "w") as archive:
            folder = make_kaggle(path / "downloaded", train=60)
            for file in folder.rglob("*"):
                archive.write(file, file.relative_to(folder))
        make_patches(path / "my_patches")
        for page in PAGES:
            for block in blocks(page):
                if block.file:
                    (path / block.file).write_text(block.text)
        hidden = ("XLA_FLAGS", "PYTHONPATH", "MLFLOW_TRACKING_URI")
        self.environment = {k: v for k, v in os.environ.items() if k not in hidden}
        self.environment["PATH"] = f"{path / '.venv' / 'bin'}:{os.environ['PATH']}"
        self.server = subprocess.Popen(
            [sys.executable, "-c", _SERVER], cwd=path, env=self.environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def fork(self, kind: str, value) -> None:
        """Runs a block of Python, or a module with its arguments, in a process of its own."""
        print(json.dumps([kind, value]), file=self.server.stdin, flush=True)
        answer = self.server.stdout.readline()
        assert answer.strip() == "0", f"{value}: {answer}{(self.path / 'log').read_text()[-3000:]}"

    def shell(self, command: str) -> None:
        words = shlex.split(command, comments=True)
        if words[1:3] == ["-m", "histo_jax.main"]:
            own = [f"--config={name.name}" in words for name in self.path.glob("*.py")]
            self.fork("module", [*words[2:], *(_SMALL if any(own) else ())])
            return
        done = subprocess.run(
            ["bash", "-euc", command], cwd=self.path, env=self.environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}: {done.stdout[-3000:]}"

    def run(self, page: Path) -> None:
        """Runs the blocks of a page, once."""
        if page in self._done:
            return
        self._done.add(page)
        for block in blocks(page):
            if block.language == "sh":
                for command in commands(block.text):
                    if not block.skips(command):
                        self.shell(command)
            elif block.language == "python" and not block.file and not block.reason:
                self.fork("python", block.text)


def make_patches(folder: Path) -> None:
    """The layout that the source of docs/extending.md reads."""
    rng = np.random.default_rng(0)
    for split, slides in (("train", 6), ("validation", 3), ("test", 2)):
        for slide in range(slides):
            for number in range(4):
                place = folder / split / str(number % 2)
                place.mkdir(parents=True, exist_ok=True)
                image = rng.integers(0, 256, (96, 96, 3)).astype(np.uint8)
                Image.fromarray(image).save(place / f"{split}{slide}_{number}.png")


@pytest.fixture(scope="module")
def clone(tmp_path_factory, make_kaggle) -> Iterator[Clone]:
    clone = Clone(tmp_path_factory.mktemp("clone"), make_kaggle)
    yield clone
    clone.server.stdin.close()
    clone.server.wait()


@ON_PAGES
def test_its_blocks_run(page, clone):
    clone.run(PAGES[0])  # whose runs the other pages use
    clone.run(page)


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (f"{page.name}: {' '.join(command.split('#')[0].split())}", block.reason)
        for page in PAGES
        for block in blocks(page)
        for command in commands(block.text)
        if block.skips(command)
    ],
)
def test_a_command_that_cannot_run_here(command, reason):
    pytest.skip(f"{command}: {reason}")


def test_the_extensions_of_the_docs_run_together(clone):
    """The network, source, augmentation, loss and callback, in one run; W&B by a stand-in."""
    (clone.path / "wandb.py").write_text("logged = []\nlog, Image = logged.append, bytes\n")
    clone.fork(
        "python",
        """
import numpy as np
import histo_jax
import my_augmentation, my_callback, my_data, my_experiment, my_loss, my_network
import wandb, with_wandb

for module in (my_augmentation, my_experiment, my_loss):
    assert isinstance(module.get_config(), histo_jax.Config)
config = my_data.get_config()
config.data.tfds_dir = "runs/records"
config.model.name = "my_network"
config.fit.batch_size, config.fit.epochs, config.predict.batch_size = 8, 2, 8
config.fit.loss, config.augment.extra = "focal", ("noise",)
callbacks = [my_callback.PrintBest(), with_wandb.WandbCallback()]
history = histo_jax.fit(config, "runs/extended", callbacks=callbacks)
assert len(history) == 2 and callbacks[0].best == history["validation_loss"].min()
logs = [entry for entry in wandb.logged if "validation_auc" in entry]
assert [entry["epoch"] for entry in logs] == [1, 2], wandb.logged
assert len(logs) < len(wandb.logged), "no images were logged"
scores = histo_jax.evaluate(config, "runs/extended")
assert scores["slide_disjoint"] is True and scores["count"] == 12
assert len(histo_jax.predict(config, "runs/extended")) == 8
""",
    )


@pytest.mark.mlflow
def test_the_mlflow_callback_logs_to_local_stores(clone):
    """A real run into MLflow's file store, and its epochs again into SQLite, its default store."""
    if not os.environ.get("CI"):
        pytest.importorskip("mlflow", reason="needs mlflow: pip install -e '.[mlflow]'")
    clone.fork(
        "python",
        """
import os
from pathlib import Path

# Nothing is sent anywhere, and MLflow's file store needs a switch.
os.environ |= {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_ALLOW_FILE_STORE": "true"}
import mlflow
import histo_jax
import with_mlflow

def log_to(uri, observe):
    mlflow.set_tracking_uri(uri)
    mlflow.create_experiment("histo_jax", Path("artifacts").absolute().as_uri())
    mlflow.set_experiment("histo_jax")
    with mlflow.start_run() as run:
        history = observe(with_mlflow.MLflowCallback())
    client = mlflow.MlflowClient()
    for name in ("train_loss", "validation_loss", "validation_auc"):
        logged = client.get_metric_history(run.info.run_id, name)
        assert [metric.step for metric in logged] == [1, 2]
        assert [metric.value for metric in logged] == history[name].tolist()
    images = client.list_artifacts(run.info.run_id, "images")
    return history, images

config = histo_jax.recipe("quickstart")
history, images = log_to(
    Path("mlruns").absolute().as_uri(),
    lambda callback: histo_jax.fit(config, "runs/mlflow", callbacks=[callback]),
)
assert images, "no images were logged"

def replay(callback):
    for row in history.to_dict("records"):
        callback.on_epoch_end(row["epoch"], row)
    return history

log_to("sqlite:///mlflow.db", replay)
""",
    )


def test_each_extension_is_short():
    for block in blocks(ROOT / "docs" / "extending.md"):
        if block.file:
            code = [line for line in block.text.splitlines()[1:] if line.strip()]
            assert len(code) < 20, block.file


def test_the_readme_fits_on_a_page():
    assert len((ROOT / "README.md").read_text().split()) <= 900
    pictures = re.findall(r"!\[.+?\]\((docs/.+?)\)", (ROOT / "README.md").read_text())
    assert len(pictures) == 1
    assert (ROOT / pictures[0]).stat().st_size < 300_000


@ON_PAGES
def test_its_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in anchors, target


# What the pages name.

# Words in code spans that belong to others: programs, libraries, languages, HDF5's datasets.
_FOREIGN = {
    "true", "false", "null", "x", "y", "n", "nohup", "pip", "pre-commit", "kubectl", "gcloud",
    "aws", "sbatch", "DataLoader", "import-linter", "jit", "lint-imports", "PATH",
    "source", "activate", "flatbuffers",
}  # fmt: skip
_FOREIGN_MODULES = ("torch", "nn", "ml_collections", "np", "os", "mlflow", "wandb")
_ENVIRONMENT = {"HISTO_JAX_SAMPLE", "HISTO_JAX_LONG", "XLA_FLAGS", "MLFLOW_TRACKING_URI"}


@functools.cache
def sources() -> dict[Path, str]:
    """The text of all that the pages may name."""
    files = [*ROOT.glob("launch/*"), ROOT / "pyproject.toml"]
    for folder in ("histo_jax", "configs", "tests/benchmarks", "tests/chaos"):
        files += [*(ROOT / folder).rglob("*.py"), *(ROOT / folder).rglob("*.html")]
    return {file: file.read_text(errors="replace") for file in files if file.is_file()}


@functools.cache
def known_words() -> set[str]:
    """Names in the code, and words in its strings; comments do not count."""
    words = set()
    for file, text in sources().items():
        if file.suffix != ".py":
            words |= set(re.findall(r"[\w-]+", text))
            continue
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type != tokenize.COMMENT:
                words |= set(re.findall(r"\w+", token.string))
    return words


@functools.cache
def known_flags() -> set[str]:
    text = "\n".join(sources().values())
    benchmarks = re.findall(r'"(--[\w-]+)"', text)
    return {*re.findall(r"--[a-z][\w-]*", text), *benchmarks}


@functools.cache
def modes() -> set[str]:
    for node in ast.walk(ast.parse((ROOT / "histo_jax" / "main.py").read_text())):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "COMMANDS":
            return set(ast.literal_eval(node.value))
    raise AssertionError("histo_jax/main.py has no COMMANDS")


def spans(page: Path) -> Iterator[tuple[str, bool]]:
    """Each word of code in a page, and whether it is part of a command line."""
    text = page.read_text()
    for block in blocks(page):
        if block.language == "sh":
            for command in commands(block.text):
                yield from ((word, True) for word in command.split("#")[0].split())
    for span in re.findall(r"`([^`\n]+)`", _FENCE.sub("", text)):
        words = re.split(r"[\s,]+", span)
        yield from ((word, len(words) > 1) for word in words)


def written(name: str) -> bool:
    """Whether code writes or reads a file of this name: `predictions_SPLIT.csv`, `events/`."""
    pattern = re.escape(name.rstrip("/")).replace("SPLIT", r"\{?\w+\}?")
    tests = set(ROOT.glob("tests/**/*.py")) - {Path(__file__)}
    texts = [*sources().values(), *(file.read_text() for file in tests)]
    return any(re.search(rf"(?<![\w.]){pattern}(?!\w)", text) for text in texts)


def exists(page: Path, word: str) -> bool:
    path = word.rstrip("/")
    places = (ROOT, ROOT / "histo_jax", ROOT / "configs", page.parent)
    if any((place / path).exists() for place in places):
        return True
    if path.startswith(("histo_jax/", "tests/", "configs/", "launch/", "docs/")):
        return False
    files = {block.file for other in PAGES for block in blocks(other)}
    return path in files or written(Path(path).name)


def problem(page: Path, word: str, in_command: bool) -> str | None:
    """What is wrong with a word of code; None if it exists or names nothing."""
    fields, groups = flat(Config()), vars(Config())
    word = word.strip("[],;()").removeprefix("@")
    if (match := re.match(r"-{0,2}(?:no)?config\.([\w.]+)", word)) and match[1] != "json":
        name = match[1].rstrip(".")
        return None if name in fields or name in groups or name == "FIELD" else "no config field"
    if match := re.match(r"--mode=(\w+)", word):
        return None if match[1] in modes() | {"MODE"} else "no mode"
    if match := re.match(r"--[\w-]+", word):
        return None if match[0] in known_flags() else "no option"
    if in_command and not re.search(
        r"\.(py|sh|md|(geo)?json|csv|html|sbatch|yaml)$|^launch/", word
    ):
        return None
    if re.search(r"[*{}=:+<>|$\"'~]", word) or re.fullmatch(r"[\d.,/K-]+N?", word):
        return None
    name = word.partition("(")[0]
    if name.startswith("histo_jax.") and not name.endswith(".py"):
        part = name.split(".")[1]
        module = ROOT / "histo_jax" / part
        is_module = module.is_dir() or module.with_suffix(".py").exists()
        return None if is_module or hasattr(histo_jax, part) else "not in histo_jax"
    if "/" in name or _FILE_NAME.search(name):
        if re.match(r"[A-Z_]{3,}/|runs/|\.h5", name):
            return None
        return None if exists(page, name) else "no such file"
    head, _, rest = name.partition(".")
    if rest:
        if head in groups:
            return None if name in fields else "no config field"
        return None if head in _FOREIGN_MODULES else "unknown"
    if re.fullmatch(r"[A-Z]+", name) or name in _FOREIGN | _ENVIRONMENT | set(groups):
        return None
    return None if name in known_words() else "not in the code"


@ON_PAGES
def test_what_it_names_exists(page):
    found = {f"{word}: {why}" for word, part in spans(page) if (why := problem(page, word, part))}
    assert not found


@pytest.mark.parametrize(
    ("word", "in_command", "why"),
    [
        ("--config.data.raw_dirr=x", True, "no config field"),
        ("data.sauce", False, "no config field"),
        ("--mode=trian", True, "no mode"),
        ("--work_dir=x", True, "no option"),
        ("tests/benchmarks/speed.py", False, "no such file"),
        ("evaluations.json", False, "no such file"),
        ("histo_jax.train", False, "not in histo_jax"),
        ("slide_disjunct", False, "not in the code"),
        ("data.source", False, None),
        ("evaluation_SPLIT.json", False, None),
        ("auc_low", False, None),
    ],
)
def test_a_name_that_does_not_exist_is_noticed(word, in_command, why):
    assert problem(PAGES[0], word, in_command) == why


def test_every_mode_is_documented():
    text = (ROOT / "docs" / "training.md").read_text()
    assert not {mode for mode in modes() if f"| `{mode}`" not in text}
