"""The options of bench.py. As a script it only checks them, and needs no packages."""

import argparse
import sys
from pathlib import Path
from typing import NoReturn

ROWS = (
    "train", "epoch", "large", "predict", "tta", "input", "images", "prepare", "memory", "start",
)  # fmt: skip


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message} (see --help)", file=sys.stderr)
        sys.exit(2)


def parse() -> argparse.Namespace:
    """Returns the options; exits with status 2 and one line that names an invalid one."""
    parser = _Parser(
        prog="launch/bench.sh",
        allow_abbrev=False,
        description="Installs histo_jax and the frameworks that it is compared with, and prints a "
        f"table of timings. Rows: {', '.join(ROWS)}",
    )
    parser.add_argument("--rows", default=",".join(ROWS), help="rows to measure, comma-separated")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each row")
    parser.add_argument("--minutes", type=float, default=60, help="start no row after this time")
    parser.add_argument(
        "--json",
        type=Path,
        default=Path(__file__).parents[2] / "runs" / "bench.json",
        help="output file with versions and all timings (runs/bench.json)",
    )
    parser.add_argument("--growth", action="store_true", help="add the row `growth`")
    parser.add_argument(
        "--short", action="store_true", help="a tiny network without rounds, for tests"
    )
    options = parser.parse_args()
    options.rounds = 0 if options.short else options.rounds
    options.rows = options.rows.split(",")
    unknown = set(options.rows) - set(ROWS)
    if unknown:
        parser.error(f"unknown row: {', '.join(sorted(unknown))}")
    if options.growth:
        options.rows.append("growth")
    return options


if __name__ == "__main__":
    parse()
