"""What networks are made of: a shallow part and a deep part for images of one size.

B  images     C  channels     Y, X  rows and columns     F  features
"""

from abc import abstractmethod
from collections.abc import Sequence
from itertools import pairwise

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from memformer_pl.contract.config import Configured
from memformer_pl.errors import LARGEST, LARGEST_WIDTH, UsageError, require_sizes


class Backbone(Configured):
    """Builds the parts of a network; has no parameters itself.

    A subclass keeps each argument of its constructor as an attribute of the same name, for checkpoints.
    """

    channels: int
    """Channels of an image."""
    halvings: int = 0
    """How often rows and columns are halved before the last batch norm."""

    @property
    @abstractmethod
    def features(self) -> int:
        """Features that a deep part ends with."""

    @abstractmethod
    def build_shallow(self) -> nn.Module:
        """A new shallow part: images to feature maps."""

    @abstractmethod
    def build_deep(self) -> nn.Module:
        """A new deep part: feature maps to features ``(B, F)``."""


class ConvNet(Backbone):
    """Convolutions of 3 x 3, each with a batch norm and a ReLU; all but the last halve rows and columns by their
    maxima, and the last ends in the mean over the map. For small images.

    Args:
        channels: Channels of an image; taken from the data on the command line.
        shallow: Width of each convolution of the shallow part.
        deep: Width of each convolution of the deep part.

    Raises:
        UsageError: A part has no convolution, or a width is out of range.
    """

    def __init__(self, *, channels: int = 1, shallow: Sequence[int] = (16, 32), deep: Sequence[int] = (32,)) -> None:
        super().__init__()
        self.channels, self.shallow, self.deep = channels, list(shallow), list(deep)
        for name, widths in {"channels": [channels], "shallow": self.shallow, "deep": self.deep}.items():
            if not widths:
                raise UsageError(f"{name} must list at least one width, got {widths}")
            require_sizes(most=LARGEST_WIDTH, **{name: min(widths)})
            require_sizes(most=LARGEST_WIDTH, **{name: max(widths)})
        self.halvings = len(self.shallow) + len(self.deep) - 1

    @property
    def features(self) -> int:
        """The last width."""
        return self.deep[-1]

    def build_shallow(self) -> nn.Module:
        """Convolutions that all end in maxima."""
        widths = [self.channels, *self.shallow]
        layers = [layer for pair in pairwise(widths) for layer in (*_convolved(*pair), _halved())]
        return nn.Sequential(*layers)

    def build_deep(self) -> nn.Module:
        """Convolutions, the last of which ends in a mean."""
        widths = [self.shallow[-1], *self.deep]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [*([_halved()] if layers else []), *_convolved(before, after)]
        return nn.Sequential(*layers, Mean())


class ResNet(Backbone):
    """The residual network for images of 32 x 32 (He et al., arXiv 1512.03385, section 4.2): three stages of 16, 32 and
    64 channels, whose shortcuts have no parameters. Its last stage is the deep part, as in MEMO.

    With 5 blocks it is ResNet32: 463,504 parameters, of which 112,016 are shallow and 351,488 deep.

    Args:
        channels: Channels of an image; taken from the data on the command line.
        blocks: Blocks of two convolutions in a stage; it has 6 ``blocks`` + 2 layers with the head.

    Raises:
        UsageError: A size is out of range.
    """

    def __init__(self, *, channels: int = 3, blocks: int = 5) -> None:
        super().__init__()
        require_sizes(most=LARGEST_WIDTH, channels=channels)
        require_sizes(most=LARGEST, blocks=blocks)
        self.channels, self.blocks = channels, blocks

    @property
    def features(self) -> int:
        """Channels of the last stage."""
        return 64

    def build_shallow(self) -> nn.Module:
        """A convolution and two stages."""
        return nn.Sequential(*_convolved(self.channels, 16), *self._stage(16, 16), *self._stage(16, 32))

    def build_deep(self) -> nn.Module:
        """The last stage, and the mean over its map."""
        return nn.Sequential(*self._stage(32, 64), Mean())

    def _stage(self, before: int, after: int) -> list[nn.Module]:
        return [Residual(before, after), *(Residual(after, after) for _ in range(self.blocks - 1))]


class Residual(nn.Module):
    """Two convolutions beside a shortcut. Where channels are added, every second row and column is kept, and the
    shortcut's new channels are zero.

    Args:
        before: Channels that enter.
        after: Channels that leave.
    """

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.stride, self.added = 1 if before == after else 2, after - before
        self.layers = nn.Sequential(
            *_convolved(before, after, stride=self.stride),
            nn.Conv2d(after, after, 3, padding=1, bias=False),
            nn.BatchNorm2d(after),
        )

    def forward(self, maps: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B D V W"]:
        """Compute the block's map."""
        shortcut = F.pad(maps[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.added))
        return F.relu(self.layers(maps) + shortcut)


class Mean(nn.Module):
    """The mean over rows and columns."""

    def forward(self, maps: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B C"]:
        """Average a map."""
        return maps.mean((2, 3))


def _convolved(before: int, after: int, *, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(after), nn.ReLU()]


def _halved() -> nn.Module:
    return nn.MaxPool2d(2)
