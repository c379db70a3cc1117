"""Folders of generated files that belong together."""

import contextlib
import glob
import os
import shutil
import uuid
from collections.abc import Collection, Mapping
from fnmatch import fnmatch
from pathlib import Path

from histo_jax.run import files


def update(folder: Path, new: Mapping[str, bytes], obsolete: Collection[str] = ()) -> None:
    """Writes files into a folder and removes others from it, all in one step.

    A copy of the folder is changed and then takes its place, so that a process that is killed
    leaves either all of the old files or all of the new ones.

    Args:
        folder: made where it is missing; what it holds besides is kept.
        new: contents by file name.
        obsolete: names of files to remove; those that are not there are passed over.

    Raises:
        OSError: a file cannot be written; the folder is as it was.
    """
    folder = folder.resolve()  # a link to another disk stays a link
    recover(folder)
    copy = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.part")

    def leave_out(parent: str, names: list[str]) -> set[str]:
        gone = {*new, *obsolete} if Path(parent) == folder else set()
        return {name for name in names if name in gone or fnmatch(name, ".*.part")}

    try:
        if folder.exists():
            shutil.copytree(folder, copy, symlinks=True, ignore=leave_out, copy_function=_link)
        else:
            copy.mkdir(parents=True)
        for name, content in new.items():
            files.write_bytes(copy / name, content)
        if folder.exists():
            folder.rename(_aside(folder))
        copy.rename(folder)
    finally:
        recover(folder)


def recover(folder: Path) -> None:
    """Cleans up after an `update` that did not end: the folder is as before or as after it."""
    folder = folder.resolve()
    if not folder.exists() and _aside(folder).exists():
        _aside(folder).rename(folder)
    for left_over in (_aside(folder), *folder.parent.glob(f".{glob.escape(folder.name)}.*.part")):
        shutil.rmtree(left_over, ignore_errors=True)


def _aside(folder: Path) -> Path:
    """Where the old folder stands for the instant between two renames."""
    return folder.with_name(f".{folder.name}.old")


def _link(source: str, target: str) -> None:
    """Copies a file by a hard link, which costs neither time nor disk, where there are any."""
    with contextlib.suppress(OSError):
        os.link(source, target)
        return
    shutil.copy2(source, target)
