"""What a step could cost at best: `python -m benchmarks.roofline [--recipe R] [--stage S] [--clips N] [--device H200]`.

Kernels, FLOPs and bytes of one step, counted on fake tensors: on any machine, in none of the memory. As written, each
operation is a kernel that reads its inputs and writes its outputs. Compiled, operations between two products of
matrices are one kernel, which reads what was made before it and writes what is used after it; this flatters the
compiler, which splits some. A kernel takes as long as its FLOPs at the device's peak, its bytes at the bandwidth, or a
launch, whichever is longest, so both MFUs are ceilings: real products reach 60 to 80 % of the peak.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from benchmarks.measure import machine, show, write
from nextvid.config.recipe import RecipeConfig, StageConfig
from nextvid.config.recipes import recipe as recipe_by_name
from nextvid.model.cost import stage_cost
from nextvid.model.encoder import Encoder, input_width
from nextvid.model.flow import NoiseKey
from nextvid.model.nextvid import NExTVid
from nextvid.model.reference import reference_features
from nextvid.model.tokens import tube_ids

LAUNCH_S = 4e-6  # our estimate of the least time from one kernel to the next
UPDATE = "optimiser, average"
PARTS = ("reference", "encoder", "predictor", "decoder", "losses", UPDATE)
# numbers of fp32 a weight: norms and clipping read g, read and write it; AdamW reads w, g, m, v and writes w, m, v
UPDATE_NUMBERS, AVERAGE_NUMBERS = 3 + 7, 3
UPDATE_KERNELS, AVERAGE_KERNELS = 3 / 40, 1  # a tensor: three multi-tensor kernels of about 40 each; the average alone


@dataclass(frozen=True)
class Device:
    """Peaks of NVIDIA's data sheets: dense bf16 FLOP/s, and bytes/s of memory."""

    flops_per_s: float
    bytes_per_s: float

    def seconds(self, flops: float, size_bytes: float, kernels: float = 1) -> float:
        """The least time of a kernel, or of several alike."""
        return max(flops / self.flops_per_s, size_bytes / self.bytes_per_s, kernels * LAUNCH_S)


DEVICES = {"H200": Device(989e12, 4.8e12), "H100": Device(989e12, 3.35e12), "A100": Device(312e12, 2.04e12)}


@dataclass(frozen=True)
class Kernel:
    """One operation: FLOPs of a product of matrices (else 0), and bytes of each storage that it reads and writes."""

    part: str
    flops: float
    reads: dict[int, int]
    writes: dict[int, int]


class Recorder(TorchDispatchMode):
    """All kernels of what runs inside, in order, under the part that is set. Views are none."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.kernels = "losses", list[Kernel]()
        self._held: list[Tensor] = []  # so that no id is used twice

    def __torch_dispatch__(
        self, func: OpOverload, _types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:  # noqa: ANN401 - whatever the operation returns
        found = func(*args, **(kwargs or {}))
        reads, writes = _sizes((args, kwargs)), _sizes(found)
        self._held += [each for each in tree_iter(found) if isinstance(each, Tensor)]
        views = not func._schema.is_mutable and writes.keys() <= reads.keys()
        if not views and not func._schema.name.startswith(("aten::empty", "aten::_unsafe_view")):
            self.kernels.append(Kernel(self.part, _flops(func, args, kwargs or {}, found), reads, writes))
        return found

    def mark(self, part: str, module: nn.Module) -> None:
        """Put what the module does, and the backward that begins at its outputs, under a part."""

        def begin(*_: object) -> None:
            self.part = part

        def end(_module: nn.Module, _inputs: object, outputs: object) -> None:
            self.part = "losses"
            for each in tree_iter(outputs):
                if isinstance(each, Tensor) and each.requires_grad:
                    each.register_hook(begin)

        module.register_forward_pre_hook(begin)
        module.register_forward_hook(end)


def main(
    quick: bool = False,
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
    recipe: str = "nextvid_l_latent",
    stage: int = 0,
    clips: int = 32,
    device: str = "H200",
) -> None:
    """Count, print a table by part, and with --json write what README.md documents.

    Args:
        quick: the recipe `demo` with 2 clips, in a few seconds.
        json: file for the results.
        recipe: its name.
        stage: number of the stage, from 0.
        clips: of one backward; weights are updated once for them.
        device: H200, H100 or A100.
    """
    recipe, clips = ("demo", 2) if quick else (recipe, clips)
    config = recipe_by_name(recipe)
    kernels = step_kernels(config, config.stages[stage], clips)
    useful = clips * stage_cost(config, config.stages[stage]).clip_flops
    rows = [*by_part(kernels, DEVICES[device])]
    eager_s, compiled_s = (sum(row[key] for row in rows) / 1e3 for key in ("eager_ms", "compiled_ms"))
    ceilings = {
        name: useful / (seconds * DEVICES[device].flops_per_s)
        for name, seconds in (("eager", eager_s), ("compiled", compiled_s))
    }
    columns = ("", "kernels", "fused", "TFLOP", "GB", "GB fused", "eager ms", "compiled ms")
    title = f"{recipe}, stage {config.stages[stage].name}, {clips} clips, {device}"
    show(title, columns, [[*row.values()] for row in rows])
    for name, share in ceilings.items():
        print(f"{name}: MFU at most {share:.1%}")
    found = {"benchmark": "roofline", "quick": quick, "machine": machine() | {"torch": torch.__version__}}
    said = {"recipe": recipe, "stage": stage, "clips": clips, "device": device, "mfu_at_most": ceilings}
    write(json, found | said | {"rows": rows, "targets": {}})


def by_part(kernels: list[Kernel], device: Device) -> Iterable[dict[str, Any]]:
    """Sums over each part's kernels, as written and fused."""
    joined = fused(kernels)
    for part in PARTS:
        plain, less = ([kernel for kernel in some if kernel.part == part] for some in (kernels, joined))
        yield {
            "name": part,
            "kernels": len(plain),
            "fused": len(less),
            "tflop": sum(kernel.flops for kernel in plain) / 1e12,
            "gb": sum(map(_bytes, plain)) / 1e9,
            "gb_fused": sum(map(_bytes, less)) / 1e9,
            "eager_ms": 1e3 * sum(device.seconds(kernel.flops, _bytes(kernel)) for kernel in plain),
            "compiled_ms": 1e3 * sum(device.seconds(kernel.flops, _bytes(kernel)) for kernel in less),
        }


