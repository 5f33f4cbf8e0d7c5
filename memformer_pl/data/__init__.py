"""Corpora, tokenizers, and the way from documents to lanes, segments and windows. Lightning is only in ``module``."""

from memformer_pl.data.corpora import Corpus, Document, Pydoc, Stdlib
from memformer_pl.data.documents import PackedDocuments
from memformer_pl.data.enwik8 import Enwik8
from memformer_pl.data.files import Files, Hub
from memformer_pl.data.images import MNIST, Digits, Images
from memformer_pl.data.lanes import LaneLoader, LanePlan, Window
from memformer_pl.data.packing import Pack, pack
from memformer_pl.data.recall import Lookup, Recall
from memformer_pl.data.subwords import BytePairs, TokenizerFile
from memformer_pl.data.tokens import Bytes, GreyValues, Tokenizer
from memformer_pl.data.wikitext import WikiText

__all__ = [
    "MNIST",
    "BytePairs",
    "Bytes",
    "Corpus",
    "Digits",
    "Document",
    "Enwik8",
    "Files",
    "GreyValues",
    "Hub",
    "Images",
    "LaneLoader",
    "LanePlan",
    "Lookup",
    "Pack",
    "PackedDocuments",
    "Pydoc",
    "Recall",
    "Stdlib",
    "Tokenizer",
    "TokenizerFile",
    "WikiText",
    "Window",
    "pack",
]
