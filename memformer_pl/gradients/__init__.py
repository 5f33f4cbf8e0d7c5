"""Exact gradients through many segments: memory replay back-propagation, and its alternatives under one signature.

Works with any step in plain torch, without a model of this package and without Lightning. ``replay.py`` has the
algorithm, ``grouped.py`` its variant for a step with a separate decoder, ``baselines.py`` plain, checkpointed and
truncated back-propagation, ``rollout.py`` the registry of all methods, ``captured.py`` all but checkpointed ones as one
CUDA graph. ``accumulate.py`` adds the gradients of a segment to ``.grad`` together. ``rng.py`` and ``side_effects.py``
restore random streams and buffers before a step is recomputed.
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
