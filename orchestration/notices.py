"""The sensor `notices`: what the command line accepted or withdrew becomes observations of the assets it affects."""

import re

import dagster as dg

from assets.resources import ProjectResource
from storage import listing
from storage.records import read_record

NAME = re.compile(r"[0-9]{19}\.json")  # nanoseconds: in the order of time


@dg.sensor(
    default_status=dg.DefaultSensorStatus.RUNNING,
    minimum_interval_seconds=30,  # our choice: each tick lists one small folder
    description="Reports what `nextvid plan --accept` and `nextvid withdraw` did, by asset, with the rows affected.",
)
def notices(context: dg.SensorEvaluationContext, project: ProjectResource) -> dg.SensorResult:
    """Report the notices after the cursor, the name of the last one."""
    root = project.open().root
    last = context.cursor if context.cursor and NAME.fullmatch(context.cursor) else ""
    new = sorted(name for name in listing.files(root.notices()) if NAME.fullmatch(name) and name > last)
    found = [read_record(f"{root.notices()}/{name}") for name in new]
    return dg.SensorResult(
        asset_events=[
            dg.AssetObservation(asset, metadata={"what": notice["what"], "rows": rows})
            for notice in found
            for asset, rows in notice["rows"].items()
        ],
        cursor=new[-1] if new else last,
        skip_reason=None if new else "nothing was accepted or withdrawn",
    )
