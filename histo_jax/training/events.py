"""TensorBoard: the callback, its event files, and their repair after a kill."""

import contextlib
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from histo_jax.run import files
from histo_jax.training.callbacks import HISTORY_COLUMNS, Callback

# `epoch` and `step` are no curves; the last two are not in `history.csv`.
CURVES = (*HISTORY_COLUMNS[2:], "gradient_norm", "weight_norm")


class TensorBoard(Callback):
    """Writes scalars and images of a run as TensorBoard events; use it as a context.

    Args:
        folder: of the event files.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._events = folder, EventWriter(folder)
        self._present: set[tuple[str, int]] = set()

    def __enter__(self) -> "TensorBoard":
        return self

    def __exit__(self, *_: object) -> None:
        self._events.close()

    def restore(self, history: Sequence[Mapping[str, Any]], step: int) -> None:
        """Repairs the event files that are there, see `repair`."""
        self._present = repair(self._folder, history, CURVES, step)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any]) -> None:
        """Adds one point to each curve."""
        self._events.add_scalars({name: logs[name] for name in CURVES}, logs["step"])
        self._events.flush()

    def on_images(self, name: str, step: int, image: np.ndarray) -> None:
        """Adds an image, unless the files hold it already."""
        if (name, step) not in self._present:
            self._events.add_image(name, image, step)
            self._events.flush()


class EventWriter:
    """Writes event files; the file is created with the first event.

    Not tensorboardX's `SummaryWriter`: its queue needs shared memory, and two that are opened
    within one second write the same file.

    Args:
        folder: of the event files.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()
        self._writer: EventsWriter | None = None

    def add_scalars(self, values: Mapping[str, float], step: int) -> None:
        """Adds one point to the curve of each name."""
        for name, value in values.items():
            self._add(summary.scalar(name, value), step)

    def add_image(self, name: str, image: np.ndarray, step: int) -> None:
        """Adds an image, uint8[height, width, 3]."""
        self._add(summary.image(name, image, dataformats="HWC"), step)

    def flush(self) -> None:
        """Returns when all events are on disk.

        Raises:
            OSError: they could not be written.
        """
        if self._writer:
            with files.naming(self._folder):
                self._writer.flush()

    def close(self) -> None:
        """Closes the file; events that were not flushed may be lost."""
        # On a full disk closing would raise the error of the last flush again.
        with contextlib.suppress(OSError):
            if self._writer:
                self._writer.close()

    def _add(self, content: Summary, step: int) -> None:
        self.write(Event(wall_time=time.time(), step=step, summary=content))

    def write(self, event: Event) -> None:
        """Writes an event unchanged."""
        with files.naming(self._folder):
            if self._writer is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                # Otherwise the name holds only the time in seconds and the host.
                suffix = f".{uuid.uuid4().hex[:8]}"
                self._writer = EventsWriter(str(self._folder / "events"), suffix)
            self._writer.write_event(event)


def repair(
    folder: Path, history: Sequence[Mapping[str, Any]], names: Sequence[str], step: int
) -> set[tuple[str, int]]:
    """Makes the event files agree with the checkpoint from which a run resumes.

    A killed process leaves events missing, events of steps that are repeated, or part of an event.
    Then all valid events are written to a new file, and the old files are removed.

    Args:
        folder: of the event files.
        history: one row per epoch, with its `step`.
        names: of the curves; a row that lacks one adds no point to it.
        step: of the checkpoint; later events are dropped.

    Returns:
        `(tag, step)` of each event in the files.

    Raises:
        OSError: a file cannot be read or written.
    """
    paths = sorted(folder.glob("*.tfevents.*"))
    kept, is_valid = _read_valid(paths, step)
    missing = [
        (name, float(row[name]), int(row["step"]))
        for row in history
        for name in names
        if name in row and (name, row["step"]) not in kept
    ]
    if not is_valid or missing:
        writer = EventWriter(folder)
        try:
            for event in sorted(kept.values(), key=lambda event: event.step):
                writer.write(event)
            for name, value, event_step in missing:
                writer.add_scalars({name: value}, event_step)
            writer.flush()
        finally:
            writer.close()
        for path in paths:
            path.unlink()
    return {*kept, *((name, event_step) for name, _, event_step in missing)}


def _read_valid(paths: Sequence[Path], step: int) -> tuple[dict[tuple[str, int], Event], bool]:
    """Returns the events up to `step` by tag and step, and whether the files hold these alone."""
    kept: dict[tuple[str, int], Event] = {}
    is_valid = True
    for path in paths:
        for event in _read(path):
            if event is None:  # the rest of the file is corrupt
                is_valid = False
            elif event.WhichOneof("what") == "summary":
                key = (",".join(value.tag for value in event.summary.value), event.step)
                is_valid &= event.step <= step and key not in kept
                if event.step <= step:
                    kept[key] = event
    return kept, is_valid


def _read(path: Path) -> Iterator[Event | None]:
    """Yields the events of a file; a last None if the rest of it is corrupt."""
    with path.open("rb") as file:
        # A record is its length, the checksum of that, the event, and its checksum.
        while head := file.read(12):
            size, content = int.from_bytes(head[:8], "little"), b""
            is_intact = int.from_bytes(head[8:], "little") == masked_crc32c(head[:8])
            if is_intact:
                content = file.read(size)
                is_intact = int.from_bytes(file.read(4), "little") == masked_crc32c(content)
            if not is_intact:
                yield None
                return
            yield Event.FromString(content)
