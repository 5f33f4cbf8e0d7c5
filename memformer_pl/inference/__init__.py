"""Use a trained model token by token: sessions, sampling, and saved sessions."""

from memformer_pl.inference.sampling import Sampling
from memformer_pl.inference.session import Session

__all__ = ["Sampling", "Session"]
