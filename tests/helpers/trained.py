"""What the commands that use a trained model are tested on: hand-over folders of small models."""

from pathlib import Path

import torch
from models import memformer

from memformer_pl.checkpoints.pretrained import save_pretrained
from memformer_pl.data import BytePairs, Pydoc, Tokenizer
from memformer_pl.models import Memformer


def learned() -> BytePairs:
    """A tokenizer of 300 tokens."""
    tokenizer = BytePairs(vocab_size=300)
    tokenizer.train(document for document, _ in zip(Pydoc().documents(), range(3), strict=False))
    return tokenizer


def write_folder(folder: Path, tokenizer: Tokenizer, *, segment_length: int = 8) -> Memformer:
    """A model in double precision that reads what the tokenizer makes, and its folder."""
    model = memformer(vocab_size=tokenizer.vocab_size, segment_length=segment_length).eval()
    with torch.no_grad():  # else it would hardly prefer one token to another
        model.embedding.weight.mul_(4.0)
    save_pretrained(model, folder, tokenizer=tokenizer.serialize())
    return model
