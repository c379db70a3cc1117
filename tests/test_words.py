"""The project speaks the field's language: coined words of 0.1.0 must not come back.

    pytest -q tests/test_words.py            as a test
    python tests/test_words.py [FOLDER]      prints what another checkout contains

Three lists, each with the standard word: identifiers, keys of JSON and CSV files, and phrases of
prose (comments, docstrings, messages, help, docs). Ordinary English is not on them, nor are the
config fields of 0.1.0, such as `data.on_damaged`.
"""

import ast
import functools
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
AREAS = ("histo_jax", "configs", "launch", "tests", "docs", "README.md", "CHANGELOG.md")
# Config fields and their choices keep the names of 0.1.0; a side alone is that of a square.
ALLOWED = {"on_damaged", "ON_DAMAGED", "side"}
# Code that reads files of 0.1.0 names their keys in a constant of this name.
_OLD_KEYS = "OLD_KEYS"

# Parts of identifiers: `sides` is found in `both_sides` and in `BothSides`.
PARTS = {
    "side": "split, subset",
    "sides": "splits, subsets",
    "honest": "slide_disjoint",
    "member": "trained model, run",
    "members": "ensemble, runs",
    "judged": "evaluated",
    "claim": "acquire",
    "claimed": "acquired",
    "damaged": "corrupt",
    "damage": "corruption",
    "aside": "quarantine",
    "mend": "fix",
    "remedy": "fix",
    "spared": "specificity",
    "verbs": "commands",
    "said": "the value's own name",
    "told": "the value's own name",
    "asked": "the value's own name",
    "wanted": "the value's own name, such as requested",
}
# Whole identifiers, without leading underscores.
IDENTIFIERS = {
    "tracked": "session",
    "writes": "is_primary",
    "is_writer": "is_primary",
    "give_roles": "set_primary",
    "own_rows": "local_slice",
    "agreement": "consensus",
    "meet": "warm_up_collectives",
    "not_for_ever": "join_timeout",
    "GO_ON": "CONTINUE",
    "LEAVE": "STOP",
    "Examples": "Dataset",
    "one_pass": "eval_batches",
    "AT_ONCE": "CHUNK_ELEMENTS",
    "averages": "tta, or ema",
    "averaged": "ema",
    "best_weights": "eval_weights",
    "deviation": "std",
    "normalisation": "channel_stats",
    "ExpectedError": "UserError",
    "most_wrong": "highest_loss",
    "least_sure": "most_uncertain",
    "false_alarms": "false_positive_rate",
    "seen": "the value's own name",
    "look": "what it does, such as inspect",
}
# Identifiers that are coined words in one part of the package only.
LOCAL = {
    "histo_jax/models": {
        "pieces": "output phases",
        "copies": "orientations",
        "gain": "folded scale",
        "turn": "random_d4, orientation",
    },
    "histo_jax/training/augmentation.py": {"turn": "random_d4", "mix": "mixup", "share": "lam"},
    "histo_jax/training/placement.py": {"everywhere": "replicated"},
    "histo_jax/distributed": {
        "hosts": "processes",
        "batched": "batch_sharding",
        "spread": "make_global_array",
        "everywhere": "replicated",
    },
    "histo_jax/data": {"ahead": "prefetch", "control": "colour_histogram_baseline"},
    "histo_jax/report": {"control": "colour_histogram_baseline"},
}
# Keys and columns of files, and fields of TensorBoard.
KEYS = {
    "honest": "slide_disjoint",
    "members": "runs",
    "sides": "subsets",
    "near": "near_duplicates",
    "damaged": "corrupt",
    "false_alarms": "false_positive_rate",
    "spared": "specificity",
    "most wrong": "highest loss",
    "least sure": "most uncertain",
}
# Phrases; a space stands for any white space.
PHRASES = {
    r"(?:two|both) sides": "two splits",
    r"(?:training|validation|test) sides?": "split",
    r"(?:of|in) (?:a|the|one|this|each) side\b(?! of)": "split",
    r"sides? (?:lacks?|trains?|validates?|that|which)": "split",
    r"who (?:trains?|validates?|tests?|is waited|does not)": "training and validation split",
    r"do(?:es)? not come\b(?! (?:back|from))": "did not join, is missing",
    r"waited for for": "waits for",
    r"honest(?:ly)?": "slide-disjoint",
    r"members?": "run, trained model",
    r"claim(?:s|ed)?": "acquire",
    r"judg(?:es?|ed|ing)": "evaluate, score",
    r"damaged?": "corrupt",
    r"(?:put|puts|set|sets) aside": "quarantine, move",
    r"mend(?:s|ed)?": "fix",
    r"remed(?:y|ies)": "fix",
    r"(?:speaks?|spoke|spoken) (?:for|of|against)": "supports, indicates, is evidence of",
    r"(?:is|are|be|was|were) (?:told|said)\b": "is reported, is logged",
    r"told apart": "distinguished",
    r"without a word": "without a message",
    r"says? nothing": "does not indicate",
    r"(?:has|have|had) said": "wrote, reported",
    r"look(?:s|ed|ing)? at\b": "read, check, inspect",
    r"looks? (?:a|the|this) machine over": "check",
    r"stand(?:s|ing)? (?:there|twice|on|in|beside|at|between|inside|behind|above|once)\b":
        "is, is stored, occurs",
    r"stood (?:there|twice|on|in|beside|at)\b": "was",
    r"what stands": "what is",
    r"where (?:\w+ ){1,3}(?:lies?|stands?)\b": "where it is stored",
    r"(?:lies?|lay|lying) (?:on|in|there|beside|here|side|idle)\b": "is, is stored",
    r"to lie\b": "to be stored",
    r"(?:go|goes|went|going) on\b": "continue, resume",
    r"(?:begun|began|begins?) (?:anew|afresh)": "restart",
    r"\banew\b": "again",
    r"once more": "again; rerun",
    r"starts? (?:it |them |all )?again": "rerun",
    r"started again": "rerun",
    r"most wrong": "highest loss",
    r"least sure": "most uncertain",
    r"draw the line": "decision threshold",
    r"false alarms?": "false positives",
    r"spared": "specificity",
    r"drawn (?:slides?|tissue|by a)": "synthetic slides",
    r"slides? (?:are|is) drawn": "slides are generated",
    r"verbs?": "command",
    r"(?:data|other|each|these|the) rooms?": "package, module",
    r"the house": "the package",
    r"at hand": "available",
    r"lets? go of": "releases",
    r"of the (?:least|most)\b": "with the lowest, the highest",
    r"in vain": "to no effect",
    r"is no (?:folder|file|directory|number|run|text|field|slide|recipe|package|module|path|job)":
        "is not a",
    r"nobody's": "unowned",
    r"taken for (?:whole|damage|copies)": "mistaken for, treated as",
    r"made ready": "prepared",
    r"the same command (?:goes|follows|begins)": "rerun the command",
    r"by what they (?:say|said)": "by their content",
    r"(?:hands?|handed) (?:on|over)\b": "pass",
    r"fills? up\b": "pad",
    r"filled up\b": "padded",
    r"let it be\b": "leave it",
    r"(?:the )?way of teaching notebooks": "the usual code of teaching notebooks",
}  # fmt: skip


