"""The gradient of the return of episodes that a model plays itself: REINFORCE, with the mean of lanes that share an
environment's seed as the baseline, or several steps for what was played, clipped as in PPO.

B  lanes     T  steps of an episode     L  tokens of a segment
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor
from torch.nn import functional as F

from memformer_pl.acting.corpus import Episodes
from memformer_pl.acting.environments import TokenEnvironment
from memformer_pl.acting.playing import Played, play
from memformer_pl.contract import Segment, SegmentModel
from memformer_pl.data.corpora.corpus import Split
from memformer_pl.data.lanes import Rollout
from memformer_pl.errors import UsageError, require_sizes
from memformer_pl.layers.dropout import bits_at, random_bits


@dataclass(frozen=True, kw_only=True)
class Acting:
    """Play episodes instead of reading documents, and follow the gradient of their return.

    Each lane of a rollout is one whole episode. ``group`` neighbouring lanes share the environment's seed, so what
    makes one of them better than the others is its actions. The advantage of an action is the discounted sum of the
    rewards from its step on, less the mean of that of the other lanes of the group, divided by the root of the mean
    square of all advantages of the rollout. What is minimised is the mean of ``advantage * -log p(action)``.

    Where all lanes of a group do the same, nothing is learned, and a policy that is sure stays so. ``entropy`` adds the
    surprise of an action to its advantage, less the mean: the gradient of the policy's entropy.

    With several ``epochs``, as many rollouts in turn train on the same episodes. All but the first follow the gradient
    of PPO's clipped objective (Schulman et al. 2017, arXiv 1707.06347): an advantage is multiplied by the ratio of the
    action's probability now to that with which it was drawn, and counts nothing where the ratio is more than ``clip``
    beyond 1, on the side to which the advantage pulls.

    With ``imitate`` the model learns to predict the actions of the corpus's policy, as it would learn any corpus, and
    plays in validation and tests alone, for its return.

    Args:
        group: Lanes that share a seed, at least 2; must divide the lanes of each process.
        discount: By what a reward one step later is multiplied, from 0 to 1. With 0 an action answers for the reward of
            its own step alone.
        entropy: What a nat of surprise adds to an advantage, at least 0.
        epochs: Rollouts that train on the same episodes; with 1 each is played anew.
        clip: How far a ratio of probabilities may be from 1, above 0.
        imitate: Learn from the actions of the corpus's policy instead of from reward.

    Raises:
        UsageError: A value is out of range, or ``imitate`` is on with several ``epochs``.
    """

    group: int = 8
    discount: float = 1.0
    entropy: float = 0.0
    epochs: int = 1
    clip: float = 0.2
    imitate: bool = False

    def __post_init__(self) -> None:
        require_sizes(least=2, group=self.group)
        if not 0 <= self.discount <= 1:
            raise UsageError(f"discount must be from 0 to 1, got {self.discount}")
        if not 0 <= self.entropy < math.inf:
            raise UsageError(f"entropy must be at least 0, got {self.entropy}")
        require_sizes(epochs=self.epochs)
        if not self.clip > 0:
            raise UsageError(f"clip must be above 0, got {self.clip}")
        if self.imitate and self.epochs > 1:
            raise UsageError(f"imitate plays nothing to train on several times: leave out epochs, got {self.epochs}")


class Kept(NamedTuple):
    """Episodes that further steps train on, with lanes first in every field."""

    played: Played
    documents: Int[Tensor, " B"]
    """Number of the document that each lane has played."""


def acts(acting: Acting | None) -> bool:
    """Whether a model reads what it does itself, in training and validation."""
    return acting is not None and not acting.imitate


class Player:
    """Turns the rollouts of an :class:`Episodes` corpus into what a model does in its episodes.

    Args:
        acting: Options.
        data: Has the corpus, ``seed``, ``segment_length`` and ``horizon``; a rollout must hold an episode, and no
            segment more.
        rank: Number of this process. What is played does not depend on how many there are.
        sum_over_ranks: Sums a tensor over all processes.

    Raises:
        UsageError: The corpus has no environment, or ``horizon`` does not fit its episodes.
    """

    def __init__(
        self,
        acting: Acting,
        data: Any,
        *,
        rank: int = 0,
        sum_over_ranks: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> None:
        corpus = getattr(data, "corpus", None)
        if not isinstance(corpus, Episodes):
            raise UsageError(f"acting needs data of the corpus Episodes, got {type(corpus or data).__name__}")
        needed = -(-corpus.tokens // data.segment_length)
        if data.horizon != needed:
            raise UsageError(
                f"an episode of {corpus.environment} has {corpus.tokens} tokens, {needed} segments of "
                f"{data.segment_length}: set data.horizon to {needed}, got {data.horizon}"
            )
        self.acting, self.corpus = acting, corpus
        self._seed, self._rank, self._sum_over_ranks = data.seed, rank, sum_over_ranks
        self._environments: list[TokenEnvironment] = []
        self.kept: Kept | None = None
        """What the next rollouts of training train on again; None without further epochs."""
        self.clipped: Float64[Tensor, ""] | None = None
        """Share of the actions of the last rollout of training that were clipped; None in a first epoch."""

    def __call__(
        self, model: SegmentModel, rollout: Rollout, split: Split, *, number: int = 0
    ) -> tuple[Rollout, Float64[Tensor, " episodes"] | None]:
        """Play the episodes of a rollout; those of training in groups, with advantages as weights.

        With ``imitate`` the rollout stays as it is, and that of training is not played.

        What is drawn depends on the seed of the data, ``number``, the lane and its episode, and on no stream.

        Args:
            model: In evaluation mode.
            rollout: Begins an episode in each lane that has not ended.
            split: Where it is from.
            number: Of the rollout; another one draws other actions in the same episodes.

        Returns:
            The rollout as it was played, and the return of each episode, if any was played.

        Raises:
            UsageError: The lanes of training are not groups.
        """
        indices = rollout.documents[0].cpu()
        if split == "train":
            return (rollout, None) if self.acting.imitate else self._trained(model, rollout, indices, number=number)
        seeds = [self.corpus.seed_of(split, max(index, 0)) for index in indices.tolist()]
        played, there = self._play(model, seeds, number=number), indices >= 0
        if self.acting.imitate:
            return rollout, played.returns[there]
        # a lane that has ended plays an episode that does not count
        counted = played._replace(acted=played.acted & there[:, None])
        return with_actions(rollout, counted, None), played.returns[there]

    def _trained(
        self, model: SegmentModel, rollout: Rollout, documents: Int[Tensor, " B"], *, number: int
    ) -> tuple[Rollout, Float64[Tensor, " B"]]:
        """A rollout of training: played, or once more what was played before."""
        again = self.kept is not None and number % self.acting.epochs > 0
        kept = self.kept if again else self._play_groups(model, documents, number=number)
        assert kept is not None
        self.kept, self.clipped = kept if self.acting.epochs > 1 else None, None
        device = rollout.documents.device
        rollout = rollout._replace(documents=kept.documents.to(device).expand_as(rollout.documents))
        weights = self._weights(kept.played, device=device)
        if again:
            weights = self._clipped(weights, kept.played, surprise_now(model, rollout, kept.played), device=device)
        return with_actions(rollout, kept.played, weights), kept.played.returns

    def _clipped(
        self, weights: Float64[Tensor, "B T"], played: Played, surprise: Float64[Tensor, "B T"], *, device: torch.device
    ) -> Float64[Tensor, "B T"]:
        """The weights whose gradient is that of PPO's objective, for a model to which actions are a surprise now."""
        ratio = (played.surprise - surprise).exp()
        beyond = (ratio - 1) * weights.sign() > self.acting.clip
        clipped, acted = self._sum_over_ranks(torch.stack((beyond.sum(), played.acted.sum())).to(device)).unbind()
        self.clipped = clipped.double() / acted
        return (weights * ratio).masked_fill(beyond, 0.0)

    def _play_groups(self, model: SegmentModel, documents: Int[Tensor, " B"], *, number: int) -> Kept:
        """Play the episodes of training, each group those of its first lane."""
        group = self.acting.group
        if len(documents) % group:
            raise UsageError(
                f"each process plays {len(documents)} lanes, which are not groups of {group}: set data.batch_size to a "
                "multiple of group times the number of processes"
            )
        documents = documents[::group].repeat_interleave(group)
        seeds = [self.corpus.seed_of("train", index) for index in documents.tolist()]
        return Kept(self._play(model, seeds, number=number), documents)

    def _weights(self, played: Played, *, device: torch.device) -> Float64[Tensor, "B T"]:
        """Advantages of all processes in units of their spread, and surprise above its mean.

        Args:
            played: The episodes.
            device: Where processes exchange sums.
        """
        above = advantages(played, group=self.acting.group, discount=self.acting.discount)
        sums = torch.stack((above.square().sum(), played.surprise.sum(), played.acted.sum()))
        squares, surprise, acted = self._sum_over_ranks(sums.to(device)).cpu().unbind()
        if squares > 0:
            above = above / (squares / acted).sqrt()
        return above + self.acting.entropy * (played.surprise - surprise / acted) * played.acted

    def _play(self, model: SegmentModel, seeds: Sequence[int], *, number: int) -> Played:
        self._environments += [self.corpus.make() for _ in range(len(seeds) - len(self._environments))]
        lanes = torch.arange(len(seeds)) + self._rank * len(seeds)
        streams = lanes
        for field in (torch.tensor(seeds), torch.tensor(number), torch.tensor(self._seed)):
            streams = bits_at(streams, field)
        bits = random_bits(streams, first=0, count=self._environments[0].steps)
        uniform = ((bits >> 11) & ((1 << 53) - 1)).double() / (1 << 53)
        return play(model, self._environments[: len(seeds)], seeds, uniform)


