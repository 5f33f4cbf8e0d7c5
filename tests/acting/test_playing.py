"""Playing: what a session draws is what the model reads again, and advantages by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import MODELS
from torch import Tensor

from memformer_pl.acting import playing
from memformer_pl.acting.corpus import Episodes
from memformer_pl.acting.environments import TokenEnvironment
from memformer_pl.acting.playing import Played, inverted, play
from memformer_pl.acting.policy_gradient import Acting, Player, advantages, with_actions
from memformer_pl.contract import Segment, SegmentModel, SegmentOutput
from memformer_pl.data import Pydoc, Symbols
from memformer_pl.data.datamodule import SegmentData
from memformer_pl.data.lanes import Rollout
from memformer_pl.errors import UsageError
from memformer_pl.gradients.rollout import add_gradient
from memformer_pl.inference.session import Session

STEPS = 51
NONE = torch.zeros(1, 1).double()
"""Surprise, where it does not matter."""


def model(name: str = "memformer", **sizes: Any) -> SegmentModel:
    built: SegmentModel = MODELS[name](vocab_size=4, segment_length=6, **sizes).eval()
    return built


def episodes(lanes: int = 3, name: str = "memformer", seeds: list[int] | None = None) -> Played:
    torch.manual_seed(0)
    environments = [TokenEnvironment("RepeatFirstEasy") for _ in range(lanes)]
    return play(model(name), environments, seeds or list(range(lanes)), torch.rand(lanes, STEPS).double())


def rollout(lanes: int, *, segments: int = 17) -> Rollout:
    """Segments of six tokens that begin an episode in each lane; what they hold does not matter."""
    data = [torch.zeros(lanes, 6).long(), torch.ones(lanes, 6).bool()]
    cut = [Segment(*data, torch.full((lanes,), t == 0)) for t in range(segments)]
    places = torch.zeros(segments, lanes).long()
    return Rollout(tuple(cut), places, places, 0)


def test_a_token_is_drawn_where_the_cumulative_probability_passes_a_number() -> None:
    log_probs = torch.tensor([[0.5, 0.25, 0.25]] * 5).double().log()
    uniform = torch.tensor([0.0, 0.49, 0.5, 0.75, 0.999999]).double()
    assert inverted(log_probs, uniform).tolist() == [0, 0, 1, 2, 2]


@pytest.mark.parametrize("name", ["memformer", "lstm", "transformer xl", "stable hadamard memory", "titans"])
def test_the_losses_of_what_was_played_are_those_of_the_probabilities_it_was_drawn_from(name: str) -> None:
    """And the first action is the one at which the cumulative probability passes the number."""
    torch.manual_seed(0)
    uniform = torch.rand(3, STEPS).double()
    environments = [TokenEnvironment("RepeatFirstEasy") for _ in range(3)]
    player = model(name)
    played = play(player, environments, [0, 1, 2], uniform)
    again = play(player, environments, [0, 1, 2], uniform)
    assert torch.equal(played.tokens, again.tokens)
    read, state = with_actions(rollout(3), played, None), player.initial_state(3)
    losses, targets = [], []
    for segment in read.segments:
        output, state = player(segment, state)
        losses.append(output.token_losses)
        targets.append(segment.target_mask)
    losses = torch.cat(losses, dim=1)[:, : 2 * STEPS]
    torch.testing.assert_close(played.surprise, losses[:, 1::2].detach(), rtol=1e-6, atol=1e-6)
    assert torch.cat(targets, dim=1)[:, : 2 * STEPS].tolist() == [[False, True] * STEPS] * 3
    others = []
    for action in range(4):
        swapped = played.tokens.clone()
        swapped[:, 1] = action
        first = with_actions(rollout(3), played._replace(tokens=swapped), None).segments[0]
        others.append((-player(first, player.initial_state(3))[0].token_losses[:, 1]).exp())
    below = torch.stack(others, dim=1).cumsum(1)
    drawn = (below <= uniform[:, :1]).sum(1)
    assert drawn.tolist() == played.tokens[:, 1].tolist()


def test_rewards_are_those_of_the_environment_for_these_actions() -> None:
    played = episodes(seeds=[7, 8, 9])
    assert played.acted.all()
    right = played.tokens[:, 1::2] == played.tokens[:, :1]
    torch.testing.assert_close(played.rewards, torch.where(right, 1.0, -1.0).double() / STEPS)
    torch.testing.assert_close(played.returns, played.rewards.sum(1))


def test_an_episode_without_probabilities_has_no_return(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as that of a memory that has overflowed: what was drawn instead means nothing."""

    class Overflowing(Session):
        @property
        def log_probs(self) -> Tensor:
            late = torch.tensor([[False], [True], [False]]) & (self.tokens_read >= 21)[:, None]
            return super().log_probs.masked_fill(late, torch.nan)

    whole = episodes()
    monkeypatch.setattr(playing, "Session", Overflowing)
    played = episodes()
    assert played.rewards.isnan().nonzero().tolist() == [[1, step] for step in range(10, STEPS)]
    assert played.returns.isnan().tolist() == [False, True, False]
    assert torch.equal(played.rewards[[0, 2]], whole.rewards[[0, 2]])


