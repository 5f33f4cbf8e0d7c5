"""Analysis of a trained memory: ablation, gradients through time, figures, and the report.

Needs matplotlib, which the extra ``analysis`` installs.
"""

try:
    import matplotlib  # noqa: F401
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError("analyze needs matplotlib: pip install 'memformer-pl[analysis]'") from missing

from memformer_pl.analysis.analyze import Choice, Drawn, Findings, compose, draw, look

__all__ = ["Choice", "Drawn", "Findings", "compose", "draw", "look"]
