"""What the tests of the page about Lightning share: its code, a quiet trainer, and double precision."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pages
import torch
from lightning import Trainer
from torch import Tensor, nn

PAGE = "memformer_pl/gradients/tbptt_in_lightning.md"
QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def definitions() -> SimpleNamespace:
    """The names of the page, without its training runs."""
    return pages.run(PAGE, train=False)


def trainer(**options: Any) -> Trainer:
    """A trainer of one epoch that prints nothing and writes nothing."""
    return Trainer(**{**QUIET, "enable_checkpointing": False, "max_epochs": 1, **options})


def in_double(rollout: Sequence[tuple[Tensor, Tensor, Tensor]]) -> list[tuple[Tensor, Tensor, Tensor]]:
    return [(inputs.double(), targets.double(), starts) for inputs, targets, starts in rollout]


def zeros(module: Any) -> tuple[Tensor, Tensor]:
    """The initial state of a forecaster of four lanes, in double precision."""
    return torch.zeros(1, 4, module.lstm.hidden_size).double(), torch.zeros(1, 4, module.lstm.hidden_size).double()


def gradients(*modules: nn.Module) -> list[Tensor | None]:
    """Take the gradients of modules away."""
    grads = [parameter.grad for module in modules for parameter in module.parameters()]
    for module in modules:
        module.zero_grad()
    return grads


def assert_close(one: Any, other: Any) -> None:
    """Equal to 1e-12, of large numbers relatively: sums of losses are in the thousands, and the last bit of one of them
    is more than 1e-12."""
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
