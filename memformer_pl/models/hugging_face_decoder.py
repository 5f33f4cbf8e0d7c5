"""Any decoder of Hugging Face's ``transformers``, whose state is its KV cache.

B  lanes     L  tokens in a segment     T  tokens of a piece     S  cached rows     R  rows that are attended to
H  heads     K  width of a head     V  vocabulary
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from memformer_pl.contract import ABSENT, DecodingCache, Segment, SegmentModel, SegmentOutput, State, as_state
from memformer_pl.contract.checks import has_values
from memformer_pl.errors import LARGEST_WIDTH, UsageError, require_sizes
from memformer_pl.layers import as_bias, at_last, output_from_logits
from memformer_pl.models.hugging_face_cache import (
    CachedRows,
    cached_places,
    joined,
    layer_class,
    left_aligned,
    next_places,
    parts,
    shifted,
    state_class,
    visible,
    without_unneeded,
)
from memformer_pl.models.hugging_face_loading import (
    KINDS,
    from_folder,
    from_options,
    library,
    quiet,
    require_layers,
    require_positions,
    with_adapters,
)


class HuggingFaceDecoder(SegmentModel[State]):
    """Predict each token from the tokens before it, by a causal language model of ``transformers``.

    The state holds the keys and values of earlier tokens, with their gradient, and the last token. With the whole cache
    (``window=None``), the losses of a document in segments, and their gradient, are those of one pass over it, to
    rounding; the fields ``keys_n``, ``values_n`` and ``exists`` grow. With a window, each segment sees the last
    ``window`` tokens before it, and the state keeps its size.

    The first token of a document is predicted from BOS alone. Masks and positions are this package's, so that lanes may
    be ragged and start documents anywhere; a sliding window of the decoder counts the tokens of the document. Attention
    is torch's ``scaled_dot_product_attention``.

    Dropout is that of the decoder's configuration. It draws from torch's default streams and not from
    ``Segment.seeds``; memory replay restores these streams. Auxiliary losses of the decoder (load balancing of experts)
    are not added.

    Args:
        vocab_size: Size of the tokenizer's vocabulary. The decoder may have more tokens, which are never predicted.
        segment_length: The most tokens that a segment may hold.
        decoder: A configuration of transformers, with its ``model_type``; the weights are random. Without
            ``vocab_size`` it has the tokens of this model, and BOS. Exactly one of ``decoder`` and ``folder`` is given.
        folder: A local folder with ``config.json`` and weights in safetensors. They are loaded in torch's default
            dtype. No code of the folder is run. Afterwards ``folder`` is None and ``decoder`` the whole configuration,
            so that a checkpoint does not need the folder.
        bos_token: Number of the decoder's token that stands before a document. By default ``bos_token_id`` of its
            configuration; with random weights whose ``decoder`` does not name one, the token ``vocab_size``, which no
            text has.
        window: Number of tokens before a segment whose keys and values are carried; None for the whole document.
        lora: Arguments of ``peft.LoraConfig``; then only its adapters are trained.

    Raises:
        UsageError: transformers or peft is not installed, an argument does not fit, or the decoder carries something
            else than keys and values (Mamba, linear attention, an encoder).
    """

    unread = ("last",)

    def __init__(
        self,
        *,
        vocab_size: int,
        segment_length: int = 64,
        decoder: dict[str, Any] | None = None,
        folder: str | None = None,
        bos_token: int | None = None,
        window: int | None = None,
        lora: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(vocab_size=vocab_size, segment_length=segment_length)
        if window is not None:
            require_sizes(least=0, most=LARGEST_WIDTH, window=window)
        if (decoder is None) == (folder is None):
            raise UsageError(
                "give either decoder, a configuration with its model_type, or folder, which holds config.json and "
                f"weights; got decoder={decoder!r} and folder={folder!r}"
            )
        self.folder, self.bos_token, self.window, self.lora = None, bos_token, window, lora
        with quiet():
            if folder is not None:
                self.language_model, decoder = from_folder(folder)
            else:
                self.language_model = from_options(_with_tokens(decoder or {}, vocab_size, bos_token))
            self.decoder: dict[str, Any] = decoder or {}
            self._layers = require_layers(self._configuration)
            self._longest = require_positions(self.language_model)
            self._bos = self._configuration.bos_token_id = self._checked_bos()
            if lora is not None:
                with_adapters(self.language_model, lora)
            self._shapes = self._probed()
        self.language_model.train()
        names = [name for name in state_class(len(self._shapes))._fields if name.startswith(("keys", "values"))]
        if window is None:
            self.growing = {**dict.fromkeys(names, 2), "exists": 1}

    def initial_state(self, lanes: int) -> State:
        """No rows, or a window of empty ones, and no token before the first."""
        rows, table = self.window or 0, self._table
        keys, values = (
            [table.new_zeros(lanes, heads, rows, width) for heads, width in shapes]
            for shapes in zip(*self._shapes, strict=True)
        )
        nothing = table.new_zeros(lanes, dtype=torch.int64)
        exists = table.new_zeros(lanes, rows, dtype=torch.bool)
        return joined(CachedRows(keys, values, exists, nothing, nothing + ABSENT))

    def step(self, segment: Segment, state: State) -> tuple[SegmentOutput, State]:
        """Predict the segment from the rows that its lanes see and from earlier tokens, and add its rows."""
        logits, next_state = self._read(segment, state, self.language_model)
        return output_from_logits(logits, segment), next_state

    def advance_step(self, segment: Segment, state: State) -> State:
        """The next state: all layers, but no logits."""
        return self._read(segment, state, self._to_advance())[1]

    def compact(self, state: State) -> State:
        """The state without rows of earlier documents and empty ones, as far as no lane needs the space."""
        if self.window is not None:
            return state
        rows = parts(state)
        kept = without_unneeded(rows, reach=self._layers.reach)
        return state if kept is rows else joined(kept)

    @torch.no_grad()
    def prefill(self, state: State, lanes: int) -> tuple[Float[Tensor, "B V"], DecodingCache]:
        """Gather the rows that each lane sees, with room for a segment, and read the last token, or BOS."""
        rows = parts(state)
        # one place to spare, for what is absent
        filled, buffers = left_aligned(rows, reach=self._layers.reach, room=self.segment_length + 1)
        first = self._first(rows.last)[:, None]
        return self._piece(first, torch.ones_like(first, dtype=torch.bool), (filled, rows.place, *buffers))

    @torch.no_grad()
    def decode(
        self, tokens: Int[Tensor, "B T"], token_mask: Bool[Tensor, "B T"], cache: DecodingCache
    ) -> tuple[Float[Tensor, "B V"], DecodingCache]:
        """Read the next tokens; their keys and values are written in place."""
        return self._piece(tokens, token_mask, cache)

    @property
    def _configuration(self) -> Any:
        return self.language_model.config

    @property
    def _table(self) -> Tensor:
        """The token embeddings, whose dtype and device are those of the state."""
        table: Tensor = self.language_model.get_input_embeddings().weight  # type: ignore[operator]
        return table

    def _checked_bos(self) -> int:
        """The token before a document, after checks of the vocabulary."""
        tokens, bos = len(self._table), self.bos_token
        if tokens < self.vocab_size:
            raise UsageError(f"the decoder has {tokens} tokens, fewer than vocab_size={self.vocab_size}")
        if bos is None:
            added = _adds_bos(self.decoder, bos)
            bos = self.vocab_size if added else getattr(self._configuration, "bos_token_id", None)
        if type(bos) is not int or not 0 <= bos < tokens:
            raise UsageError(
                f"the token before a document must be one of the decoder's {tokens} tokens, got {bos!r}: name one with "
                "bos_token, such as its end-of-text token"
            )
        return bos

    def _probed(self) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """Heads and width of the keys and values of each layer, from one token."""
        device, layers = self._table.device, len(self._layers.kinds)
        places = torch.zeros(1, 1, dtype=torch.int64, device=device)
        cache = library("transformers.cache_utils").DynamicCache()
        with torch.no_grad():
            self.language_model.eval()(
                input_ids=places,
                attention_mask=self._mask(places, places),
                position_ids=places,
                cache=cache,
                use_cache=True,
            )
        if len(cache.layers) != layers:
            raise UsageError(f"the decoder has {layers} layers and caches keys and values in {len(cache.layers)}")
        return [
            ((layer.keys.shape[1], layer.keys.shape[3]), (layer.values.shape[1], layer.values.shape[3]))
            for layer in cache.layers
        ]

    def _to_advance(self) -> nn.Module:
        """The decoder without its head, unless the head draws random numbers, as an adapter with dropout does."""
        decoder: nn.Module = self.language_model.get_decoder()  # type: ignore[operator]
        inside = set(decoder.modules())
        outside = (module for module in self.language_model.modules() if module not in inside)
        return self.language_model if any(isinstance(module, nn.Dropout) for module in outside) else decoder

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "HuggingFaceDecoder":
        """Convert the weights; frequencies of rotations keep their precision, as in transformers itself: those of
        bfloat16 are wrong by whole turns at distant positions."""
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in list(self.named_buffers()):
            if buffer.is_floating_point() and buffer.dtype.itemsize < before[name].dtype.itemsize:
                owner, _, last = name.rpartition(".")
                setattr(self.get_submodule(owner), last, before[name].to(buffer.device))
        return self

    def _first(self, last: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
        """The last token of each lane, or BOS."""
        return last.masked_fill(last == ABSENT, self._bos)

    def _mask(self, rows: Int[Tensor, "B R"], inputs: Int[Tensor, "B L"]) -> Tensor | dict[str, Tensor]:
        """The mask of all layers, or one for each kind of layer."""
        reaches = dict(zip(KINDS, (None, self._layers.window), strict=True))
        kinds = dict.fromkeys(self._layers.kinds)
        masks = {kind: as_bias(visible(rows, inputs, reach=reaches[kind]), self._table) for kind in kinds}
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _read(self, segment: Segment, state: State, run: nn.Module) -> tuple[Tensor, State]:
        """What ``run`` returns first for a segment, logits if it has a head, and the next state."""
        rows, arrived = parts(state), segment.token_mask.sum(1)
        inputs = torch.cat((self._first(rows.last)[:, None], segment.tokens[:, :-1]), dim=1)
        places = next_places(rows.place, inputs.shape[1])
        seen = torch.cat((cached_places(rows.exists, rows.place), places), dim=1)
        layers = [layer_class()(*pair) for pair in zip(rows.keys, rows.values, strict=True)]
        returned = self._run(run, inputs, places, segment.token_mask, self._mask(seen, places), layers)
        keys, values = [layer.keys for layer in layers], [layer.values for layer in layers]
        exists = torch.cat((rows.exists, segment.token_mask), dim=1)
        after = CachedRows(keys, values, exists, rows.place + arrived, segment.last_token)
        return returned, joined(after if self.window is None else shifted(after, arrived, window=self.window))

    def _piece(
        self, inputs: Int[Tensor, "B T"], token_mask: Bool[Tensor, "B T"], cache: DecodingCache
    ) -> tuple[Float[Tensor, "B V"], DecodingCache]:
        """Run the next inputs of a segment. What is absent goes to places that later inputs overwrite."""
        filled, place, *rows = cache
        room, length, arrived = rows[0].shape[2], inputs.shape[1], token_mask.sum(1)
        at = next_places(filled, length).clamp(max=room - 1)
        mask = self._mask(torch.arange(room, device=at.device).expand(len(at), -1), at)
        layers = [layer_class()(keys, values, at) for keys, values in zip(rows[::2], rows[1::2], strict=True)]
        logits = self._run(self.language_model, inputs, next_places(place, length), token_mask, mask, layers)
        return at_last(logits, arrived), as_state(cache, (filled + arrived, place + arrived, *rows))

    def _run(
        self,
        run: nn.Module,
        inputs: Int[Tensor, "B L"],
        places: Int[Tensor, "B L"],
        token_mask: Bool[Tensor, "B L"],
        mask: Tensor | dict[str, Tensor],
        layers: Sequence[Any],
    ) -> Tensor:
        """Call the decoder; the layers add rows. Returns its first result, logits without those of foreign tokens."""
        # what is absent may lie beyond a table of positions
        positions = places.masked_fill(~token_mask, 0)
        if self._longest is not None and has_values(positions) and int(positions.max()) >= self._longest:
            raise UsageError(
                f"a document has more than {self._longest} tokens, and the decoder a learned table of {self._longest} "
                "positions (max_position_embeddings): cut the documents, or take a decoder with rotary positions"
            )
        cache = library("transformers.cache_utils").Cache(layers=list(layers))
        returned = run(input_ids=inputs, attention_mask=mask, position_ids=positions, cache=cache, use_cache=True)
        first: Tensor = returned[0]
        return first[..., : self.vocab_size] if run is self.language_model else first


def _with_tokens(decoder: Mapping[str, Any], vocab_size: int, bos_token: int | None) -> dict[str, Any]:
    """The configuration of a decoder with random weights that has these tokens, and BOS if it names none."""
    return {"vocab_size": vocab_size + _adds_bos(decoder, bos_token), **decoder}


def _adds_bos(decoder: Mapping[str, Any], bos_token: int | None) -> bool:
    """Whether BOS is a token behind the vocabulary. The default of transformers would be one that texts have."""
    return bos_token is None and "bos_token_id" not in decoder
