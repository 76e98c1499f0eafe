"""An S3 server on the loopback interface (moto's, a process of its own, everything in memory) and what speaks to it."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import requests

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "not-a-secret", "AWS_DEFAULT_REGION": "us-east-1"}
START_S = 60  # it takes half a second alone
SERVER = """
import threading
from moto.s3.responses import S3Response
from moto.server import main

# For Amazon, to see that a name is free and to take it is one act. For moto it is two, and its server has threads.
put_object, one_at_a_time = S3Response.put_object, threading.Lock()

def put_alone(self):
    with one_at_a_time:
        return put_object(self)

S3Response.put_object = put_alone
main()
"""


_KEPT: list[object] = []  # collected, they would warn of open connections in the middle of another test


def variables_of(url: str) -> dict[str, str]:
    """The variables that a user sets for a server at this URL."""
    return CREDENTIALS | {"AWS_ENDPOINT_URL": url, "AWS_EC2_METADATA_DISABLED": "true"}


def forget_clients() -> None:
    """Have the next request made by a client that reads the environment anew."""
    from s3fs import S3FileSystem  # here, since `make test` collects this file and does without

    _KEPT.extend(S3FileSystem._cache.values())
    S3FileSystem.clear_instance_cache()


@contextmanager
def s3_server(folder: Path) -> Iterator[int]:
    """Start it, give its port, end it; what it says is kept in the folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    log = folder / "log"
    command = [sys.executable, "-c", SERVER, "-H", "127.0.0.1", "-p", str(port)]
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
