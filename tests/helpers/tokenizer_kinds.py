"""Tokenizers of every kind that the library ``tokenizers`` builds, each trained on a few lines."""

from collections.abc import Callable
from functools import partial
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

LINES = ["The cat saw Zoë's 中文 cafés, 🤷🏽 and  double\n\nspaces don't stop: ﬁne ½.  "] * 20
WIDE = "<\uff5ceos\uff5c>"
"""A special token of characters outside the byte alphabet."""
ALPHABET = pre_tokenizers.ByteLevel.alphabet()


def trained(model: models.Model, trainer: trainers.Trainer, **steps: Any) -> Tokenizer:
    built = Tokenizer(model)
    for name, step in steps.items():
        setattr(built, name, step)
    built.train_from_iterator(LINES, trainer)
    return built


def byte_level(special: list[str] | None = None, *, prefix: bool = False, **steps: Any) -> Tokenizer:
    options = {"special_tokens": special or [], "initial_alphabet": ALPHABET, "show_progress": False}
    steps = {"pre_tokenizer": pre_tokenizers.ByteLevel(prefix), "decoder": decoders.ByteLevel()} | steps
    return trained(models.BPE(), trainers.BpeTrainer(vocab_size=300, **options), **steps)


def split_first() -> Tokenizer:
    split = pre_tokenizers.Split(Regex(r"\p{N}{1,3}|\p{L}+|[^\p{L}\p{N}]+"), "isolated")
    return byte_level(pre_tokenizer=pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)]))


def with_added_tokens() -> Tokenizer:
    built = byte_level(["<end of text>", WIDE, "line\nbreak"])
    built.add_special_tokens([AddedToken("<m>", lstrip=True, rstrip=True), "é"])
    built.add_tokens(["cat saw", AddedToken("stop", single_word=True)])
    return built


def llama(pre_tokenizer: Any = None) -> Tokenizer:
    vocab = {"<unk>": 0, **{f"<0x{byte:02X}>": 1 + byte for byte in range(256)}}
    for piece in [*"▁abcdefghij", "▁a"]:
        vocab[piece] = len(vocab)
    built = Tokenizer(models.BPE(vocab, [("▁", "a")], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if pre_tokenizer is None:
        built.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        built.pre_tokenizer = pre_tokenizer
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    built.decoder = decoders.Sequence(steps)
    return built


def word_piece(*, lower: bool, decoder: bool = True) -> Tokenizer:
    steps: dict[str, Any] = {"decoder": decoders.WordPiece()} if decoder else {}
    return trained(
        models.WordPiece(unk_token="[UNK]"),
        trainers.WordPieceTrainer(vocab_size=90, special_tokens=["[UNK]"], show_progress=False),
        normalizer=normalizers.BertNormalizer(lowercase=lower),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
        post_processor=processors.BertProcessing(("[UNK]", 0), ("[UNK]", 0)),
        **steps,
    )


def unigram(**steps: Any) -> Tokenizer:
    options = {"unk_token": "<unk>", "special_tokens": ["<unk>"], "show_progress": False}
    return trained(models.Unigram(), trainers.UnigramTrainer(vocab_size=90, **options), **steps)


def pairs(*, unknown: str | None = None, suffix: str | None = None, **steps: Any) -> Tokenizer:
    options = {"end_of_word_suffix": suffix} if suffix else {}
    special = [unknown] if unknown else []
    trainer = trainers.BpeTrainer(vocab_size=100, special_tokens=special, show_progress=False, **options)
    model = models.BPE(**options, **({"unk_token": unknown} if unknown else {}))
    return trained(model, trainer, **steps)


def word_level(words: list[str]) -> Tokenizer:
    built = Tokenizer(models.WordLevel({"<unk>": 0} | {word: 1 + n for n, word in enumerate(words)}, unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    return built


LOSSLESS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": byte_level,
    "byte-level, a space in front": partial(byte_level, prefix=True),
    "byte-level, offsets without spaces": partial(byte_level, post_processor=processors.ByteLevel(trim_offsets=True)),
    "byte-level in a sequence": partial(byte_level, decoder=decoders.Sequence([decoders.ByteLevel()])),
    "byte-level after another split": split_first,
    "byte-level, no decoder": partial(byte_level, decoder=None),
    "byte-level, another decoder": partial(byte_level, decoder=decoders.Fuse()),
    "byte-level by its normalizer": partial(byte_level, pre_tokenizer=None, normalizer=normalizers.ByteLevel()),
    "llama": llama,
    "llama by metaspace": partial(llama, pre_tokenizers.Metaspace(split=False)),
}
LOSSY: dict[str, Callable[[], Tokenizer]] = {
    "byte-level with added tokens": with_added_tokens,
    "byte-level, composed": partial(byte_level, normalizer=normalizers.NFKC()),
    "byte-level, decomposed": partial(byte_level, normalizer=normalizers.NFD()),
    "word pieces": partial(word_piece, lower=False),
    "word pieces in lower case": partial(word_piece, lower=True),
    "word pieces without decoder": partial(word_piece, lower=True, decoder=False),
    "unigram": partial(unigram, pre_tokenizer=pre_tokenizers.Metaspace(), decoder=decoders.Metaspace()),
    "unigram, composed": partial(unigram, normalizer=normalizers.NFKC(), decoder=decoders.Fuse()),
    "unigram of whole texts": unigram,
    "pairs that drop": partial(pairs, pre_tokenizer=pre_tokenizers.Whitespace()),
    "pairs of whole texts": pairs,
    "pairs with an end of words": partial(
        pairs,
        unknown="<unk>",
        suffix="</w>",
        normalizer=normalizers.Lowercase(),
        pre_tokenizer=pre_tokenizers.WhitespaceSplit(),
        decoder=decoders.BPEDecoder(),
    ),
    "pairs without accents": partial(
        pairs, normalizer=normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents(), normalizers.Strip()])
    ),
    "connectionist": partial(pairs, unknown="<unk>", decoder=decoders.CTC("<unk>", "|")),
    "three words": partial(word_level, ["the", "cat", "saw"]),
    "punctuation and digits": partial(
        pairs,
        pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Punctuation("removed"), pre_tokenizers.Digits(True)]),
    ),
}
KINDS = LOSSLESS | LOSSY
