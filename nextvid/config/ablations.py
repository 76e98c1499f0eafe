"""The paper's ablations (Tab. 2-5, 11, 12; docs/method.md 10), each a recipe that differs from its base in one switch.

The base is ViT-B with latents as input, its schedule cut where the paper stops early: 15K of 132K steps, so warm-up and
the first tenth of Stable1 (docs/method.md 7.3), four noise levels a target. The paper's is almost surely ViT-G, 15 days
of one GPU a row; ViT-B costs 3.2 TFLOP a clip, only a fifth more than ViT-S, since predictor and decoder weigh most in
both (docs/method.md 12). A switch is written as the overrides that a user could type; ablation_table.py says which row
of which table a recipe repeats.
"""

from nextvid.config.overrides import apply_overrides
from nextvid.config.recipe import RecipeConfig

EARLY_STOP = 15 / 132  # of all steps, docs/method.md 7.3
LATER_STOP = 30 / 132  # of all steps, the longer rows of Tab. 11
COPIES = 4  # noise levels a target in the stages that are left, Tab. 8
SIGLIP2_CHANNELS = 768  # width of SigLIP2 B/16, docs/method.md 10
COSMOS_CHANNELS = 16 * 2 * 2  # 16 channels at stride 8 (diffusers: AutoencoderKLCosmos), four cells to one of stride 16

ABLATIONS: tuple[str, ...] = (
    "ablation_full",
    "ablation_gen_only",
    "ablation_gen_isolated",
    "ablation_gen_predictor",
    "ablation_align_only",
    "ablation_align_isolated",
    "ablation_full_pixels",
    "ablation_target_pixels",
    "ablation_target_siglip2",
    "ablation_target_cosmos",
    "ablation_unmasked",
    "ablation_cross_self",
    "ablation_one_copy",
    "ablation_full_30k",
    "ablation_one_copy_30k",
    "ablation_no_average",
)


def ablation(name: str, one_gpu: RecipeConfig) -> RecipeConfig:
    """The ablation of that name, one of ABLATIONS; `one_gpu` is the recipe whose schedule is cut."""
    full = stopped(one_gpu, EARLY_STOP)
    match name.removeprefix("ablation_"):
        case "full":
            found = full
        case "gen_only":
            found = gen_only(full)
        case "gen_isolated":
            found = gen_isolated(full)
        case "gen_predictor":
            found = gen_predictor(full)
        case "align_only":
            found = align_only(full)
        case "align_isolated":
            found = align_isolated(full)
        case "full_pixels":
            found = full_pixels(full)
        case "target_pixels":
            found = target_pixels(full_pixels(full))
        case "target_siglip2":
            found = target_siglip2(full_pixels(full))
        case "target_cosmos":
            found = target_cosmos(full_pixels(full))
        case "unmasked":
            found = unmasked(gen_isolated(full))
        case "cross_self":
            found = cross_self(gen_isolated(full))
        case "one_copy":
            found = one_copy(full)
        case "full_30k":
            found = stopped(one_gpu, LATER_STOP)
        case "one_copy_30k":
            found = one_copy(stopped(one_gpu, LATER_STOP))
        case "no_average":
            found = no_average(full)
        case _:
            raise AssertionError(f"{name} is none of ABLATIONS")
    return found.model_copy(update={"name": name})


def stopped(recipe: RecipeConfig, share: float) -> RecipeConfig:
    """The recipe's schedule up to `share` of its steps, inside the second stage; rates are those of the whole one."""
    warmup, stable = recipe.stages[:2]
    left = round(share * recipe.steps) - warmup.steps
    assert 0 < left <= stable.steps, f"{share} of {recipe.steps} steps does not end in {stable.name}"
    end = stable.lr_start + (stable.lr_end - stable.lr_start) * left / stable.steps
    cut = stable.model_copy(update={"steps": left, "lr_end": float(f"{end:.10g}")})
    stages = tuple(stage.model_copy(update={"tau_copies": COPIES}) for stage in (warmup, cut))
    return recipe.model_copy(update={"stages": stages})


def gen_only(full: RecipeConfig) -> RecipeConfig:
    """Tab. 2, row 1: flow loss alone, and context that joins the hidden state."""
    return apply_overrides(full, ("losses.align=0", "model.predictor.kind=joint"))


def gen_isolated(full: RecipeConfig) -> RecipeConfig:
    """Tab. 2, row 2, and the base of Tab. 4 and 5: flow loss alone, a decoder that reads the encoder, no predictor."""
    return apply_overrides(full, ("losses.align=0", "model.predictor.kind=none", "model.decoder.kind=xattn"))


def gen_predictor(full: RecipeConfig) -> RecipeConfig:
    """Tab. 2, row 2, read the other way: the base without alignment (docs/method.md 14 row 24)."""
    return apply_overrides(full, ("losses.align=0",))


def align_only(full: RecipeConfig) -> RecipeConfig:
    """Tab. 2, row 3: alignment alone, and context that joins the hidden state."""
    return apply_overrides(full, ("losses.flow=0", "model.decoder.kind=none", "model.predictor.kind=joint"))


def align_isolated(full: RecipeConfig) -> RecipeConfig:
    """Tab. 2, row 4: alignment alone: an autoregressive V-JEPA with a cross-attention predictor."""
    return apply_overrides(full, ("losses.flow=0", "model.decoder.kind=none"))


def full_pixels(full: RecipeConfig) -> RecipeConfig:
    """Tab. 3, VA-VAE: the base with pixels as input, since targets that are no latents need them."""
    return apply_overrides(full, ("model.encoder.input=pixels",))


def target_pixels(full: RecipeConfig) -> RecipeConfig:
    """Tab. 3, pixel: 3 * 16 * 16 numbers a frame and cell; 384-wide decoders have a floor there (docs/method.md 10)."""
    return apply_overrides(full, ("losses.target=pixels", f"model.frame_channels={3 * full.model.patch**2}"))


def target_siglip2(full: RecipeConfig) -> RecipeConfig:
    """Tab. 3, SigLIP2: last patch features of each frame."""
    return apply_overrides(full, ("losses.target=siglip2", f"model.frame_channels={SIGLIP2_CHANNELS}"))


def target_cosmos(full: RecipeConfig) -> RecipeConfig:
    """Tab. 3, Cosmos: each frame takes the latent that covers it in time (docs/method.md 14 row 32)."""
    return apply_overrides(full, ("losses.target=cosmos", f"model.frame_channels={COSMOS_CHANNELS}"))


def unmasked(isolated: RecipeConfig) -> RecipeConfig:
    """Tab. 4: every cell visible, one pass."""
    return apply_overrides(isolated, ("masks.keep=all",))


def cross_self(isolated: RecipeConfig) -> RecipeConfig:
    """Tab. 5: self-attention among the noisy tokens of all tubelets, which then share one noise level."""
    return apply_overrides(isolated, ("model.decoder.kind=xattn_self", "losses.tau_share=clip"))


def one_copy(full: RecipeConfig) -> RecipeConfig:
    """Tab. 11: one noise level a target."""
    return apply_overrides(full, tuple(f"stages.{stage.name}.tau_copies=1" for stage in full.stages))


def no_average(full: RecipeConfig) -> RecipeConfig:
    """Tab. 12: the reference is the online encoder of the same step."""
    return apply_overrides(full, ("optim.ema=0",))
