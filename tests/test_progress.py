"""Lines of progress in logs, and which bar is shown where."""

import io
import logging
import sys
import time
import types

import pytest
import tqdm

from histo_jax.errors import UserError
from histo_jax.run import progress


class Log(logging.Handler):
    """Keeps what is logged, and lets a test wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def wait_for(self, text: str) -> None:
        for _ in range(2000):
            if any(text in line for line in self.lines):
                return
            time.sleep(0.005)
        pytest.fail(f"{text!r} is not in {self.lines}")


@pytest.fixture
def log(monkeypatch):
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.01)
    handler = Log()
    progress.log.addHandler(handler)
    yield handler
    progress.log.removeHandler(handler)


def test_a_log_gets_lines_of_the_innermost_work_even_while_it_stands_still(log):
    with progress.working("fit"):
        log.wait_for("fit: 0 s")
        with progress.bar("epoch 1/2", 4000, unit=" img", initial=1000) as bar:
            log.wait_for("epoch 1/2: 1,000 of 4,000 img, 0 s")
            bar.update(500)
            bar.set_postfix(step=12, loss="0.3")
            log.wait_for("epoch 1/2: 1,500 of 4,000 img, step 12, loss 0.3, ")
            assert " img/s, " in log.lines[-1]
        log.lines.clear()
        log.wait_for("fit: ")
        assert list(progress.counted(bar, "ab", size=2, total=3)) == ["a", "b"]
        assert str(bar).startswith("epoch 1/2: 1,503 of 4,000 img")


def test_a_clock_that_is_set_back_stops_no_bar(monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.delenv("CI", raising=False)
    now = time.time()
    monkeypatch.setattr(tqdm.std, "time", lambda: now)
    with progress.bar("loading", 3, mininterval=0.001) as bar:
        now -= 3600
        time.sleep(0.01)
        bar.update(2)
    assert "2/3" in screen.getvalue()


@pytest.mark.parametrize("is_kernel", [True, False])
def test_notebooks_have_a_bar_with_text_where_widgets_are_missing(is_kernel, monkeypatch):
    config = {"IPKernelApp": {}} if is_kernel else {}
    shell = types.SimpleNamespace(config=config)
    console = types.SimpleNamespace(get_ipython=lambda: shell)
    monkeypatch.setitem(sys.modules, "IPython", console)
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    monkeypatch.delenv("CI", raising=False)
    cell = io.StringIO()
    monkeypatch.setattr(sys, "stderr", cell)
    with progress.bar("loading", 3) as bar:
        bar.update(3)
    assert ("3/3" in cell.getvalue()) == is_kernel
    assert isinstance(bar, progress.Bar)


def test_a_bar_that_tqdm_cannot_format_names_the_variables(monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TQDM_BAR_FORMAT", "{no_such_field}")
    with pytest.raises(UserError, match=r"cannot be shown .*unset TQDM_BAR_FORMAT="):
        progress.bar("loading", 3, bar_format="{no_such_field}")


def test_nothing_is_shown_without_stderr(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    with progress.bar("loading", 3) as bar:
        bar.update(3)
