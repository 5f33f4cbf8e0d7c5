"""WikiText, joined from lines to articles."""

import re
from collections.abc import Iterable, Iterator
from itertools import chain, pairwise

from memformer_pl.data.corpora.files import Hub

# " = Valkyria Chronicles III = \n" heads an article, " = = Gameplay = = \n" a section of one
HEADING = re.compile(r"\s*= (?!= )(.*[^ =]) =\s*")


class WikiText(Hub):
    """WikiText from the Hugging Face hub, with its own splits: an article is a document. Needs a download.

    Args:
        path: The data set.
        name: Configuration of the data set; ``wikitext-2-raw-v1`` is a small one.
    """

    def __init__(self, *, path: str = "Salesforce/wikitext", name: str | None = "wikitext-103-raw-v1") -> None:
        super().__init__(path=path, name=name)

    def _texts_of_documents(self, rows: Iterator[str]) -> Iterator[str]:
        return articles(rows)


def articles(lines: Iterable[str]) -> Iterator[str]:
    """Yield the articles of WikiText, each from its heading to the line before the next one.

    The heading of an article stands between blank lines, with one ``=`` on either side. No line is dropped: lines
    before the first heading form a document.

    Args:
        lines: Rows of any WikiText configuration.
    """
    article: list[str] = []
    for (before, line), (_, after) in pairwise(pairwise(chain([""], lines, [""]))):
        if article and HEADING.fullmatch(line) and not before.strip() and not after.strip():
            yield "".join(article)
            article = []
        article.append(line)
    if article:
        yield "".join(article)
