"""Episodes of a scripted policy, as documents."""

from collections.abc import Iterator, Mapping
from typing import ClassVar

import numpy as np

from memformer_pl.acting.environments import TokenEnvironment
from memformer_pl.acting.experts import PolicyName, follow, scripted_policy
from memformer_pl.data.corpora.corpus import SPLITS, Corpus, Document, Split
from memformer_pl.data.corpora.mqar import SYMBOL
from memformer_pl.errors import require_sizes


class Episodes(Corpus):
    """Episodes of an environment of POPGym: the observations and the actions of a scripted policy in turn, an episode
    each. Only actions are predicted.

    Train on it as on any corpus to imitate the policy. With ``model.acting``, the model acts itself, in the same
    episodes: a document then stands for its environment's seed (``policy_gradient.py``).

    A document has two tokens for each step that an episode may have. If the episode ends before, zeros follow, which
    are not predicted. It needs the tokenizer ``Symbols`` with the same ``vocab_size``. Held-out episodes have seeds of
    their own.

    Args:
        environment: Class name, such as ``RepeatFirstHard``.
        policy: ``expert``, or ``random`` for actions that are equally likely.
        episodes: Number of training episodes.
        tested: Number of held-out episodes.
        seed: Seed of all episodes, below 2 to the power of 31.

    Raises:
        UsageError: There is no such environment, its spaces are not discrete, it has no expert, or a size is out of
            range.
        ModuleNotFoundError: popgym is not installed.
    """

    revision: ClassVar[int] = 1
    """Increases whenever the same arguments give different documents, so that earlier packs are not reused."""

    def __init__(
        self,
        *,
        environment: str,
        policy: PolicyName = "expert",
        episodes: int = 4096,
        tested: int = 64,
        seed: int = 0,
    ) -> None:
        require_sizes(episodes=episodes, tested=tested)
        require_sizes(least=0, most=(1 << 31) - 1, seed=seed)  # of 64 bits, an episode has the lower half
        self.environment: str = environment
        self.policy: PolicyName = policy
        self.episodes, self.tested, self.seed = episodes, tested, seed
        self._made = self.make()
        scripted_policy(policy, self._made, np.random.default_rng(seed))  # raises if there is none

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return self._made.vocab_size

    @property
    def tokens(self) -> int:
        """Tokens of a document."""
        return 2 * self._made.steps

    @property
    def baselines(self) -> Mapping[str, float]:
        """Chance: one action in all."""
        return {"chance": 1 / self._made.actions}

    def make(self) -> TokenEnvironment:
        """Build the environment."""
        return TokenEnvironment(self.environment)

    def seed_of(self, split: Split, index: int) -> int:
        """The environment's seed in an episode of a split."""
        return (self.seed << 32) + len(SPLITS) * index + SPLITS.index(split)

    def documents(self) -> Iterator[Document]:
        """Yield the training episodes, then the held-out ones."""
        counts: tuple[tuple[Split, int], ...] = (("train", self.episodes), ("validation", self.tested))
        for split, count in counts:
            for index in range(count):
                yield self._document(split, index)

    def identity(self) -> Mapping[str, object]:
        """The arguments, the release of POPGym, and :attr:`revision`."""
        from importlib.metadata import version

        given = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return {"corpus": "Episodes", "revision": self.revision, "popgym": version("popgym"), **given}

    def _document(self, split: Split, index: int) -> Document:
        seed = self.seed_of(split, index)
        act = scripted_policy(self.policy, self._made, np.random.default_rng(seed))
        played = follow(act, self._made, seed=seed)
        tokens, read = np.zeros(self.tokens, dtype=SYMBOL), 2 * len(played.actions)
        tokens[:read:2], tokens[1:read:2] = played.observations, played.actions
        size = SYMBOL.itemsize
        return Document(
            tokens.tobytes(),
            name=f"{split} episode {index} of {self.environment}",
            split=split,
            answers=tuple((size * place, size * (place + 1)) for place in range(1, read, 2)),
        )
