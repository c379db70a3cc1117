"""Interleaved measurements, printed as rows of a table and written as JSON."""

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from worker import PeerError

Times = dict[str, list[float]]  # by name, one per round


class Entry(NamedTuple):
    """What is measured, alternately with the other entries of a row.

    Attributes:
        name: as in the table.
        seconds: runs it once and returns the seconds that it took.
        count: patches of one run; 0 if the result is in seconds.
    """

    name: str
    seconds: Callable[[], float]
    count: int


class Report:
    """Prints each result immediately.

    Attributes:
        contents: contents of the JSON file.
    """

    def __init__(self, path: Path, rounds: int, **contents: Any) -> None:
        self._path, self._rounds = path, rounds
        self.contents = {**contents, "rounds": rounds, "skipped": {}, "results": []}

    def skip(self, name: str, reason: str) -> None:
        """Records what could not be measured."""
        self.contents["skipped"][name] = reason
        print(f"skipped: {name}: {reason}", flush=True)

    def note(
        self,
        row: str,
        batch: int | None,
        name: str,
        value: float,
        unit: str = "",
        ratios: Sequence[float] = (),
        seconds: Sequence[float] = (),
    ) -> None:
        """Adds a result; of the ratios of all rounds it keeps the median and the range."""
        spread = [statistics.median(ratios), min(ratios), max(ratios)] if ratios else None
        result = {"row": row, "batch": batch, "name": name, "value": value, "unit": unit}
        self.contents["results"].append({**result, "ratio": spread, "seconds": list(seconds)})
        number = f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
        compared = "{:.2f} ({:.2f} to {:.2f})".format(*spread) if spread else ""
        print(
            f"| {row:<9} | {batch or '':>5} | {name:<36} | {f'{number} {unit}':>14} "
            f"| {compared:<22} |",
            flush=True,
        )

    def measure(self, row: str, batch: int | None, entries: list[Entry]) -> Times:
        """Warms up, measures the entries alternately, and notes the results.

        Without rounds the warm-up is noted.

        Returns:
            Seconds per patch, or per run, by name.
        """
        times: Times = {}
        for entry in entries:
            try:
                first = entry.seconds() / (entry.count or 1)
                times[entry.name] = [] if self._rounds else [first]
            except PeerError as error:
                if entry is entries[0]:
                    raise  # the others are compared with it
                self.skip(f"{row}, {entry.name}", str(error))
        entries = [entry for entry in entries if entry.name in times]
        for _ in range(self._rounds):
            for entry in entries:
                times[entry.name].append(entry.seconds() / (entry.count or 1))
        for entry in entries:
            seconds = times[entry.name]
            value = statistics.median(seconds)
            if entry.count:
                compared = ratios(times, entry.name, entries[0].name) if len(entries) > 1 else ()
                self.note(row, batch, entry.name, 1 / value, "img/s", compared, seconds)
            else:
                self.note(row, batch, entry.name, value, "s", (), seconds)
        return times

    def head(self) -> None:
        """Prints the header of the table."""
        names = (
            f"{'row':<9} | batch | {'entry':<36} | {'value':>14} | {'time relative to first':<22}"
        )
        print(f"| {names} |\n|---|--:|---|--:|---|", flush=True)

    def save(self) -> None:
        """Writes the results so far as JSON."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(self.contents, indent=1) + "\n")


def ratios(times: Times, name: str, reference: str) -> list[float]:
    """Returns the time of an entry relative to a reference, by round."""
    return [own / other for own, other in zip(times[name], times[reference], strict=True)]
