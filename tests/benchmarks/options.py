"""The options of bench.py; run alone, by any Python without packages, it only checks them."""

import argparse
import sys
from pathlib import Path
from typing import NoReturn

ROWS = ("train", "epoch", "large", "predict", "averaging", "input", "prepare", "memory", "start")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message} (see --help)", file=sys.stderr)
        sys.exit(2)


def parse() -> argparse.Namespace:
    """Returns the options; a wrong one is named in one line, with status 2."""
    parser = _Parser(
        prog="launch/bench.sh",
        allow_abbrev=False,
        description="Installs histo_jax with its peers and prints how they compare. Rows: "
        + ", ".join(ROWS),
    )
    parser.add_argument("--rows", default=",".join(ROWS), help="some of them, by commas")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each entry")
    parser.add_argument("--minutes", type=float, default=60, help="begin no row after these")
    parser.add_argument(
        "--json",
        type=Path,
        default=Path(__file__).parents[2] / "runs" / "bench.json",
        help="file for versions and every round; runs/bench.json",
    )
    parser.add_argument("--growth", action="store_true", help="also from 1,000 to 100,000 patches")
    parser.add_argument("--short", action="store_true", help="a tiny network, no rounds: a test")
    options = parser.parse_args()
    options.rounds = 0 if options.short else options.rounds
    options.rows = options.rows.split(",")
    unknown = set(options.rows) - set(ROWS)
    if unknown:
        parser.error(f"no such row: {', '.join(sorted(unknown))}")
    if options.growth:
        options.rows.append("growth")
    return options


if __name__ == "__main__":
    parse()
