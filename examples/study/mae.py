"""The positive control: a masked autoencoder with the encoder of the recipe, without its causality.

Tubes of cells are hidden in whole clips, by the recipe's own masks; the encoder sees the visible cells of all tubelets
at once, and a small decoder gives the normalised latents of the hidden ones (MAE, VideoMAE). It tells a weak score of
the method from a weak probe: same weights, data, masks, rates and budget.

Axes: B clips, N = T*S tokens, L visible tokens, i numbers in a token, D width.
"""

import torch
from einops import repeat
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from nextvid.config.recipe import RecipeConfig
from nextvid.model.attention import rotary
from nextvid.model.encoder import NORM_EPS, Encoder, EncoderBlock, all_ids, initialise
from nextvid.model.reference import ema_update, reference_encoder
from nextvid.model.tokens import gather_tokens, latent_tokens
from nextvid.train.batches import TrainingBatches
from nextvid.train.optim import build_optimizer, clip_gradients, rates, set_rates, trained_modules


class Decoder(nn.Module):
    """From features of visible cells to latents of all: the recipe's decoder's width and depth, full attention."""

    def __init__(self, recipe: RecipeConfig) -> None:
        super().__init__()
        model, config = recipe.model, recipe.model.decoder
        self.model = model
        self.embed = nn.Linear(model.encoder.width, config.width)
        self.hidden = nn.Parameter(torch.zeros(1, 1, config.width))
        self.blocks = nn.ModuleList(
            EncoderBlock(config.width, config.heads, 4 * config.width) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.head = nn.Linear(config.width, model.target_channels)
        initialise(self, model.encoder.width)

    def forward(self, features: Float[Tensor, "B L D"], ids: Int[Tensor, "B L"], count: int) -> Float[Tensor, "B N i"]:
        """Latents of all `count` cells from features of those with these ids."""
        seen = self.embed(features)
        places = repeat(ids, "b l -> b l d", d=seen.shape[-1])
        x = self.hidden.expand(len(seen), count, -1).scatter(1, places, seen)
        model, config = self.model, self.model.decoder
        table = rotary(torch.arange(count)[None], config.width // config.heads, model.grid_height, model.grid_width).to(
            x.device
        )
        for block in self.blocks:
            x = block(x, table, scaled_dot_product_attention)
        return self.head(self.norm(x))


class MaskedAutoencoder(nn.Module):
    """Encoder and decoder; `forward` is the mean squared error at hidden cells."""

    def __init__(self, recipe: RecipeConfig) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(recipe.model), Decoder(recipe)

    def forward(self, tokens: Float[Tensor, "B N i"], ids: Int[Tensor, "B L"]) -> Float[Tensor, ""]:
        found = self.decoder(encode(self.encoder, gather_tokens(tokens, ids), ids), ids, tokens.shape[1])
        hidden = torch.ones(tokens.shape[:2], device=tokens.device).scatter(1, ids, 0.0)
        return ((found - tokens).square().mean(-1) * hidden).sum() / hidden.sum()


def encode(encoder: Encoder, tokens: Float[Tensor, "B L i"], ids: Int[Tensor, "b L"]) -> Float[Tensor, "B L D"]:
    """Features of these cells, each of which sees all others."""
    return encoder.extend(tokens, ids, [scaled_dot_product_attention] * len(encoder.blocks))


def features(encoder: Encoder, recipe: RecipeConfig, latents: Float[Tensor, "B F C h w"]) -> Float[Tensor, "B N D"]:
    """Features of whole clips, as a probe reads them."""
    tokens = latent_tokens(latents, recipe.model.tubelet)
    return encode(encoder, tokens, all_ids(tokens.shape[1] // recipe.model.cells, recipe.model.cells, tokens.device))


def train_mae(batches: TrainingBatches) -> tuple[Encoder, list[float]]:
    """The averaged encoder after the recipe's steps, by its batches, masks, rates and momentum; the loss of each step.

    A step has every mask strategy, as a step of the method has.
    """
    recipe = batches.recipe
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = MaskedAutoencoder(recipe)
    average, optimizer = reference_encoder(model.encoder), build_optimizer(model, recipe.optim)
    losses = []
    for batch in batches:
        assert batch.latents is not None, "the recipe reads latents"
        set_rates(optimizer, rates(recipe.stages, recipe.optim.shape, batch.step))
        optimizer.zero_grad(set_to_none=True)
        tokens = latent_tokens(batch.latents, recipe.model.tubelet)
        loss = torch.stack([model(tokens, ids) for ids in batch.visible]).mean()
        loss.backward()
        clip_gradients(trained_modules(model), recipe.optim)
        optimizer.step()
        ema_update(average, model.encoder, recipe.optim.ema)
        losses.append(float(loss.detach()))
    return average, losses
