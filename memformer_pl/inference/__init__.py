"""Use a trained model: sessions, sampling, saved sessions, scores of many texts, and the LM evaluation harness."""

from memformer_pl.inference.sampling import Sampling
from memformer_pl.inference.session import Session

__all__ = ["Sampling", "Session"]
