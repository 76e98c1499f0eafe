"""Training input without a store: each clip decoded when it is drawn, as V-JEPA 2 does it.

A clip opens its file with decord, takes 16 frames at about 4 a second, and resizes a random crop to 256 pixels (torch,
bilinear without antialiasing, its settings), flips and normalises it. Decoding runs in one thread, so that a worker is
a core. The file is a synthetic one of 10 s at 456 x 256 and is in the page cache: footage is dearer to decode. What
a frozen encoder costs on top is not counted.

Axes: T frames, C channels, H and W pixels.
"""

from collections.abc import Iterator
from pathlib import Path

import av
import cv2
import numpy as np
import torch
from av.video.stream import VideoStream
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

FRAMES, SIDE = 16, 256  # V-JEPA 2's pretraining, configs/train/vitl16: 16 frames of 256 pixels
CLIP_FPS = 4
SCALE, ASPECT = (0.3, 1.0), (0.75, 1.35)  # its data_aug: random_resize_scale and random_resize_aspect_ratio
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # its normalisation, ImageNet's
WIDTH, HEIGHT, FPS, SECONDS = 456, 256, 25, 10  # a Kinetics file at 256p
BATCH = 8  # clips a batch: one of 32 as float32 is 400 MB here
SPEED = 3  # pixels a frame


def write_video(folder: Path) -> Path:
    """A textured scene that pans, with a cut in the middle; x264 at its defaults."""
    path, rng = folder / "video.mp4", np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        added = container.add_stream("libx264", rate=FPS, options={"crf": "23", "preset": "medium"})
        assert isinstance(added, VideoStream)
        added.width, added.height, added.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        half = FPS * SECONDS // 2
        for _ in range(2):
            small = rng.uniform(0, 255, (HEIGHT // 8, (WIDTH + SPEED * half) // 8, 3)).astype(np.float32)
            scene = cv2.resize(small, (WIDTH + SPEED * half, HEIGHT), interpolation=cv2.INTER_CUBIC)
            scene = scene.clip(0, 255).astype(np.uint8)
            for number in range(half):
                frame = np.ascontiguousarray(scene[:, SPEED * number : SPEED * number + WIDTH])
                container.mux(added.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(added.encode(None))
    return path


class Decoded(Dataset[Tensor]):
    """Clips of one file by number; the same number gives the same clip."""

    def __init__(self, path: Path, clips: int) -> None:
        self._path, self._clips = path, clips

    def __len__(self) -> int:
        return self._clips

    def __getitem__(self, clip: int) -> Float[Tensor, "C T H W"]:
        import decord

        rng = np.random.default_rng(clip)
        video = decord.VideoReader(
            str(self._path), num_threads=1, ctx=decord.cpu(0)
        )  # opened for each clip, as it does
        step = int(np.ceil(video.get_avg_fps())) // CLIP_FPS
        last = len(video) - FRAMES * step
        frames = video.get_batch(rng.integers(0, last + 1) + step * np.arange(FRAMES)).asnumpy()
        cropped = rearrange(torch.from_numpy(frames), "t h w c -> t c h w")[..., *_crop(rng)].float()
        resized = functional.interpolate(cropped, (SIDE, SIDE), mode="bilinear", align_corners=False)
        if rng.random() < 0.5:
            resized = resized.flip(-1)
        mean, std = (255 * torch.tensor(values)[:, None, None, None] for values in (MEAN, STD))
        return rearrange(resized, "t c h w -> c t h w").sub_(mean).div_(std)


def decoded_batches(path: Path, clips: int, workers: int) -> Iterator[Float[Tensor, "B C T H W"]]:
    """Batches as its DataLoader makes them."""
    yield from DataLoader(Decoded(path, clips), BATCH, num_workers=workers)


def _crop(rng: np.random.Generator) -> tuple[slice, slice]:
    """Rows and columns of torchvision's RandomResizedCrop, the first draw that fits."""
    while True:
        area = HEIGHT * WIDTH * rng.uniform(*SCALE)
        aspect = np.exp(rng.uniform(*np.log(ASPECT)))
        high, wide = round(float(np.sqrt(area / aspect))), round(float(np.sqrt(area * aspect)))
        if high <= HEIGHT and wide <= WIDTH:
            top, left = rng.integers(0, HEIGHT - high + 1), rng.integers(0, WIDTH - wide + 1)
            return slice(top, top + high), slice(left, left + wide)
