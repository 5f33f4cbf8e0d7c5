"""How many rows of a table of values are ever looked up."""

from collections.abc import Mapping
from functools import partial

import torch
from jaxtyping import Bool, Int
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from memformer_pl.layers.ultra_memory import KeyedValues
from memformer_pl.training.distributed import sum_over_ranks
from memformer_pl.training.task import SegmentTask


class RowsHit(Callback):
    """Log in every validation which share of the rows of a table any token looks up.

    For each layer with ``UltraMemory`` or ``ProductKeys`` the share is logged as ``rows_hit/LAYER``, such as
    ``rows_hit/blocks.1.ffn``. A row that is never hit is a dead weight. Where lanes are ragged, what stands in empty
    places counts as a token too. For a model without such a layer nothing is logged.
    """

    logs = ("rows_hit/",)
    """Prefix of the metrics that this callback logs."""

    def __init__(self) -> None:
        self._hit: dict[str, Bool[Tensor, " rows"]] = {}
        self._hooks: list[RemovableHandle] = []

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch the picks of every table, except in Lightning's sanity check."""
        assert isinstance(pl_module, SegmentTask)
        if trainer.sanity_checking:
            return
        for name, layer in tables(pl_module.model).items():
            hit = self._hit[name] = torch.zeros(len(layer.values), dtype=torch.bool, device=layer.values.device)
            self._hooks.append(layer.picked.register_forward_hook(partial(_mark, hit)))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the shares. Collective."""
        hit = {name: sum_over_ranks(rows.float()) > 0 for name, rows in self._hit.items()}
        pl_module.log_dict({f"rows_hit/{name}": rows.float().mean() for name, rows in hit.items()}, sync_dist=True)
        self._forget()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop watching if a validation was interrupted."""
        self._forget()

    def _forget(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hit, self._hooks = {}, []


def tables(model: nn.Module) -> Mapping[str, KeyedValues]:
    """The layers of a model that look up values, by their names."""
    return {name: part for name, part in model.named_modules() if isinstance(part, KeyedValues)}


def _mark(hit: Bool[Tensor, " rows"], probe: nn.Module, args: object, addresses: Int[Tensor, "N P"]) -> None:
    """Mark the rows of addresses."""
    hit[addresses.flatten() % len(hit)] = True
