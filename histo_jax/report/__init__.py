"""Reports for people: the page `report.html`, and attribution images of single patches.

As a function, `histo_jax.report(config, workdir)` writes the page; see `histo_jax.report.report`.
"""

import os
import sys
import types

from histo_jax.config import Config
from histo_jax.report.explanation import explain
from histo_jax.report.reporting import report
from histo_jax.report.result import Report

__all__ = ["Report", "explain", "report"]


class _Callable(types.ModuleType):
    """Lets `histo_jax.report` be this package and the command: the attribute can be only one."""

    def __call__(self, config: Config, workdir: str | os.PathLike[str]) -> Report:
        """Writes `report.html`; see `histo_jax.report.report`."""
        return report(config, workdir)


sys.modules[__name__].__class__ = _Callable
