"""What the data modules log."""

import logging
from collections.abc import Iterator

import pytest


class _Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def messages() -> Iterator[list[str]]:
    """The messages that histo_jax has logged in this test; filled as they come."""
    logger, handler = logging.getLogger("histo_jax"), _Messages()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler.lines
    logger.setLevel(level)
    logger.removeHandler(handler)
