"""NExT-Vid: encoder, predictor and flow decoder as one module whose forward returns the losses (docs/method.md 0, 4).

The reference encoder is separate (reference.py). Masks come in as visible ids, features and targets as tensors, noise
as a key, so the losses are a pure function of the arguments.

Axes: B clips, T tubelets, S cells, N = T*S tokens, L visible tokens, i numbers in a token, P = (T-1)*S, Q predicted
positions, D encoder width, c condition channels, C target channels, k copies, F predicted tubelets, n positions in
each, m hidden cells, R tokens of the condition; b is B or 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from nextvid.config.recipe import MaskConfig, RecipeConfig
from nextvid.model.attention import flash_kernel
from nextvid.model.decoder import CrossFlowDecoder, FlowDecoder, Positions
from nextvid.model.encoder import Encoder, all_ids
from nextvid.model.flow import ODE_STEPS, NoiseKey, draw_flow, euler, flow_loss, folded_mean, interpolate
from nextvid.model.predictor import Predicted, Predictor
from nextvid.model.tokens import gather_tokens, tube_ids


@dataclass(frozen=True)
class Losses:
    """`total` is minimised; `align` and `flow` are the unweighted losses by strategy name, for the log."""

    total: Float[Tensor, ""]
    align: dict[str, Tensor]
    flow: dict[str, Tensor]


@dataclass(frozen=True)
class Conditioned:
    """Predictions for tubelets 1..F at their positions; `z` is None for the model without predictor."""

    z: Float[Tensor, "B Q D"] | None
    condition: Float[Tensor, "B R c"]
    positions: Positions
    frames: int


def strategy_names(masks: MaskConfig) -> tuple[str, ...]:
    """Names of a step's passes, in order: one for each mask strategy, or `all` without masks."""
    return ("all",) if masks.keep == "all" else tuple(strategy.name for strategy in masks.strategies)


