"""The training loop: from a run's newest checkpoint to its last step, with events, diagnostics and checkpoints.

One path for one CPU and for many GPUs; rank 0 alone writes. Speed is reported as TFLOP/s by the formulas of
docs/method.md 12 and, on a GPU whose peak is known, as a share of that peak (MFU). FLOPs of recomputed blocks are not
counted, since the model does not ask for them.
"""

import gc
import itertools
import math
import os
import time
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from nextvid.config.project import Project
from nextvid.config.recipe import RecipeConfig, StageConfig
from nextvid.config.stages import draws_before, stage_at
from nextvid.model.cost import stage_cost
from nextvid.model.encoder import Encoder
from nextvid.train import checkpoint
from nextvid.train import step as steps
from nextvid.train.async_checkpoint import AsyncCheckpoints
from nextvid.train.checkpoint import Progress
from nextvid.train.diagnose import OpenScorer, Scorer, Scores, collapsed, features_of, judged, share
from nextvid.train.distributed import Ranks, whole
from nextvid.train.events import Reporter, newest, read_events
from nextvid.train.export import export_encoder
from nextvid.train.init import start_from
from nextvid.train.loader import Batch, Loader, open_loader
from nextvid.train.micro_batch import MicroBatches
from nextvid.train.optim import Spikes
from nextvid.train.run import Run, run_lock
from nextvid.train.sinks import open_sink
from nextvid.train.step import Stepped, Trained, build, encoder_tokens, means
from nextvid.trainset.mask_plan import grid_of, open_mask_plan
from nextvid.trainset.pixels import open_pixels
from nextvid.trainset.trainset import Trainset
from storage import atomic
from storage.errors import NExTVidError, RefusedError

SKIPS_ALLOWED = 2  # our choice: stop after three skipped steps in a row
LEFTOVER_AGE_S = 0.0  # rank 0 holds the run's lock, so a half-written file there has no writer: remove it at any age


def train(project: Project, run: Run, ranks: Ranks, open_scorer: OpenScorer | None = None) -> None:
    """Train a run from its newest checkpoint to its last step, and score it meanwhile where a scorer is given.

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
            if trained.spikes is not None and progress.spikes is not None:
                trained.spikes = Spikes(trained.spikes.config, ranks.device, progress.spikes)
        elif run.source is not None:
            start_from(run.source, trained)
        pixels = None if run.pixels is None else open_pixels(project.root, trainset, run.pixels)
        loader = stack.enter_context(open_loader(project.root, trainset, run.recipe, plan, ranks, pixels))
        scorer = None
        if open_scorer is not None and run.how.score_clips and project.corpus.benchmarks:
            scorer = stack.enter_context(open_scorer(project, run, trained.reference, ranks))
        reporter = None
        if ranks.first:
            config = run.recipe.model_dump(mode="json")
            reporter = stack.enter_context(
                Reporter(
                    run.folder,
                    run.recipe.steps,
                    open_sinks=lambda ends: [
                        open_sink(name, run.folder, run.id, config, ends) for name in run.how.sinks
                    ],
                )
            )
        # two, so that a diagnosis need not wait for a checkpoint; what they have begun ends even if the run fails
        thread = stack.enter_context(ThreadPoolExecutor(2, "trainer", torch.set_num_threads, (1,)))
        background = stack.enter_context(AsyncCheckpoints(ranks, run.identity, thread, cut=trained.fsdp))
        session = _Session(run, trained, loader, clips, reporter, background, progress, thread, scorer)
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
    with torch.device("meta"):
        found = Encoder(encoder.model)
    found.load_state_dict({name: whole(tensor) for name, tensor in encoder.state_dict().items()}, assign=True)
    return found


@contextmanager
def _garbage_at_logs() -> Iterator[None]:
    """Python's collector runs where `_log` calls it alone: all ranks wait for one that it stops at another step."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


