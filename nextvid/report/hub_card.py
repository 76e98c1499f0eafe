"""The model card of a run for the Hub, from its trainset, its datasets' licences and its scores."""

from nextvid.config.project import Project
from nextvid.features.card import Scored, TrainedOn, card
from nextvid.lineage.trace import licences_of, shares
from nextvid.report.report import scores_of_run
from nextvid.train.export import read_config
from nextvid.train.run import Run
from nextvid.trainset.trainset import Trainset
from storage import atomic


def hub_card(project: Project, run: Run) -> str:
    """README.md of the exported encoder of a run. The data are left open where its trainset is not on this machine."""
    data = None
    if atomic.exists(project.root.pointed("trainset", run.trainset)):
        trainset = Trainset.open(project.root, run.trainset)
        lineage = trainset.lineage()
        licences = licences_of(project, lineage)
        data = [
            TrainedOn(share.name, licences[share.name], share.weight, share.files, share.clips)
            for share in shares(lineage, "dataset", trainset.weights)
        ]
    scores = []
    for benchmark, ordered in scores_of_run(project, run).items():
        record = ordered[-1][-1]
        ema, random = record["encoders"]["ema"], record["encoders"]["random"]
        scores.append(
            Scored(
                benchmark,
                ema["accuracy"],
                ema["standard_error"],
                random["accuracy"],
                record["clips"]["test"],
                record.get("finetune") is not None,
                record.get("limit"),
            )
        )
    return card(read_config(run.folder / "encoder"), data, scores)
