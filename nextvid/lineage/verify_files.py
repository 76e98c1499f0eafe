"""Files that `nextvid verify` has no rule for by their place: each is judged by what its ending says that it is.

Records have seals, tables and the parts of .npz files have checksums, chunks of PNG files too. What foreign programs
write (curves, logs, pages of reports) has none, and is passed over.
"""

import io
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image

from nextvid.train.events import NAME, read_events
from storage import atomic, listing, tables
from storage.errors import DamagedError
from storage.records import read_record
from storage.remote import is_local
from storage.root import DataRoot

ENDINGS = (".parquet", ".json", ".jsonl", ".npy", ".npz", ".safetensors")  # that no folder of ours has
# Parts of stores are storage/verify.py's; a spec has its digest; exported encoders have sums, their autoencoder foreign
# files; what a maker has not finished yet, and the kept features beside it, is nobody's record.
_OTHERS = re.compile(r"/f[0-9]+/[0-9]{4,5}/|/spec\.json$|/encoder(_online)?/|/\.|\.partial|/unfinished/")
_WHOLE = "remove it and make it again"


def sealed_files(root: DataRoot, *, quick: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every file under the roots that proves its own bytes, and what to call to read it; with `quick`, records."""
    for top in sorted({root.url, root.runs_url}):
        for path in listing.files_below(top):
            if not _OTHERS.search(path.removeprefix(top)) and (read := reader_of(path, quick=quick)) is not None:
                yield path, read


def reader_of(path: str, *, quick: bool) -> Callable[[], object] | None:
    """What reads a file by its ending, and raises where its bytes are not those that were written."""
    match path.rpartition(".")[2]:
        case "json":
            return lambda: read_record(path, _WHOLE)
        case "parquet":
            return lambda: tables.seal(path)
        case "jsonl" if Path(path).name == NAME:
            return lambda: read_events(Path(path).parent)
        case "npz" if not quick:
            return lambda: tables.read_arrays(path, _WHOLE)
        case "png" if not quick:
            return lambda: _picture(path)
    return None


def folders_for_files(root: DataRoot) -> Iterator[str]:
    """Folders with the name of a file."""
    for top in sorted({root.url, root.runs_url}):
        for place, folders, _ in os.walk(top) if is_local(top) else ():
            yield from (str(Path(place, name)) for name in folders if name.endswith(ENDINGS))


def _picture(path: str) -> None:
    try:
        with Image.open(io.BytesIO(atomic.read_bytes(path)), formats=["PNG"]) as picture:
            picture.verify()
    except (OSError, SyntaxError, ValueError) as error:  # SyntaxError: what Pillow says of a broken chunk
        raise DamagedError(f"{path} is damaged ({error})") from error