class Hit(NamedTuple):
    """A coined word in a file."""

    file: Path
    line: int
    word: str
    standard: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.word!r}: write {self.standard}"


@functools.cache
def _phrases() -> re.Pattern[str]:
    """One pattern; group names are the positions in `PHRASES`."""
    spaced = (pattern.replace(" ", r"\s+") for pattern in PHRASES)
    parts = (f"(?P<p{index}>{pattern})" for index, pattern in enumerate(spaced))
    return re.compile(rf"(?<![\w-])(?:{'|'.join(parts)})(?![\w-])", re.IGNORECASE)


def in_prose(text: str) -> Iterator[tuple[int, str, str]]:
    """The offset, the words and the standard of each coined phrase."""
    for match in _phrases().finditer(text):
        index = int(match.lastgroup[1:])
        yield match.start(), " ".join(match[0].split()), [*PHRASES.values()][index]


def in_part(name: str, file: Path) -> str | None:
    """The standard word for a name that is a coined word in this part of the package only."""
    return next(
        (
            names[name]
            for place, names in LOCAL.items()
            if file.is_relative_to(place) and name in names
        ),
        None,
    )


def in_identifier(name: str, file: Path) -> str | None:
    """The standard word for a coined identifier, None if there is nothing to change."""
    if name in ALLOWED:
        return None
    bare = name.strip("_")
    if standard := in_part(bare, file):
        return standard
    if bare in IDENTIFIERS:
        return IDENTIFIERS[bare]
    words = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", bare).lower().split("_")
    return next((PARTS[word] for word in words if word in PARTS), None)


