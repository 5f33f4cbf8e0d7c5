"""What can be wrong with the text of a configuration that parsers of YAML let pass, or die of."""

from collections.abc import Collection
from typing import Any

import yaml

from memformer_pl.errors import UsageError

DEEPEST = 50
"""Levels of a configuration; some parsers of YAML crash a few thousand levels down."""
LARGEST = 10_000_000
"""Values of a configuration; what is referred to counts each time."""


def check(text: str, *, sections: Collection[str]) -> None:
    """Refuse what cannot be a configuration.

    Args:
        text: In YAML.
        sections: Top-level names that hold options.

    Raises:
        UsageError: Says what is wrong, and in which line.
    """
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise UsageError(f"{_line(event.start_mark)}: nested more than {DEEPEST} levels deep")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        said = ", ".join(part for part in (error.context, error.problem) if part)
        raise UsageError(f"{_line(error.problem_mark)}: no YAML: {said}") from error
    except yaml.YAMLError as error:  # a character that no text has
        raise UsageError(f"no YAML: {error}") from error
    if not isinstance(root, yaml.MappingNode):
        given = "nothing" if root is None else _described(root)
        raise UsageError(f"expected options, such as 'trainer: {{max_steps: 100}}', got {given}")
    _count(root, {})
    for key, value in root.value:
        if key.value in sections and not (isinstance(value, yaml.MappingNode) or _is_text(value)):
            raise UsageError(f"{_line(value.start_mark)}: {key.value}: expected options, got {_described(value)}")


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node stands for.

    Raises:
        UsageError: Too many, or one that contains itself; a name stands twice, or a class is not written as one.
    """
    if known.get(id(node)) == 0:
        raise UsageError(f"{_line(node.start_mark)}: this contains itself")
    if id(node) not in known:
        known[id(node)] = 0  # being counted
        if isinstance(node, yaml.MappingNode):
            _check_names(node)
        inner = [value for _, value in node.value] if isinstance(node, yaml.MappingNode) else node.value
        known[id(node)] = 1 + (0 if isinstance(node, yaml.ScalarNode) else sum(_count(each, known) for each in inner))
        if known[id(node)] > LARGEST:
            raise UsageError(f"{_line(node.start_mark)}: this stands for more than {LARGEST:,} values")
    return known[id(node)]


def _check_names(node: yaml.MappingNode) -> None:
    lines: dict[object, str] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        name = key.value
        if name in lines:
            raise UsageError(f"{_line(key.start_mark)}: {name} stands here for a second time, after {lines[name]}")
        lines[name] = _line(key.start_mark)
        if name == "class_path" and not _is_text(value):
            where = f"{_line(value.start_mark)}: class_path"
            raise UsageError(f"{where}: expected the name of a class, got {_described(value)}")
        if name == "init_args" and not isinstance(value, yaml.MappingNode):
            raise UsageError(f"{_line(value.start_mark)}: init_args: expected options, got {_described(value)}")


def _is_text(node: yaml.Node) -> bool:
    return node.tag == "tag:yaml.org,2002:str" and bool(node.value)


def _described(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return str(node.value) or "nothing"
    return "a list" if isinstance(node, yaml.SequenceNode) else "options"


def _line(mark: Any) -> str:
    return f"line {mark.line + 1}" if mark else "somewhere"
