"""Whether a recipe can be trained on a trainset: asked before a run is written, so that nothing starts in vain.

Reads facts and row tables, no latents. What fits is drawn by order.py and read by loader.py.
"""

from nextvid.config import RecipeConfig
from nextvid.corpus.trainset import Trainset
from nextvid.train.order import Order
from storage.errors import RefusedError


def refuse_unfit(trainset: Trainset, recipe: RecipeConfig) -> None:
    """RefusedError where a dataset has no clip of a stage's length, or the latents are of another shape."""
    Order(trainset, recipe)
    if recipe.reads_latents:
        fold(trainset, recipe)


def fold(trainset: Trainset, recipe: RecipeConfig) -> int:
    """Cells of the store per cell and side of the model's grid; refuses what does not fit."""
    spec, model = trainset.spec, recipe.model
    fold = max(1, spec.height // model.grid_height)
    stored = (spec.channels, spec.height, spec.width)
    wanted = (model.frame_channels // fold**2, model.grid_height * fold, model.grid_width * fold)
    if stored != wanted or model.frame_channels % fold**2:
        raise RefusedError(
            f"recipe {recipe.name} wants {model.frame_channels} channels on a grid of {model.grid_height} x "
            f"{model.grid_width}, and the latents are {spec.channels} channels of {spec.height} x {spec.width} "
            f"(encoding of {spec.resolution} pixels): choose another recipe, resolution or autoencoder"
        )
    return fold