def test_a_lane_whose_episode_has_ended_acts_no_more() -> None:
    torch.manual_seed(0)
    environments = [TokenEnvironment("MineSweeperEasy") for _ in range(8)]
    player = MODELS["lstm"](vocab_size=16, segment_length=6).eval()
    played = play(player, environments, list(range(8)), torch.rand(8, 14).double())
    steps = played.acted.sum(1)
    assert steps.unique().numel() > 1
    for lane, count in enumerate(steps.tolist()):
        assert played.acted[lane].tolist() == [True] * count + [False] * (14 - count)
        assert not played.rewards[lane, count:].any()
        assert not played.tokens[lane, 2 * count :].any()
    read = with_actions(rollout(8, segments=5), played, played.rewards)
    masks = torch.cat([segment.token_mask for segment in read.segments], dim=1)
    assert masks.sum(1).tolist() == (2 * steps).tolist()
    state = player.initial_state(8)
    for segment in read.segments:  # the contract is kept: tokens at the left, and nothing continues a lane that ended
        _, state = player(segment, state)


def test_advantages_by_hand() -> None:
    """Returns of 1, -1, -1, -1: the first is 2 above the mean of the others, each of them 2/3 below."""
    played = Played(
        torch.zeros(4, 2).long(), torch.tensor([[1.0], [-1], [-1], [-1]]).double(), torch.ones(4, 1).bool(), NONE
    )
    found = advantages(played, group=4, discount=1.0)[:, 0]
    torch.testing.assert_close(found, torch.tensor([2.0, -2 / 3, -2 / 3, -2 / 3]).double())


def test_rewards_count_from_their_step_on_and_fade() -> None:
    rewards = torch.tensor([[1.0, 0, 4], [0, 0, 0]]).double()
    played = Played(torch.zeros(2, 6).long(), rewards, torch.ones(2, 3).bool(), NONE)
    to_go = torch.tensor([2.0, 2, 4]).double()  # 1 + 4 / 4, 4 / 2, 4; of the other lane nothing
    torch.testing.assert_close(advantages(played, group=2, discount=0.5), torch.stack((to_go, -to_go)))
    nothing = played._replace(rewards=torch.zeros(2, 3).double())
    assert not advantages(nothing, group=2, discount=0.5).any()


@pytest.mark.parametrize("group", [3, 5, 7, 8, 12])
def test_a_group_whose_lanes_do_equally_well_has_no_advantage(group: int) -> None:
    """Not even what rounding leaves of the mean of equal numbers, which the spread would make large."""
    rewards = (torch.arange(STEPS) % 3 - 1).double().div(STEPS).expand(2 * group, -1).contiguous()
    played = Played(torch.zeros(2 * group, 2 * STEPS).long(), rewards, torch.ones(2 * group, STEPS).bool(), NONE)
    assert not advantages(played, group=group, discount=0.9).any()
    better = played._replace(rewards=torch.cat((rewards[:1] + 0.1, rewards[1:])))
    found = advantages(better, group=group, discount=0.9)
    assert found[:group].all()
    assert not found[group:].any()


