"""The jobs that sensors and schedules request, and that people find in the UI.

One run per batch makes all four assets up to the latents: assets that share a run share its start-up.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import dagster as dg
from pydantic import Field

from assets.compute import Compute, tags
from assets.resources import ProjectResource
from nextvid.graph import BY_BATCH, assets
from nextvid.plain_text import in_markdown

ingest = dg.define_asset_job(
    "ingest",
    selection=dg.AssetSelection.assets(*BY_BATCH),
    description="Media, shots, clips and latents of one batch of files. Makes only what is missing.",
    # behind what people launch, in the queue and in the pools; dagster.yaml bounds how many runs have `ingest`
    tags={"dagster/priority": "-1", "ingest": "1"},
)

freeze = dg.define_asset_job(
    "freeze",
    selection=dg.AssetSelection.assets(*assets("none")),
    description="Statistics, duplicates and the trainset, over all batches. The sensor `follow` requests them too.",
)

experiment = dg.define_asset_job(
    "experiment",
    selection=dg.AssetSelection.assets(*assets("recipe")),
    description="Mask plan, training run, probes on every benchmark, samples and report of one recipe. All of them "
    "are about the run that `pretrain` makes.",
)


@dg.op(tags=tags(Compute()))
def compute_forecast(context: dg.OpExecutionContext, project: ProjectResource) -> None:
    """Write forecast.json and log it; 11 ms a batch (docs/performance.md) are too long for a tick of the sensor."""
    from assets.reporting import readable_errors
    from nextvid.planning.costs import publish_forecast

    with readable_errors():
        context.log.info(publish_forecast(project.open()))


def forecast_of(project: ProjectResource) -> dg.JobDefinition:
    """The job `forecast`, which the sensor `new_sources` requests whenever corpus.yaml differs from what is accepted.

    The resource is bound here, since Dagster would otherwise bind it to a copy of the job and of that sensor.
    """

    @dg.job(
        resource_defs={"project": project},
        description="What accepting corpus.yaml and the makers' versions would cost; `nextvid plan` lists it by batch.",
    )
    def forecast() -> None:
        compute_forecast()

    return forecast


class ShowConfig(dg.Config):
    """What `nextvid show` takes, as fields of the launchpad."""

    what: str = Field(description="id of a row, clip, shot or medium, or a file as its dataset's listing names it")
    recipe: str = Field("", description="whose draws, masks and encoder; empty: the last run's")
    features: bool = Field(False, description="add dense features as colours, of the averaged and the random encoder")


@dg.op(tags=tags(Compute()))
def draw(context: dg.OpExecutionContext, config: ShowConfig, project: ProjectResource) -> None:
    """Log the facts, and put the picture into the output's metadata."""
    from assets.reporting import picture_markdown, readable_errors
    from nextvid.lineage.shown import show as show_one

    with readable_errors(), TemporaryDirectory() as folder:
        out = f"{folder}/shown.png"
        found = show_one(project.open(), config.what, out, config.recipe or None, features=config.features)
        metadata = {
            "facts": dg.MetadataValue.md("\n\n".join(map(in_markdown, [f"{found.kind} {found.what}", *found.facts])))
        }
        if found.picture is not None:
            png = Path(found.picture).read_bytes()
            metadata["picture"] = dg.MetadataValue.md(picture_markdown(png, found.what))
        context.log.info(found.text())
        context.add_output_metadata(metadata)


@dg.job(description="A row, shot or file as a picture and in words: source, stored, masked, and which draws see it.")
def show() -> None:
    """What `nextvid show` draws, in the metadata of the step's output."""
    draw()


JOBS = [ingest, freeze, experiment]
