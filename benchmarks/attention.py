"""Frame attention block by block against one dense mask: `python -m benchmarks.attention [--quick] [--json FILE]`.

Both arms are `frame_attention` of the model, with backend `loop` and `dense`, on the same q, k, v, forward and
backward, in turns, in one process; the ratio is loop over dense within a turn, in CPU seconds. Shapes are those of the
method at T=8, heads as in the models: the reference encoder's 256 cells, what the online encoder keeps (60 cells), the
predictor's queries against it. fp32 on the CPU, where a mask excludes no kernel; on a GPU the dense arm would also lose
flash attention, which is not measured here.
"""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from benchmarks.measure import Took, machine, median_ratio, show, timed, write
from nextvid.model.attention import Backend, frame_attention

TARGET = 0.65  # our aim at T=8, forward and backward
QUICK_TURNS, TURNS = 3, 7
ARMS: tuple[Backend, ...] = ("loop", "dense")
BATCH = 1  # small enough for a CPU; both arms grow alike with it
IDEAL = {8: 9 / 16, 32: 33 / 64}  # pairs that may attend over all pairs, (T + 1) / 2T


@dataclass(frozen=True)
class Case:
    """One shape; `counts` says whether the target is about it."""

    name: str
    tubelets: int
    queries: int  # a tubelet
    keys: int  # a tubelet
    heads: int
    head_dim: int
    counts: bool = True


CASES = (
    Case("reference, ViT-L", 8, 256, 256, 16, 64),
    Case("online, ViT-H", 8, 60, 60, 16, 80),
    Case("predictor", 8, 256, 60, 12, 32),
    Case("reference, 64 frames", 32, 128, 128, 16, 64, counts=False),
)


def main(
    quick: bool = False,
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
) -> None:
    """Measure, print a table, and with --json write what README.md documents.

    Args:
        quick: 3 turns and no clips of 64 frames, in under a minute.
        json: file for the results.
    """
    rows = [_row(case, QUICK_TURNS if quick else TURNS) for case in CASES if case.counts or not quick]
    worst = max(row["ratio"] for case, row in zip(CASES, rows, strict=False) if case.counts)
    found = {
        "benchmark": "attention",
        "quick": quick,
        "machine": machine() | {"torch": torch.__version__, "threads": torch.get_num_threads()},
        "turns": QUICK_TURNS if quick else TURNS,
        "rows": rows,
        "targets": {"loop_over_dense": {"measured": worst, "at_most": TARGET, "met": worst <= TARGET}},
    }
    columns = ("", "T", "queries", "keys", "heads", "loop ms", "dense ms", "loop / dense", "forward alone", "pairs")
    keys = ("tubelets", "queries", "keys", "heads", "loop_ms", "dense_ms", "ratio", "forward_ratio", "ideal_ratio")
    show("frame attention against a dense mask", columns, [[row["name"], *(row[key] for key in keys)] for row in rows])
    print(f"loop_over_dense: {worst:.2f}, wanted <= {TARGET}: {'met' if worst <= TARGET else 'MISSED'}")
    write(json, found)


def _row(case: Case, turns: int) -> dict[str, Any]:
    both = {backend: _work(case, backend, backward=True) for backend in ARMS}
    forward = {backend: _work(case, backend, backward=False) for backend in ARMS}
    took, took_forward = _in_turns(both, turns), _in_turns(forward, turns)
    return {
        "name": case.name,
        "tubelets": case.tubelets,
        "queries": case.queries,
        "keys": case.keys,
        "heads": case.heads,
        "head_dim": case.head_dim,
        "loop_ms": 1e3 * statistics.median(took["loop"]),
        "dense_ms": 1e3 * statistics.median(took["dense"]),
        "ratio": median_ratio(took["loop"], took["dense"]),
        "forward_ratio": median_ratio(took_forward["loop"], took_forward["dense"]),
        "ideal_ratio": IDEAL[case.tubelets],
    }


def _in_turns(arms: Mapping[Backend, Callable[[], None]], turns: int) -> dict[Backend, list[float]]:
    """CPU seconds of each arm in each turn; the order changes from turn to turn."""
    for work in arms.values():
        work()
    took: dict[Backend, list[float]] = {name: [] for name in arms}
    for turn in range(turns):
        for name in ARMS if turn % 2 == 0 else reversed(ARMS):
            once: Took = timed(arms[name])
            took[name].append(once.cpu_s)
    return took


def _work(case: Case, backend: Backend, backward: bool) -> Callable[[], None]:
    generator = torch.Generator().manual_seed(0)

    def drawn(tokens: int) -> torch.Tensor:
        shape = (BATCH, case.heads, case.tubelets * tokens, case.head_dim)
        return torch.randn(shape, generator=generator).requires_grad_(backward)

    q, k, v = drawn(case.queries), drawn(case.keys), drawn(case.keys)
    weights = torch.randn(q.shape, generator=generator)

    def work() -> None:
        out = frame_attention(q, k, v, case.tubelets, backend)
        if backward:
            torch.autograd.grad(out, (q, k, v), weights)

    return work


if __name__ == "__main__":
    tyro.cli(main)
