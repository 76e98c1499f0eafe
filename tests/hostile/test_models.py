"""Folders of models from elsewhere: pickles under every name, code, foreign classes, headers and indexes that lie.

Autoencoders, encoders to probe, exported encoders and checkpoints: nothing in a folder is executed, no file outside of
it is read, no memory is taken for what a configuration merely claims, and the error is ours.
"""

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from nextvid.config.benchmarks import ProbedEncoderConfig
from nextvid.config.recipe import EncoderConfig, ModelConfig
from nextvid.encode.autoencoders import Autoencoder
from nextvid.encode.vavae import import_vavae
from nextvid.encode.weights import autoencoder_digest
from nextvid.evaluate.encoders import encoder_digest, shape_of
from nextvid.features.encoder import load_encoder
from nextvid.features.output import Output
from nextvid.model.encoder import Encoder
from nextvid.train import checkpoint
from nextvid.train.events import read_events
from nextvid.train.export import publish_config
from storage.errors import ConfigError, NExTVidError
from storage.records import publish_record
from storage.schemas import Clips
from storage.tables import read_arrays, read_table
from tests.factories import save_autoencoder
from tests.hostile.conftest import Measured

WEIGHTS = "diffusion_pytorch_model.safetensors"


class Payload:
    """A pickle of it makes a folder when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (self.mark,)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small autoencoder's folder, not to be changed."""
    return save_autoencoder(tmp_path_factory.mktemp("sound") / "autoencoder")


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """A copy that a test changes."""
    target = tmp_path / "autoencoder"
    target.mkdir()
    for path in sound.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refused(folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        Autoencoder.load(folder)
    assert len(str(caught.value)) < 3000
    return str(caught.value)


def pickles(mark: Path, file: Path) -> list[bytes]:
    """The payload as plain pickles and as torch.save writes it."""
    found = [pickle.dumps(Payload(mark), protocol) for protocol in (0, 2, 5)]
    for archived in (True, False):
        torch.save({"state_dict": Payload(mark)}, file, _use_new_zipfile_serialization=archived)
        found.append(file.read_bytes())
    return found


@pytest.mark.parametrize("name", [WEIGHTS, f"{WEIGHTS}.index.json", "config.json", "nextvid.json"])
def test_a_pickle_under_every_name_of_an_autoencoder(folder: Path, tmp_path: Path, name: str) -> None:
    for data in pickles(tmp_path / "owned", tmp_path / "saved"):
        (folder / name).write_bytes(data)
        refused(folder)
    assert not (tmp_path / "owned").exists()


def test_pickles_beside_the_weights_are_never_read(folder: Path, tmp_path: Path) -> None:
    for name in ("diffusion_pytorch_model.bin", "pytorch_model.bin", "model.pt", "adapter_model.bin", "scheduler.pkl"):
        (folder / name).write_bytes(pickles(tmp_path / "owned", tmp_path / "saved")[3])
    (folder / "modeling.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'owned')!r})\n")
    (folder / "__init__.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'owned')!r})\n")
    Autoencoder.load(folder)
    (folder / WEIGHTS).unlink()
    assert "never from a pickle" in refused(folder)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"_class_name": "StableDiffusionPipeline"},
        {"_class_name": "os.system"},
        {"_class_name": ["AutoencoderKL"]},
        {"_class_name": "modeling.Evil"},
        {"_class_name": "AutoencoderDC"},
        {"auto_map": {"AutoModel": "modeling.Evil"}},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        {"attn_implementation": "evil/kernels"},
        {"_attn_implementation": {"": "evil/kernels"}},
        {"vision_config": {"auto_map": {"AutoModel": "modeling.Evil"}}},
        {"act_fn": "__import__('os').system('x')"},
        {"down_block_types": ["EvilBlock", "DownEncoderBlock2D"]},
        {"down_block_types": 7},
        {"layers_per_block": 1_000_000_000},
        {"layers_per_block": "2"},
        {"block_out_channels": [16, 1_000_000_000]},
        {"block_out_channels": [16] * 10_000},
        {"block_out_channels": [16, -16]},
        {"latent_channels": 10**18},
        {"norm_num_groups": 0},
        {"in_channels": 10**30},
    ],
    ids=lambda changes: f"{next(iter(changes))}={next(iter(changes.values()))}"[:60],
)
def test_configurations_that_ask_for_other_code_or_sizes(
    folder: Path, tmp_path: Path, changes: Mapping[str, Any]
) -> None:
    (folder / "modeling.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'owned')!r})\n")
    edit(folder / "config.json", **changes)
    refused(folder)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "9" * 6000, "NaN", "[]", "", '"\ud800"', " " * 9_000_000]
)
@pytest.mark.parametrize("name", ["config.json", "nextvid.json", f"{WEIGHTS}.index.json"])
def test_json_that_is_none(folder: Path, name: str, text: str) -> None:
    (folder / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    refused(folder)


@pytest.mark.parametrize(
    "index",
    [
        {},
        {"weight_map": None},
        {"weight_map": []},
        {"weight_map": {}},
        {"weight_map": {"a": 7}},
        {"weight_map": {"a": "../secret.safetensors"}},
        {"weight_map": {"a": "/etc/passwd"}},
        {"weight_map": {"a": ".."}},
        {"weight_map": {"a": ""}},
        {"weight_map": {"a": "a\0b"}},
        {"weight_map": {"a": "pipe.safetensors"}},
        {"weight_map": {"a": "zero.safetensors"}},
        {"weight_map": {"a": "evil.bin"}},
    ],
    ids=str,
)
def test_an_index_that_lies(folder: Path, tmp_path: Path, index: Mapping[str, Any]) -> None:
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    (tmp_path / "secret.safetensors").write_bytes((folder / WEIGHTS).read_bytes())
    (folder / "evil.bin").write_bytes(pickles(tmp_path / "owned", tmp_path / "saved")[3])
    os.mkfifo(folder / "pipe.safetensors")
    (folder / "zero.safetensors").symlink_to("/dev/zero")
    refused(folder)
    assert not (tmp_path / "owned").exists()


def header(values: Any, length: int | None = None, data: bytes = b"") -> bytes:
    text = values if isinstance(values, bytes) else json.dumps(values).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


ONE = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
HEADERS = {
    "a huge length": header({}, 1 << 62),
    "a length beyond its end": header({}, 1000),
    "no length": b"\x01\x02",
    "nothing": b"",
    "no JSON": header(b"x" * 100),
    "deep JSON": header(b'{"a":' * 100_000),
    "deep lists": header(b'{"a":{"dtype":"F32","shape":' + b"[" * 100_000),
    "no tensors": header({}),
    "an unknown type": header({"a": ONE | {"dtype": "F999"}}, data=bytes(16)),
    "an offset beyond its end": header({"a": ONE | {"data_offsets": [0, 1 << 40], "shape": [1 << 38]}}, data=bytes(16)),
    "an offset before its beginning": header({"a": ONE | {"data_offsets": [-16, 0]}}, data=bytes(16)),
    "offsets that overlap": header({"a": ONE, "b": ONE}, data=bytes(16)),
    "offsets in reverse": header({"a": ONE | {"data_offsets": [16, 0]}}, data=bytes(16)),
    "a hole": header({"a": ONE, "b": ONE | {"data_offsets": [32, 48]}}, data=bytes(48)),
    "a shape of other bytes": header({"a": ONE | {"shape": [1 << 30, 1 << 30, 1 << 30]}}, data=bytes(16)),
    "a negative shape": header({"a": ONE | {"shape": [-4]}}, data=bytes(16)),
    "names twice": header(b'{"a":%s,"a":%s}' % ((json.dumps(ONE).encode(),) * 2), data=bytes(16)),
    "bytes behind": header({"a": ONE}, data=bytes(64)),
    "thousands of tensors": header({f"t{n}": ONE | {"shape": [0], "data_offsets": [0, 0]} for n in range(3_000)}),
}


@pytest.mark.parametrize("data", HEADERS.values(), ids=HEADERS)
def test_headers_of_safetensors_that_lie(folder: Path, tmp_path: Path, data: bytes) -> None:
    (folder / WEIGHTS).write_bytes(data)
    refused(folder)
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(NExTVidError):
        checkpoint.fill(torch.nn.Linear(2, 2), tmp_path / "model.safetensors")


@pytest.mark.faults
def test_sizes_that_are_merely_claimed_take_no_memory(folder: Path, measured: Measured) -> None:
    """Each describes a model of a terabyte and more over weights of a megabyte."""
    edit(folder / "config.json", block_out_channels=[100_000, 100_000])
    code = """
import sys
from nextvid.encode.autoencoders import Autoencoder
from storage.errors import ConfigError
try:
    Autoencoder.load(sys.argv[1])
except ConfigError as error:
    print("refused", error)
"""
    ended = measured("-c", code, str(folder), most_bytes=32 << 30)
    assert ended.out.startswith("refused"), ended.err
    assert ended.peak_bytes < 1_500_000_000


ENCODERS = {
    "auto_map": {"auto_map": {"AutoModel": "modeling.Evil"}},
    "kernels": {"attn_implementation": "evil/kernels"},
    "another family": {"model_type": "evil"},
    "a list as type": {"model_type": ["dinov2"]},
    "no width": {"hidden_size": "32"},
    "a negative depth": {"num_hidden_layers": -1},
}


@pytest.mark.parametrize("changes", ENCODERS.values(), ids=ENCODERS)
def test_encoders_to_probe(tmp_path: Path, changes: Mapping[str, Any]) -> None:
    said = {"model_type": "dinov2", "hidden_size": 32, "num_hidden_layers": 1, "patch_size": 8, **changes}
    (tmp_path / "config.json").write_text(json.dumps(said))
    (tmp_path / "model.safetensors").write_bytes(b"")
    config = ProbedEncoderConfig(family="dinov2", folder=str(tmp_path))
    for read in (shape_of, encoder_digest):
        with pytest.raises(ConfigError):
            read(config)


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """An exported encoder of pixels."""
    folder = tmp_path / "encoder"
    folder.mkdir()
    model = ModelConfig(
        grid_height=2,
        grid_width=2,
        patch=8,
        encoder=EncoderConfig(input="pixels", depth=1, width=8, heads=2, mlp_hidden=8),
    )
    tensors = {f"encoder.{name}": value for name, value in Encoder(model).state_dict().items()}
    save_file(tensors | {"mean": torch.zeros(4), "std": torch.ones(4)}, folder / "model.safetensors")
    named = {"recipe": "r", "run": "0" * 12, "trainset": "0" * 32, "init": None, "autoencoder": None, "clip": None}
    encoding = {"resolution": 16, "precision": "fp32", "autoencoder": "none"}
    publish_config(folder, {"format": 1, "model": model.model_dump(mode="json"), "encoding": encoding, **named})
    assert load_encoder(folder)(torch.zeros(1, 2, 16, 16, 3, dtype=torch.uint8)).shape == (1, 4, 8)
    return folder


EXPORTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a file above": lambda c: c["files"].update({"../secret.json": {"size_bytes": 1, "crc32c": 1}}),
    "an absolute file": lambda c: c["files"].update({"/etc/passwd": {"size_bytes": 1, "crc32c": 1}}),
    "a device": lambda c: c["files"].update({"zero": {"size_bytes": 1, "crc32c": 1}}),
    "files as a list": lambda c: c.update(files=["model.safetensors"]),
    "an autoencoder above": lambda c: c.update(autoencoder="../autoencoder"),
    "an absolute autoencoder": lambda c: c.update(autoencoder="/autoencoder"),
    "an autoencoder that is not there": lambda c: c.update(autoencoder="autoencoder"),
    "a width of a terabyte": lambda c: c["model"]["encoder"].update(width=1_000_000, mlp_hidden=1_000_000),
    "a billion blocks": lambda c: c["model"]["encoder"].update(depth=10**9),
    "a grid of a billion": lambda c: c["model"].update(patch=10**9),
    "no model": lambda c: c.pop("model"),
    "a word as resolution": lambda c: c["encoding"].update(resolution="many"),
    "no resolution": lambda c: c["encoding"].update(resolution=-1),
    "another precision": lambda c: c["encoding"].update(precision="os.system"),
    "a clip of no frames": lambda c: c.update(clip={"frames": -1}),
    "a clip as a list": lambda c: c.update(clip=[1]),
}


