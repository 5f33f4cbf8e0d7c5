"""Which trainers give the right numbers."""

from memformer_pl.errors import UsageError

PRECISIONS = ("32-true", "64-true", "bf16-mixed", "bf16-true")
STRATEGIES = ("auto", "ddp", "ddp_spawn", "ddp_fork", "ddp_notebook", "DDPStrategy", "SingleDeviceStrategy")


def check_trainer(*, strategy: str, precision: str) -> None:
    """Refuse a trainer under which training would go wrong, with or without a word.

    Raises:
        UsageError: The precision scales losses, once for each segment; or the strategy splits parameters, which manual
            optimization does not support.
    """
    if precision not in PRECISIONS:
        raise UsageError(
            f"precision {precision!r} is not supported: choose one of {', '.join(PRECISIONS)} (float16 needs its loss "
            "scaled, which would compound over the segments of a window)"
        )
    if strategy not in STRATEGIES:
        raise UsageError(
            f"strategy {strategy!r} is not supported: choose auto or ddp (others split parameters or gradients, which "
            "manual optimization through segments does not allow)"
        )
