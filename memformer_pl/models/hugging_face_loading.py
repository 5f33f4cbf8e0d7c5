"""Build a decoder of ``transformers`` from a configuration or a folder, and check that its state is keys and values."""

import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

import torch
from torch import nn

from memformer_pl.errors import UsageError, nearest

COMPLETE = "transformers_version"
"""Key of a configuration that transformers has written; it may hold anything else, too."""
FORMER = ("rope_theta", "rope_scaling", "partial_rotary_factor", "torch_dtype", "model_type")
"""Keys that configurations of transformers take beside their fields."""
KINDS = ("full_attention", "sliding_attention")
"""Layers whose state is keys and values, and whose mask depends on distance alone."""
NOT_OURS = ("_name_or_path", "dtype", "torch_dtype")
"""What a configuration says of where and how weights were stored."""


class Layers(NamedTuple):
    """The layers of a decoder."""

    kinds: tuple[str, ...]
    """One of ``KINDS`` for each layer."""
    window: int | None
    """How many tokens a layer with a sliding window sees, its own included; None if there is no such layer."""

    @property
    def reach(self) -> int | None:
        """How many tokens the layer that sees most can see; None if there is no limit."""
        return None if KINDS[0] in self.kinds else self.window


def library(name: str) -> Any:
    """Import a module of transformers or peft.

    Raises:
        UsageError: It is not installed.
    """
    try:
        return import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise UsageError(f"HuggingFaceDecoder needs {package}: pip install 'memformer-pl[hf]' ({error})") from error


def from_options(options: Mapping[str, Any]) -> nn.Module:
    """A decoder with random weights, in the default dtype.

    Args:
        options: A configuration of transformers, with its ``model_type``.

    Raises:
        UsageError: There is no such decoder, or it does not have such options.
    """
    about = f"decoder: cannot build a {options.get('model_type')!r}"
    with _refused(about):
        configuration = _configuration(options)
    require_layers(configuration)
    with _refused(about):
        model: nn.Module = library("transformers").AutoModelForCausalLM.from_config(
            configuration, attn_implementation="sdpa", dtype=torch.get_default_dtype(), trust_remote_code=False
        )
    return model


def from_folder(folder: str) -> tuple[nn.Module, dict[str, Any]]:
    """A decoder with the weights of a local folder, in the default dtype, and its configuration for JSON.

    Raises:
        UsageError: The folder does not exist, has no decoder of transformers in safetensors, or lacks weights.
    """
    about, config_file = f"folder={folder!r}", Path(folder) / "config.json"
    if not config_file.is_file():
        raise UsageError(f"{about} has no config.json: give a local folder that holds config.json and safetensors")
    transformers = library("transformers")
    options = {"local_files_only": True, "trust_remote_code": False}
    with _refused(f"{about} holds no decoder that can be read"):
        configuration = transformers.AutoConfig.from_pretrained(folder, **options)
    require_layers(configuration)
    with _refused(f"{about}: cannot load the weights"):
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            config=configuration,
            use_safetensors=True,
            attn_implementation="sdpa",
            dtype=torch.get_default_dtype(),
            output_loading_info=True,
            **options,
        )
        written = json.loads(config_file.read_bytes()).get(COMPLETE, "unknown")
    if missing := sorted(report["missing_keys"]):
        raise UsageError(f"{about} lacks {len(missing)} weights, such as {missing[0]}: save the whole model there")
    complete = json.loads(configuration.to_json_string(use_diff=False))
    kept = {name: value for name, value in complete.items() if name not in NOT_OURS}
    return model, {**kept, COMPLETE: written}


def with_adapters(model: nn.Module, lora: Mapping[str, Any]) -> None:
    """Add LoRA adapters to a decoder, in place; nothing else is trained then.

    Args:
        model: The decoder.
        lora: Arguments of ``peft.LoraConfig``.

    Raises:
        UsageError: There is no such argument, or no such module to adapt.
    """
    peft = library("peft")
    with _refused("lora: cannot add the adapters"):
        peft.inject_adapter_in_model(peft.LoraConfig(**lora), model)


