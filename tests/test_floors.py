"""The house keeps its order: imports point strictly down, nothing goes in circles, and files stay short."""

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import memformer_pl

ROOT = Path(memformer_pl.__file__).parent
ROOMS = (
    *("errors", "atomic_write", "contract", "gradients", "layers", "models", "data"),
    *("checkpoints", "inference", "acting", "training", "callbacks", "analysis", "sweeps", "cli", "__main__"),
    *("continual", "electra"),
)
"""From the ground up: a room imports only rooms that stand before it."""
LIGHTNING_ROOMS = ("data.datamodule", "training", "callbacks", "cli", "continual", "electra")
"""The rooms, and the one module besides, that know Lightning."""
LIGHTNING = ("lightning", "pytorch_lightning", "lightning_fabric")
FACE = ""
"""The package itself: it offers names of any room, each imported when it is first used."""

Sources = Mapping[str, str]
"""The source of each module, by its name inside the package."""
Arrow = tuple[str, str]
"""An importing and an imported module."""


@cache
def sources() -> Sources:
    return {name_of(path): path.read_text() for path in sorted(ROOT.rglob("*.py"))}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module: str) -> str:
    return module.partition(".")[0]


def inside(module: str, part: str) -> bool:
    return module == part or module.startswith(f"{part}.")


