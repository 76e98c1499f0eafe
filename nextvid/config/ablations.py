"""The paper's ablations (Tab. 2-5, 11, 12; docs/method.md 10), each a recipe that differs from its base in one switch.

The base is ViT-B with latents as input, its schedule cut where the paper stops early: 15K of 132K steps, so warm-up and
the first tenth of Stable1 (docs/method.md 7.3), four noise levels a target. The paper's is almost surely ViT-G, 15 days
of one GPU a row; ViT-B costs 3.2 TFLOP a clip, only a fifth more than ViT-S, since predictor and decoder weigh most in
both (docs/method.md 12). docs/ablations.md lists which row of which table a recipe repeats.
"""

from nextvid.config.overrides import apply_overrides
from nextvid.config.recipe import RecipeConfig

EARLY_STOP = 15 / 132  # of all steps, docs/method.md 7.3
LATER_STOP = 30 / 132  # of all steps, the longer rows of Tab. 11
COPIES = 4  # noise levels a target in the stages that are left, Tab. 8
SIGLIP2_CHANNELS = 768  # width of SigLIP2 B/16, docs/method.md 10
COSMOS_CHANNELS = 16 * 2 * 2  # 16 channels at stride 8 (diffusers: AutoencoderKLCosmos), four cells to one of stride 16

# Overrides that several recipes share
GENERATION_ISOLATED = ("losses.align=0", "model.predictor.kind=none", "model.decoder.kind=xattn")
PIXELS = ("model.encoder.input=pixels",)  # targets that are no latents need frames
ONE_COPY = ("stages.warmup.tau_copies=1", "stages.stable1.tau_copies=1")

# The overrides of the base that make each ablation, as a user could type them
ABLATIONS: dict[str, tuple[str, ...]] = {
    "ablation_full": (),
    # Tab. 2, row 1: flow loss alone, and context that joins the hidden state
    "ablation_gen_only": ("losses.align=0", "model.predictor.kind=joint"),
    # Tab. 2, row 2, and the base of Tab. 4 and 5: flow loss alone, a decoder that reads the encoder, no predictor
    "ablation_gen_isolated": GENERATION_ISOLATED,
    # Tab. 2, row 2, read the other way: the base without alignment (docs/method.md 14 row 24)
    "ablation_gen_predictor": ("losses.align=0",),
    # Tab. 2, row 3: alignment alone, and context that joins the hidden state
    "ablation_align_only": ("losses.flow=0", "model.decoder.kind=none", "model.predictor.kind=joint"),
    # Tab. 2, row 4: alignment alone: an autoregressive V-JEPA with a cross-attention predictor
    "ablation_align_isolated": ("losses.flow=0", "model.decoder.kind=none"),
    # Tab. 3. Pixels: 3 * 16 * 16 numbers a frame and cell; 384-wide decoders have a floor there (docs/method.md 10)
    "ablation_full_pixels": PIXELS,
    "ablation_target_pixels": (*PIXELS, "losses.target=pixels", f"model.frame_channels={3 * 16 * 16}"),
    # SigLIP2: last patch features of each frame
    "ablation_target_siglip2": (*PIXELS, "losses.target=siglip2", f"model.frame_channels={SIGLIP2_CHANNELS}"),
    # Cosmos: each frame takes the latent that covers it in time (docs/method.md 14 row 32)
    "ablation_target_cosmos": (*PIXELS, "losses.target=cosmos", f"model.frame_channels={COSMOS_CHANNELS}"),
    # Tab. 4: every cell visible, one pass
    "ablation_unmasked": (*GENERATION_ISOLATED, "masks.keep=all"),
    # Tab. 5: self-attention among the noisy tokens of all tubelets, which then share one noise level
    "ablation_cross_self": (*GENERATION_ISOLATED, "model.decoder.kind=xattn_self", "losses.tau_share=clip"),
    # Tab. 11: one noise level a target; and twice the steps
    "ablation_one_copy": ONE_COPY,
    "ablation_full_30k": (),
    "ablation_one_copy_30k": ONE_COPY,
    # Tab. 12: the reference is the online encoder of the same step
    "ablation_no_average": ("optim.ema=0",),
}


def ablation(name: str, one_gpu: RecipeConfig) -> RecipeConfig:
    """The ablation of that name, one of ABLATIONS; `one_gpu` is the recipe whose schedule is cut."""
    base = stopped(one_gpu, LATER_STOP if name.endswith("_30k") else EARLY_STOP)
    return apply_overrides(base, ABLATIONS[name]).model_copy(update={"name": name})


def stopped(recipe: RecipeConfig, share: float) -> RecipeConfig:
    """The recipe's schedule up to `share` of its steps, inside the second stage; rates are those of the whole one."""
    warmup, stable = recipe.stages[:2]
    left = round(share * recipe.steps) - warmup.steps
    assert 0 < left <= stable.steps, f"{share} of {recipe.steps} steps does not end in {stable.name}"
    end = stable.lr_start + (stable.lr_end - stable.lr_start) * left / stable.steps
    cut = stable.model_copy(update={"steps": left, "lr_end": float(f"{end:.10g}")})
    stages = tuple(stage.model_copy(update={"tau_copies": COPIES}) for stage in (warmup, cut))
    return recipe.model_copy(update={"stages": stages})
