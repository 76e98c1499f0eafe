"""How fast a run is, in FLOPs by the model's own formulas (method.md 12) and as a share of its GPUs' peak (MFU).

Holds the peaks and a division; what a clip costs is model/cost.py's. FLOPs of recomputed blocks are not counted: they
are no work that the model asks for.
"""

import torch

from nextvid.config import RecipeConfig, StageConfig
from nextvid.model.cost import stage_cost

# Dense bf16 FLOP/s by the makers' data sheets, by what a name of torch contains; the first that fits
PEAKS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}


def peak(device: torch.device) -> float | None:
    """FLOP/s that this device can do; None for a CPU, and for a GPU that is not listed."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for known, flops in PEAKS.items() if known in name), None)


def speeds(
    recipe: RecipeConfig, stage: StageConfig, clips_per_s: float, ranks: int, device: torch.device
) -> dict[str, float]:
    """TFLOP/s of all ranks together and, where the device's peak is known, `mfu`."""
    flops_per_s = stage_cost(recipe, stage).clip_flops * clips_per_s
    found, most = {"tflop_per_s": flops_per_s / 1e12}, peak(device)
    return found if most is None else found | {"mfu": flops_per_s / (ranks * most)}
