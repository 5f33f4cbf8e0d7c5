"""Use a trained model token by token: sessions, sampling, and the files that sessions are saved to."""

from memformer_pl.inference.sampling import Sampling
from memformer_pl.inference.session import Session

__all__ = ["Sampling", "Session"]