@pytest.mark.parametrize("change", EXPORTS.values(), ids=EXPORTS)
def test_exported_encoders(exported: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Whoever edits config.json can seal it again: it is checked for what it says."""
    (exported.parent / "secret.json").write_text("{}")
    (exported / "zero").symlink_to("/dev/zero")
    config = json.loads((exported / "config.json").read_text())
    del config["seal"]
    change(config)
    publish_record(str(exported / "config.json"), config)
    with pytest.raises(NExTVidError):
        load_encoder(exported)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_pickle_as_a_file_of_an_exported_encoder(exported: Path, tmp_path: Path, name: str) -> None:
    for data in pickles(tmp_path / "owned", tmp_path / "saved"):
        (exported / name).write_bytes(data)
        with pytest.raises(NExTVidError):
            load_encoder(exported)
    assert not (tmp_path / "owned").exists()


STATES: dict[str, Any] = {
    "a pickle": None,
    "a list": [],
    "nothing": {},
    "no files": {"identity": {}, "progress": {}, "files": None},
    "a file above": {"identity": {}, "progress": {}, "files": {"../x": {"size_bytes": 0}}},
    "an absolute file": {"identity": {}, "progress": {}, "files": {"/etc/passwd": {"size_bytes": 0}}},
    "no sums": {"identity": {}, "progress": {}, "files": {"x.safetensors": 7}},
}


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_checkpoints(tmp_path: Path, state: object) -> None:
    path = checkpoint.path_at(tmp_path, 1)
    path.mkdir()
    (path / "x.safetensors").write_bytes(b"")
    (path / ".metadata").write_bytes(pickle.dumps(Payload(tmp_path / "owned")))  # of torch's own distributed format
    (path / "__0_0.distcp").write_bytes(pickle.dumps(Payload(tmp_path / "owned")))
    written = pickle.dumps(Payload(tmp_path / "owned")) if state is None else json.dumps(state).encode()
    (path / "state.json").write_bytes(written)
    with pytest.raises(NExTVidError):
        checkpoint.weights(path, "ema")
    assert not (tmp_path / "owned").exists()


def test_a_pickle_under_the_other_names_that_are_opened(tmp_path: Path) -> None:
    """Arrays, tables, events, features and the checkpoint of VA-VAE, the one file that is a pickle by its format."""
    mark = tmp_path / "owned"
    for data in pickles(mark, tmp_path / "saved"):
        for name in ("a.npz", "a.parquet", "events.jsonl", "a.safetensors", "vavae.pt"):
            (tmp_path / name).write_bytes(data)
        with pytest.raises(NExTVidError):
            read_arrays(str(tmp_path / "a.npz"), "make it again")
        with pytest.raises(NExTVidError):
            read_table(str(tmp_path / "a.parquet"), Clips)
        with pytest.raises(NExTVidError):
            read_events(tmp_path)
        with pytest.raises(ConfigError):
            import_vavae(tmp_path / "vavae.pt", tmp_path / "vavae")
        for name in ("a.npz", "a.parquet", "a.safetensors"):
            with pytest.raises(ConfigError):
                Output(tmp_path / name, {}, (4,)).open()
    np.savez(tmp_path / "objects.npz", a=np.array([Payload(mark)], dtype=object), allow_pickle=True)
    with pytest.raises(NExTVidError):
        read_arrays(str(tmp_path / "objects.npz"), "make it again")
    with zipfile.ZipFile(tmp_path / "lying.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        shape = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }"
        archive.writestr("a.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(shape) + 1) + shape + b"\n" + bytes(8))
    with pytest.raises(NExTVidError):
        read_arrays(str(tmp_path / "lying.npz"), "make it again")
    assert not mark.exists()


def test_weights_behind_a_link_out_of_the_folder_are_those_of_the_link(folder: Path, tmp_path: Path) -> None:
    """As in the cache of the Hub; a link to what is no weights is refused by its content, not shown."""
    before = autoencoder_digest(folder)
    (tmp_path / "blob").write_bytes((folder / WEIGHTS).read_bytes())
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(tmp_path / "blob")
    assert autoencoder_digest(folder) == before
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("/etc/passwd")
    assert "root:" not in refused(folder)
