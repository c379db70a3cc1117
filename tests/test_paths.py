"""Names of folders: lists of them, URLs, characters that libraries read as patterns; full disks."""

import errno
import os
import shutil
from pathlib import Path

import pytest

import histo_jax
from histo_jax.config import Config
from histo_jax.config_checks import validate
from histo_jax.config_values import folders
from histo_jax.errors import UserError
from histo_jax.metrics import Calibration
from histo_jax.run import files
from histo_jax.run.workdir import Workdir

URLS = (
    "gs://bucket/run", "s3://bucket", "S3A://bucket/x", "hdfs://host:8020/run", "https://a.org/x",
    "file:///home/x", "dbfs:/FileStore/run", "abfss://c@a.dfs.core.windows.net/x", "memory://x",
    "user@host:/data/run",
)  # fmt: skip
PATHS = ("gs", "gs:", "a:b", "12:30:00/run", "me@noon/x", "C:\\runs", "C:/runs", "/gs:/x", "https")
FIELDS = ("data.raw_dir", "data.tfds_dir", "data.slide_map", "predict.checkpoints", "compare.runs")


@pytest.mark.parametrize(
    ("there", "text", "found"),
    [
        ([], "a,b", ["a", "b"]),
        ([], " a , b,", ["a", "b"]),
        (["lr=1,bs=4", "lr=2,bs=4"], "lr=1,bs=4,lr=2,bs=4", ["lr=1,bs=4", "lr=2,bs=4"]),
        (["lr=1, bs=4", "b"], "b, lr=1, bs=4", ["b", "lr=1, bs=4"]),
        (["a", "a,b"], "a,b", ["a,b"]),
        (["a", "b", "a,b"], "a/,b", ["a/", "b"]),
        ([",", " c"], ",,, c", [",", " c"]),
        (["a,b"], "a,b,gone", ["a,b", "gone"]),
        (["a,b"], "a,b/,a,b", ["a,b/", "a,b"]),
        (["~"], "~/x,y", ["~/x", "y"]),
        ([], "x" * 300 + ",\0", ["x" * 300, "\0"]),
    ],
)
def test_a_list_takes_folders_that_exist_as_they_are(tmp_path, monkeypatch, there, text, found):
    monkeypatch.chdir(tmp_path)
    for name in there:
        Path(name).mkdir()
    assert folders(text) == found


@pytest.mark.parametrize("url", URLS)
def test_a_url_is_refused_and_nothing_is_made(tmp_path, monkeypatch, url):
    monkeypatch.chdir(tmp_path)
    for field in FIELDS:
        config = Config()
        group, name = field.split(".")
        setattr(getattr(config, group), name, f"{url},other" if "runs" in name else url)
        with pytest.raises(UserError, match=rf"config\.{field} = .* not a URL: mount the buck"):
            validate(config)
    for command in (histo_jax.fit, histo_jax.compare, histo_jax.evaluate):
        # `pathlib` takes away one of two slashes.
        with pytest.raises(UserError, match=r"--workdir=.*:/.* not a URL"):
            command(Config(), Path(url))
    assert not list(tmp_path.iterdir())


def test_names_that_look_like_urls_are_paths():
    for path in PATHS:
        Workdir(path).check_path()
        validate(Config(data=histo_jax.config.DataConfig(raw_dir=path)))


SPECIAL = (
    "features=[8,16]",
    "a*b",
    "what?",
    "back\\slash",
    "**",
    "caf\udce9",
    ("d" * 200 + "/") * 15 + "x",
)


@pytest.mark.parametrize("name", [*SPECIAL, "link/../behind", "plain", "ü ,{0}%d#@:'\"$x\n~"])
def test_a_folder_has_a_name_that_libraries_take_as_it_stands(tmp_path, name):
    (tmp_path / "else" / "inside").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "else" / "inside")
    folder = tmp_path / name
    folder.mkdir(exist_ok=True, parents=True)
    before = set(os.listdir("/proc/self/fd"))
    literal = files.LiteralFolder(folder)
    (literal.path / "file").write_text("x")
    assert (folder / "file").read_text() == "x"
    assert not files.is_special(literal.path)
    del literal
    assert set(os.listdir("/proc/self/fd")) <= before


