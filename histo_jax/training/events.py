"""TensorBoard's event files, and what keeps them equal to the history of a run."""

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


class Events:
    """Writes the event files of a run; the file is made with the first event.

    Not tensorboardX's `SummaryWriter`: its queue needs shared memory, and two that are opened
    within one second write the same file.

    Args:
        folder: of the event files.
        writes: false: nothing is written.
    """

    def __init__(self, folder: Path, writes: bool = True) -> None:
        self._folder, self._writes = folder.absolute(), writes
        self._writer: EventsWriter | None = None

    def __enter__(self) -> "Events":
        return self

    def __exit__(self, *_: object) -> None:
        # What was not flushed is lost: on a full disk closing the file would fail once more.
        with contextlib.suppress(OSError):
            if self._writer:
                self._writer.close()

    def add_scalars(self, values: Mapping[str, float], step: int) -> None:
        """Adds one point to the curve of each name."""
        for name, value in values.items():
            self._add(summary.scalar(name, value), step)

    def add_image(self, name: str, image: np.ndarray, step: int) -> None:
        """Adds an image, uint8[height, width, 3]."""
        self._add(summary.image(name, image, dataformats="HWC"), step)

    def flush(self) -> None:
        """Returns when all is on disk.

        Raises:
            OSError: it could not be written.
        """
        if self._writer:
            with files.naming(self._folder):
                self._writer.flush()

    def _add(self, content: Summary, step: int) -> None:
        self.write(Event(wall_time=time.time(), step=step, summary=content))

    def write(self, event: Event) -> None:
        """Writes an event as it stands."""
        if not self._writes:
            return
        with files.naming(self._folder):
            if self._writer is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                # The name holds the time in seconds and the host only.
                suffix = f".{uuid.uuid4().hex[:8]}"
                self._writer = EventsWriter(str(self._folder / "events"), suffix)
            self._writer.write_event(event)


def repair(
    folder: Path, rows: Sequence[Mapping[str, Any]], names: Sequence[str], step: int
) -> None:
    """Makes the event files agree with the history of the checkpoint that a run goes on from.

    A process that was killed leaves too few events, or those of steps that are taken once more, or
    half of one. Then all that is right is written into a new file, and the old ones are removed.

    Args:
        folder: of the event files.
        rows: of the history, one an epoch, with its `step`.
        names: of the curves; a row that lacks one adds no point to it.
        step: of the checkpoint; later events are dropped.

    Raises:
        OSError: a file cannot be read or written.
    """
    paths = sorted(folder.glob("*.tfevents.*"))
    kept: dict[tuple[str, int], Event] = {}
    is_right = True
    for path in paths:
        for event in _read(path):
            if event is None:  # the rest of the file cannot be read
                is_right = False
            elif event.WhichOneof("what") == "summary":
                key = (",".join(value.tag for value in event.summary.value), event.step)
                is_right &= event.step <= step and key not in kept
                if event.step <= step:
                    kept[key] = event
    missing = [
        (name, float(row[name]), int(row["step"]))
        for row in rows
        for name in names
        if name in row and (name, row["step"]) not in kept
    ]
    if is_right and not missing:
        return
    with Events(folder) as events:
        for event in sorted(kept.values(), key=lambda event: event.step):
            events.write(event)
        for name, value, at in missing:
            events.add_scalars({name: value}, at)
        events.flush()
    for path in paths:
        path.unlink()


def _read(path: Path) -> Iterator[Event | None]:
    """Yields the events of a file, and None at the end where the rest of it cannot be read."""
    with path.open("rb") as file:
        # Each is its length, a checksum of that, itself, and its checksum.
        while head := file.read(12):
            size, content = int.from_bytes(head[:8], "little"), b""
            is_whole = int.from_bytes(head[8:], "little") == masked_crc32c(head[:8])
            if is_whole:
                content = file.read(size)
                is_whole = int.from_bytes(file.read(4), "little") == masked_crc32c(content)
            if not is_whole:
                yield None
                return
            yield Event.FromString(content)
