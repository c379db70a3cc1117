"""The slides of one folder, which clients know by ids."""

import logging
from pathlib import Path

from histo_jax.errors import ConfigError
from histo_jax.run import files
from histo_jax.slides import libraries, search
from histo_jax.slides.search import SlideFile

log = logging.getLogger("histo_jax")


class SlideFolder:
    """Slides that clients may name; the folder is searched once.

    Args:
        folder: that `--slides` names; None = no slides.

    Raises:
        ConfigError: it is not a folder, or has no slides.
        UserError: the extra `slides` is not installed.
    """

    def __init__(self, folder: str | None) -> None:
        self._slides: dict[str, SlideFile] = {}
        if folder is None:
            return
        libraries.check()
        self._root = files.expand(folder, "--slides").resolve()
        if not self._root.is_dir():
            raise ConfigError(f"--slides={folder} is not a folder: give a folder of slides")
        inside = [SlideFile(path) for path in search.search(self._root) if self._is_inside(path)]
        if not inside:
            raise ConfigError(f"--slides={folder} has no slides: give another folder")
        self._slides = dict(search.assign_names(inside, {}))
        log.info("%d slides in %s", len(self._slides), folder)

    @property
    def ids(self) -> list[str]:
        """Ids of all slides."""
        return list(self._slides)

    def get(self, name: str) -> SlideFile | None:
        """Returns the slide of an id, None if it is unknown or no longer in the folder."""
        slide = self._slides.get(name)
        return slide if slide and self._is_inside(slide.path) else None

    def _is_inside(self, path: Path) -> bool:
        """Returns whether a file is there, and in the folder; links may lead elsewhere."""
        try:
            if not path.is_file():
                return False
            is_inside = path.resolve().is_relative_to(self._root)
        except (OSError, RuntimeError):
            return False
        if not is_inside:
            log.warning("%s is a link to a place outside of --slides: it is left out", path)
        return is_inside
