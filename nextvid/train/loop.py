"""The training loop: from a run's newest checkpoint to its last step, with events, diagnostics and checkpoints.

One path for one CPU and for many GPUs; rank 0 alone writes. Speed is reported as TFLOP/s by the formulas of
docs/method.md 12 and, on a GPU whose peak is known, as a share of that peak (MFU). FLOPs of recomputed blocks are not
counted, since the model does not ask for them.
"""

import itertools
import os
import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from nextvid.config.project import Project
from nextvid.config.recipe import RecipeConfig, StageConfig, draws_before, stage_at
from nextvid.model.cost import stage_cost
from nextvid.model.encoder import Encoder
from nextvid.train import checkpoint
from nextvid.train import step as steps
from nextvid.train.async_checkpoint import AsyncCheckpoints
from nextvid.train.checkpoint import Progress
from nextvid.train.diagnose import CLIPS, collapsed, diagnose
from nextvid.train.distributed import Ranks, whole
from nextvid.train.events import Reporter
from nextvid.train.export import export_encoder
from nextvid.train.loader import Batch, Loader, open_loader
from nextvid.train.micro_batch import MicroBatches
from nextvid.train.run import Run, run_lock
from nextvid.train.step import Stepped, Trained, build, encoder_tokens, means
from nextvid.trainset.mask_plan import grid_of, open_mask_plan
from nextvid.trainset.pixels import open_pixels
from nextvid.trainset.trainset import Trainset
from storage import atomic
from storage.errors import NExTVidError, RefusedError

SKIPS_ALLOWED = 2  # our choice: stop after three skipped steps in a row
LEFTOVER_AGE_S = 0.0  # rank 0 holds the run's lock, so a half-written file there has no writer: remove it at any age


def train(project: Project, run: Run, ranks: Ranks) -> None:
    """Train a run from its newest checkpoint to its last step.

    Raises ConflictError if another process trains it, RefusedError if three steps in a row have no finite gradient or
    the trainset does not fit the recipe.
    """
    torch.set_flush_denormal(True)  # CPUs are slow on denormals
    with ExitStack() as stack:
        if ranks.first:
            stack.enter_context(run_lock(run.folder))
            atomic.remove_leftovers(str(run.folder), LEFTOVER_AGE_S)
        ranks.wait()
        trainset = Trainset.open(project.root, run.trainset)
        plan = open_mask_plan(project.root, run.recipe.masks, grid_of(run.recipe.model))
        clips = MicroBatches(run.recipe, run.how, ranks)
        trained = build(run.recipe, ranks, run.how)
        found = checkpoint.complete(run.checkpoints)
        progress = Progress(0, 0)
        if found:
            progress = checkpoint.load(found[-1], run.identity, trained.model, trained.reference, trained.optimizer)
        pixels = None if run.pixels is None else open_pixels(project.root, trainset, run.pixels)
        loader = stack.enter_context(open_loader(project.root, trainset, run.recipe, plan, ranks, pixels))
        reporter = stack.enter_context(Reporter(run.folder, run.recipe.steps)) if ranks.first else None
        background = stack.enter_context(AsyncCheckpoints(ranks, run.identity)) if trained.fsdp else None
        session = _Session(run, trained, loader, clips, reporter, background, progress)
        session.go()
        encoders = {"encoder": _whole(trained.reference), "encoder_online": _whole(trained.model.encoder)}
        if reporter:
            for name, encoder in encoders.items():
                export_encoder(run.folder / name, encoder, trainset, run, project.corpus)
            reporter.event("end", run.recipe.steps, {"complete": run.complete})
        ranks.wait()


def _whole(encoder: Encoder) -> Encoder:
    """The encoder itself, or if FSDP2 cut it a whole copy; then every rank must call this."""
    if not any(isinstance(parameter, DTensor) for parameter in encoder.parameters()):
        return encoder
    tensors = {name: whole(tensor) for name, tensor in encoder.state_dict().items()}
    found = Encoder(encoder.model).to(next(iter(tensors.values())).device)
    found.load_state_dict(tensors)
    return found


