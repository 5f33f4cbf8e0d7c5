"""Exact gradients through many segments: memory replay back-propagation, and its rivals under one signature.

Usable on its own: it knows no model and no Lightning. ``replay.py`` has the algorithm, ``grouped.py`` the same for a
step with a separate decoder, ``baselines.py`` plain, checkpointed and truncated back-propagation, ``rollout.py`` the
methods by their keys. ``rng.py`` and ``side_effects.py`` make a recomputed step see what it saw the first time.
"""

from memformer_pl.gradients.baselines import bptt, checkpointed, truncated
from memformer_pl.gradients.replay import replay_backward, sparse_replay_backward
from memformer_pl.gradients.rollout import GRADIENTS, Gradient, add_gradient, check_gradient

__all__ = [
    "GRADIENTS",
    "Gradient",
    "add_gradient",
    "bptt",
    "check_gradient",
    "checkpointed",
    "replay_backward",
    "sparse_replay_backward",
    "truncated",
]
