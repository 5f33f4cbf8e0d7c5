"""Returns of scripted policies in environments of POPGym: ``python experiments/acting/scripted.py RepeatFirstHard``.

Prints the rows of the table in ``README.md``.
"""

from argparse import ArgumentParser

import numpy as np

from memformer_pl.acting.environments import TokenEnvironment
from memformer_pl.acting.experts import PolicyName, follow, scripted_policy
from memformer_pl.errors import UsageError


def returned(environment: TokenEnvironment, name: PolicyName, *, seed: int) -> float:
    """The return of one episode."""
    act = scripted_policy(name, environment, np.random.default_rng(seed))
    return sum(follow(act, environment, seed=seed).rewards)


def in_words(environment: TokenEnvironment, name: PolicyName, *, episodes: int) -> str:
    """Mean and standard deviation over episodes; empty if there is no such policy."""
    try:
        found = [returned(environment, name, seed=seed) for seed in range(episodes)]
    except UsageError:
        return ""
    return f"{np.mean(found):.2f} ± {np.std(found, ddof=1):.2f}"


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("environments", nargs="+", help="such as RepeatFirstHard")
    parser.add_argument("--episodes", type=int, default=100)
    given = parser.parse_args()
    for name in given.environments:
        environment = TokenEnvironment(name)
        expert, random = (in_words(environment, which, episodes=given.episodes) for which in ("expert", "random"))
        print(f"| {name} | {environment.steps} | {expert} | {random} |")
