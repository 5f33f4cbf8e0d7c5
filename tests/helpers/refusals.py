"""What a command that refuses to run leaves behind."""

from conftest import Outcome


def refused(outcome: Outcome, *, code: int) -> str:
    """The one line that a refused command prints, nothing having been trained."""
    assert outcome.code == code, outcome
    (line,) = outcome.errors
    assert not any(noise in outcome.output for noise in ("Traceback", "usage:", "Trainer.fit"))
    assert len(line) < 300
    return line
