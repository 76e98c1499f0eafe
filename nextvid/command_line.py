"""What all commands share: the app that they register with, options of the same name, help texts, how results print.

Results go to stdout; progress, notes and errors go to stderr.
"""

import json
from dataclasses import asdict
from typing import Annotated, Any, ClassVar, Protocol

import tyro
from tyro.extras import SubcommandApp

from nextvid.plain_text import printable

app = SubcommandApp()

Corpus = Annotated[
    str | None, tyro.conf.arg(metavar="PATH", help="path of corpus.yaml; else NEXTVID_CORPUS, else ./corpus.yaml")
]
Batch = Annotated[str | None, tyro.conf.arg(metavar="BATCH", help="only this batch, such as my_videos.000000")]
Overrides = Annotated[
    tuple[str, ...], tyro.conf.arg(name="set", help="changes of the recipe, such as seed=1 or stages.warmup.steps=100")
]
How = Annotated[
    tuple[str, ...], tyro.conf.arg(help="how to train, such as device=cpu micro_batch=8; the run is the same")
]
Run = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN", help="id of a training run")]
Yes = Annotated[bool, tyro.conf.arg(help="do it; otherwise only print what would be done")]
Json = Annotated[bool, tyro.conf.arg(name="json", help="print JSON")]

ABOUT = """Pretrain video encoders by masked next-frame prediction on your own videos and images, and probe them.

A command works on one project: the corpus.yaml named by --corpus, else by the variable NEXTVID_CORPUS,
else ./corpus.yaml. 'nextvid COMMAND --help' lists the options of a command.

exit codes:
  0  done
  1  refused: the request does not fit what exists; or any other error
  2  corpus.yaml, a recipe, a dataset or the command itself is wrong
  3  what the command reads is missing or failed its checks
  4  a store, table or trainset is damaged
  5  the system refused: disk full, no permission
 75  a process or machine of the same work is gone: ask again, and it resumes
130  stopped by Ctrl-C; 143 by SIGTERM, 129 by a closed terminal
"""

EXAMPLES = {
    "make": "nextvid make pretrain --recipe nextvid_s_latent --how ranks=4",
    "init": "nextvid init videos --out corpus.yaml",
    "status": "nextvid status --json",
    "plan": "nextvid plan --batch my_videos.000000",
    "inspect": "nextvid inspect nextvid_l --set stages.stable1.batch=1024",
    "schema": "nextvid schema",
    "draws": "nextvid draws --recipe demo --first 20 --start 1000",
    "verify": "nextvid verify --batch my_videos.000000",
    "lineage": "nextvid lineage videos/one.mp4",
    "show": "nextvid show videos/one.mp4 --out one.png",
    "compare": "nextvid compare RUN RUN",
    "export": "nextvid export RUN encoder --format onnx",
    "features": "nextvid features videos --encoder encoder --out features.parquet --every 2",
    "withdraw": "nextvid withdraw videos/one.mp4 --yes",
    "sweep": "nextvid sweep --yes",
    "pull": "nextvid pull DIGEST s3://bucket/root",
    "export-latents": "nextvid export-latents latents --format webdataset --frames 16",
    "import-vavae": "nextvid import-vavae vavae-imagenet256-f16d32-dinov2.pt vavae",
}


class Result(Protocol):
    """A dataclass that can be printed for people."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def text(self) -> str: ...


def show(found: Result, json_: bool) -> None:
    """Print a result for people or as JSON."""
    print(json.dumps(asdict(found), default=str, indent=2) if json_ else printable(found.text(), keep="\n"))


def example_of(words: list[str]) -> str | None:
    """The example that ends the help of the command that these words ask help for; None where they do not."""
    asks = len(words) > 1 and bool({"-h", "--help"} & set(words[1:]))
    example = EXAMPLES.get(words[0]) if asks else None
    return example and f"example:\n  {example}"
