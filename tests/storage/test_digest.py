"""storage/digest.py: one value, one id, everywhere."""

import hashlib
import mmap
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.digest import canonical, crc32c, digest, digest_bytes, digest_config, digest_file

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(PLAIN)
def test_ids_depend_on_the_value_alone(value: object) -> None:
    assert digest(value) == digest(value)
    assert len(bytes.fromhex(digest(value))) == 16
    if isinstance(value, dict):
        assert digest(dict(reversed(value.items()))) == digest(value)


@given(PLAIN, PLAIN)
def test_other_values_other_ids(one: object, other: object) -> None:
    assert (canonical(one) == canonical(other)) == (digest(one) == digest(other))


def test_the_first_ids_never_change() -> None:
    """Ids name files on disk: another rule would orphan every store."""
    assert canonical({"b": [1, "é"], "a": None}) == '{"a":null,"b":[1,"\\u00e9"]}'
    assert digest({"a": 1}) == hashlib.blake2b(b'{"a":1}', digest_size=16).hexdigest()
    assert digest_config({"lr": 0.1}) == digest({"lr": "0.1"})
    assert digest((1, 2)) == digest([1, 2])


@pytest.mark.parametrize("value", [0.5, [1, 0.5], {"a": {"b": 0.5}}, float("nan")])
def test_floats_are_refused_in_ids(value: object) -> None:
    with pytest.raises(TypeError, match="digest_config"):
        digest(value)
    assert len(digest_config(value)) == 32


def test_keys_must_be_strings() -> None:
    with pytest.raises(AssertionError):
        digest({1: "a"})


@given(st.binary(max_size=3000))
def test_files_and_bytes_agree(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("d") / "file"
    path.write_bytes(data)
    assert digest_file(path) == digest_bytes(data) == hashlib.blake2b(data, digest_size=16).hexdigest()


def test_large_files_are_read_in_pieces(tmp_path: Path) -> None:
    data = bytes(range(256)) * 10_000
    (tmp_path / "file").write_bytes(data)
    assert digest_file(tmp_path / "file") == digest_bytes(data)


def test_crc32c_of_any_buffer() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # RFC 3720, B.4's check value
    array = np.arange(12, dtype=np.float16).reshape(3, 4)
    expected = crc32c(array.tobytes())
    assert crc32c(array) == crc32c(array.data) == crc32c(memoryview(array.tobytes())) == expected
    assert crc32c(memoryview(b"")) == crc32c(b"") == 0


def test_others_run_while_a_checksum_waits_for_pages() -> None:
    """With turns of an hour a thread gives the interpreter away only where it means to."""
    with mmap.mmap(-1, 1 << 26) as memory:
        ran = threading.Event()
        left = [4000]  # of checksums, 5 ms each: on a busy machine this thread waits longer for a core than one takes

        def check() -> None:
            while left[0] and not ran.is_set():
                crc32c(memoryview(memory))
                left[0] -= 1

        thread = threading.Thread(target=check)
        before = sys.getswitchinterval()
        sys.setswitchinterval(3600)
        try:
            thread.start()
            ran.set()
        finally:
            sys.setswitchinterval(before)
            thread.join()
    assert left[0], "all were over before this thread ran"
