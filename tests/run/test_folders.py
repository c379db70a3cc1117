"""Atomic replacement of a folder: all of the old files or all of the new ones."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from histo_jax.run import folders

# Forks processes; each one is killed one file operation later than the one before.
KILLED = """
import importlib.util, os, signal, sys, pathlib, shutil
spec = importlib.util.spec_from_file_location("folder", sys.argv[1])
folders = importlib.util.module_from_spec(spec)
spec.loader.exec_module(folders)
root = pathlib.Path(sys.argv[2])
OLD, NEW = {"a.png": "1", "index": "a", "mine": "x"}, {"b.png": "2", "index": "b", "mine": "x"}

def content(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}

for number in range(1, 1000):
    folder = root / str(number) / "pictures"
    folder.mkdir(parents=True)
    for name, text in OLD.items():
        (folder / name).write_text(text)
    child = os.fork()
    if not child:
        left = number
        def hook(event, _):
            global left
            if event in ("open", "os.mkdir", "os.link", "os.rename", "os.remove", "os.rmdir"):
                left -= 1
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        folders.update(folder, {"b.png": b"2", "index": b"b"}, ["a.png"])
        os._exit(0)
    _, status = os.waitpid(child, 0)
    # The folder is missing between the two renames.
    assert not folder.exists() or content(folder) in (OLD, NEW), (number, content(folder))
    folders.recover(folder)
    assert content(folder) in (OLD, NEW), (number, content(folder))
    assert [path.name for path in folder.parent.iterdir()] == ["pictures"]
    if status == 0:
        print(number, "kills")
        assert content(folder) == NEW
        break
"""


def test_an_update_killed_at_any_file_operation_is_atomic(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, folders.__file__, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(Path(folders.__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) > 10


def test_a_full_disk_leaves_the_folder_unchanged(tmp_path, monkeypatch):
    folders.update(tmp_path / "f", {"a": b"1", "b": b"1"})

    def full(path, content):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(folders.files, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        folders.update(tmp_path / "f", {"a": b"2"}, ["b"])
    assert {path.name: path.read_bytes() for path in (tmp_path / "f").iterdir()} == {
        "a": b"1",
        "b": b"1",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_files_are_copied_without_hard_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    folders.update(tmp_path / "f", {"a": b"1"})
    monkeypatch.setattr(os, "link", refuse)
    folders.update(tmp_path / "f", {"b": b"2"})
    assert {path.name for path in (tmp_path / "f").iterdir()} == {"a", "b"}


def test_a_symbolic_link_and_an_unusual_name_are_kept(tmp_path):
    target = tmp_path / "scratch" / "of [me]"
    target.mkdir(parents=True)
    (tmp_path / "f").symlink_to(target)
    for name in ("a", "b"):
        folders.update(tmp_path / "f", {name: b"1"})
    assert (tmp_path / "f").is_symlink()
    assert {path.name for path in target.iterdir()} == {"a", "b"}
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_leftovers_of_a_longer_name_are_kept(tmp_path):
    with folders.replacing(tmp_path / "a.b") as other:
        (other / "x").write_text("1")
        with folders.replacing(tmp_path / "a"):
            pass
    assert (tmp_path / "a.b" / "x").read_text() == "1"
