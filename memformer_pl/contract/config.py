"""The configuration of a model: the import path of its class, and the arguments of its constructor.

A model of this package has the import path that users write (``memformer_pl.models.Memformer``), so that checkpoints
outlive a move of the modules behind it.
"""

import inspect
import operator
import sys
import warnings
from collections.abc import Mapping
from importlib import import_module
from numbers import Integral, Real
from typing import Any, TypeVar

from torch import nn

from memformer_pl.errors import UntrainedWarning, UsageError

PACKAGE = __name__.partition(".")[0]
PUBLIC = f"{PACKAGE}.models"
"""The module from which users import the models of this package."""
SCRIPT = "__main__"
"""The module of a script or a notebook; another one in every process."""

Model = TypeVar("Model", bound="Configured")


class Configured(nn.Module):
    """A module that keeps every argument of its constructor as an attribute of the same name."""

    def config(self) -> dict[str, Any]:
        """The import path of the class and the arguments of its constructor, ready for JSON.

        Raises:
            UsageError: The constructor takes ``*args``, ``**kwargs`` or positional-only arguments, or an argument is
                not kept, or its value has no JSON form.
        """
        return {"class": import_path(type(self)), **{name: self._argument(name) for name in _arguments(type(self))}}

    @classmethod
    def from_config(cls: type[Model], config: Mapping[str, Any], *, model_module: str | None = None) -> Model:
        """Build a model from a :meth:`config`: of this class, or of a subclass.

        Args:
            config: From :meth:`config`. No code is imported for the class that it names.
            model_module: The user's module that has the class; it is imported, which runs its code.

        Raises:
            UsageError: The class is not known, is not a subclass of this one, or does not take these arguments.
        """
        options = dict(config)
        path = options.pop("class", None)
        kind: Any = find_class(path, model_module=model_module)
        if not issubclass(kind, cls):
            raise UsageError(f"the model is a {path}, not a {import_path(cls)}: load it with its own class")
        if inspect.isabstract(kind):
            raise UsageError(f"the model is a {path}, which is abstract: name the class that implements it")
        try:
            inspect.signature(kind).bind(**options)
        except TypeError as error:
            told = f"the configuration does not fit the constructor of {path}: {error}"
            raise UsageError(f"{told}. Use the version of the class that wrote it") from error
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UntrainedWarning)  # its weights are loaded next
            built: Model = kind(**options)
        return built

    def differences(self, config: Mapping[str, object]) -> list[str]:
        """The differences between another :meth:`config` and this model's, value by value, for messages."""
        current = self.config()
        return [
            f"{name} (was {config.get(name)!r}, is {current.get(name)!r})"
            for name in dict.fromkeys((*config, *current))
            if not (_is_same_class if name == "class" else operator.eq)(config.get(name), current.get(name))
        ]

    def _argument(self, name: str) -> object:
        owner = type(self).__name__
        try:
            value = getattr(self, name)
        except AttributeError as error:
            raise UsageError(
                f"{owner} does not keep its argument {name!r}, which a checkpoint must hold: write "
                f"`self.{name} = {name}` in its constructor"
            ) from error
        try:
            return _plain(value)
        except TypeError as error:
            raise UsageError(
                f"{owner}.{name} holds {error}, but must hold the value of the argument {name!r} for checkpoints: a "
                "bool, int, float, str or None, or a list or dict of these. Keep anything else under another name"
            ) from error


def import_path(kind: type) -> str:
    """The path from which a class is imported."""
    if getattr(sys.modules.get(PUBLIC), kind.__name__, None) is kind:
        return f"{PUBLIC}.{kind.__name__}"
    # a process that multiprocessing has spawned knows the script by another name
    module = SCRIPT if kind.__module__ == "__mp_main__" else kind.__module__
    return f"{module}.{kind.__qualname__}"