def test_folders_of_the_root_that_etils_takes_for_buckets_are_special():
    special = ("/s3/run", "/gs", "/x/logs:/run")
    plain = ("/x/s3", "/s3fs", "/a/..b", "/x/logs:")
    assert [files.is_special(Path(path)) for path in special] == [True] * len(special)
    assert [files.is_special(Path(path)) for path in plain] == [False] * len(plain)


def test_what_cannot_be_worked_in_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_DESCRIPTORS", tmp_path / "none")  # as on macOS
    config = Config()
    with pytest.raises(UserError, match=r"--workdir=.*\[8\].*choose another folder"):
        histo_jax.fit(config, tmp_path / "[8]")
    config.data.tfds_dir = str(tmp_path / "a*b")
    with pytest.raises(UserError, match=r"--config\.data\.tfds_dir=.*a\*b"):
        histo_jax.fit(config, tmp_path / "run")
    deep = tmp_path.joinpath(*["d" * 200] * 20)
    with pytest.raises(UserError, match="longer than 3900 bytes"):
        histo_jax.fit(config, deep)
    assert not list(tmp_path.iterdir())


def test_records_and_runs_in_folders_with_patterns_in_their_names(
    make_tiny_config, save_run, tmp_path
):
    place = tmp_path / "lr=[0.1]*, a\\b?"
    config = make_tiny_config()
    shutil.copytree(config.data.raw_dir, place / "raw, [x]")
    config.data.raw_dir, config.data.tfds_dir = str(place / "raw, [x]"), str(place / "records**")
    runs = [place / "run [1, 2]", place / "run [1"]
    save_run(config, runs[0], Calibration(1.0, 0.0))
    shutil.copytree(runs[0], runs[1])
    config.predict.checkpoints = ", ".join(map(str, runs))
    scores = histo_jax.evaluate(config, place / "both")
    assert [run["run"] for run in scores["runs"]] == [str(run) for run in runs]
    assert [path.name for path in tmp_path.iterdir()] == [place.name]
    written = [p for p in place.rglob("*") if p.suffix in (".json", ".csv")]
    assert not any("/proc/" in p.read_text() for p in written)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.EACCES, "Permission denied", "/a/b"), "/a/b: Permission denied; fix this"),
        (OSError(errno.EACCES, "Permission denied", b"/a/b"), "/a/b: Permission denied; fix this"),
        (OSError(errno.EMFILE, "Too many open files"), "Too many open files: raise the limit (ul"),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "FULL: No space left on device; free some",
        ),
        (OSError(errno.EIO, "Input/output error"), "Input/output error (in test_paths, which"),
        (
            OSError(errno.EBADF, "Bad file", 3),
            "Bad file (in test_paths, which names no file): fix this",
        ),
        (OSError("odd"), "odd (in test_paths, which names no file): fix this"),
    ],
)
def test_an_error_of_the_system_blames_what_it_names(tmp_path, monkeypatch, error, line):
    full, other = tmp_path / "full", tmp_path / "other"
    full.mkdir()
    other.mkdir()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        files.shutil, "disk_usage",
        lambda path: usage._replace(free=0 if path == full else 2**30),
    )  # fmt: skip
    try:
        raise error
    except OSError as caught:
        message = files.describe(caught, (other, full / "new"))
    assert message.replace("(in tests.", "(in ").startswith(line.replace("FULL", str(full)))
    assert str(other) not in message


def test_a_write_that_fails_names_the_file(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space") as caught:
        files.write_text(tmp_path / "a.json", "x")
    assert caught.value.filename == str(tmp_path / "a.json")