def require_layers(configuration: Any) -> Layers:
    """The layers of a decoder.

    Raises:
        UsageError: A layer carries something else than keys and values, or a step would depend on more than them.
    """
    name, cache_utils = configuration.model_type, library("transformers.cache_utils")
    if configuration.get_text_config(decoder=True) is not configuration:
        raise UsageError(f"a {name!r} does not read text alone: take the model of its text_config")
    if configuration.is_encoder_decoder:
        raise UsageError(f"a {name!r} has an encoder: take a decoder, such as a 'llama'")
    with _refused(f"cannot tell the layers of a {name!r}"):
        kinds, _ = cache_utils.get_layer_types_and_kwargs(configuration)
        layers = cache_utils.DynamicCache(config=configuration).layers
    for n, (kind, layer) in enumerate(zip(kinds, layers, strict=True)):
        plain = type(layer) in (cache_utils.DynamicLayer, cache_utils.DynamicSlidingWindowLayer)
        if not plain or kind not in KINDS:
            raise UsageError(
                f"layer {n} of this {name!r} is {kind!r}, and not one of {', '.join(KINDS)}: what it carries from "
                "token to token is not its keys and values. Take a decoder all of whose layers attend to earlier tokens"
            )
    windows = {layer.sliding_window for layer in layers if layer.is_sliding}
    if len(windows) > 1:
        raise UsageError(
            f"this {name!r} has sliding windows of several lengths, {sorted(windows)}: give all layers one"
        )
    for rope in _rope_types(getattr(configuration, "rope_parameters", None)):
        if rope in ("dynamic", "longrope"):
            raise UsageError(
                f"this {name!r} has the rope_type {rope!r}, which rotates a text in another way once it is long, so "
                "keys that were kept would not fit: set another rope_type in the configuration, such as 'default'"
            )
    return Layers(tuple(kinds), next(iter(windows), None))


def require_positions(model: Any) -> int | None:
    """The number of positions of a learned table; None if there is no such table.

    Raises:
        UsageError: The decoder sees later tokens, or takes no cache or no positions.
    """
    decoder = model.get_decoder()
    if any(getattr(module, "is_causal", True) is False for module in decoder.modules()):
        raise UsageError(f"a {type(decoder).__name__} sees later tokens: set is_decoder: true, or take another decoder")
    for argument in ("cache", "position_ids"):
        if argument not in inspect.signature(decoder.forward).parameters:
            raise UsageError(
                f"{type(decoder).__name__} takes no {argument!r}, which a segment in the middle of a document needs: "
                "take another decoder, or transformers 5.24 or newer"
            )
    longest, tokens = getattr(model.config, "max_position_embeddings", None), decoder.get_input_embeddings()
    tables = [module for module in decoder.modules() if isinstance(module, nn.Embedding) and module is not tokens]
    learned = any(table.num_embeddings - getattr(table, "offset", 0) == longest for table in tables)
    return longest if learned else None


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from printing and from drawing progress bars."""
    logging = library("transformers.utils.logging")
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _configuration(options: Mapping[str, Any]) -> Any:
    """The configuration, after a check of its keys: transformers ignores a misspelled one."""
    transformers, kind = library("transformers"), options.get("model_type")
    known = transformers.CONFIG_MAPPING
    if kind not in known:
        near = nearest(str(kind), known.keys())
        raise UsageError(f"decoder: model_type {kind!r} does not exist{f': did you mean {near!r}?' if near else ''}")
    names = {field.name for field in fields(known[kind])} | set(known[kind].attribute_map) | set(FORMER)
    for name in options if COMPLETE not in options else ():
        if name not in names:
            near = nearest(name, names)
            hint = f"did you mean {near!r}?" if near else f"it has {', '.join(sorted(names))}"
            raise UsageError(f"decoder: a {kind!r} has no option {name!r}: {hint}")
    # a token of padding would neither begin at random nor be trained
    unpadded = {"pad_token_id": None} if "pad_token_id" in names else {}
    return transformers.AutoConfig.for_model(**{**unpadded, **options})


def _rope_types(parameters: Any) -> Iterator[str]:
    """The types of rotation, which may differ between kinds of layers."""
    if isinstance(parameters, Mapping):
        yield from ([str(parameters["rope_type"])] if "rope_type" in parameters else [])
        for part in parameters.values():
            yield from _rope_types(part)


@contextmanager
def _refused(about: str) -> Iterator[None]:
    """Turn any error of transformers or peft about a user's input into a ``UsageError``."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:  # each class of configuration and model raises its own
        raise UsageError(f"{about}: {shorten(str(error), 400)}") from error
