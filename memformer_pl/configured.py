"""Models that are known by what their constructors were called with."""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from torch import nn

from memformer_pl.errors import UsageError

Model = TypeVar("Model", bound="Configured")


class Configured(nn.Module):
    """A module that keeps every value of its constructor as an attribute of the same name."""

    def config(self) -> dict[str, int | float | str | bool | None]:
        """What the constructor was called with, and the name of the class."""
        names = list(inspect.signature(type(self)).parameters)
        return {"class": type(self).__name__, **{name: getattr(self, name) for name in names}}

    @classmethod
    def from_config(cls: type[Model], config: Mapping[str, Any]) -> Model:
        """A new model like the one that gave this :meth:`config`: of this class, or of one below it.

        Raises:
            UsageError: No such class is known, or it does not take these values.
        """
        options = dict(config)
        name = str(options.pop("class", None))
        known: dict[str, Any] = {kind.__name__: kind for kind in family(cls) if not inspect.isabstract(kind)}
        if name not in known:
            raise UsageError(f"the model is a {name}, but asked for is one of these: {', '.join(known)}")
        try:
            built: Model = known[name](**options)
            return built
        except TypeError as error:
            raise UsageError(f"the configuration of the {name} does not fit: {error}") from error

    def differences(self, config: Mapping[str, object]) -> list[str]:
        """In what another :meth:`config` differs from this model's, value by value, for messages."""
        own = self.config()
        return [
            f"{name} (was {config.get(name)!r}, is {own.get(name)!r})"
            for name in dict.fromkeys((*config, *own))
            if config.get(name) != own.get(name)
        ]


def family(kind: type[Configured]) -> Iterator[type[Configured]]:
    """A class, and all that were derived from it so far."""
    yield kind
    for derived in kind.__subclasses__():
        yield from family(derived)
