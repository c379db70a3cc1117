"""Folders of generated files that are replaced together."""

import contextlib
import glob
import os
import re
import shutil
import uuid
from collections.abc import Collection, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path

from histo_jax.run import files


def update(folder: Path, new: Mapping[str, bytes], obsolete: Collection[str] = ()) -> None:
    """Writes files into a folder and removes others, atomically.

    Changes a copy of the folder, which then replaces it. A process that is killed leaves either all
    of the old files or all of the new ones.

    Args:
        folder: created if missing; its other files are kept.
        new: contents by file name.
        obsolete: names of files to remove; missing ones are ignored.

    Raises:
        OSError: a file cannot be written; the folder is unchanged.
    """

    def ignored(parent: str, names: list[str]) -> set[str]:
        replaced = {*new, *obsolete} if Path(parent) == folder.resolve() else set()
        return {name for name in names if name in replaced or fnmatch(name, ".*.part")}

    with replacing(folder) as copy:
        if folder.exists():
            shutil.copytree(
                folder.resolve(),
                copy,
                symlinks=True,
                ignore=ignored,
                copy_function=_link,
                dirs_exist_ok=True,
            )
        for name, content in new.items():
            files.write_bytes(copy / name, content)


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yields an empty folder that replaces `folder` where the block ends without an error.

    A process that is killed leaves the old folder or the new one, perhaps under another name, which
    `recover` restores.

    Args:
        folder: created if missing; unchanged where the block raises.

    Raises:
        OSError: the folder cannot be replaced; it is unchanged.
    """
    folder = folder.resolve()  # keeps a symbolic link to another disk
    recover(folder)
    new = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.part")
    try:
        new.mkdir(parents=True)
        yield new
        if folder.exists():
            folder.rename(_backup(folder))
        new.rename(folder)
    finally:
        recover(folder)


def recover(folder: Path) -> None:
    """Cleans up after an interrupted replacement: restores the old folder, or keeps the new one."""
    folder = folder.resolve()
    if not folder.exists() and _backup(folder).exists():
        _backup(folder).rename(folder)
    # Another process may replace a folder whose name begins with this one.
    own = re.compile(rf"\.{re.escape(folder.name)}\.[0-9a-f]{{32}}\.part")
    parts = folder.parent.glob(f".{glob.escape(folder.name)}.*.part")
    for leftover in (_backup(folder), *(part for part in parts if own.fullmatch(part.name))):
        shutil.rmtree(leftover, ignore_errors=True)


def _backup(folder: Path) -> Path:
    """Returns the path of the old folder between the two renames."""
    return folder.with_name(f".{folder.name}.old")


def _link(source: str, target: str) -> None:
    """Hard-links a file, which takes neither time nor space, or copies it where links fail."""
    with contextlib.suppress(OSError):
        os.link(source, target)
        return
    shutil.copy2(source, target)
