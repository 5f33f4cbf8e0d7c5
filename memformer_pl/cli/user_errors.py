"""How the command line reports a user's mistake: in one line. Every other exception keeps its traceback."""

import re
import sys
from collections.abc import Iterable
from typing import NoReturn

from memformer_pl.errors import debugging, nearest


def refuse(error: Exception, *, code: int) -> NoReturn:
    """Print a user's mistake in one line and exit with ``code``; raise it if tracebacks are asked for."""
    if debugging():
        raise error
    sys.stderr.write(f"error: {brief(str(error))}\n")
    sys.exit(code)


UNKNOWN = {
    r"unrecognized arguments: --?([\w.]+)": "option",
    r"does not accept option '([\w.]+)'": "option",
    r"Option '([\w.]+)' is not accepted": "option",
    r"Expected a dot import path string: (\S+)": "class",
    r"Problem with given class_path '(\S+)':\s+(?:module .* has no attribute|No module named)": "class",
    r"(?s)callable class: (?:module .* has no attribute|No module named).*class_path[=:] ?'([^']+)'": "class",
    r"(?s)callable class: (?:module .* has no attribute|No module named).*Given value: (\S+)": "class",
    r"argument subcommand: invalid choice: '(\S+?)'": "command",
}
"""How the parser reports an unknown name, and what kind of name it is."""

LONGEST = 600
"""Characters of an error message."""
NOISE = r'^ *- |Parser key ".+?":?|in "<unicode string>",|Expected a path but .*|(?s:Subclass types expect.*)'
"""What the parser prints besides the mistake."""


def explain(message: str, *, here: Iterable[str], elsewhere: Iterable[str]) -> str:
    """Shorten a message of the parser to one line, and suggest the nearest valid name.

    Args:
        message: From the parser.
        here: Names that are valid at this place.
        elsewhere: Names that are valid elsewhere.
    """
    key = re.search(r'Parser key "(.+?)"', message)
    where = f"{key[1]}: " if key else ""
    for pattern, kind in UNKNOWN.items():
        if found := re.search(pattern, message):
            order = (elsewhere, here) if kind == "class" else (here, elsewhere)
            near = next(filter(None, (nearest(found[1], names) for names in order)), None)
            return f"{where}there is no {kind} {found[1]!r}" + (f". Did you mean {near}?" if near else "")
    if found := re.search(r"Expected '(\S+)' to be a subclass of <class '(\w+)'>", message):
        return f"{where}{found[1]} is not a subclass of {found[2]}"
    expected = re.findall(r"Expected an? (?!path but)(.+?)(?:\. Got value: .*)?$", message, flags=re.MULTILINE)
    expected += re.findall(r"Not a valid subclass of (\w+)", message)
    given = re.search(r"(?:Given|Got) value: (.*)", message)
    if where and given and expected:
        types = dict.fromkeys(re.sub(r"typing\.Literal|<class '(.+)'>|[\[\]]", r"\1", name) for name in expected)
        return f"{where}expected {' or '.join(name for name in types if name != 'NoneType')}, got {given[1]}"
    plain = re.sub(NOISE, "", message, flags=re.MULTILINE)
    return where + " ".join(plain.split())


def brief(text: str) -> str:
    """Put a text on one line, and cut the middle out of a long one."""
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} [...] {text[-LONGEST // 2 :]}"