def advantages(played: Played, *, group: int, discount: float) -> Float64[Tensor, "B T"]:
    """What the rewards from each step on have above the mean of those of the other lanes of a group.

    0 behind the end of an episode, and everywhere in a group whose lanes do equally well.
    """
    to_go = torch.zeros_like(played.rewards)
    following = torch.zeros_like(to_go[:, 0])
    for t in reversed(range(to_go.shape[1])):
        following = played.rewards[:, t] + discount * following
        to_go[:, t] = following
    of_group = to_go.view(-1, group, to_go.shape[1])
    above = (of_group - of_group.mean(1, keepdim=True)) * group / (group - 1)
    alike = (of_group == of_group[:, :1]).all(1, keepdim=True)  # the mean of equal numbers is rounded
    return above.masked_fill(alike, 0.0).flatten(0, 1) * played.acted


@torch.no_grad()
def surprise_now(model: SegmentModel, rollout: Rollout, played: Played) -> Float64[Tensor, "B T"]:
    """Nats of each action that was played for a model as it is now, on the CPU; 0 behind the end of an episode.

    Args:
        model: In evaluation mode.
        rollout: Every lane of it begins an episode.
        played: The episodes.
    """
    state, losses = model.initial_state(len(played.tokens)), []
    for segment in with_actions(rollout, played, None).segments:
        output, state = model(segment, state)
        losses.append(output.token_losses)
    nats: Tensor = torch.cat(losses, dim=1)[:, 1 : played.tokens.shape[1] : 2].double().cpu()
    return nats


