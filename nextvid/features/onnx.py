"""An exported encoder as ONNX, for runtimes without torch."""

import logging
import warnings
from pathlib import Path

import torch

from storage.errors import ConfigError

ONNX = "model.onnx"
OPSET = 18  # torch 2.11's own choice, read by onnxruntime 1.14 and later
EXTERNAL_BYTES = 1 << 30  # a protobuf holds 2 GiB: larger weights go to a file beside it


def write_onnx(program: torch.export.ExportedProgram, path: Path) -> None:
    """Write a file with the input `clips` and the output `features`, for any number of clips.

    Raises ConfigError where the packages are missing.
    """
    try:
        import onnxscript  # noqa: F401 - torch.onnx needs it and says so in a traceback
    except ImportError as error:
        raise ConfigError(f"ONNX is written with more packages: pip install 'nextvid[onnx]' ({error})") from error
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)  # else it tells four times that torchvision is missing, which no encoder needs
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch about torch
            found = torch.onnx.export(
                program, opset_version=OPSET, input_names=["clips"], output_names=["features"], verbose=False
            )
    finally:
        logger.setLevel(level)
    assert found is not None, "None is the answer of the older exporter"
    size_bytes = sum(value.nbytes for value in program.state_dict.values())
    found.save(path, external_data=size_bytes > EXTERNAL_BYTES)
