"""A probe shows its input, costs nothing unless watched, and changes nothing."""

import pytest
import torch
from models import VOCAB, full, losses_of, memformer
from torch import Tensor, nn

from memformer_pl.layers import attention
from memformer_pl.layers.probe import Probe
from memformer_pl.models import Memformer

# Two encoder and two decoder layers.
PROBES = {
    *(f"encoder.{n}.self_attention.weights" for n in range(2)),
    *(f"encoder.{n}.memory_reader.attention.weights" for n in range(2)),
    *(f"decoder.{n}.self_attention.weights" for n in range(2)),
    *(f"decoder.{n}.cross_attention.weights" for n in range(2)),
    *("writer.retention", "writer.writing"),
}


def watch(model: nn.Module) -> dict[str, list[Tensor]]:
    """What passes through each probe of a model from now on, by the name of the probe."""
    seen: dict[str, list[Tensor]] = {}

    def show(name: str, probe: nn.Module) -> None:
        probe.register_forward_hook(lambda probe, args, value: seen.setdefault(name, []).append(value))

    for name, probe in model.named_modules():
        if isinstance(probe, Probe):
            show(name, probe)
    return seen


def test_a_probe_passes_on_its_input_and_shows_it_to_hooks() -> None:
    probe, value, seen = Probe(), torch.randn(2), []
    hook = probe.register_forward_hook(lambda probe, args, value: seen.append(value))
    assert probe(value) is value
    assert seen[0] is value
    hook.remove()
    probe(value)
    assert len(seen) == 1


def test_a_probe_knows_whether_it_is_watched() -> None:
    probe = Probe()
    assert not probe.watched
    hook = probe.register_forward_hook(lambda *_: None)
    assert probe.watched
    hook.remove()
    assert not probe.watched


def test_a_model_shows_every_attention_under_its_name_once_a_segment() -> None:
    model = memformer()
    seen = watch(model)
    losses_of(model, full(3))
    assert {name: len(values) for name, values in seen.items()} == dict.fromkeys(PROBES, 3)


def test_probed_attention_weights_sum_to_one() -> None:
    model = memformer()
    seen = watch(model)
    losses_of(model, full(3))
    shares = [weights.sum(-1) for name in PROBES if name.endswith("weights") for weights in seen[name]]
    writer = zip(seen["writer.retention"], seen["writer.writing"], strict=True)
    shares += [retention + writing.sum(-1) for retention, writing in writer]
    for share in shares:
        torch.testing.assert_close(share, torch.ones_like(share), rtol=1e-12, atol=0)


def test_watching_changes_no_loss() -> None:
    watched, unwatched = memformer(), memformer()
    watch(watched)
    for a, b in zip(losses_of(watched, full(3)), losses_of(unwatched, full(3)), strict=True):
        assert torch.equal(a, b)


def test_attention_weights_are_not_computed_unless_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    def computed(*args: object) -> None:
        raise ArithmeticError

    monkeypatch.setattr(attention, "attention_weights", computed)
    model = memformer()
    assert losses_of(model, full(2))[0].shape == (2, 5)
    watch(model)
    with pytest.raises(ArithmeticError):
        losses_of(model, full(2))


def test_a_probe_adds_nothing_to_a_state_dict() -> None:
    model = Memformer(vocab_size=VOCAB, dim=8, heads=2)
    assert not any(name.rpartition(".")[0] in PROBES for name in model.state_dict())
