"""How many of the values that are asked for B'MOJO still sees: ``python experiments/recall/mqar/stored/seen.py RUNS``.

Each row of B'MOJO is loaded with every seed, from the folder of runs in which ``sweep`` trained it. Prints the share of
questions at which the value stands in the window or among the stored tokens of the last layer, mean and standard error
over seeds. What the fading memory still knows of it is not counted. 64 documents of each length, none of them trained
on.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from memformer_pl import SegmentTask
from memformer_pl.contract import Segment
from memformer_pl.data.corpora.mqar import MQAR, SYMBOL
from memformer_pl.layers.eidetic_memory import EideticBlock
from memformer_pl.models import BMojo
from memformer_pl.sweeps import rows, tables
from memformer_pl.sweeps.runner import Run

TABLE = Path(__file__).with_name("rows.yaml")
DOCUMENTS = 64
LENGTHS = [(64, 4), (128, 8), (256, 16), (512, 32)]
"""Tokens of a document, and its pairs, which stand at its beginning."""


def questions(corpus: MQAR) -> tuple[Tensor, Tensor, Tensor]:
    """Of each held-out document: its tokens, the places of answers, and of the same values among the pairs."""
    documents = [each for each in corpus.documents() if each.split == "validation"]
    tokens = torch.from_numpy(np.stack([np.frombuffer(each.content, SYMBOL) for each in documents]).astype(np.int64))
    asked = torch.tensor([each.answers for each in documents])[..., 0] // SYMBOL.itemsize
    values = tokens[:, 1 : 2 * asked.shape[1] : 2]
    shown = (tokens.take_along_dim(asked, dim=1)[:, :, None] == values[:, None]).int().argmax(2)
    return tokens, asked, 1 + 2 * shown


@torch.no_grad()
def share_seen(model: BMojo, *, length: int, pairs: int) -> float:
    """The share of questions at which the last layer sees the value."""
    corpus = MQAR(vocab_size=model.vocab_size, trained=[(4, 1, 1)], tested=[(length, pairs, DOCUMENTS)], seed=1)
    tokens, asked, shown = questions(corpus)
    shown = shown + 1  # a token enters the model one place after its own, behind START
    seen = asked - shown < model.window
    block, held = model.blocks[-1], list[Tensor]()
    assert isinstance(block, EideticBlock)
    hook = block.held.register_forward_hook(lambda _module, _inputs, output: held.append(output))
    state = model.initial_state(len(tokens))
    for start in range(0, length if model.stored else 0, model.segment_length):
        part = tokens[:, start : start + model.segment_length]
        begins = torch.full((len(part),), start == 0)
        leaving = torch.arange(start, start + part.shape[1]) - model.window
        places = torch.cat((state.places[:, -1], leaving.expand(len(part), -1)), dim=1)
        _, state = model(Segment(part, torch.ones_like(part, dtype=torch.bool), document_start=begins), state)
        lane, number = ((asked >= start) & (asked < start + part.shape[1])).nonzero(as_tuple=True)
        stored = held.pop()[lane, asked[lane, number] - start] & (places[lane] == shown[lane, number, None])
        seen[lane, number] |= stored.any(1)
    hook.remove()
    return float(seen.float().mean())


def main(runs: Path) -> None:
    """Print a line for each row of B'MOJO."""
    table = rows.read(TABLE)
    print(f"| row | seeds | {' | '.join(f'{length} tokens' for length, _ in LENGTHS)} |")
    print(f"|{'---|' * (2 + len(LENGTHS))}")
    for outcome in tables.outcomes(table).values():
        found = []
        for seed in outcome.ended:
            checkpoint = Run(table, outcome.row, seed, runs).checkpoint
            model = SegmentTask.load_from_checkpoint(checkpoint, map_location="cpu").model.eval()
            if isinstance(model, BMojo):
                found.append([share_seen(model, length=length, pairs=pairs) for length, pairs in LENGTHS])
        if found:
            cells = (tables.spread(values).formatted(2) for values in zip(*found, strict=True))
            print(f"| {outcome.row.title} | {len(found)} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
