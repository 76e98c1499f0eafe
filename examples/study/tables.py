"""What the study compares, declared before anything runs: sizes, data, arms, tables, predictions (docs/study_plan.md).

A table is data x arms x seeds. A run is one arm on one data set with one seed, whichever tables ask for it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Literal

from nextvid.config.ablations import GENERATION_ISOLATED
from nextvid.config.recipes import STAGE_NAMES, STAGE_SHARES
from storage.digest import digest_config

VERSION = 1  # of the study: what is measured differently afterwards is another run
FRAMES = 4  # of a clip: two tubelets, as in the pilot (docs/study_plan.md)
Kind = Literal["random", "recipe", "mae", "floor"]


@dataclass(frozen=True)
class Size:
    """How large a study is."""

    train: int  # clips
    test: int
    steps: int
    batch: int
    seeds: int
    fewer_seeds: int  # of tables that say so
    probe_epochs: int
    probe_batch: int
    probe_seeds: int
    entries: int  # masks drawn in advance
    looks: int  # diagnoses of a run, beside the one before its first step
    data: tuple[str, ...]  # sets that are run


@dataclass(frozen=True)
class Arm:
    """One way to come by an encoder: changes of the recipe `demo`, the control, no training, or a floor."""

    kind: Kind
    meaning: str
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Data:
    """A data set: what is asked of its clips, and for drawn ones how fast objects move."""

    meaning: str
    targets: tuple[str, ...]
    speed: float = 0.0  # of objects, over the demo's; drawn data only
    drift: bool = False  # whether grounds drift as the demo's
    fold: int | None = None  # weizmann4: persons whose number leaves this rest by three are tested on


@dataclass(frozen=True)
class Table:
    """One claim: where it is looked for, what is compared, and what we expected."""

    title: str
    data: tuple[str, ...]
    arms: tuple[str, ...]
    differences: tuple[tuple[str, str], ...]  # first minus second, paired by seed
    prediction: str
    fewer: bool = False  # whether it has fewer seeds


@dataclass(frozen=True)
class Cell:
    """One run."""

    data: str
    arm: str
    seed: int

    def settings(self, size: Size) -> dict[str, object]:
        """All that its result depends on beside the code; how many others there are is no part of it."""
        arm, data = asdict(ARMS[self.arm]), asdict(DATA[self.data])
        others = ("meaning", "seeds", "fewer_seeds", "looks", "data")
        parts = {"size": asdict(size), "arm_is": arm, "data_is": data}
        kept = {name: {k: v for k, v in part.items() if k not in others} for name, part in parts.items()}
        return {"version": VERSION, "frames": FRAMES, **asdict(self), **kept}

    def file(self, size: Size) -> str:
        """Name of its result; one with other settings has another name."""
        return f"{self.data}.{self.arm}.{self.seed}.{digest_config(self.settings(size))[:12]}.json"


ARMS: Mapping[str, Arm] = {
    "random": Arm("random", "random initialisation of the same encoder"),
    "s_masked": Arm("recipe", "S-model, masked (Tab. 2 r2, Tab. 4, Tab. 5 cross)", GENERATION_ISOLATED),
    "s_unmasked": Arm(
        "recipe",
        "S-model without masks, two noise levels a clip, as many as two masked passes draw",
        (*GENERATION_ISOLATED, "masks.keep=all", *(f"stages.{name}.tau_copies=2" for name in STAGE_NAMES)),
    ),
    "s_cross_self": Arm(
        "recipe",
        "S-model, masked, with self-attention among noisy tokens (Tab. 5)",
        (*GENERATION_ISOLATED, "model.decoder.kind=xattn_self", "losses.tau_share=clip"),
    ),
    "full": Arm("recipe", "full method, EMA .99 (recipe `demo`)"),
    "ema_90": Arm("recipe", "full method, EMA .9", ("optim.ema=0.9",)),
    "ema_0": Arm("recipe", "full method without moving average (Tab. 12)", ("optim.ema=0.0",)),
    "gen_joint": Arm(
        "recipe", "generation, joint context (Tab. 2 r1)", ("losses.align=0", "model.predictor.kind=joint")
    ),
    "align_joint": Arm(
        "recipe",
        "alignment, joint context (Tab. 2 r3)",
        ("losses.flow=0", "model.decoder.kind=none", "model.predictor.kind=joint"),
    ),
    "full_k4": Arm(
        "recipe", "full method, four noise levels (Tab. 11)", tuple(f"stages.{n}.tau_copies=4" for n in STAGE_NAMES)
    ),
    "mae": Arm("mae", "control: the same encoder without causality, latents of masked cells as target"),
    "latents": Arm("floor", "floor: the autoencoder's latents"),
    "pixels": Arm("floor", "floor: mean colours of 16 fields of each frame"),
}  # fmt: skip

# The demo's digits move up to 6.8 pixels a tubelet and turn by up to 32 degrees, 17 pixels at a rim 30 from the middle:
# at .07 of that .5 and 1.2 pixels.
DATA: Mapping[str, Data] = {
    "stills": Data("digits that fill the frame, nothing moves", ("shape",)),
    "drift": Data("the same clips, digits move about half a pixel a tubelet", ("shape", "motion"), 0.07),
    "moving": Data("the same clips, digits and grounds move as in the demo", ("shape", "motion"), 1.0, drift=True),
    **{
        f"weizmann4_{fold}": Data(f"photographed, four actions, persons {fold}, {fold + 3}, {fold + 6} tested on",
                                  ("motion",), fold=fold)
        for fold in range(3)
    },
    "clothing10": Data("photographed, ten kinds of clothes, images", ("shape",)),
}  # fmt: skip

TABLES: Mapping[str, Table] = {
    "tab4": Table(
        "Tab. 4: masking, by how redundant the data is",
        ("stills", "moving", "drift"),
        ("s_masked", "s_unmasked", "random"),
        (("s_masked", "s_unmasked"), ("s_masked", "random"), ("s_unmasked", "random")),
        "Masks gain appearance where frames repeat each other (stills, then drift), less where they move, where the "
        "gain may be negative. Without masks on stills the flow loss is lowest, and the probe is below random.",
    ),
    "tab12": Table(
        "Tab. 12: the moving average",
        ("stills",),
        ("full", "ema_90", "ema_0"),
        (("full", "ema_0"), ("full", "ema_90"), ("ema_90", "ema_0")),
        "Without an average every run collapses: effective rank about 1, probe far below the others. EMA .9 lies "
        "between, nearer to .99.",
    ),
    "control": Table(
        "Full method, control and floors",
        ("stills", "moving"),
        ("full", "mae", "random", "latents", "pixels"),
        (("full", "random"), ("mae", "random"), ("full", "mae"), ("full", "latents")),
        "The full method gains motion over random by ten points or more, and appearance by 0 to 4. The control gains "
        "appearance by as much or more; if it does not, the probe or the budget is too weak to show appearance.",
        fewer=True,
    ),
    "tab2": Table(
        "Tab. 2: joint context",
        ("moving",),
        ("full", "gen_joint", "align_joint"),
        (("full", "gen_joint"), ("full", "align_joint")),
        "Undecided: the paper's differences are 0.4 to 2.7 points, below what this shows. Alignment alone may lie "
        "below generation alone, since it must find features at this length.",
        fewer=True,
    ),
    "tab5": Table(
        "Tab. 5: cross-attention against cross- and self-attention",
        ("moving",),
        ("s_masked", "s_cross_self"),
        (("s_masked", "s_cross_self"),),
        "Cross-attention alone is better or undecided: the paper's differences are 2.4 and 4.5 points.",
        fewer=True,
    ),
    "tab11": Table(
        "Tab. 11: one or four noise levels",
        ("moving",),
        ("full", "full_k4"),
        (("full_k4", "full"),),
        "Undecided: the paper's differences are 0.2 points.",
        fewer=True,
    ),
    "real": Table(
        "Real media",
        (*(f"weizmann4_{fold}" for fold in range(3)), "clothing10"),
        ("full", "random"),
        (("full", "random"),),
        "Undecided: 12 test videos a fold show 25 points, 293 test images 7.",
        fewer=True,
    ),
}  # fmt: skip


FULL = Size(4000, 4000, 792, 16, 5, 3, 10, 32, 3, 16384, 11, tuple(DATA))  # docs/study_plan.md
QUICK = Size(20, 10, 11, 4, 1, 1, 1, 8, 1, 256, 1, ("stills", "moving"))  # each arm once; its scores mean nothing


def seeds(table: Table, arm: str, size: Size) -> range:
    """Seeds of an arm in a table; a floor has no chance in it."""
    return range(1 if ARMS[arm].kind == "floor" else size.fewer_seeds if table.fewer else size.seeds)


def cells(size: Size, tables: Mapping[str, Table] = TABLES) -> Iterator[Cell]:
    """Every run once, the most valuable first: by table, data set, seed, arm."""
    found: set[Cell] = set()
    for table in tables.values():
        for data in (data for data in table.data if data in size.data):
            for seed in range(size.seeds):
                for arm in table.arms:
                    cell = Cell(data, arm, seed)
                    if seed in seeds(table, arm, size) and cell not in found:
                        found.add(cell)
                        yield cell


def overrides(cell: Cell, size: Size) -> list[str]:
    """Changes of the recipe `demo` that make a run's recipe."""
    steps = [round(share * size.steps) for share in STAGE_SHARES]
    assert sum(steps) == size.steps, f"{size.steps} steps do not divide into stages: {steps}"
    common = [f"seed={cell.seed}", f"masks.entries={size.entries}"]
    for name, count in zip(STAGE_NAMES, steps, strict=True):
        common += [f"stages.{name}.{key}={value}" for key, value in
                   (("steps", count), ("frames", FRAMES), ("batch", size.batch))]  # fmt: skip
    for strategy, blocks, budget in (("short", 4, 24), ("long", 2, 12)):  # the pilot's masks (docs/study_plan.md)
        common += [f"masks.strategies.{strategy}.blocks={blocks}", f"masks.strategies.{strategy}.budget={budget}"]
    return [*common, *ARMS[cell.arm].overrides]
