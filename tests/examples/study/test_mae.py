"""The control sees all visible cells at once, none of the hidden ones, and learns."""

import torch

from examples.study.mae import MaskedAutoencoder, encode, features
from examples.study.tables import QUICK, Cell, overrides
from nextvid.config.overrides import apply_overrides
from nextvid.config.recipe import RecipeConfig
from nextvid.config.recipes import recipe
from nextvid.model.tokens import tube_ids


def tiny() -> RecipeConfig:
    small = ("model.encoder.depth=1", "model.decoder.depth=1")
    return apply_overrides(recipe("demo"), [*overrides(Cell("stills", "mae", 0), QUICK), *small])


def test_hidden_cells_are_predicted_from_visible_ones_alone() -> None:
    torch.manual_seed(0)
    model = MaskedAutoencoder(tiny())
    ids = tube_ids(torch.arange(12)[None].expand(2, -1), 2, 64)
    tokens = torch.randn(2, 128, 32)
    hidden = torch.ones(2, 128, dtype=torch.bool).scatter(1, ids, value=False)
    found = model.decoder(encode(model.encoder, tokens.gather(1, ids[..., None].expand(-1, -1, 32)), ids), ids, 128)
    assert torch.isclose(model(tokens, ids), (found - tokens)[hidden].square().mean())
    changed = torch.where(hidden[..., None], tokens + 1, tokens)
    again = model.decoder(encode(model.encoder, changed.gather(1, ids[..., None].expand(-1, -1, 32)), ids), ids, 128)
    assert torch.equal(found, again)


def test_features_of_an_earlier_tubelet_see_a_later_one() -> None:
    torch.manual_seed(0)
    config = tiny()
    encoder = MaskedAutoencoder(config).encoder
    latents = torch.randn(1, 4, 16, 8, 8)
    later = latents.clone()
    later[:, 2:] += 1
    assert not torch.allclose(features(encoder, config, latents)[:, :64], features(encoder, config, later)[:, :64])


def test_it_learns() -> None:
    torch.manual_seed(0)
    model = MaskedAutoencoder(tiny())
    ids = tube_ids(torch.arange(24)[None].expand(8, -1), 2, 64)
    tokens = torch.randn(8, 1, 32).expand(-1, 128, -1)  # of which every cell tells all
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(tokens, ids)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
