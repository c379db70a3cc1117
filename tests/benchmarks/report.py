"""What was measured: by turns, as rows of a table, and as JSON."""

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from worker import PeerError

Times = dict[str, list[float]]  # by name, a number a round


class Entry(NamedTuple):
    """One thing that takes turns within a row.

    Attributes:
        who: as in the table.
        seconds: does it once; returns the seconds that it took.
        count: patches of one turn; 0 where seconds themselves are the result.
    """

    who: str
    seconds: Callable[[], float]
    count: int


class Report:
    """Prints each result as it comes.

    Attributes:
        contents: what becomes the JSON.
    """

    def __init__(self, path: Path, rounds: int, **contents: Any) -> None:
        self._path, self._rounds = path, rounds
        self.contents = {**contents, "rounds": rounds, "skipped": {}, "results": []}

    def skip(self, what: str, why: str) -> None:
        """Says what could not be measured."""
        self.contents["skipped"][what] = why
        print(f"left out: {what}: {why}", flush=True)

    def note(
        self,
        row: str,
        batch: int | None,
        who: str,
        value: float,
        unit: str = "",
        ratios: Sequence[float] = (),
        seconds: Sequence[float] = (),
    ) -> None:
        """Adds a result; `ratios` are those of the rounds, of which median and spread are kept."""
        spread = [statistics.median(ratios), min(ratios), max(ratios)] if ratios else None
        result = {"row": row, "batch": batch, "who": who, "value": value, "unit": unit}
        self.contents["results"].append({**result, "ratio": spread, "seconds": list(seconds)})
        number = f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
        compared = "{:.2f} ({:.2f} to {:.2f})".format(*spread) if spread else ""
        print(
            f"| {row:<9} | {batch or '':>5} | {who:<36} | {f'{number} {unit}':>14} "
            f"| {compared:<20} |",
            flush=True,
        )

    def measure(self, row: str, batch: int | None, entries: list[Entry]) -> Times:
        """Warms up, lets all take turns, notes them; returns seconds a patch (or a turn).

        Without rounds the warm-up itself is noted.
        """
        times: Times = {}
        for entry in entries:
            try:
                first = entry.seconds() / (entry.count or 1)
                times[entry.who] = [] if self._rounds else [first]
            except PeerError as error:
                if entry is entries[0]:
                    raise  # there is nothing to compare with
                self.skip(f"{row}, {entry.who}", str(error))
        entries = [entry for entry in entries if entry.who in times]
        for _ in range(self._rounds):
            for entry in entries:
                times[entry.who].append(entry.seconds() / (entry.count or 1))
        for entry in entries:
            seconds = times[entry.who]
            value = statistics.median(seconds)
            if entry.count:
                compared = ratios(times, entry.who, entries[0].who) if len(entries) > 1 else ()
                self.note(row, batch, entry.who, 1 / value, "img/s", compared, seconds)
            else:
                self.note(row, batch, entry.who, value, "s", (), seconds)
        return times

    def head(self) -> None:
        """Prints the table's head."""
        names = f"{'row':<9} | batch | {'who':<36} | {'value':>14} | {'times the first':<20}"
        print(f"| {names} |\n|---|--:|---|--:|---|", flush=True)

    def save(self) -> None:
        """Writes the JSON as far as it is."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(self.contents, indent=1) + "\n")


def ratios(times: Times, who: str, reference: str) -> list[float]:
    """Returns how many times as long one took as the other, by round."""
    return [mine / its for mine, its in zip(times[who], times[reference], strict=True)]