def test_groups_do_not_see_each_other_and_steps_that_were_not_acted_weigh_nothing() -> None:
    rewards = torch.tensor([[1.0, 0], [3, 0], [50, 0], [50, 0]]).double()
    acted = torch.tensor([[1, 1], [1, 0], [1, 1], [1, 1]]).bool()
    found = advantages(Played(torch.zeros(4, 4).long(), rewards, acted, NONE), group=2, discount=0.0)
    assert found[:, 1].tolist() == [0.0] * 4
    assert found[2:, 0].tolist() == [0.0] * 2
    assert found[:2, 0].tolist() == [-2.0, 2.0]


@pytest.mark.parametrize("gradient", ["replay", "bptt"])
def test_the_gradient_is_that_of_the_weighted_log_probabilities(gradient: str) -> None:
    def cost(output: SegmentOutput) -> Tensor:
        return output.token_losses.sum()

    played = episodes(lanes=4, seeds=[1, 1, 2, 2])
    weights = advantages(played, group=2, discount=0.9)
    read = with_actions(rollout(4), played, weights)
    trained, plain = model(), model()
    loss, _ = add_gradient(trained, cost, read.segments, trained.initial_state(4), gradient=gradient)
    state, total = plain.initial_state(4), torch.zeros(()).double()
    for t, segment in enumerate(read.segments):
        output, state = plain(segment._replace(weights=None), state)
        first = 6 * t
        for place in range(first, min(first + 6, 2 * STEPS)):
            if place % 2:
                total = total + (output.token_losses[:, place - first] * weights[:, place // 2].float()).sum()
    total.backward()
    torch.testing.assert_close(loss, total.detach(), rtol=1e-10, atol=1e-10)
    for (name, got), expected in zip(trained.named_parameters(), plain.parameters(), strict=True):
        if expected.grad is not None:
            torch.testing.assert_close(got.grad, expected.grad, rtol=1e-9, atol=1e-10, msg=name)


def data(tmp_path: Path, **options: Any) -> SegmentData:
    corpus = Episodes(environment="RepeatFirstEasy", policy="random", episodes=16, tested=6)
    sizes = {"segment_length": 16, "horizon": 7, "batch_size": 8, "interleave": 1, "validation": 0.0, "test": 0.0}
    chosen = {"corpus": corpus, "tokenizer": Symbols(vocab_size=4), "cache": tmp_path, **sizes, **options}
    return SegmentData(**chosen)


def test_a_group_plays_one_episode_and_differs_by_its_actions(tmp_path: Path) -> None:
    chosen = data(tmp_path)
    chosen.setup()
    (first, *_) = chosen.train_dataloader()
    player = Player(Acting(group=4), chosen)
    actor = MODELS["lstm"](vocab_size=4, segment_length=16).eval()
    read, returns = player(actor, first, "train")
    tokens = torch.cat([segment.tokens for segment in read.segments], dim=1)
    for group in (tokens[:4], tokens[4:]):
        assert len(group[:, :102:2].unique(dim=0)) == 1
        assert len(group[:, 1:102:2].unique(dim=0)) == 4
    assert returns.shape == (8,)
    assert torch.equal(read.documents[0], first.documents[0, [0, 0, 0, 0, 4, 4, 4, 4]])  # whose seeds they played
    again, _ = player(actor, first, "train", number=1)
    assert not torch.equal(torch.cat([segment.tokens for segment in again.segments], dim=1), tokens)
    repeated, _ = player(actor, first, "train")
    assert torch.equal(torch.cat([segment.tokens for segment in repeated.segments], dim=1), tokens)


def test_weights_are_advantages_in_units_of_their_spread(tmp_path: Path) -> None:
    chosen = data(tmp_path)
    chosen.setup()
    (first, *_) = chosen.train_dataloader()
    actor = MODELS["lstm"](vocab_size=4, segment_length=16).eval()
    read, _ = Player(Acting(group=4), chosen)(actor, first, "train")
    weights, targets = (
        torch.cat([field(segment) for segment in read.segments], dim=1)
        for field in (lambda segment: segment.weights, lambda segment: segment.target_mask)
    )
    assert not weights[~targets].any()
    torch.testing.assert_close(weights[targets].square().mean(), torch.tensor(1.0))
    # the lanes of a group answer for the same rewards
    torch.testing.assert_close(weights.view(2, 4, -1).sum(1), torch.zeros(2, weights.shape[1]), rtol=0, atol=1e-5)


def test_entropy_adds_surprise_above_its_mean(tmp_path: Path) -> None:
    """The gradient of that is the gradient of entropy: here at the first action, whose four probabilities are known."""
    chosen = data(tmp_path)
    chosen.setup()
    (first, *_) = chosen.train_dataloader()
    actor = MODELS["lstm"](vocab_size=4, segment_length=16).eval()
    plain, more = (Player(Acting(group=4, entropy=entropy), chosen)(actor, first, "train")[0] for entropy in (0.0, 0.5))
    added = torch.cat([b.weights - a.weights for a, b in zip(plain.segments, more.segments, strict=True)], dim=1)
    targets = torch.cat([segment.target_mask for segment in plain.segments], dim=1)
    losses, state = [], actor.initial_state(8)
    for segment in plain.segments:
        output, state = actor(segment, state)
        losses.append(output.token_losses.detach())
    surprise = torch.cat(losses, dim=1)
    expected = 0.5 * (surprise - surprise[targets].mean()) * targets
    torch.testing.assert_close(added, expected.float(), rtol=1e-4, atol=1e-5)


def moved(tmp_path: Path, **options: Any) -> tuple[Player, SegmentModel, Rollout, Rollout]:
    """A player whose model has played and then moved, the rollout as it was played, and the next of the loader."""
    chosen = data(tmp_path)
    chosen.setup()
    (first, second) = list(chosen.train_dataloader())[:2]
    player, actor = (
        Player(Acting(group=4, epochs=3, **options), chosen),
        MODELS["lstm"](vocab_size=4, segment_length=16),
    )
    played, _ = player(actor.eval(), first, "train")
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return player, actor, played, second


def test_later_epochs_follow_the_gradient_of_the_clipped_objective(tmp_path: Path) -> None:
    player, actor, played, second = moved(tmp_path, clip=0.1, entropy=0.02)
    assert player.clipped is None
    read, _ = player(actor, second, "train", number=1)

    def cost(output: SegmentOutput) -> Tensor:
        return output.token_losses.sum()

    add_gradient(actor, cost, read.segments, actor.initial_state(8), gradient="replay")
    found = [parameter.grad.clone() for parameter in actor.parameters() if parameter.grad is not None]
    actor.zero_grad()
    assert player.kept is not None
    state, objective, outside = actor.initial_state(8), torch.zeros(()).double(), 0
    drawn = torch.zeros(8, 112).double()
    drawn[:, 1:102:2] = player.kept.played.surprise
    for t, segment in enumerate(played.segments):
        output, state = actor(segment, state)
        ratio = (drawn[:, 16 * t : 16 * (t + 1)] - output.token_losses).exp()
        advantage = segment.weights
        least = torch.minimum(ratio * advantage, ratio.clamp(0.9, 1.1) * advantage)
        objective = objective + least[segment.target_mask].sum()
        outside += int((least != ratio * advantage)[segment.target_mask].sum())
    (-objective).backward()
    expected = [parameter.grad for parameter in actor.parameters() if parameter.grad is not None]
    assert 20 < outside < 8 * STEPS - 20
    assert player.clipped == outside / (8 * STEPS)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_epochs_train_on_the_episodes_of_the_first(tmp_path: Path) -> None:
    player, actor, played, second = moved(tmp_path)
    for number, again in ((1, True), (2, True), (3, False), (4, True)):
        read, _ = player(actor, second, "train", number=number)
        same = [
            torch.equal(one.tokens, other.tokens) for one, other in zip(read.segments, played.segments, strict=True)
        ]
        assert all(same) == again
        assert torch.equal(read.documents, played.documents) == again
        assert (player.clipped is None) != again
        played = read
    assert Player(Acting(group=4), data(tmp_path)).kept is None


def test_what_is_played_does_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    """The lanes of two processes, each with the sums of both, are those of one."""
    chosen = data(tmp_path)
    chosen.setup()
    (first, *_) = chosen.train_dataloader()
    actor, sums = MODELS["lstm"](vocab_size=4, segment_length=16).eval(), []

    def played(read: Rollout, **options: Any) -> tuple[Tensor, Tensor]:
        found, _ = Player(Acting(group=4), chosen, **options)(actor, read, "train")
        tokens, weights = zip(*((segment.tokens, segment.weights) for segment in found.segments), strict=True)
        return torch.cat(tokens, dim=1), torch.cat(weights, dim=1)

    halves = [first.map(lambda tensor, lanes=lanes: tensor[:, lanes]) for lanes in (slice(0, 4), slice(4, 8))]
    for rank, half in enumerate(halves):
        played(half, rank=rank, sum_over_ranks=lambda tensor: sums.append(tensor) or tensor)
    both = [played(half, rank=rank, sum_over_ranks=lambda _: sum(sums)) for rank, half in enumerate(halves)]
    tokens, weights = (torch.cat(fields) for fields in zip(*both, strict=True))
    expected_tokens, expected_weights = played(first)
    assert torch.equal(tokens, expected_tokens)
    torch.testing.assert_close(weights, expected_weights)


def test_held_out_episodes_are_played_once_each_and_always_alike(tmp_path: Path) -> None:
    chosen = data(tmp_path, evaluation_batch_size=4)
    chosen.setup()
    player, seen = Player(Acting(), chosen), []
    actor = MODELS["lstm"](vocab_size=4, segment_length=16).eval()
    for _ in range(2):
        played = [player(actor, read, "validation") for read in chosen.val_dataloader()]
        assert [len(returns) for _, returns in played] == [4, 2]
        assert not played[1][0].segments[0].token_mask[2:].any()
        seen.append(torch.cat([returns for _, returns in played]))
    assert torch.equal(*seen)
    assert len(seen[0].unique()) > 1


def test_imitation_reads_what_there_is_and_plays_held_out_episodes_alone(tmp_path: Path) -> None:
    chosen = data(tmp_path, evaluation_batch_size=4)
    chosen.setup()
    reader, player = Player(Acting(imitate=True), chosen), Player(Acting(), chosen)
    actor = MODELS["lstm"](vocab_size=4, segment_length=16).eval()
    (first, *_) = chosen.train_dataloader()
    read, returns = reader(actor, first, "train")
    assert read is first
    assert returns is None
    for held_out in chosen.val_dataloader():
        read, returns = reader(actor, held_out, "validation")
        assert read is held_out
        assert torch.equal(returns, player(actor, held_out, "validation")[1])


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has 102 tokens, 7 segments of 16: set data\.horizon to 7, got 8"):
        Player(Acting(), data(tmp_path, horizon=8))
    with pytest.raises(UsageError, match="acting needs data of the corpus Episodes, got Pydoc"):
        Player(Acting(), data(tmp_path, corpus=Pydoc()))
    with pytest.raises(UsageError, match="acting needs data of the corpus Episodes, got NoneType"):
        Player(Acting(), None)
    chosen = data(tmp_path, batch_size=6)
    chosen.setup()
    (first, *_) = chosen.train_dataloader()
    with pytest.raises(UsageError, match=r"process plays 6 lanes, which are not groups of 4: set data\.batch_size"):
        Player(Acting(group=4), chosen)(model("lstm"), first, "train")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group": 1}, "group must be at least 2, got 1"),
        ({"discount": 1.5}, "discount must be from 0 to 1, got 1.5"),
        ({"discount": -0.1}, "discount must be from 0 to 1, got -0.1"),
        ({"entropy": -0.1}, "entropy must be at least 0, got -0.1"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"clip": 0.0}, "clip must be above 0, got 0.0"),
        ({"imitate": True, "epochs": 4}, "imitate plays nothing to train on several times: leave out epochs, got 4"),
    ],
)
def test_a_bad_option_is_refused_with_its_name_and_value(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Acting(**options)
