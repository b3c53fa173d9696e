# SPDX-License-Identifier: Apache-2.0
"""Stands in for the two parts of Google's cloud that a launch asks before it sends anything, and that cannot be had
here: the metadata server, which says who the machine is, and an empty bucket.
"""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

#: Path prefix to answer; the first that fits.
ANSWERS: dict[str, Any] = {
    "/computeMetadata/v1/instance/service-accounts/default/token": {
        "access_token": "none",
        "expires_in": 3600,
        "token_type": "Bearer",
    },
    "/computeMetadata/v1/instance/service-accounts/": {"email": "me@example.com", "scopes": [], "aliases": ["default"]},
    "/computeMetadata/v1/universe": "googleapis.com",
    "/computeMetadata/": "some-project",
    "/storage/": {"kind": "storage#objects"},
}


class GoogleCloud:
    """`with GoogleCloud() as cloud`; `cloud.environment` are the variables that make Google's libraries ask it."""

    def __init__(self) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        host = f"127.0.0.1:{self._server.server_address[1]}"
        self.environment = {
            "GCE_METADATA_HOST": host,
            "GCE_METADATA_IP": host,
            "STORAGE_EMULATOR_HOST": f"http://{host}",
        }

    def __enter__(self) -> GoogleCloud:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        found = next((answer for prefix, answer in ANSWERS.items() if self.path.startswith(prefix)), "")
        body = found.encode() if isinstance(found, str) else json.dumps(found).encode()
        self.send_response(200)
        self.send_header("metadata-flavor", "Google")
        self.send_header("content-type", "text/plain" if isinstance(found, str) else "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass
