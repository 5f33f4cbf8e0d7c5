"""Environments of POPGym as tokens, scripted policies, and their episodes as documents."""

from pathlib import Path

import jaxtyping
import numpy as np
import pytest

from memformer_pl.acting.corpus import Episodes
from memformer_pl.acting.environments import TokenEnvironment, digits, number, parts
from memformer_pl.acting.experts import backwards, expert, follow, previous, scripted_policy
from memformer_pl.data import Symbols, pack
from memformer_pl.errors import UsageError

SERVED = {  # observations, actions, steps
    "RepeatFirstHard": (4, 4, 831),
    "RepeatPreviousEasy": (4, 4, 51),
    "AutoencodeEasy": (8, 4, 103),
    "CountRecallEasy": (4, 27, 51),
    "BattleshipEasy": (2, 64, 64),
    "MultiarmedBanditEasy": (2, 10, 200),
}


@pytest.mark.parametrize("name", SERVED)
def test_spaces_are_counted_through(name: str) -> None:
    environment = TokenEnvironment(name)
    observations, actions, steps = SERVED[name]
    assert (environment.observations, environment.actions, environment.steps) == (observations, actions, steps)
    assert environment.vocab_size == max(observations, actions)


def test_the_last_part_of_a_value_is_counted_fastest() -> None:
    assert number((1, 3), [2, 4]) == 7
    assert digits(7, [2, 4]) == [1, 3]
    assert number(np.array([2, 5]), [8, 8]) == 21
    assert digits(21, [8, 8]) == [2, 5]
    assert number(3, [4]) == 3
    assert [number(tuple(digits(n, [2, 3, 4])), [2, 3, 4]) for n in range(24)] == list(range(24))


@pytest.mark.parametrize("name", SERVED)
def test_every_observation_is_a_token_and_an_episode_ends_in_time(name: str) -> None:
    environment, random, seen = TokenEnvironment(name), np.random.default_rng(0), []
    for seed in range(3):
        steps, ended = 0, False
        seen.append(environment.reset(seed))
        while not ended:
            observation, reward, ended = environment.step(int(random.integers(environment.vocab_size)))
            seen.append(observation)
            steps += 1
            assert -1 <= reward <= 1
        assert steps <= environment.steps
    assert min(seen) >= 0
    assert max(seen) < environment.observations


def test_an_episode_depends_on_its_seed_and_the_actions_alone() -> None:
    def episode(seed: int) -> list[int]:
        environment = TokenEnvironment("RepeatPreviousEasy")
        return [environment.reset(seed), *(environment.step(0)[0] for _ in range(20))]

    assert episode(3) == episode(3)
    assert episode(3) != episode(4)


