# SPDX-License-Identifier: Apache-2.0
"""What the reading tests share: filling indices, reading everything, and a proxy that misbehaves."""

from __future__ import annotations

import http.client
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from transforms.opensearch import OpenSearchConnection, OpenSearchVectors
from transforms.vectors import RejectedVector


def vectors(count: int, dimension: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, dimension)).astype("<f4")


def create(
    server: Any, index: str, mapping: dict[str, Any] | None, shards: int = 1, settings: dict[str, Any] | None = None
) -> None:
    client = server.client()
    client.indices.delete(index=index, ignore=[404])
    settings = {"number_of_shards": shards, "number_of_replicas": 0, **(settings or {})}
    client.indices.create(
        index=index, body={"settings": settings, "mappings": {"properties": mapping} if mapping else {}}
    )


def knn_vector(dimension: int, **settings: Any) -> dict[str, Any]:
    return {"type": "knn_vector", "dimension": dimension, **settings}


def put(server: Any, index: str, documents: Sequence[dict[str, Any]], action: str = "index", batch: int = 2000) -> None:
    client = server.client()
    for start in range(0, len(documents), batch):
        lines = []
        for document in documents[start : start + batch]:
            lines += [json.dumps({action: {}}), json.dumps(document)]
        answer = client.bulk(index=index, body="\n".join(lines) + "\n")
        assert not answer["errors"], str(answer)[:2000]
    client.indices.refresh(index=index)


def fill(server: Any, index: str, matrix: np.ndarray, shards: int = 1, field: str = "vec", **settings: Any) -> None:
    """An index of one document a row."""
    create(server, index, {field: knn_vector(matrix.shape[1], **settings)}, shards)
    put(server, index, [{field: row.tolist()} for row in matrix])


def source(
    server: Any, index: str, dimension: int, field: str = "vec", url: str = "", **options: Any
) -> OpenSearchVectors:
    return OpenSearchVectors(OpenSearchConnection(url or server.url), index, field, dimension, **options)


def refuse(bad: RejectedVector) -> None:
    raise AssertionError(bad)


def read(vectors: OpenSearchVectors, keep: float = 1.0, reject: Any = refuse) -> tuple[np.ndarray, np.ndarray]:
    """All slices, in the order of their priorities."""
    blocks = [block for part in vectors.slices() for block in vectors.read(part, keep, reject)]
    if not blocks:
        return np.empty(0, np.uint64), np.empty((0, 0))
    priorities = np.concatenate([block.priorities for block in blocks])
    order = np.argsort(priorities, kind="stable")
    return priorities[order], np.concatenate([block.vectors for block in blocks])[order]


def same_rows(found: np.ndarray, expected: np.ndarray) -> bool:
    """Whether two matrices have the same rows, bit by bit, in any order."""
    return sorted(map(bytes, np.ascontiguousarray(found))) == sorted(map(bytes, np.ascontiguousarray(expected)))


def open_contexts(client: Any) -> int:
    # Of the indices there are: a node goes on counting the contexts that an index had when it was deleted.
    search = client.indices.stats(metric="search")["_all"]["total"]["search"]
    return int(search["open_contexts"] + search["scroll_current"] + search["point_in_time_current"])


def assert_no_contexts(server: Any) -> None:
    # A closed context is released a moment after the answer.
    for _ in range(50):
        if not open_contexts(server.client()):
            return
        time.sleep(0.1)
    raise AssertionError(f"{open_contexts(server.client())} search contexts are open")


#: Called with method, path and body of each request. Returns None to pass it on, or one of: a status or (status,
#: headers) to answer, "reset", "hang", "partial" (half of the real answer), or a function from the real answer's bytes
#: to those to send.
Rule = Callable[[str, str, bytes], Any]


class Proxy:
    """An HTTP proxy in front of `url`; `seen` has (method, path, body) of the requests. `with Proxy(url, rule) as
    proxy`.
    """

    def __init__(self, url: str, rule: Rule = lambda method, path, body: None):
        self.rule = rule
        self.seen: list[tuple[str, str, bytes]] = []
        self._target = urlsplit(url)
        self._lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                proxy._serve(self, body)

            do_GET = do_POST = do_DELETE = do_PUT = do_HEAD = handle_any

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Proxy:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def requests(self, path_part: str) -> list[tuple[str, str, bytes]]:
        return [request for request in self.seen if path_part in request[1]]

    def _serve(self, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        with self._lock:
            self.seen.append((handler.command, handler.path, body))
            action = self.rule(handler.command, handler.path, body)
        if action == "reset":
            linger = struct.pack("ii", 1, 0)
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            handler.connection.close()
            handler.close_connection = True
            return
        if action == "hang":
            time.sleep(3)
            handler.close_connection = True
            return
        if isinstance(action, int):
            action = (action, {})
        if isinstance(action, tuple):
            status, headers = action
            data, kind = (
                json.dumps({"error": {"type": "injected", "reason": "by the test"}}).encode(),
                "application/json",
            )
        else:
            status, headers, data, kind = self._forward(handler, body)
            if callable(action):
                data = action(data)
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("content-type", kind)
        handler.send_header("content-length", str(len(data)))
        handler.end_headers()
        if action == "partial":
            handler.wfile.write(data[: len(data) // 2])
            handler.close_connection = True
        else:
            handler.wfile.write(data)

    def _forward(self, handler: BaseHTTPRequestHandler, body: bytes) -> tuple[int, dict[str, str], bytes, str]:
        connection = http.client.HTTPConnection(self._target.hostname or "", self._target.port, timeout=60)
        try:
            headers = {name: value for name, value in handler.headers.items() if name.lower() != "host"}
            connection.request(handler.command, handler.path, body, headers)
            answer = connection.getresponse()
            return answer.status, {}, answer.read(), answer.headers.get("content-type", "application/json")
        finally:
            connection.close()
