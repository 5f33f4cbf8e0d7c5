"""The house keeps its floors: imports point down, Lightning is known to the third floor alone, and files stay short."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import memformer_pl

ROOT = Path(memformer_pl.__file__).parent
FLOORS = {
    4: (
        *("__main__", "cli", "commands", "configs", "generation", "mistakes", "parser", "prediction"),
        *("trainer", "analysis", "sweeps", ""),
    ),
    3: ("task", "callbacks", "checkpoint_files", "earlier_run", "guard", "resumption", "supported", "data.module"),
    2: ("models", "pretrained"),
    1: (
        "layers",
        "checkpoints",
        "replay",
        "surroundings",
        "grouped_replay",
        "gradients",
        "metrics",
        "operations",
        "optimizer",
        "ranks",
        "data",
    ),
    0: (
        *("recurrence", "session", "sampling", "saved_memory", "whole_files", "handover"),
        *("configured", "contract_checks", "errors", "sizes", "probes", "randomness", "shipped", "explanations"),
    ),
}
LIGHTNING = ("lightning", "pytorch_lightning", "lightning_fabric")


@cache
def modules() -> dict[str, Path]:
    """Every module, by its name inside the package; the package itself, with the names that it offers, is ``""``."""
    return {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def inside(module: str, part: str) -> bool:
    return module == part or (part != "" and module.startswith(part + "."))


def floor(module: str) -> int:
    """The floor of a module, by the most exact entry; an error for one that has none."""
    fitting = [(part.count("."), number) for number, parts in FLOORS.items() for part in parts if inside(module, part)]
    return max(fitting)[1]


def imports(source: str, package: str = "") -> Iterator[str]:
    """Everything that a source imports anywhere in it, by full names; of ``from a import b`` both ``a`` and ``a.b``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = ["memformer_pl", *package.split(".")] if package else ["memformer_pl"]
            start = parents[: len(parents) - node.level + 1] if node.level else []
            origin = ".".join([*start, *([node.module] if node.module else [])])
            if origin != "memformer_pl":
                yield origin
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def module_of(imported: str) -> str | None:
    """The module of this package that an import is from; the package itself for the names that it offers."""
    top, _, inner = imported.partition(".")
    if top != "memformer_pl":
        return None
    return inner if inner in modules() else inner.rpartition(".")[0]


@cache
def borders() -> list[tuple[str, str]]:
    """Every pair of modules of the package of which the first imports from the second."""
    pairs = set()
    for name, path in modules().items():
        package = name if path.stem == "__init__" else name.rpartition(".")[0]
        pairs |= {(name, module_of(imported)) for imported in imports(path.read_text(), package)}
    return sorted((a, b) for a, b in pairs if b is not None and a != b)


def crossings(importer: str, imported: str) -> list[tuple[str, str]]:
    """The imports from one part of the package into another."""
    return [(a, b) for a, b in borders() if inside(a, importer) and inside(b, imported)]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import memformer_pl.training.task", "memformer_pl.training.task"),
        ("import memformer_pl.training.task as t", "memformer_pl.training.task"),
        ("from memformer_pl import task", "memformer_pl.training.task"),
        ("from memformer_pl.data import module", "memformer_pl.data.datamodule"),
        ("from memformer_pl.data.datamodule import SegmentData", "memformer_pl.data.datamodule"),
        ("def f():\n    from memformer_pl.training.task import SegmentTask", "memformer_pl.training.task"),
        ("from .attention import Attention", "memformer_pl.layers.attention"),
        ("from . import attention", "memformer_pl.layers.attention"),
        ("from .. import task", "memformer_pl.training.task"),
        ("from ..data.module import SegmentData", "memformer_pl.data.datamodule"),
    ],
)
def test_the_walk_sees_every_form_of_import(source: str, found: str) -> None:
    assert found in imports(source, package="layers")


def test_the_walk_finds_imports_that_are_there() -> None:
    assert {("gradients", "replay"), ("models.memformer", "layers"), ("data.module", "data.packing")} <= set(borders())
    assert ("", "models") in borders()


@pytest.mark.parametrize(
    ("imported", "module"),
    [
        ("torch.nn", None),
        ("memformer_pl", ""),
        ("memformer_pl.Memformer", ""),
        ("memformer_pl.training.task", "task"),
        ("memformer_pl.training.task.SegmentTask", "task"),
        ("memformer_pl.data.datamodule.SegmentData", "data.module"),
        ("memformer_pl.data.Corpus", "data"),
    ],
)
def test_the_walk_knows_where_a_name_is_from(imported: str, module: str | None) -> None:
    assert module_of(imported) == module


def test_every_module_has_a_floor() -> None:
    assert [
        name for name in modules() if not any(inside(name, part) for parts in FLOORS.values() for part in parts)
    ] == []
    assert (floor("data.module"), floor("data.batch_size"), floor("data"), floor("layers.memory")) == (3, 1, 1, 1)


def test_imports_point_to_the_same_floor_or_a_lower_one() -> None:
    assert [(a, b) for a, b in borders() if floor(b) > floor(a)] == []


def test_models_and_data_meet_in_segments_alone() -> None:
    assert crossings("models", "data") + crossings("data", "models") == []


def test_nothing_imports_analysis_but_the_command_line() -> None:
    assert {a for a, b in borders() if inside(b, "analysis") and not inside(a, "analysis")} == {"trainer"}
    assert {a for a, b in borders() if b == "trainer"} == {"cli"}


def test_callbacks_know_no_model_class() -> None:
    assert crossings("callbacks", "models") == []


def test_lightning_is_known_to_the_third_floor_and_the_command_line_alone() -> None:
    know = {
        name
        for name, path in modules().items()
        if any(inside(imported, part) for imported in imports(path.read_text()) for part in LIGHTNING)
    }
    assert {"task", "data.module"} <= know
    others = ("cli", "mistakes", "parser", "trainer", "__main__")
    assert [name for name in know if floor(name) != 3 and name not in others] == []


def test_models_and_replay_load_no_lightning() -> None:
    code = "import sys, memformer_pl.models, memformer_pl.gradients.replay; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "memformer_pl.models.memformer" in loaded
    assert not {*LIGHTNING, "huggingface_hub"} & set(loaded)


def test_help_loads_neither_torch_nor_lightning() -> None:
    code = "import sys; from memformer_pl.cli.main import main; main(['--help']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert not {"torch", *LIGHTNING} & set(done.stdout.split())


def test_every_name_that_the_package_offers_can_be_had() -> None:
    assert [name for name in memformer_pl.__all__ if not hasattr(memformer_pl, name)] == []
    with pytest.raises(AttributeError, match="no attribute 'Memfromer'"):
        memformer_pl.Memfromer  # noqa: B018


def test_no_function_is_longer_than_sixty_lines() -> None:
    lengths = {
        f"{name}.{node.name}": node.end_lineno - node.lineno + 1
        for name, path in modules().items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert len(lengths) > 50
    assert {name: length for name, length in lengths.items() if length > 60} == {}


def test_no_file_is_longer_than_four_hundred_lines() -> None:
    lengths = {name: len(path.read_text().splitlines()) for name, path in modules().items()}
    assert {name: length for name, length in lengths.items() if length > 400} == {}
