"""A network with a shared shallow part and one deep part for each task.

B  images     C  channels     Y, X  rows and columns     F  features of a deep part     P  deep parts     K  classes
"""

from collections.abc import Sequence
from copy import deepcopy
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from memformer_pl.continual.backbones import Backbone
from memformer_pl.errors import UsageError


class Scores(NamedTuple):
    """What a network says about images."""

    logits: Float[Tensor, "B K"]
    """Of all classes so far, in the order in which they were learned."""
    auxiliary: Float[Tensor, "B A"] | None
    """Of the auxiliary head, which sees the newest deep part alone: all old classes as one, then each new class. None
    for the first task, and for a network that does not grow."""


class ExpandingNet(nn.Module):
    """MEMO's network (Zhou et al., arXiv 2205.13218): ``z = [s_1(g x), ..., s_P(g x)]`` and logits ``W z``.

    The shallow part g is shared, and goes on learning. A task adds a deep part, which starts as a copy of the one
    before; that one is frozen, and stays in evaluation mode, so neither its weights nor the statistics of its norms
    change. The new head keeps the old weights of the old classes.

    With an empty g and whole networks as deep parts it is DER's; with one deep part that never gets another it is a
    plain network, whose head alone grows.

    Ours: the columns of W from old classes to a new deep part are drawn as in any linear layer; so are the rows of new
    classes.

    Args:
        backbone: What the parts are made of.
        sizes: New classes of each task so far.
        shares: Whether the shallow part is shared; otherwise each deep part is a whole network.
        grows: Whether a task adds a deep part.

    Raises:
        UsageError: There is no task, or one without classes.
    """

    def __init__(self, backbone: Backbone, *, sizes: Sequence[int], shares: bool, grows: bool) -> None:
        super().__init__()
        if not sizes or min(sizes) < 1:
            raise UsageError(f"each task must have at least one class, got {list(sizes)}")
        self.grows, self.features = grows, backbone.features
        self.sizes = [sizes[0]]
        shallow, deep = backbone.build_shallow(), backbone.build_deep()
        self.shallow = shallow if shares else nn.Identity()
        self.parts = nn.ModuleList([deep if shares else nn.Sequential(shallow, deep)])
        self.head = nn.Linear(self.features, sizes[0])
        self.auxiliary: nn.Linear | None = None
        for classes in sizes[1:]:
            self.grow(classes)

    @property
    def known(self) -> int:
        """Number of classes of the tasks before the present one."""
        return sum(self.sizes[:-1])

    def stored_bytes(self, tasks: int) -> int:
        """Bytes of the network after so many tasks, 4 for each parameter of its parts.

        Heads and the statistics of norms are not counted: so is the paper's ResNet32 463,504 parameters.
        """
        shared, part = (sum(p.numel() for p in module.parameters()) for module in (self.shallow, self.parts[0]))
        return 4 * (shared + part * (tasks if self.grows else 1))

    def grow(self, classes: int) -> None:
        """Make room for a task: a deep part, if the network grows, and outputs for its classes.

        Args:
            classes: Number of new classes.
        """
        old = self.head
        if self.grows:
            last = self.parts[-1]
            self.parts.append(deepcopy(last))
            last.requires_grad_(False)
            self.auxiliary = nn.Linear(self.features, 1 + classes).to(old.weight)
        self.sizes.append(classes)
        self.head = nn.Linear(self.features * len(self.parts), sum(self.sizes)).to(old.weight)
        with torch.no_grad():
            self.head.weight[: old.out_features, : old.in_features] = old.weight
            self.head.bias[: old.out_features] = old.bias
        self.train(self.training)

    def train(self, mode: bool = True) -> "ExpandingNet":
        """Set the mode of everything but frozen parts, which stay in evaluation mode."""
        super().train(mode)
        for part in self.parts[:-1]:
            part.eval()
        return self

    def extract(self, images: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B PF"]:
        """The features of all deep parts, one after the other."""
        shared = self.shallow(images)
        return torch.cat([part(shared) for part in self.parts], dim=1)

    def forward(self, images: Float[Tensor, "B C Y X"]) -> Scores:
        """Score images."""
        features = self.extract(images)
        auxiliary = None if self.auxiliary is None else self.auxiliary(features[:, -self.features :])
        return Scores(self.head(features), auxiliary)

    @torch.no_grad()
    def align(self) -> float:
        """Scale the head's weights of the new classes, so that their mean norm is that of the old classes.

        Training sees few images of old classes, which makes the new ones' weights larger.

        Returns:
            The factor.
        """
        norms = self.head.weight.norm(dim=1)
        factor = norms[: self.known].mean() / norms[self.known :].mean()
        self.head.weight[self.known :] *= factor
        return float(factor)