def imported(source: str) -> Iterator[tuple[str, ...]]:
    """Everything that a source imports anywhere in it: the module, and the name that is taken from it, if one is."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name,) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            yield from ((node.module or "", alias.name) for alias in node.names)


def target(found: tuple[str, ...], modules: Sources) -> str | None:
    """The module of this package that an import reaches, given its parts; None for another package."""
    top, _, inner = found[0].partition(".")
    if top != "memformer_pl":
        return None
    named = ".".join([*([inner] if inner else []), *found[1:]])
    return named if named in modules else inner


def arrows(modules: Sources) -> list[Arrow]:
    """Every import from one module of the package into another."""
    pairs = {(name, target(found, modules)) for name, source in modules.items() for found in imported(source)}
    return sorted((a, b) for a, b in pairs if b is not None and a != b)


def upward(modules: Sources) -> list[Arrow]:
    """The arrows into a room that does not stand below the importing one."""
    place = {name: number for number, name in enumerate(ROOMS)}
    return [
        (a, b)
        for a, b in arrows(modules)
        if a != FACE and room(a) != room(b) and (b == FACE or place[room(b)] > place[room(a)])
    ]


def circle(modules: Sources) -> list[str]:
    """A circle of modules that import each other, or nothing."""
    sorter: TopologicalSorter[str] = TopologicalSorter()
    for a, b in arrows(modules):
        sorter.add(a, b)
    try:
        sorter.prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def stale(rooms: tuple[str, ...], modules: Sources) -> list[str]:
    """Names of a table that are no longer in the package."""
    return [name for name in rooms if not any(inside(module, name) for module in modules)]


def planted(module: str, line: str) -> Sources:
    """The package, with one more line in a module."""
    return {**sources(), module: f"{sources()[module]}\n{line}\n"}


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("import memformer_pl.training.task", "training.task"),
        ("import memformer_pl.training.task as t", "training.task"),
        ("from memformer_pl.training import task", "training.task"),
        ("from memformer_pl.training.task import SegmentTask", "training.task"),
        ("def f():\n    from memformer_pl.training.task import SegmentTask", "training.task"),
        ("from memformer_pl.contract import Segment", "contract"),
        ("from memformer_pl import Memformer", FACE),
        ("from memformer_pl import contract", "contract"),
        ("from torch import nn", None),
    ],
)
def test_the_walk_knows_every_form_of_import(source: str, module: str | None) -> None:
    (found,) = imported(source)
    assert target(found, sources()) == module


def test_the_walk_finds_imports_that_are_there() -> None:
    expected = {
        ("gradients.rollout", "gradients.replay"),
        ("models.memformer", "layers"),
        ("contract.model", "contract.checks"),
    }
    assert expected <= set(arrows(sources()))


def test_every_module_is_in_a_room() -> None:
    assert [name for name in sources() if name != FACE and room(name) not in ROOMS] == []


def test_no_name_of_the_tables_is_stale() -> None:
    assert stale((*ROOMS, *LIGHTNING_ROOMS), sources()) == []
    assert stale((*ROOMS, "handover", "data.module"), sources()) == ["handover", "data.module"]


def test_imports_point_strictly_down() -> None:
    assert upward(sources()) == []
    arrow = ("contract.state", "models.memformer")
    assert upward(planted("contract.state", "from memformer_pl.models.memformer import Memformer")) == [arrow]
    arrow = ("layers.attention", "training.task")
    assert upward(planted("layers.attention", "def f():\n    import memformer_pl.training.task")) == [arrow]


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circle(sources()) == []
    found = circle(planted("layers.rotary", "from memformer_pl.layers.attention import Attention"))
    assert set(found) == {"layers.rotary", "layers.attention"}


def test_the_root_has_at_most_four_modules_and_the_package_nineteen_rooms() -> None:
    root = [name for name in sources() if "." not in name and not (ROOT / name / "__init__.py").exists()]
    assert len([*root, FACE]) <= 4, root
    assert len({room(name) for name in sources()}) <= 19


def test_models_and_data_meet_in_segments_alone() -> None:
    assert [(a, b) for a, b in arrows(sources()) if {room(a), room(b)} == {"models", "data"}] == []


def test_nothing_imports_analysis_but_the_command_line() -> None:
    assert {room(a) for a, b in arrows(sources()) if inside(b, "analysis") and not inside(a, "analysis")} == {"cli"}


def test_callbacks_know_no_model_class() -> None:
    assert [(a, b) for a, b in arrows(sources()) if inside(a, "callbacks") and inside(b, "models")] == []


def test_lightning_is_known_to_its_rooms_alone() -> None:
    know = {
        name
        for name, source in sources().items()
        if any(inside(found[0], package) for found in imported(source) for package in LIGHTNING)
    }
    assert {"training.task", "data.datamodule"} <= know
    assert [name for name in know if not any(inside(name, part) for part in LIGHTNING_ROOMS)] == []


def test_models_and_gradients_load_no_lightning() -> None:
    code = "import sys, memformer_pl.models, memformer_pl.gradients; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "memformer_pl.models.memformer" in loaded
    assert not {*LIGHTNING, "huggingface_hub"} & set(loaded)


def test_help_loads_neither_torch_nor_lightning() -> None:
    code = "import sys; from memformer_pl.cli.main import main; main(['--help']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert not {"torch", *LIGHTNING} & set(done.stdout.split())


def test_every_name_that_the_package_offers_is_there() -> None:
    assert [name for name in memformer_pl.__all__ if not hasattr(memformer_pl, name)] == []
    with pytest.raises(AttributeError, match="no attribute 'Memfromer'"):
        memformer_pl.Memfromer  # noqa: B018


def test_no_function_is_longer_than_sixty_lines() -> None:
    lengths = {
        f"{name}.{node.name}": node.end_lineno - node.lineno + 1
        for name, source in sources().items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert len(lengths) > 50
    assert {name: length for name, length in lengths.items() if length > 60} == {}


def test_no_file_is_longer_than_four_hundred_lines() -> None:
    lengths = {name: len(source.splitlines()) for name, source in sources().items()}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_no_helper_of_the_tests_has_the_name_of_a_folder_that_a_run_leaves() -> None:
    """A process of its own would take the folder, in the current one, for the module."""
    helpers = {path.stem for path in (ROOT.parent / "tests" / "helpers").glob("*.py")}
    beside = {line.strip("/\n") for line in (ROOT.parent / ".gitignore").read_text().splitlines()}
    beside |= {path.name for path in ROOT.parent.iterdir() if path.is_dir()}
    assert "runs" in beside
    assert not helpers & beside
