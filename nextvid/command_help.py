"""What `nextvid --help` says beside the commands' options: what a project is, the exit codes, an example a command."""

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
    "import-vavae": "nextvid import-vavae vavae-imagenet256-f16d32-dinov2.pt vavae",
}


def example_of(words: list[str]) -> str | None:
    """The example that ends the help of the command that these words ask help for; None where they do not."""
    asks = len(words) > 1 and bool({"-h", "--help"} & set(words[1:]))
    example = EXAMPLES.get(words[0]) if asks else None
    return example and f"example:\n  {example}"