def test_a_token_above_the_actions_counts_from_the_first_again() -> None:
    rewards = []
    for token in (1, 5):
        environment = TokenEnvironment("AutoencodeEasy")
        environment.reset(0)
        rewards.append([environment.step(token)[1] for _ in range(103)])
    assert rewards[0] == rewards[1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("RepeatFirstHrad", "there is no environment 'RepeatFirstHrad'. Did you mean RepeatFirstHard?"),
        ("PositionOnlyCartPoleEasy", "observations of PositionOnlyCartPoleEasy must be whole numbers from 0 on, got"),
        ("ConcentrationEasy", "observations of ConcentrationEasy must be at most 65,536 in number, got 6,461"),
        ("HigherLowerEasy", "HigherLowerEasy does not say how long an episode may be"),
    ],
)
def test_an_environment_that_cannot_be_tokens_is_refused(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TokenEnvironment(name)


def test_a_space_that_does_not_begin_at_zero_is_refused() -> None:
    from gymnasium import spaces

    assert parts(spaces.Tuple((spaces.Discrete(2), spaces.MultiDiscrete([3, 4]))), of="x") == [2, 3, 4]
    with pytest.raises(UsageError, match="x must be whole numbers from 0 on"):
        parts(spaces.Discrete(3, start=1), of="x")


def returned(name: str, which: str, seed: int) -> float:
    environment = TokenEnvironment(name)
    act = scripted_policy(which, environment, np.random.default_rng(seed))  # type: ignore[arg-type]
    return sum(follow(act, environment, seed=seed).rewards)


@pytest.mark.parametrize("name", ["RepeatFirstEasy", "RepeatFirstMedium", "RepeatPreviousEasy", "RepeatPreviousHard"])
def test_the_expert_gets_all_there_is_and_a_random_policy_about_one_in_four(name: str) -> None:
    assert returned(name, "expert", 1) == pytest.approx(1.0)
    assert np.mean([returned(name, "random", seed) for seed in range(20)]) == pytest.approx(-0.5, abs=0.1)


@pytest.mark.parametrize("name", ["AutoencodeEasy", "AutoencodeHard"])
def test_the_expert_of_autoencode_gets_all_there_is(name: str) -> None:
    assert returned(name, "expert", 1) == pytest.approx(1.0)


def test_experts_by_hand() -> None:
    assert [previous([5, 6, 7, 8][:n], back=3) for n in (1, 2, 3, 4)] == [5, 5, 5, 6]
    # 4 + suit while cards are shown: 1, 3, 0; then the fourth, 2, and what follows does not count
    shown = [5, 7, 4, 2, 0, 0, 0]
    assert [backwards(shown[:n], suits=4) for n in range(1, 8)] == [0, 0, 0, 2, 0, 3, 1]


def test_an_unknown_policy_or_expert_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no expert of BattleshipEasy is known: take policy=random"):
        expert(TokenEnvironment("BattleshipEasy"))
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # its check of types would come first
    with pytest.raises(UsageError, match="policy must be one of expert, random, got 'best'"):
        scripted_policy("best", TokenEnvironment("RepeatFirstEasy"), np.random.default_rng(0))  # type: ignore[arg-type]


def test_documents_are_episodes_whose_actions_are_predicted(tmp_path: Path) -> None:
    corpus = Episodes(environment="RepeatFirstEasy", episodes=5, tested=3)
    documents = list(corpus.documents())
    assert [document.split for document in documents] == ["train"] * 5 + ["validation"] * 3
    for document in documents:
        tokens = np.frombuffer(document.content, dtype="<u2")
        assert len(tokens) == corpus.tokens == 102
        assert (tokens[1::2] == tokens[0]).all()
        assert document.answers == tuple((2 * place, 2 * place + 2) for place in range(1, 102, 2))
    assert len({document.content for document in documents}) == 8
    packed = pack(corpus, Symbols(vocab_size=corpus.vocab_size), validation=0.0, test=0.0, cache=tmp_path)
    assert len(packed.train) == 5


def test_the_environment_of_a_document_begins_as_the_document_does() -> None:
    corpus = Episodes(environment="AutoencodeEasy", policy="random", episodes=4, tested=2, seed=3)
    environment = corpus.make()
    documents = list(corpus.documents())
    for number_of, (split, index) in enumerate(
        [*(("train", n) for n in range(4)), ("validation", 0), ("validation", 1)]
    ):
        tokens = np.frombuffer(documents[number_of].content, dtype="<u2").tolist()
        observed = [environment.reset(corpus.seed_of(split, index))]  # type: ignore[arg-type]
        observed += [environment.step(action)[0] for action in tokens[1::2]]
        assert observed[:-1] == tokens[::2]


def test_an_episode_that_ends_early_is_followed_by_zeros_that_are_not_predicted() -> None:
    corpus = Episodes(environment="MineSweeperEasy", policy="random", episodes=20, tested=1)
    lengths = set()
    for document in corpus.documents():
        tokens = np.frombuffer(document.content, dtype="<u2")
        steps = len(document.answers)
        assert len(tokens) == 28
        assert not tokens[2 * steps :].any()
        lengths.add(steps)
    assert len(lengths) > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"environment": "BattleshipEasy"}, "no expert of BattleshipEasy is known: take policy=random"),
        ({"episodes": 0}, "episodes must be at least 1, got 0"),
        ({"tested": 0}, "tested must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"seed": 1 << 31}, "seed must be at most 2,147,483,647, got 2147483648"),
    ],
)
def test_a_bad_option_is_refused_with_its_name_and_value(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Episodes(**{"environment": "RepeatFirstEasy", **options})  # type: ignore[arg-type]
