"""Where a training's curves go beside events.jsonl: TensorBoard, Weights & Biases, trackio; scalars by step.

events.jsonl is the record, and has each step once. An attempt that resumes a run therefore fills its sinks again with
the steps that it goes on from; what a killed attempt sent of later steps is removed. Nothing leaves this machine unless
the sink's own variables say so: WANDB_MODE, TRACKIO_SPACE_ID or TRACKIO_SERVER_URL.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nextvid.config.recipe import SinkName
from storage import atomic
from storage.errors import ConfigError

PROJECT = "nextvid"  # what Weights & Biases and trackio call the place of all runs
Send = Callable[[Mapping[str, float], int], None]  # scalars by name, and their step


def refuse_missing(sinks: Sequence[SinkName]) -> None:
    """ConfigError for a sink whose package is not installed."""
    for name in sinks:
        if find_spec(name) is None:
            raise ConfigError(
                f"how.sinks names {name}, and its package is not installed: pip install {name}, or leave it out"
            )


def open_sink(name: SinkName, folder: Path, run: str, config: Mapping[str, Any], stack: ExitStack) -> Send:
    """A run's sink, empty: what an earlier attempt sent is removed, but kept and not sent again by wandb online.

    `folder` is the run's; the stack's exit closes the sink.
    """
    match name:
        case "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            atomic.remove_tree(str(folder / name))
            board = SummaryWriter(str(folder / name))
            stack.callback(board.close)

            def send(scalars: Mapping[str, float], step: int) -> None:
                for curve, value in scalars.items():
                    board.add_scalar(curve, value, step)

        case "wandb":
            import wandb

            mode, resume = os.environ.get("WANDB_MODE", "offline"), "allow"
            if mode == "offline":
                atomic.remove_tree(str(folder / name))
                resume = "never"
            settings = {"console": "off"}  # else it reads and keeps all that is printed
            tracked = wandb.init(
                project=PROJECT, id=run, dir=folder, mode=mode, resume=resume, config=dict(config), settings=settings
            )
            stack.callback(tracked.finish)
            first = tracked.step  # 0, or of a run online the one after its last

            def send(scalars: Mapping[str, float], step: int) -> None:
                if step >= first:
                    tracked.log(dict(scalars), step=step)

        case "trackio":
            import trackio

            with suppress(ValueError):  # trackio has no such project yet
                for earlier in trackio.Api().runs(PROJECT):
                    if earlier.name == run:
                        earlier.delete()
            tracked = trackio.init(
                PROJECT, run, config=dict(config), embed=False, auto_log_gpu=False, auto_log_cpu=False
            )
            stack.callback(tracked.finish)

            def send(scalars: Mapping[str, float], step: int) -> None:
                tracked.log(dict(scalars), step)

    return send
