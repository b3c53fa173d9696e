# SPDX-License-Identifier: Apache-2.0
"""An S3 for the tests: moto, which answers as Amazon's does. A real one cannot be had where they run."""

from __future__ import annotations

import glob
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import boto3

from tests.opensearch_server import die_with_parent
from tests.runners import CACHE, call, once
from tests.runners.flink_cluster import free_ports

MOTO = "moto[s3,server]==5.2.5"
BUCKET = "vectors"


@dataclass(frozen=True)
class ObjectStore:
    """A running store with one empty bucket."""

    url: str
    access_key: str = "trainer"
    secret_key: str = "not-to-be-seen"

    @property
    def flags(self) -> list[str]:
        """Beam's options for it."""
        keys = [f"--s3_access_key_id={self.access_key}", f"--s3_secret_access_key={self.secret_key}"]
        return [f"--s3_endpoint_url={self.url}", "--s3_region_name=us-east-1", *keys]

    @property
    def environment(self) -> dict[str, str]:
        """Amazon's variables for it."""
        keys = {"AWS_ACCESS_KEY_ID": self.access_key, "AWS_SECRET_ACCESS_KEY": self.secret_key}
        return {"AWS_ENDPOINT_URL": self.url, "AWS_DEFAULT_REGION": "us-east-1", **keys}

    def put(self, prefix: str, pattern: str) -> None:
        """Copies the files that match a glob."""
        for path in glob.glob(pattern):
            self._client().upload_file(path, BUCKET, f"{prefix}/{os.path.basename(path)}")

    def list(self, prefix: str = "") -> list[str]:
        found = self._client().list_objects_v2(Bucket=BUCKET, Prefix=prefix)
        return [entry["Key"] for entry in found.get("Contents", ())]

    def write(self, name: str) -> None:
        """An empty object."""
        self._client().put_object(Bucket=BUCKET, Key=name, Body=b"")

    def delete(self, name: str) -> None:
        self._client().delete_object(Bucket=BUCKET, Key=name)

    def refuse(self) -> None:
        """Whatever it is asked for from now on: nobody has rights, and moto is told to look at them."""
        plain = {"Content-Type": "text/plain"}
        with urllib.request.urlopen(urllib.request.Request(f"{self.url}/moto-api/reset-auth", b"0", plain)):
            pass

    def read(self, name: str) -> bytes:
        body: bytes = self._client().get_object(Bucket=BUCKET, Key=name)["Body"].read()
        return body

    def make_bucket(self) -> None:
        self._client().create_bucket(Bucket=BUCKET)

    def _client(self) -> boto3.client:
        keys = {"aws_access_key_id": self.access_key, "aws_secret_access_key": self.secret_key}
        return boto3.client("s3", endpoint_url=self.url, region_name="us-east-1", **keys)


def moto_server() -> Path:
    """Its program, in an environment of its own."""

    def build(folder: Path) -> None:
        call([sys.executable, "-m", "venv", str(folder)])
        call([str(folder / "bin/python"), "-m", "pip", "install", "--quiet", MOTO])

    return once(CACHE / MOTO.replace("[s3,server]==", "-"), build) / "bin/moto_server"


@contextmanager
def object_store(log: Path) -> Iterator[ObjectStore]:
    """Runs one, which writes to `log`."""
    program, (port,) = moto_server(), free_ports(1)
    store = ObjectStore(f"http://127.0.0.1:{port}")
    command = [str(program), "-H", "127.0.0.1", "-p", str(port)]
    with log.open("wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, preexec_fn=die_with_parent())
    try:
        for _ in range(300):
            with suppress(OSError), urllib.request.urlopen(f"{store.url}/moto-api/data.json", timeout=1):
                break
            assert server.poll() is None, log.read_text()[-2000:]
            time.sleep(0.1)
        store.make_bucket()
        yield store
    finally:
        server.kill()
        server.wait()
