"""An S3 server (moto's, on loopback, as a process of its own), a proxy before it, and a bucket a test."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from storage import remote
from storage.root import DataRoot
from tests.services.s3.proxy import Proxy, serve

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "not-a-secret", "AWS_DEFAULT_REGION": "us-east-1"}
START_S = 30  # it takes half a second alone


_KEPT: list[object] = []  # collected, they would warn of open connections in the middle of another test


def forget_clients() -> None:
    """Have the next request made by a client that reads the environment anew."""
    from s3fs import S3FileSystem  # here, since `make test` collects this file and does without

    _KEPT.extend(S3FileSystem._cache.values())
    S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="session")
def server_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Port of moto's server, which keeps everything in memory."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    log = tmp_path_factory.mktemp("moto") / "log"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        for _ in range(START_S * 10):
            assert process.poll() is None, log.read_text()
            try:
                requests.get(f"http://127.0.0.1:{port}/moto-api/", timeout=5)
                break
            except requests.ConnectionError:
                time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait(10)


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
    variables = CREDENTIALS | {"AWS_ENDPOINT_URL": proxy.url, "AWS_EC2_METADATA_DISABLED": "true"}
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