def find_class(path: object, *, model_module: str | None = None) -> type[Configured]:
    """Find a class by its import path. Imports nothing but this package and ``model_module``.

    Args:
        path: From :func:`import_path`.
        model_module: A module to import. It is also searched for a class of a script or of a module that is gone.

    Raises:
        UsageError: There is no such class, its module has not been imported, or it is not a model.
    """
    if not isinstance(path, str) or "." not in path:
        raise UsageError(f"the class of a model must be an import path such as {PUBLIC}.Memformer, got {path!r}")
    module = None if model_module is None else _import(model_module)
    candidates = [path]
    if path.startswith(f"{PACKAGE}."):
        import_module(PUBLIC)
    elif module is not None:
        scripted = path.startswith(f"{SCRIPT}.")
        name = path.removeprefix(f"{SCRIPT}.") if scripted else path.rpartition(".")[2]
        candidates.insert(0 if scripted else 1, f"{module}.{name}")
    found = next((each for each in map(_imported, candidates) if each is not None), None)
    if found is None:
        raise UsageError(_missing(path, module))
    if not (isinstance(found, type) and issubclass(found, Configured)):
        raise UsageError(f"{path!r} is not a model: a model is a subclass of SegmentModel")
    return found


def _imported(path: str) -> object | None:
    """The object at this import path, if its module is imported. Runs no code, not even a module's ``__getattr__``."""
    parts = path.split(".")
    for end in range(len(parts) - 1, 0, -1):
        found: object = sys.modules.get(".".join(parts[:end]))
        if found is not None:
            for name in parts[end:]:
                found = inspect.getattr_static(found, name, None)
            return found
    return None


def _missing(path: str, searched: str | None) -> str:
    """The message for a class that was not found, with the remedy."""
    module, _, name = path.rpartition(".")
    told = f"the class of the model is {path!r}"
    if path.startswith(f"{PACKAGE}."):
        return f"{told}, which this version of {PACKAGE} does not have: use the version that wrote it"
    if searched is not None:
        return f"{told}, but the module {searched!r} has no class {name!r}: name the module that has it"
    if module == SCRIPT or "<locals>" in path:
        where = "in a script or a notebook. Define it here too, or" if module == SCRIPT else "inside a function:"
        return (
            f"{told}, which was defined {where} put it into a module, say my_model.py, and add --model_module my_model "
            "(in Python load(..., model_module='my_model'))"
        )
    if module in sys.modules:
        return f"{told}, but the module {module!r} has no class {name!r}: add --model_module and the module that has it"
    return (
        f"{told}, whose code is run only if you say so: add --model_module {module}, or in Python `import {module}` "
        f"first, or load(..., model_module={module!r})"
    )


def _import(name: str) -> str:
    """Import a module, given its name or the import path of something in it; returns the name of the module."""
    if not all(part.isidentifier() for part in name.split(".")):
        raise UsageError(f"model_module must be a name as in an import statement, such as my_model, got {name!r}")
    try:
        import_module(name)
        return name
    except ModuleNotFoundError as error:
        # an import that fails inside the module is a bug of the module
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        if _imported(name) is None:
            raise UsageError(
                f"there is no module {error.name!r}: give the name as in an import statement, and start in the folder "
                "that holds the module, or put that folder on PYTHONPATH"
            ) from error
        return error.name.rpartition(".")[0]


def _arguments(kind: type) -> list[str]:
    parameters = inspect.signature(kind).parameters.values()
    for parameter in parameters:
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise UsageError(
                f"the constructor of {kind.__name__} takes `{parameter}`, but a checkpoint stores arguments under "
                "their names: make each one a named argument, without * and /"
            )
    return [parameter.name for parameter in parameters]


def _plain(value: object) -> object:
    """Convert to types of JSON and ``torch.load(weights_only=True)``: Python's for numpy's numbers, lists for tuples.

    Raises:
        TypeError: The value has no such form; the message describes it.
    """
    if value is None or type(value) in (bool, str):
        return value
    if isinstance(value, Integral | Real):
        number = int(value) if isinstance(value, Integral) else float(value)
        if number == value:
            return number
    if type(value) in (list, tuple):
        return [_plain(each) for each in value]  # type: ignore[attr-defined]  # it is a list or a tuple
    if type(value) is dict and all(type(key) is str for key in value):
        return {key: _plain(each) for key, each in value.items()}
    raise TypeError(f"a {type(value).__name__}" if isinstance(value, nn.Module) else f"{value!r}")


def _is_same_class(one: object, other: object) -> bool:
    """``__main__.Rnn`` of a script equals ``my_model.Rnn`` of its module, but never a class of this package."""
    for scripted, path in ((str(one), str(other)), (str(other), str(one))):
        if scripted.startswith(f"{SCRIPT}.") and path.endswith(scripted.removeprefix(SCRIPT)):
            return not path.startswith(f"{PACKAGE}.")
    return one == other
