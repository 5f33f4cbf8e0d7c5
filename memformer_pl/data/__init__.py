"""From documents to lanes, segments and rollouts; ``README.md`` has a picture. Only
``datamodule`` imports Lightning.
"""

from memformer_pl.data.corpora.corpus import Corpus, Document, Pydoc, Stdlib
from memformer_pl.data.corpora.enwik8 import Enwik8
from memformer_pl.data.corpora.facts import FactsInNoise, Passkey
from memformer_pl.data.corpora.files import Files, Hub
from memformer_pl.data.corpora.images import MNIST, Digits, Images
from memformer_pl.data.corpora.installed import InstalledPackages
from memformer_pl.data.corpora.key_value_facts import KeyedFacts
from memformer_pl.data.corpora.mqar import MQAR
from memformer_pl.data.corpora.recall import AssociativeRecall, Copy
from memformer_pl.data.corpora.remember import Remember, Rewrite
from memformer_pl.data.corpora.wikitext import WikiText
from memformer_pl.data.lane_plan import LanePlan
from memformer_pl.data.lanes import LaneLoader, Rollout
from memformer_pl.data.packing.documents import PackedDocuments
from memformer_pl.data.packing.pack import Pack, pack
from memformer_pl.data.tokenizers.subwords import BytePairs, TokenizerFile
from memformer_pl.data.tokenizers.tokenizer import Bytes, GreyValues, Symbols, Tokenizer

__all__ = [
    "MNIST",
    "MQAR",
    "AssociativeRecall",
    "BytePairs",
    "Bytes",
    "Copy",
    "Corpus",
    "Digits",
    "Document",
    "Enwik8",
    "FactsInNoise",
    "Files",
    "GreyValues",
    "Hub",
    "Images",
    "InstalledPackages",
    "KeyedFacts",
    "LaneLoader",
    "LanePlan",
    "Pack",
    "PackedDocuments",
    "Passkey",
    "Pydoc",
    "Remember",
    "Rewrite",
    "Rollout",
    "Stdlib",
    "Symbols",
    "Tokenizer",
    "TokenizerFile",
    "WikiText",
    "pack",
]
