"""The S3 server (server.py), a proxy before it, and a bucket a test."""

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage import remote
from storage.root import DataRoot
from tests.services.s3.proxy import Proxy, serve
from tests.services.s3.server import forget_clients, s3_server, variables_of


@pytest.fixture(scope="session")
def server_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Port of moto's server."""
    with s3_server(tmp_path_factory.mktemp("moto")) as port:
        yield port


@pytest.fixture(scope="session")
def running_proxy(server_port: int) -> Iterator[Proxy]:
    server, proxy = serve(server_port)
    yield proxy
    server.shutdown()
    server.server_close()


@pytest.fixture
def proxy(running_proxy: Proxy) -> Iterator[Proxy]:
    """The proxy, without faults."""
    running_proxy.clear()
    yield running_proxy
    running_proxy.clear()


@pytest.fixture
def environment(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """The variables a user sets; processes that a test starts inherit them. Requests go through the proxy."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "FSSPEC_"))]:
        monkeypatch.delenv(name)
    variables = variables_of(proxy.url)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    forget_clients()
    yield variables
    forget_clients()


@pytest.fixture
def bucket(environment: dict[str, str], proxy: Proxy, request: pytest.FixtureRequest) -> str:
    """URL of a new bucket."""
    name = re.sub(r"[^a-z0-9]+", "-", request.node.name.lower()).strip("-")[:50] + f"-{time.monotonic_ns() % 10**9}"
    fs, _ = remote.connect(f"s3://{name}")
    fs.mkdir(name)
    proxy.clear()
    return f"s3://{name}"


@pytest.fixture
def root(bucket: str, tmp_path: Path) -> DataRoot:
    """A data root in the bucket, with a cache of 1 GB."""
    return DataRoot.open(f"{bucket}/corpus", str(tmp_path / "runs"), str(tmp_path / "cache"), 10**9)