@dataclass
class _Meter:
    """Sums since the last `step` event; tensors stay on the device until they are read."""

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
    background: AsyncCheckpoints
    progress: Progress
    thread: Executor  # for what no step waits for
    scorer: Scorer | None = None
    meter: _Meter = field(default_factory=_Meter)
    recent: list[tuple[int, torch.Tensor]] = field(default_factory=list)  # taken and norms of steps, on the device
    fixed: torch.Tensor | None = None  # what the encoders read of the clips that are diagnosed
    diagnosing: tuple[int, list[Future[dict[str, Any]]]] | None = None  # step; reference, online encoder, scores

    def __post_init__(self) -> None:
        self.recipe, self.how, self.ranks = self.run.recipe, self.run.how, self.trained.ranks
        self.stage_ends = set(itertools.accumulate(stage.steps for stage in self.recipe.stages))

    def go(self) -> None:
        """Take all steps that are left; an error of ours is also written as an event."""
        facts = {
            "run": self.run.id,
            **({} if self.run.source is None else {"init": self.run.source.text()}),
            "ranks": self.ranks.count,
            "device": str(self.ranks.device),
            "threads": torch.get_num_threads(),
            "process": os.getpid(),
            "compiled": steps.compiles(self.how, self.ranks.device),
            "steps": self.recipe.steps,
        }
        self._event("start", facts)
        for benchmark, why in {} if self.scorer is None else self.scorer.left_out.items():
            self._event("not_scored", {"benchmark": benchmark, "why": why})
        try:
            self._steps()
        except NExTVidError as error:
            self._event("error", {"error": error.kind, "message": str(error)})
            raise

    def _steps(self) -> None:
        step = self.progress.step
        if step % self.how.diagnose_every_steps == 0 or step == self.recipe.steps:  # the first, or one lost by a kill
            written = newest(read_events(self.run.folder), "diagnostics") if self.ranks.first else {}
            if self.ranks.from_first(str(written.get("step"))) != str(step):
                self._diagnose()
        with _garbage_at_logs():
            for batch in self.loader.batches(self.progress.step, self.how.threads):
                stage, inside = stage_at(self.recipe.stages, batch.step)
                if inside == 0:
                    self._event("stage", {**self.recipe.stages[stage].model_dump(), "micro_batch": self.clips[stage]})
                self._step(batch, stage)
                self._after_step()
        self._diagnosed()
        self._checkpoint_written(self.background.finish())

    def _step(self, batch: Batch, stage: int) -> None:
        stepped, planned = self.clips.take(stage, lambda clips: steps.take_step(self.trained, batch, batch.step, clips))
        if planned:
            self._event("micro_batch", {"clips": self.clips[stage], "out_of_memory_at": planned})
        step = batch.step + 1
        self.progress = replace(self.progress, step=step, draws=draws_before(self.recipe.stages, step))
        self.meter.add(stepped, len(batch.draws) * self.ranks.count, batch.waited_s)
        self.recent.append((step, torch.stack([stepped.taken, *stepped.norms.values()])))
        logged = step % self.how.log_every_steps == 0 or step in self.stage_ends
        if logged or step % self.how.checkpoint_every_steps == 0:
            norms = self._count_skips(list(stepped.norms))
        if logged:
            self._diagnosed()
            self._checkpoint_written(self.background.written())
            self._log(stepped, norms)

    def _count_skips(self, modules: list[str]) -> dict[str, float]:
        """Events of the steps skipped since the last call; the norms of the last step.

        The device decides what is skipped, so that the host needs not wait for each step; it learns of it here.
        """
        numbers = [step for step, _ in self.recent]
        rows = torch.stack([row for _, row in self.recent]).tolist()
        self.recent = []
        for step, (taken, *values) in zip(numbers, rows, strict=True):
            norms, skipped = dict(zip(modules, values, strict=True)), 0 if taken else self.progress.skipped + 1
            self.progress = replace(self.progress, skipped=skipped)
            guard = self.recipe.optim.spikes if all(map(math.isfinite, values)) else None
            if skipped:
                why = "the gradient is not finite" if guard is None else "the loss leaps"
                self._event("skipped", {"in_a_row": skipped, "why": why, "norm": norms}, step)
            if skipped > (SKIPS_ALLOWED if guard is None else guard.stop_after - 1):
                start, end = (draws_before(self.recipe.stages, at) for at in (step - skipped, step))
                cause, more = f"no finite gradient (norms of the last: {norms})", "lower the learning rate"
                if guard is not None:
                    cause = f"a loss over the running mean by more than {guard.deviations:g} standard deviations"
                    more = "raise optim.spikes.deviations, lower the learning rate"
                raise RefusedError(
                    f"run {self.run.id}: {skipped} steps in a row had {cause}; {more}, or look at the rows of these "
                    f"steps with 'nextvid draws --recipe {self.recipe.name} --start {start} --first {end - start}'"
                )
        return norms

    def _after_step(self) -> None:
        step = self.progress.step
        if step % self.how.diagnose_every_steps == 0 or step == self.recipe.steps:
            self._diagnose()
        if step % self.how.checkpoint_every_steps == 0 or step in self.stage_ends:
            if self.trained.spikes is not None:
                self.progress = replace(self.progress, spikes=tuple(self.trained.spikes.state.tolist()))
            if self.progress.first_rank is None:
                self._diagnosed()
            self._checkpoint_written(self.background.begin(self.run.checkpoints, self.progress, self.trained))

    def _log(self, stepped: Stepped, norms: dict[str, float]) -> None:
        """One event for the steps since the last. Every rank takes part in the mean, rank 0 writes it."""
        losses, rates = self.meter.read(self.ranks)
        self.meter = _Meter()
        gc.collect(1)
        stage = self.recipe.stages[stage_at(self.recipe.stages, self.progress.step - 1)[0]]
        self._event(
            "step",
            {
                "stage": stage.name,
                "draws": self.progress.draws,
                **means(losses),
                "loss": losses,
                "norm": norms,
                "lr": stepped.rates.main,
                "decoder_lr": stepped.rates.decoder,
                **rates,
                **speeds(self.recipe, stage, rates["clips_per_s"], self.ranks.count, self.ranks.device),
            },
        )

    def _diagnose(self) -> None:
        """Features of both encoders on the fixed clips, by all ranks; a thread of rank 0 computes what they say."""
        self._diagnosed()
        device = self.ranks.device
        if self.fixed is None:
            clips = share(self.ranks)  # none, if there are more ranks
            self.fixed = encoder_tokens(self.loader.clips(clips or range(1)), self.recipe.model)[: len(clips)]
        with steps.uncompiled(self.how, device), steps.autocast(self.recipe, device):
            scores, judging = list[Scores](), list[Scores]()
            for encoder in (self.trained.reference, self.trained.model.encoder):
                found = _whole(encoder)
                judging.append(partial(judged, features_of(found, self.fixed, self.clips[0], self.ranks)))
                if self.scorer is not None and not scores:  # of the reference encoder
                    scores = [self.scorer.encode(found)]
        if self.ranks.first:
            self.diagnosing = self.progress.step, [self.thread.submit(each) for each in (*judging, *scores)]

    def _diagnosed(self) -> None:
        """The event of the last diagnosis, if there was one since; at the next log its thread has long ended."""
        if self.diagnosing is None:
            return
        (step, futures), self.diagnosing = self.diagnosing, None
        found, online, *scores = (future.result() for future in futures)
        rank = found["effective_rank"]
        first = rank if self.progress.first_rank is None else self.progress.first_rank
        self.progress = replace(self.progress, first_rank=first)
        found |= {f"online_{name}": value for name, value in online.items()}
        self._event("diagnostics", {**found, "rank_over_first": rank / first}, step)
        for each in scores:
            self._event("scores", each, step)
        if self.how.alarm != "off" and collapsed(rank, first, step, self.recipe.steps):
            self._event("alarm", {"effective_rank": rank, "first_rank": first}, step)
            if self.how.alarm == "stop":
                raise RefusedError(
                    f"run {self.run.id}: the features collapsed at step {step}: their effective rank is {rank:.1f}, "
                    f"and was {first:.1f} at first; change the recipe, or go on with --how alarm=warn"
                )

    def _checkpoint_written(self, path: Path | None) -> None:
        """A checkpoint is complete: remove those that it replaces, and write the event."""
        if path is not None and self.ranks.first:
            checkpoint.prune(self.run.checkpoints, self.how.keep_last, self.stage_ends)
            self._event("checkpoint", {"path": path.name}, checkpoint.step_of(path))

    def _event(self, kind: str, values: dict[str, Any], step: int | None = None) -> None:
        """Write an event of this step; `step`: of an earlier one."""
        if self.reporter:
            self.reporter.event(kind, self.progress.step if step is None else step, values)


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