def identifiers(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """The line and the text of each name that a module defines or uses; not what it imports."""
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        for field in ("id", "attr", "arg", "name", "asname"):
            value = getattr(node, field, None)
            if isinstance(value, str):
                yield line, value.rpartition(".")[2]


def keys(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """The line and the text of each string that may be a key: not a docstring, not an f-string."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def prose(text: str) -> Iterator[tuple[list[int], str]]:
    """Comments and strings of Python code, adjacent ones joined: the line of each character."""
    kind, lines, joined = "", [], ""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        name = tokenize.tok_name[token.type]
        if name in ("NL", "FSTRING_START", "FSTRING_END") or (kind and name == "NEWLINE"):
            continue
        new = {"COMMENT": "comment", "STRING": "string", "FSTRING_MIDDLE": "string"}.get(name, "")
        if new != kind and joined:
            yield lines, joined
            lines, joined = [], ""
        kind = new
        if not new:
            continue
        part = token.string
        if name == "COMMENT":
            part = part.lstrip("# ") + " "
        elif name == "STRING":
            # Quotes become blanks, so that every character keeps its line.
            part = re.sub(r"^\w*?(\"{3}|'{3}|\"|')|(\"{3}|'{3}|\"|')$", "", part)
        first = token.start[0]
        for character in part:
            lines.append(first)
            first += character == "\n"
        joined += part
    if joined:
        yield lines, joined


def in_python(path: Path, file: Path) -> Iterator[Hit]:
    text = path.read_text()
    exempt = {n for n, line in enumerate(text.splitlines(), start=1) if _OLD_KEYS in line}
    yield from (hit for hit in _in_python(text, file) if hit.line not in exempt)


def _in_python(text: str, file: Path) -> Iterator[Hit]:
    tree = ast.parse(text)
    for line, name in identifiers(tree):
        if standard := in_identifier(name, file):
            yield Hit(file, line, name, standard)
        elif name not in ALLOWED:
            for _, _, standard in in_prose(name.replace("_", " ")):
                yield Hit(file, line, name, standard)
    for line, key in keys(tree):
        if standard := KEYS.get(key) or in_part(key, file):
            yield Hit(file, line, key, standard)
    for lines, part in prose(text):
        for offset, words, standard in in_prose(part):
            yield Hit(file, lines[offset], words, standard)


def in_text(path: Path, file: Path) -> Iterator[Hit]:
    # CHANGELOG.md names the old keys once, in a marked section.
    text = re.sub(
        r"<!-- old names -->.*?<!-- end of old names -->",
        lambda match: "\n" * match[0].count("\n"),
        path.read_text(),
        flags=re.DOTALL,
    )
    for offset, words, standard in in_prose(text):
        yield Hit(file, text.count("\n", 0, offset) + 1, words, standard)
    for number, line in enumerate(text.splitlines(), start=1):
        for name in re.findall(r"\b[A-Za-z]\w*_\w+\b", line):
            if standard := in_identifier(name, file):
                yield Hit(file, number, name, standard)


def hits(root: Path, area: str) -> list[Hit]:
    """All coined words below one folder, or in one file, of a checkout."""
    place = root / area
    paths = sorted(place.rglob("*")) if place.is_dir() else [place]
    found = []
    for path in paths:
        file = path.relative_to(root)
        text_like = path.suffix in (".py", ".md", ".html", ".sh", ".sbatch", ".yaml", "")
        if not path.is_file() or not text_like or path.name == Path(__file__).name:
            continue
        if "__pycache__" in path.parts:
            continue
        if standard := in_identifier(path.stem.removeprefix("test_"), file):
            found.append(Hit(file, 0, path.name, standard))
        found += (in_python if path.suffix == ".py" else in_text)(path, file)
    return sorted(set(found))


@pytest.mark.parametrize("area", AREAS)
def test_no_coined_words(area):
    found = hits(ROOT, area)
    assert not found, "\n" + "\n".join(map(str, found))


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("# goes on where it stopped\n", 1),
        ("# both\n# sides of it\n", 1),
        ('f"{x} is damaged: "\n', 1),
        ('log("the newest checkpoint is put " "aside")\n', 1),
        ('"""Tells who trains\nand who validates."""\n', 2),
        ("members = 1\n", 1),
        ("def both_sides(honest): pass\n", 2),
        ('scores["honest"]\n', 2),  # as a key and as a word
        ("class TestSides: pass\n", 1),
        ("def test_a_run_goes_on_after_a_kill(): pass\n", 1),
        ("x.on_damaged, x.inside, x.stain, x.near, x.found, x.check, x.share\n", 0),
        ("# found near the same share; check side by side, inside the sheet\n", 0),
    ],
)
def test_coined_words_are_noticed(text, count, tmp_path):
    path = tmp_path / "module.py"
    path.write_text(text)
    assert len([*in_python(path, Path("histo_jax/module.py"))]) == count


if __name__ == "__main__":
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT
    every = [hit for area in AREAS if (root / area).exists() for hit in hits(root, area)]
    print(*every, sep="\n")
    print(f"{len(every)} coined words")
