"""The averaged encoder: exact copy, closed form, pairing by name, targets without a future."""

import pytest
import torch
from torch import nn

from nextvid.model.encoder import all_ids
from nextvid.model.reference import ema_update, reference_encoder, reference_features
from tests.nextvid.model.tiny import CELLS, TUBELETS, clip, shake, tiny_model


def test_trap_10_at_init_the_reference_is_the_online_encoder_on_all_tokens() -> None:
    model = tiny_model()
    model.train()
    reference = reference_encoder(model.encoder)
    tokens, _ = clip()
    online = model.encoder(tokens, TUBELETS, all_ids(TUBELETS, CELLS))
    assert torch.equal(reference(tokens, TUBELETS), online)
    assert torch.equal(reference_features(reference, tokens, target_norm=False), online[:, CELLS:])
    assert not reference.training
    assert not any(parameter.requires_grad for parameter in reference.parameters())


def test_targets_are_normalised_without_affine() -> None:
    features = reference_features(tiny_model().encoder, clip()[0], target_norm=True)
    assert not features.requires_grad
    assert features.shape == (2, (TUBELETS - 1) * CELLS, 32)
    assert features.mean(dim=-1).abs().max() < 1e-5
    assert torch.allclose(features.var(dim=-1, correction=0), torch.ones(2, 36), atol=1e-3)


def test_trap_09_targets_do_not_know_the_future() -> None:
    reference = reference_encoder(tiny_model().encoder)
    tokens, _ = clip()
    before = reference_features(reference, tokens, target_norm=True)
    tokens[:, 3 * CELLS :] = 1.0
    after = reference_features(reference, tokens, target_norm=True)
    assert torch.equal(before[:, : 2 * CELLS], after[:, : 2 * CELLS])
    assert not torch.allclose(before[:, 2 * CELLS :], after[:, 2 * CELLS :], atol=1e-3)


def test_trap_11_average_of_constant_weights_has_the_closed_form() -> None:
    model = tiny_model()
    reference = reference_encoder(model.encoder)
    start = {name: value.clone() for name, value in reference.state_dict().items()}
    shake(model.encoder)
    momentum, steps = 0.99925, 40  # more steps add fp32 rounding beyond the 1e-6 below
    for _ in range(steps):
        ema_update(reference, model.encoder, momentum)
    for name, online in model.encoder.state_dict().items():
        expected = online.double() - (online.double() - start[name].double()) * momentum**steps
        assert (reference.state_dict()[name].double() - expected).abs().max() < 1e-6


def test_trap_11_an_average_below_fp32_is_refused() -> None:
    model = tiny_model()
    reference = reference_encoder(model.encoder)
    with pytest.raises(AssertionError, match="below fp32"):
        ema_update(reference.bfloat16(), model.encoder, 0.9)


def test_trap_12_parameters_pair_by_name_through_wrappers() -> None:
    model = tiny_model()
    reference = reference_encoder(model.encoder)
    shake(model.encoder)
    wrapped = nn.Module()
    wrapped.module = nn.Module()
    wrapped.module._orig_mod = model.encoder  # names as DDP over torch.compile gives them
    ema_update(reference, wrapped, 0.0)
    for name, value in model.encoder.state_dict().items():
        assert torch.equal(reference.state_dict()[name], value)


def test_trap_12_other_names_are_refused() -> None:
    model = tiny_model()
    assert model.predictor is not None
    with pytest.raises(AssertionError, match="unpaired"):
        ema_update(reference_encoder(model.encoder), model.predictor, 0.9)


def test_no_average_is_momentum_zero() -> None:
    """Tab. 12: the reference is then the current online encoder."""
    model = tiny_model()
    reference = reference_encoder(model.encoder)
    shake(model.encoder)
    ema_update(reference, model.encoder, 0.0)
    assert torch.equal(reference.embed.weight, model.encoder.embed.weight)


def test_trap_12_tables_are_not_in_the_state() -> None:
    encoder = tiny_model().encoder
    assert not list(encoder.buffers())
    assert encoder.state_dict().keys() == dict(encoder.named_parameters()).keys()