@dataclass
class _Meter:
    """Sums since the last `step` event; losses stay on the device until they are read."""

    losses: dict[str, torch.Tensor] = field(default_factory=dict)
    steps: int = 0
    clips: int = 0
    waited_s: float = 0.0
    since: float = field(default_factory=time.perf_counter)

    def add(self, stepped: Stepped, clips: int, waited_s: float) -> None:
        for name, value in stepped.losses.items():
            self.losses[name] = self.losses.get(name, torch.zeros_like(value)) + value
        self.steps, self.clips, self.waited_s = self.steps + 1, self.clips + clips, self.waited_s + waited_s

    def read(self, ranks: Ranks) -> tuple[dict[str, float], dict[str, float]]:
        """Mean losses over steps and ranks, and speeds."""
        names = sorted(self.losses)
        values = ranks.mean(torch.stack([self.losses[name] for name in names]) / self.steps).tolist()
        seconds = time.perf_counter() - self.since
        rates = {
            "clips_per_s": self.clips / seconds,
            "step_s": seconds / self.steps,
            "wait_share": self.waited_s / seconds,
        }
        return dict(zip(names, values, strict=True)), rates


@dataclass
class _Session:
    """One attempt at a run, from its start to its end."""

    run: Run
    trained: Trained
    loader: Loader
    clips: MicroBatches
    reporter: Reporter | None  # rank 0's
    background: AsyncCheckpoints | None
    progress: Progress
    meter: _Meter = field(default_factory=_Meter)
    fixed: torch.Tensor | None = None  # what the encoders read of the clips that are diagnosed

    def __post_init__(self) -> None:
        self.recipe, self.how, self.ranks = self.run.recipe, self.run.how, self.trained.ranks
        self.stage_ends = set(itertools.accumulate(stage.steps for stage in self.recipe.stages))

    def go(self) -> None:
        """Take all steps that are left; an error of ours is also written as an event."""
        facts = {
            "run": self.run.id,
            "ranks": self.ranks.count,
            "device": str(self.ranks.device),
            "threads": torch.get_num_threads(),
            "process": os.getpid(),
            "compiled": steps.compiles(self.how, self.ranks.device),
        }
        self._event("start", facts)
        try:
            self._steps()
        except NExTVidError as error:
            self._event("error", {"error": error.kind, "message": str(error)})
            raise

    def _steps(self) -> None:
        if self.progress.step == 0:
            self._diagnose()
        for batch in self.loader.batches(self.progress.step, self.how.threads):
            stage, inside = stage_at(self.recipe.stages, batch.step)
            if inside == 0:
                self._event("stage", {**self.recipe.stages[stage].model_dump(), "micro_batch": self.clips[stage]})
            self._step(batch, stage)
            self._after_step()
        if self.background is not None:
            self._checkpoint_written(self.background.finish())

    def _step(self, batch: Batch, stage: int) -> None:
        stepped, planned = self.clips.take(stage, lambda clips: steps.take_step(self.trained, batch, batch.step, clips))
        if planned:
            self._event("micro_batch", {"clips": self.clips[stage], "out_of_memory_at": planned})
        step = batch.step + 1
        skipped = 0 if stepped.finite else self.progress.skipped + 1
        self.progress = Progress(step, draws_before(self.recipe.stages, step), skipped, self.progress.first_rank)
        self.meter.add(stepped, len(batch.draws) * self.ranks.count, batch.waited_s)
        if not stepped.finite:
            norms = {name: float(norm) for name, norm in stepped.norms.items()}
            self._event("skipped", {"in_a_row": skipped, "norm": norms})
            if skipped > SKIPS_ALLOWED:
                start = draws_before(self.recipe.stages, step - skipped)
                raise RefusedError(
                    f"run {self.run.id}: {skipped} steps in a row had no finite gradient (norms of the last: {norms}); "
                    "lower the learning rate, or look at the rows of these steps with 'nextvid draws --recipe "
                    f"{self.recipe.name} --start {start} --first {self.progress.draws - start}'"
                )
        if step % self.how.log_every_steps == 0 or step in self.stage_ends:
            self._log(stepped)

    def _after_step(self) -> None:
        step = self.progress.step
        if step % self.how.diagnose_every_steps == 0 or step == self.recipe.steps:
            self._diagnose()
        if step % self.how.checkpoint_every_steps == 0 or step in self.stage_ends:
            self._checkpoint()

    def _log(self, stepped: Stepped) -> None:
        """One event for the steps since the last. Every rank takes part in the mean, rank 0 writes it."""
        losses, rates = self.meter.read(self.ranks)
        self.meter = _Meter()
        stage = self.recipe.stages[stage_at(self.recipe.stages, self.progress.step - 1)[0]]
        self._event(
            "step",
            {
                "stage": stage.name,
                "draws": self.progress.draws,
                **means(losses),
                "loss": losses,
                "norm": {name: float(norm) for name, norm in stepped.norms.items()},
                "lr": stepped.rates.main,
                "decoder_lr": stepped.rates.decoder,
                **rates,
                **speeds(self.recipe, stage, rates["clips_per_s"], self.ranks.count, self.ranks.device),
            },
        )

    def _diagnose(self) -> None:
        """Diagnose both encoders on the fixed clips; on rank 0 alone, the others wait at their next collective."""
        encoders = _whole(self.trained.reference), _whole(self.trained.model.encoder)
        if not self.ranks.first:
            return
        if self.fixed is None:
            self.fixed = encoder_tokens(self.loader.clips(range(CLIPS)), self.recipe.model)
        batch = max(1, self.recipe.stages[0].batch // self.ranks.count)
        with steps.uncompiled(self.how, self.ranks.device), steps.autocast(self.recipe, self.ranks.device):
            found, online = (diagnose(encoder, self.fixed, batch) for encoder in encoders)
        step, rank = self.progress.step, found["effective_rank"]
        first = rank if self.progress.first_rank is None else self.progress.first_rank
        self.progress = replace(self.progress, first_rank=first)
        found |= {f"online_{name}": value for name, value in online.items()}
        self._event("diagnostics", {**found, "rank_over_first": rank / first})
        if collapsed(rank, first, step, self.recipe.steps):
            self._event("alarm", {"effective_rank": rank, "first_rank": first})

    def _checkpoint(self) -> None:
        if self.background is not None:
            self._checkpoint_written(self.background.begin(self.run.checkpoints, self.progress, self.trained))
            return
        if self.ranks.first:
            run, trained = self.run, self.trained
            parts = trained.model, trained.reference, trained.optimizer
            self._checkpoint_written(checkpoint.save(run.checkpoints, run.identity, self.progress, *parts))
        self.ranks.wait()

    def _checkpoint_written(self, path: Path | None) -> None:
        """A checkpoint is complete: remove those that it replaces, and write the event."""
        if path is not None and self.ranks.first:
            checkpoint.prune(self.run.checkpoints, self.how.keep_last, self.stage_ends)
            self._event("checkpoint", {"path": path.name})

    def _event(self, kind: str, values: dict[str, Any]) -> None:
        if self.reporter:
            self.reporter.event(kind, self.progress.step, values)


# Dense bf16 FLOP/s from NVIDIA's data sheets, by a part of torch's device name; the first match applies
PEAKS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}


def peak(device: torch.device) -> float | None:
    """Peak FLOP/s of this device; None for a CPU or a GPU that is not listed."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for known, flops in PEAKS.items() if known in name), None)


def speeds(
    recipe: RecipeConfig, stage: StageConfig, clips_per_s: float, ranks: int, device: torch.device
) -> dict[str, float]:
    """TFLOP/s of all ranks together and, where the device's peak is known, `mfu`."""
    flops_per_s = stage_cost(recipe, stage).clip_flops * clips_per_s
    found, most = {"tflop_per_s": flops_per_s / 1e12}, peak(device)
    return found if most is None else found | {"mfu": flops_per_s / (ranks * most)}
