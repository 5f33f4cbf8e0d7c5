"""What a trained memory does: reading with less of it, gradients through time, figures, and the report.

Draws with matplotlib, which comes with the extra ``analysis``.
"""

try:
    import matplotlib  # noqa: F401
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError("analyze needs matplotlib: pip install 'memformer-pl[analysis]'") from missing

from memformer_pl.analysis.analyze import Choice, Drawn, Findings, compose, draw, look

__all__ = ["Choice", "Drawn", "Findings", "compose", "draw", "look"]