def step_kernels(recipe: RecipeConfig, stage: StageConfig, clips: int) -> list[Kernel]:
    """Kernels of a step of so many clips: reference, both strategies forward and backward, update and average."""
    model, tubelets = recipe.model, stage.frames // recipe.model.tubelet
    with torch.device("meta"):
        online, reference = NExTVid(recipe), Encoder(model).requires_grad_(False)
    record = Recorder()
    lowered = torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bf16", cache_enabled=True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        online.to_empty(device="cpu")
        reference.to_empty(device="cpu")
        tokens = torch.empty(clips, tubelets * model.cells, input_width(model))
        targets = torch.empty(clips, tubelets, model.cells, model.target_channels) if recipe.losses.flow else None
        budgets = [model.cells] if recipe.masks.keep == "all" else [each.budget for each in recipe.masks.strategies]
        seen = [tube_ids(torch.zeros(clips, n, dtype=torch.int64), tubelets, model.cells) for n in budgets]
        for name in ("encoder", "predictor", "decoder"):
            if getattr(online, name) is not None:
                record.mark(name, getattr(online, name))
        record.mark("reference", reference)
        key, features = NoiseKey(0, 0, tuple(range(clips))), None
        with record:
            for only in range(len(seen)):
                with lowered:
                    if only == 0 and recipe.losses.align > 0:
                        features = reference_features(reference, tokens, recipe.losses.target_norm)
                    losses = online(tokens, targets, features, seen, key, stage.tau_copies, only)
                losses.total.backward()
    return [*record.kernels, *update_kernels(online)]


def update_kernels(model: NExTVid) -> list[Kernel]:
    """Clipping, AdamW and the average, from the number of weights."""
    tensors, averaged = (list(module.parameters()) for module in (model, model.encoder))
    found = []
    for some, numbers, each in (
        (tensors, UPDATE_NUMBERS, UPDATE_KERNELS),
        (averaged, AVERAGE_NUMBERS, AVERAGE_KERNELS),
    ):
        count = max(1, round(len(some) * each))
        size = 4 * numbers * sum(weight.numel() for weight in some) // count
        found += [Kernel(UPDATE, 0.0, {}, {-1 - number: size}) for number in range(count)]
    return found


def fused(kernels: list[Kernel]) -> list[Kernel]:
    """The same with the kernels between two products of matrices, within a part, as one."""
    last_use = {storage: number for number, kernel in enumerate(kernels) for storage in kernel.reads}
    found: list[Kernel] = []
    for (part, product), run in groupby(enumerate(kernels), key=lambda each: (each[1].part, each[1].flops > 0)):
        some = list(run)
        if product or part == UPDATE:
            found += [kernel for _, kernel in some]
            continue
        made = {storage for _, kernel in some for storage in kernel.writes}
        reads = {s: size for _, kernel in some for s, size in kernel.reads.items() if s not in made}
        end = some[-1][0]
        writes = {s: size for _, kernel in some for s, size in kernel.writes.items() if last_use.get(s, end + 1) > end}
        found.append(Kernel(part, 0.0, reads, writes))
    return found


def _bytes(kernel: Kernel) -> int:
    return sum(kernel.reads.values()) + sum(kernel.writes.values())


def _sizes(values: object) -> dict[int, int]:
    """Bytes of each storage among the values, as far as tensors reach."""
    found: dict[int, int] = {}
    for each in tree_iter(values):
        if isinstance(each, Tensor):
            storage = each.untyped_storage()
            size = min(each.numel() * each.element_size(), storage.nbytes())
            found[storage._cdata] = max(size, found.get(storage._cdata, 0))
    return found


def _flops(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], found: object) -> float:
    """FLOPs of a product of matrices or of attention; 0 of anything else."""
    name = func._schema.name
    if "scaled_dot_product" in name and name.endswith("_for_cpu"):
        q, k = (args[0], args[1])
        return 4.0 * q.numel() * k.shape[-2]
    if "scaled_dot_product" in name and name.endswith("_for_cpu_backward"):
        q, k = args[1], args[2]
        return 10.0 * q.numel() * k.shape[-2]
    formula: Callable[..., float] | None = flop_registry.get(func._overloadpacket)
    return float(formula(*args, **kwargs, out_val=found)) if formula is not None else 0.0


if __name__ == "__main__":
    tyro.cli(main)
