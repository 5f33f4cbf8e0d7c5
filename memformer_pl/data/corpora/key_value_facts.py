"""Facts to be known by heart: the value of a random key, which no text says before it is asked for."""

from collections.abc import Iterator, Mapping
from typing import ClassVar

import numpy as np

from memformer_pl.data.corpora.corpus import Corpus, Document
from memformer_pl.errors import require_sizes

KEY_BYTES = 3


class KeyedFacts(Corpus):
    """Random keys of three bytes and their values, a byte each: what a model holds in its weights.

    A document is a fact, key and value; only the value is predicted. Keys are distinct, values are drawn independently.
    Nothing can be found in the document or guessed from other facts, so right answers count what was learned by heart.
    The training documents and the validation documents are the same facts.

    A document has four tokens with the tokenizer ``Bytes``: give the data a ``segment_length`` of 4.

    Args:
        facts: Number of facts.
        seed: Seed of keys and values.

    Raises:
        UsageError: A number is out of range.
    """

    revision: ClassVar[int] = 1
    """Increases whenever the same arguments give different documents, so that earlier packs are not reused."""

    def __init__(self, *, facts: int = 4096, seed: int = 0) -> None:
        require_sizes(facts=facts, most=1 << 20)
        require_sizes(least=0, seed=seed)
        self.facts, self.seed = facts, seed

    @property
    def baselines(self) -> Mapping[str, float]:
        """Chance: one in all bytes."""
        return {"chance": 1 / 256}

    def documents(self) -> Iterator[Document]:
        """Yield the facts for training, then the same facts for validation."""
        random = np.random.default_rng(self.seed)
        keys = random.choice(1 << 8 * KEY_BYTES, self.facts, replace=False)
        values = random.integers(256, size=self.facts)
        for split in ("train", "validation"):
            for number, (key, value) in enumerate(zip(keys.tolist(), values.tolist(), strict=True)):
                content = key.to_bytes(KEY_BYTES, "big") + bytes([value])
                yield Document(content, name=f"{split} fact {number}", split=split, prompt_length=KEY_BYTES)

    def identity(self) -> Mapping[str, object]:
        """The arguments, and :attr:`revision`."""
        return {"corpus": type(self).__name__, "revision": self.revision, **vars(self)}