class NExTVid(nn.Module):
    """All trained parts. Parameters are initialised from torch's global generator: seed it first."""

    def __init__(self, recipe: RecipeConfig) -> None:
        super().__init__()
        model = recipe.model
        if model.attention == "flash":
            flash_kernel()
        self.recipe = recipe
        self.encoder = Encoder(model)
        self.predictor = None if model.predictor.kind == "none" else Predictor(model)
        self.decoder: FlowDecoder | CrossFlowDecoder | None
        match model.decoder.kind:
            case "dit_iso":
                self.decoder = FlowDecoder(model)
            case "xattn" | "xattn_self":
                self.decoder = CrossFlowDecoder(model)
            case "none":
                self.decoder = None

    def forward(
        self,
        tokens: Float[Tensor, "B N i"],
        targets: Float[Tensor, "B T S C"] | None,
        features: Float[Tensor, "B P D"] | None,
        visible: Sequence[Int[Tensor, "B _"]],
        key: NoiseKey,
        copies: int = 1,
        only: int | None = None,
        fold: bool = False,
    ) -> Losses:
        """Losses of whole clips.

        `tokens`: the encoder's input for every cell. `targets`: normalised latents (None if the flow loss is off).
        `features`: from `reference_features` (None if alignment is off). `visible`: for each strategy the sorted
        visible ids over all T tubelets. `only`: run one strategy; totals of single strategies add up to the total of
        all, so each can have its own backward. `fold`: decode the copies one after the other (`folded_mean`).
        """
        weights, names = self.recipe.losses, strategy_names(self.recipe.masks)
        assert len(visible) == len(names), f"{len(visible)} sets of visible ids for strategies {names}"
        assert len(key.draws) == tokens.shape[0], f"{len(key.draws)} draw numbers for {tokens.shape[0]} clips"
        total = torch.zeros((), device=tokens.device)
        align: dict[str, Tensor] = {}
        flow: dict[str, Tensor] = {}
        for index, (name, ids) in enumerate(zip(names, visible, strict=True)):
            if only is not None and index != only:
                continue
            seen, query_ids = self._encode_and_predict(tokens, ids)
            if weights.align > 0:
                assert features is not None, "alignment needs reference features"
                assert seen.z is not None, "alignment needs a predictor"
                align[name] = self._align(seen.z, features, query_ids)
                total = total + weights.align * align[name] / len(names)
            if weights.flow > 0:
                assert targets is not None, "the flow loss needs targets"
                flow[name] = self._flow(seen, targets, query_ids, key, index, copies, fold)
                total = total + weights.flow * flow[name] / len(names)
        return Losses(total, align, flow)

    def condition(self, tokens: Float[Tensor, "B L i"], ids: Int[Tensor, "b L"], frames: int) -> Conditioned:
        """Predictions for all cells of tubelets 1..frames from the visible tokens of tubelets 0..frames-1.

        `tokens` are the real ones (teacher forcing) with these `ids`, equally many in each tubelet.
        """
        cells = self.recipe.model.cells
        queries = all_ids(frames, cells, tokens.device) + cells
        return self._predict(tokens, ids, queries, frames, frames)

    def conditioned(self, predicted: Predicted, positions: Positions, frames: int) -> Conditioned:
        """A prediction with what the decoder reads of it: z, or the predictor's hidden state."""
        reads_hidden = self.recipe.model.decoder.condition == "hidden"
        return Conditioned(predicted.z, predicted.hidden if reads_hidden else predicted.z, positions, frames)

    def velocity(
        self, seen: Conditioned, noisy: Float[Tensor, "k B F n C"], tau: Float[Tensor, "k B F"]
    ) -> Float[Tensor, "k B F n C"]:
        """The decoder's velocity at (noisy, tau); tau in 0..1."""
        assert self.decoder is not None, "this recipe has no decoder"
        return self.decoder(seen.condition, noisy, tau, seen.positions)

    @torch.no_grad()
    def sample(
        self, seen: Conditioned, steps: int = ODE_STEPS, generator: torch.Generator | None = None
    ) -> Float[Tensor, "B F n C"]:
        """Generate normalised latents of the predicted tubelets, by Euler's method from Gaussian noise."""
        clips, frames = seen.condition.shape[0], seen.frames
        shape = (1, clips, frames, seen.positions.query_ids.shape[1] // frames, self.recipe.model.target_channels)
        device, dtype = seen.condition.device, torch.promote_types(seen.condition.dtype, torch.float32)
        noise = torch.randn(shape, generator=generator, device=device).to(dtype)

        def velocity(h: Tensor, tau: float) -> Tensor:
            return self.velocity(seen, h, torch.full(shape[:3], tau, device=device)).to(dtype)

        return euler(velocity, noise, steps)[0]

    def _encode_and_predict(self, tokens: Tensor, ids: Tensor) -> tuple[Conditioned, Tensor]:
        """Encode a strategy's visible tokens of tubelets 0..T-2 and predict tubelets 1..T-1."""
        model, cells = self.recipe.model, self.recipe.model.cells
        tubelets = tokens.shape[1] // cells
        queries = all_ids(tubelets - 1, cells, tokens.device) + cells
        if self.recipe.masks.keep == "flat":
            return self._predict(gather_tokens(tokens, ids), ids, queries, None, tubelets - 1), queries
        assert ids.shape[1] % tubelets == 0, "a tube keeps equally many cells in every tubelet"
        kept = ids.shape[1] // tubelets
        # The last tubelet reaches no loss (docs/method.md 1): queries end at T-1 and attend strictly earlier tubelets.
        context_ids = ids[:, : (tubelets - 1) * kept]
        if model.predictor.support == "masked":
            queries = tube_ids(hidden_cells(ids[:, :kept], cells), tubelets - 1, cells) + cells
        context = gather_tokens(tokens, context_ids)
        return self._predict(context, context_ids, queries, tubelets - 1, tubelets - 1), queries

    def _predict(self, tokens: Tensor, ids: Tensor, query_ids: Tensor, blocks: int | None, frames: int) -> Conditioned:
        context = self.encoder(tokens, blocks, ids)
        positions = Positions(query_ids, ids, blocks)
        if self.predictor is None:
            return Conditioned(None, context, positions, frames)
        return self.conditioned(self.predictor(context, ids, query_ids, blocks), positions, frames)

    def _align(self, z: Tensor, features: Tensor, query_ids: Tensor) -> Tensor:
        """Mean over every element of (z - y)^2 in fp32 (docs/method.md 4.1)."""
        if self.recipe.model.predictor.support == "masked":
            features = gather_tokens(features, query_ids - self.recipe.model.cells)
        return (z.float() - features.float()).square().mean()

    def _flow(
        self,
        seen: Conditioned,
        targets: Tensor,
        query_ids: Tensor,
        key: NoiseKey,
        strategy: int,
        copies: int,
        fold: bool,
    ) -> Tensor:
        """Flow loss over all copies, at once or folded; the draws are the same, since each copy has its own seed."""
        assert self.decoder is not None, "the flow loss needs a decoder"
        clips, tubelets, cells, channels = targets.shape
        shape, target, index = (tubelets - 1, cells, channels), targets[:, 1:], None
        if self.recipe.model.predictor.support == "masked":
            chosen = rearrange(query_ids, "b (f n) -> b f n", f=tubelets - 1)[:, 0] % cells
            index = chosen[:, None, :, None].expand(clips, tubelets - 1, -1, channels)
            target = target.gather(2, index)

        def loss_of(condition: Tensor, some: range) -> Tensor:
            draws = draw_flow(key, strategy, some, shape, self.recipe.losses, targets.device)
            if index is not None:
                draws = draws._replace(noise=draws.noise.gather(3, index.expand(len(some), *index.shape)))
            velocity = self.velocity(replace(seen, condition=condition), interpolate(draws, target), draws.tau)
            return flow_loss(velocity, draws, target)

        if not fold or copies == 1:
            return loss_of(seen.condition, range(copies))
        parameters = [p for p in self.decoder.parameters() if p.requires_grad]
        return folded_mean(lambda z, copy: loss_of(z, range(copy, copy + 1)), copies, seen.condition, parameters)


def hidden_cells(visible: Int[Tensor, "B n"], cells: int) -> Int[Tensor, "B m"]:
    """Cells that are not visible, ascending; every row has equally many visible ones."""
    hidden = torch.ones(visible.shape[0], cells, dtype=torch.int8, device=visible.device).scatter(1, visible, 0)
    order = torch.argsort(hidden, dim=1, descending=True, stable=True)
    return order[:, : cells - visible.shape[1]]
