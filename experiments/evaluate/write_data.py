"""Write the data of the tasks in this folder: the documents of Python's standard library that the quickstart holds out,
and items made from them.

    python experiments/evaluate/write_data.py --out runs/evaluate

Each item is a place in a document, with all that stands before it as its context:

- ``names.jsonl``: a name that occurred before. Four choices: the name, and three others that occurred before, too.
- ``lines.jsonl``: the rest of a line that occurred before, word for word.
"""

import argparse
import json
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from memformer_pl.data import Stdlib
from memformer_pl.data.packing.splits import TRAIN, VALIDATION, assign_splits, content_hash

SHARE = 0.1
"""Share of the documents that the quickstart holds out."""
LONGEST = 8000
"""Characters of a context."""
NAMES, LINES = 8, 2
"""The most items of a document."""
SHOWN = 8
"""Characters of a line that the context still shows."""
Row = dict[str, object]


def held_out() -> Iterator[str]:
    """The documents, as ``validate`` reads them with the data options of the quickstart."""
    documents = [document.content for document in Stdlib().documents()]
    hashes = np.array([content_hash(content) for content in documents], dtype=np.uint64)
    given = np.full(len(documents), TRAIN, dtype=np.int8)
    splits = assign_splits(hashes, given, validation=SHARE, test=0.0)
    for content, split in zip(documents, splits, strict=True):
        if split == VALIDATION and content:
            yield content.decode()


def names(text: str, chance: random.Random) -> Iterator[Row]:
    """Places where a name is used again, with three other names of the text before."""
    found = list(re.finditer(r"\b[a-zA-Z_]\w{3,}", text[:LONGEST]))
    again = [place for place in found if place[0] in {other[0] for other in found if other.end() < place.start()}]
    for place in sorted(chance.sample(again, min(NAMES, len(again))), key=re.Match.start):
        others = sorted({other[0] for other in found if other.end() < place.start()} - {place[0]})
        if len(others) >= 3:
            choices = [place[0], *chance.sample(others, 3)]
            chance.shuffle(choices)
            yield {"context": text[: place.start()], "choices": choices, "answer": choices.index(place[0])}


def lines(text: str, chance: random.Random) -> Iterator[Row]:
    """Places where a line of at least 20 characters occurs again."""
    found = list(re.finditer(r"^ *(\S.{19,})\n", text[:LONGEST], flags=re.MULTILINE))
    again = [line for line in found if line[1] in {other[1] for other in found if other.end() <= line.start()}]
    for line in sorted(chance.sample(again, min(LINES, len(again))), key=re.Match.start):
        border = line.start(1) + SHOWN
        yield {"context": text[:border], "rest": text[border : line.end(1)]}


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as JSON lines, and say how many."""
    written = [json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in written), encoding="utf-8")
    print(f"{path}: {len(written)} rows")


def main() -> None:
    """Write the three files."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/evaluate"), help="Folder of the files.")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    texts = list(held_out())
    write(out / "documents.jsonl", ({"text": text} for text in texts))
    for name, items in (("names", names), ("lines", lines)):
        write(
            out / f"{name}.jsonl",
            (row for number, text in enumerate(texts) for row in items(text, random.Random(number))),
        )


if __name__ == "__main__":
    main()
