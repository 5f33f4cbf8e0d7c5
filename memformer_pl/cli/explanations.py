"""What is wrong with a command or a configuration, told in a line."""

import re
from collections.abc import Iterable

from memformer_pl.errors import nearest

UNKNOWN = {
    r"unrecognized arguments: --?([\w.]+)": "option",
    r"does not accept option '([\w.]+)'": "option",
    r"Option '([\w.]+)' is not accepted": "option",
    r"Expected a dot import path string: (\S+)": "class",
    r"Problem with given class_path '(\S+)':\s+(?:module .* has no attribute|No module named)": "class",
    r"argument subcommand: invalid choice: '(\S+?)'": "command",
}
"""How the parser reports a name that it does not know, and the name of what."""

LONGEST = 600
"""Characters of an error."""
NOISE = r'^ *- |Parser key ".+?":?|in "<unicode string>",|Expected a path but .*|(?s:Subclass types expect.*)'
"""What the parser says besides what is wrong."""


def explain(message: str, *, own: Iterable[str], others: Iterable[str]) -> str:
    """What is wrong, in one line of the many that the parser has to say.

    Args:
        message: From the parser.
        own: Names that would have been valid in that place.
        others: Names that would have been valid elsewhere.
    """
    key = re.search(r'Parser key "(.+?)"', message)
    where = f"{key[1]}: " if key else ""
    for pattern, kind in UNKNOWN.items():
        if found := re.search(pattern, message):
            near = nearest(found[1], own) or nearest(found[1], others)
            return f"{where}there is no {kind} {found[1]!r}" + (f". Did you mean {near}?" if near else "")
    expected = re.findall(r"Expected an? (.+?)(?:\. Got value: .*)?$", message, flags=re.MULTILINE)
    expected += re.findall(r"Not a valid subclass of (\w+)", message)
    given = re.search(r"(?:Given|Got) value: (.*)", message)
    if where and given and expected:
        types = dict.fromkeys(re.sub(r"typing\.Literal|<class '(.+)'>|[\[\]]", r"\1", name) for name in expected)
        return f"{where}expected {' or '.join(name for name in types if name != 'NoneType')}, got {given[1]}"
    plain = re.sub(NOISE, "", message, flags=re.MULTILINE)
    return where + " ".join(plain.split())


def brief(text: str) -> str:
    """The text on one line, without its middle where it is long."""
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} [...] {text[-LONGEST // 2 :]}"

