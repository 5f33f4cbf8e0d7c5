"""Operations are counted without memory for them, and set against what a device can do at best."""

import pytest
import torch
from models import MODELS, transformer
from torch import nn

from memformer_pl.contract import Segment
from memformer_pl.models import Transformer
from memformer_pl.training.flops import PEAKS, count_flops, forward_flops, peak_flops_of, training_flops

CUDA = torch.device("cuda")


@pytest.mark.parametrize("name", MODELS)
def test_a_copy_without_values_costs_what_the_model_costs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, expected = MODELS[name](), count_flops(MODELS[name]())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    stream, runs = torch.random.get_rng_state(), []
    monkeypatch.setattr(model, "step", lambda *args: runs.append(1) or type(model).step(model, *args))
    assert forward_flops(model) == expected
    assert len(runs) == (name == "lstm")  # the only one whose shapes depend on values
    assert torch.equal(torch.random.get_rng_state(), stream)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training


def test_a_model_is_counted_that_no_memory_holds() -> None:
    with torch.device("meta"):
        model = Transformer(vocab_size=1 << 17, dim=1 << 14, heads=128, layers=40, segment_length=1 << 12)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters > 100e9
    assert training_flops(model) > 6 * parameters


def test_a_training_token_costs_six_operations_a_weight_and_attention_beside() -> None:
    model = transformer()
    matrices = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear | nn.Embedding))
    # without fused kernels, attention computes whole squares: products of queries and keys, and of weights and values
    attention = 3 * 2 * 2 * model.segment_length * model.dim * len(model.blocks)
    assert training_flops(model) == 6 * matrices + attention


class Unwilling(Transformer):
    """A model of a user that reads a value in its step."""

    def step(self, segment: Segment, state: tuple[()]) -> object:
        assert int(segment.tokens.sum()) == 0
        return super().step(segment, state)


def test_a_model_that_reads_values_is_counted_too() -> None:
    model = Unwilling(vocab_size=11, dim=8, heads=2, layers=2, segment_length=5)
    assert forward_flops(model) == count_flops(model) > 0


@pytest.mark.parametrize("name", PEAKS)
def test_the_peak_of_a_device_depends_on_the_precision(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    peak = PEAKS[name]
    assert peak.bfloat16 > peak.tf32 >= peak.float32 > 1e13
    assert peak_flops_of(CUDA, "bf16-mixed") == peak_flops_of(CUDA, "bf16-true") == peak.bfloat16
    for precision, expected in (("highest", peak.float32), ("high", peak.tf32), ("medium", peak.bfloat16)):
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda precision=precision: precision)
        assert peak_flops_of(CUDA, "32-true") == expected
    assert peak_flops_of(CUDA, "64-true") is None


def test_other_devices_have_no_known_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_flops_of(torch.device("cpu"), "bf16-mixed") is None
    for name in ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA GeForce RTX 4090 Laptop GPU", "Tesla T4"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops_of(CUDA, "bf16-mixed") is None
