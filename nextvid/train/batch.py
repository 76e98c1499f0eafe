"""One rank's clips of a global batch, and the encoder's input and the decoder's targets made from them.

The loader fills it, the step reads it. Latents are those of any target encoder (VA-VAE, SigLIP2, Cosmos), normalised
and on the model's grid. Pixels stay bytes until the step, which takes a quarter of the memory.

Axes: B clips, F frames, C channels of one frame, h and w cells, H and W pixels, L visible tokens, N = T*S tokens,
i numbers in a token, T tubelets, S cells.
"""

from dataclasses import dataclass

from jaxtyping import Float, Int, UInt8
from torch import Tensor

from nextvid.config.recipe import ModelConfig, RecipeConfig
from nextvid.model.tokens import latent_tokens, pixel_tokens, pixel_values, space_to_depth, stack_target
from storage.errors import ConfigError


@dataclass(frozen=True)
class Batch:
    """Clips on their device, images repeated over frames; `latents` or `pixels` is None if the recipe reads none."""

    step: int
    draws: tuple[int, ...]
    latents: Float[Tensor, "B F C h w"] | None  # normalised, on the model's grid
    visible: list[Int[Tensor, "B L"]]  # ids for each mask strategy
    pixels: UInt8[Tensor, "B F H W 3"] | None = None  # of the same view as the latents
    waited_s: float = 0.0

    def split(self, clips: int) -> list["Batch"]:
        """Micro-batches of `clips` each. Raises ConfigError unless they divide the batch: means need equal weight."""
        if len(self.draws) % clips:
            raise ConfigError(f"micro_batch {clips} does not divide the {len(self.draws)} clips of a rank")
        return [
            Batch(
                self.step,
                self.draws[first : first + clips],
                None if self.latents is None else self.latents[first : first + clips],
                [ids[first : first + clips] for ids in self.visible],
                None if self.pixels is None else self.pixels[first : first + clips],
            )
            for first in range(0, len(self.draws), clips)
        ]


def encoder_tokens(batch: Batch, model: ModelConfig) -> Float[Tensor, "B N i"]:
    """Encoder input of every cell: latent cells, or patches of pixels in [-1, 1] (docs/method.md 1)."""
    match model.encoder.input:
        case "latents":
            assert batch.latents is not None, "a recipe that reads latents got a batch without"
            return latent_tokens(batch.latents, model.tubelet)
        case "pixels":
            assert batch.pixels is not None, "a recipe that reads pixels got a batch without"
            return pixel_tokens(pixel_values(batch.pixels), model.patch, model.tubelet)


def flow_targets(batch: Batch, recipe: RecipeConfig) -> Float[Tensor, "B T S C"] | None:
    """The decoder's targets, None without flow loss: latents, or pixels in [-1, 1] folded into channels of a cell."""
    model = recipe.model
    if recipe.losses.flow <= 0:
        return None
    if recipe.losses.target == "pixels":
        assert batch.pixels is not None, "a recipe that predicts pixels got a batch without"
        return stack_target(space_to_depth(pixel_values(batch.pixels), model.patch), model.tubelet)
    assert batch.latents is not None, f"a recipe that predicts {recipe.losses.target} got a batch without latents"
    return stack_target(batch.latents, model.tubelet)
