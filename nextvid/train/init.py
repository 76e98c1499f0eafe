"""What a run's weights start from (`init` of its recipe): another run's checkpoint, or an exported encoder."""

from pathlib import Path
from typing import Any

import torch

from nextvid.config.overrides import flat
from nextvid.config.project import Project
from nextvid.config.recipe import RecipeConfig
from nextvid.model.nextvid import NExTVid
from nextvid.train import checkpoint
from nextvid.train.checkpoint import STATE
from nextvid.train.distributed import like, local
from nextvid.train.export import WEIGHTS, read_config, read_weights
from nextvid.train.run import Source, open_run
from nextvid.train.step import Trained
from storage import atomic
from storage.digest import digest, digest_file
from storage.errors import RefusedError, UpstreamError
from storage.records import read_record
from storage.root import RUN_CONFIG

NOT_IN_WEIGHTS = ("attention",)  # fields of a model that may differ: how it is computed


def find_source(project: Project, recipe: RecipeConfig) -> Source | None:
    """What the recipe starts from; None for random numbers. Raises UpstreamError if it is missing or incomplete."""
    init = recipe.init
    if init is None:
        return None
    if init.run is not None:
        folders = list(Path(project.root.runs_url, "pretrain").glob(f"*/{init.run}"))
        if not folders:
            raise UpstreamError(f"init: there is no run {init.run} in {project.root.runs_url}/pretrain")
        run = open_run(folders[0])
        path = checkpoint.path_at(run.checkpoints, init.step or run.recipe.steps)
        if path not in (found := checkpoint.complete(run.checkpoints)):
            steps = ", ".join(str(checkpoint.step_of(each)) for each in found) or "none"
            raise UpstreamError(f"init: {path} is no complete checkpoint; run {run.id} has those of steps {steps}")
        return Source(str(path), run.id, checkpoint.step_of(path), None)
    folder = project.path.parent / (init.checkpoint or init.encoder or "")
    names = (STATE,) if init.checkpoint is not None else (RUN_CONFIG, WEIGHTS)
    for name in names:
        if not (folder / name).is_file():
            kind = "complete checkpoint" if init.checkpoint is not None else "exported encoder"
            raise UpstreamError(f"init: {folder} is no {kind}: it has no {name}")
    found_digest = digest([digest_file(folder / name) for name in names])
    if init.encoder is not None:
        return Source(str(folder), None, None, found_digest)
    state = read_record(str(folder / STATE))
    return Source(str(folder), state["identity"]["run"], state["progress"]["step"], found_digest)


def refuse_other_shapes(source: Source, recipe: RecipeConfig) -> None:
    """Raise RefusedError, which names the difference, unless the parts taken are of the same model as the recipe's."""
    assert recipe.init is not None, "a source is of a recipe that names one"
    folder, taken = Path(source.folder), recipe.init.taken
    here = dict(flat(_relevant(recipe.model.model_dump(mode="json"), taken)))
    files = (folder / RUN_CONFIG, folder.parent.parent / RUN_CONFIG)  # an exported encoder's, or that of its run
    known: dict[str, Any] = next((atomic.read_json(str(file)) for file in files if file.is_file()), {})
    model = known.get("model") or known.get("recipe", {}).get("model") or recipe.model.model_dump(mode="json")
    there = dict(flat(_relevant(model, taken)))
    differing = [
        f"model.{name} is {there.get(name)} there and {here[name]} here"
        for name in here
        if there.get(name) != here[name]
    ]
    with torch.device("meta"):
        networks = NExTVid(recipe)
    shapes = checkpoint.shapes(folder / WEIGHTS) if recipe.init.encoder else checkpoint.weight_shapes(folder, "model")
    for name, tensor in networks.state_dict().items():
        if name.split(".", 1)[0] in taken and shapes.get(name) != tuple(tensor.shape):
            differing.append(f"{name} is {list(shapes.get(name, ())) or 'absent'} there and {list(tensor.shape)} here")
    if differing:
        more = f", and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise RefusedError(
            f"recipe {recipe.name} cannot start from {source.text()}: {'; '.join(differing[:3])}{more}; "
            "start from a run of the same model, or take fewer parts (init.parts)"
        )


def start_from(source: Source, trained: Trained) -> None:
    """Load the parts that the recipe takes into the model, and the reference encoder; every rank must call this.

    Raises UpstreamError if the source is gone, DamagedError if its bytes changed.
    """
    init, folder = trained.recipe.init, Path(source.folder)
    assert init is not None, "a source is of a recipe that names one"
    if not folder.is_dir():
        raise UpstreamError(f"init: {folder} is gone; the run cannot start without it")
    if init.encoder is not None:
        tensors = read_weights(folder, read_config(folder))
    else:
        tensors = checkpoint.weights(folder, "model")
    reference = {name.removeprefix("encoder."): value for name, value in tensors.items() if name.startswith("encoder.")}
    if init.reference == "average":
        reference = checkpoint.weights(folder, "ema")
    with torch.no_grad():
        for name, tensor in trained.model.state_dict().items():
            if name.split(".", 1)[0] in init.taken:
                local(tensor).copy_(local(like(tensors[name], tensor)))
        if "encoder" in init.taken:
            for name, tensor in trained.reference.state_dict().items():
                local(tensor).copy_(local(like(reference[name], tensor)))


def _relevant(model: dict[str, Any], taken: tuple[str, ...]) -> dict[str, Any]:
    """The fields that weights of the parts taken depend on, by their shapes or their meaning."""
    parts = {"encoder", "predictor", "decoder"} - set(taken)
    return {name: value for name, value in model.items() if name not in parts and name not in NOT_IN_WEIGHTS}
