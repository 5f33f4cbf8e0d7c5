"""What users mistype in a YAML configuration and a YAML parser does not report, or reports without the line."""

from collections.abc import Collection

import yaml

from memformer_pl.errors import UsageError


def check(text: str, *, sections: Collection[str]) -> None:
    """Refuse a text that is not a configuration.

    Args:
        text: In YAML.
        sections: Top-level names that hold options.

    Raises:
        UsageError: The text is not valid YAML, holds a key twice in one mapping, or a list or nothing where options are
            expected. The message names the line.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        where = f"{_line(error.problem_mark)}: " if error.problem_mark else ""
        raise UsageError(f"{where}not valid YAML: {problem}") from error
    except yaml.YAMLError as error:  # a control character, for example
        raise UsageError(f"not valid YAML: {error}") from error
    if not isinstance(root, yaml.MappingNode):
        raise UsageError(f"expected options, such as 'trainer: {{max_steps: 100}}', got {_described(root)}")
    for key, value in root.value:
        if key.value in sections and not (isinstance(value, yaml.MappingNode) or _is_text(value)):
            raise UsageError(f"{_line(value.start_mark)}: {key.value}: expected options, got {_described(value)}")
    _check_mappings(root)


def _check_mappings(node: yaml.Node) -> None:
    if isinstance(node, yaml.MappingNode):
        _check_keys(node)
        for _, value in node.value:
            _check_mappings(value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_mappings(item)


def _check_keys(node: yaml.MappingNode) -> None:
    first: dict[str, str] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        line = _line(key.start_mark)
        if key.value in first:
            raise UsageError(f"{line}: {key.value} is given twice, first in {first[key.value]}")
        first[key.value] = line
        if key.value == "class_path" and not _is_text(value):
            raise UsageError(f"{line}: class_path: expected the name of a class, got {_described(value)}")
        if key.value == "init_args" and not isinstance(value, yaml.MappingNode):
            raise UsageError(f"{line}: init_args: expected options, got {_described(value)}")


def _is_text(node: yaml.Node) -> bool:
    return node.tag == "tag:yaml.org,2002:str" and bool(node.value)


def _described(node: yaml.Node | None) -> str:
    if node is None or (isinstance(node, yaml.ScalarNode) and not node.value):
        return "nothing"
    if isinstance(node, yaml.ScalarNode):
        return str(node.value)
    return "a list" if isinstance(node, yaml.SequenceNode) else "options"


def _line(mark: yaml.Mark) -> str:
    return f"line {mark.line + 1}"