def with_actions(rollout: Rollout, played: Played, weights: Float[Tensor, "B T"] | None) -> Rollout:
    """A rollout that reads what was played instead; its targets are the actions.

    Args:
        rollout: Every lane of it begins an episode.
        played: The episodes.
        weights: Of the actions.
    """
    length, count = rollout.segments[0].tokens.shape[1], len(rollout.segments)
    missing = count * length - played.tokens.shape[1]

    def cut(of_tokens: Tensor) -> Tensor:
        return F.pad(of_tokens, (0, missing)).view(-1, count, length).transpose(0, 1)

    exists = played.acted.repeat_interleave(2, dim=1)
    is_action = exists & (torch.arange(exists.shape[1]) % 2 == 1)
    fields = [cut(field) for field in (played.tokens, exists, is_action)]
    weighing = [None] * count
    if weights is not None:
        weighing = list(cut(torch.stack((torch.zeros_like(weights), weights), dim=2).flatten(1).float()))
    segments = []
    for t, (tokens, token_mask, loss_mask) in enumerate(zip(*fields, strict=True)):
        starts = token_mask[:, 0] if t == 0 else torch.zeros_like(token_mask[:, 0])
        continues = t > 0 and bool(token_mask[:, 0].all())
        segments.append(Segment(tokens, token_mask, starts, loss_mask, continues, weights=weighing[t]))
    return rollout._replace(segments=tuple(segments)).map(lambda tensor: tensor.to(rollout.documents.device))
