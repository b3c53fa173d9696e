# SPDX-License-Identifier: Apache-2.0
"""`Session`: requests to a cluster with retries, raw response bodies, and errors of one clear line.

opensearch-py knows how to connect (TLS, authentication, signing, several hosts) but decodes every body as UTF-8 text,
which a CBOR page is not, so a small connection class hands the bytes through.
"""

from __future__ import annotations

import json
import random
import re
import ssl
import threading
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import urlencode

import cbor2
import opensearchpy
import urllib3

from transforms.errors import RequestError, TrainingError
from transforms.opensearch.connection import OpenSearchConnection

JSON = "application/json"
CBOR = "application/cbor"

#: Tries of one request, about a minute of waiting in all: a node restarts in less.
ATTEMPTS = 10
#: Tries of a request that a busy cluster refuses (429), in a session with a gate: about nine minutes, a peak passes.
BUSY_ATTEMPTS = 40
#: On the launcher a wrong address should not take long to report.
LAUNCHER_ATTEMPTS = 3

#: Connections that a session keeps open at most.
POOL_SIZE = 64

_RETRIED = frozenset({408, 429, 502, 503, 504})
#: A refusal (429) that does not pass with a peak: what others have open may stay open for hours.
_NO_MORE_PITS = "too many Point In Time contexts"
_FIRST_WAIT_S = 0.25
_LONGEST_WAIT_S = 16.0


class ServerError(Exception):
    """A response that is not a success.

    Attributes:
      status: HTTP status.
      type: the server's name for the error, e.g. `index_not_found_exception`; empty when it gave none.
      reason: one line, the server's words.
      body: the parsed response, or the beginning of its text.
    """

    body: Any

    def __init__(self, status: int, body: bytes, retry_after: str | None = None):
        self.status = status
        self.retry_after = retry_after
        self.body = _parsed(body)
        self.type, self.reason = _innermost(self.body)
        super().__init__(f"{status} {self.type}: {self.reason}")


class PartialResult(Exception):
    """A search that did not answer for every shard, which would silently lose vectors."""


@dataclass
class RequestStats:
    """What a session has done so far; `request_msec` has one entry, milliseconds, for each successful request.

    `paused_msec` are those spent waiting because the cluster was busy.
    """

    requests: int = 0
    retried: int = 0
    bytes_received: int = 0
    paused_msec: int = 0
    request_msec: list[int] = field(default_factory=list)


class Gate(Protocol):
    """Through which the requests of a session go; see `transforms.opensearch.throttle`."""

    @property
    def permit(self) -> AbstractContextManager[object]:
        """Held while a request is in flight."""

    def refused(self) -> None:
        """The cluster answered 429."""


class Session:
    """An open connection, which threads may share.

    Args:
      connection: its secrets are looked up here.
      attempts: tries of one request before giving up.
      gate: if there is one, refusals (429) have BUSY_ATTEMPTS tries of their own.

    Raises:
      RequestError: a secret or certificate file is missing, here or for every request below: the cluster refuses the
      credentials
        or the request.
      TrainingError: the cluster cannot be reached or fails, after all tries.
    """

    def __init__(self, connection: OpenSearchConnection, attempts: int = ATTEMPTS, gate: Gate | None = None):
        self.stats = RequestStats()
        self._counting = threading.Lock()
        self._connection = connection
        self._attempts = attempts
        self._gate = gate
        self._permit = gate.permit if gate else nullcontext()
        self._cancelled = threading.Event()
        arguments = connection.client_arguments()
        try:
            self._client = opensearchpy.OpenSearch(
                connection_class=_BytesConnection,
                serializers={CBOR: _Bytes(), JSON: _Bytes()},
                pool_maxsize=POOL_SIZE,
                **arguments,
            )
        except (ssl.SSLError, OSError, ValueError) as error:
            raise RequestError(f"the certificates for {connection.url} cannot be loaded: {error}") from None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._client.close()

    def cancel(self) -> None:
        """From now on, a request that fails is not sent again. For another thread to call."""
        self._cancelled.set()

    def count_retry(self) -> None:
        """Adds one to the requests that had to be sent again."""
        with self._counting:
            self.stats.retried += 1

    def pause(self, seconds: float) -> bool:
        """Waits because the cluster is busy; True, at once, if this session is or gets cancelled."""
        started = time.monotonic()
        cancelled = self._cancelled.wait(seconds)
        with self._counting:
            self.stats.paused_msec += round((time.monotonic() - started) * 1000)
        return cancelled

    def json(self, method: str, path: str, params: Mapping[str, Any] | None = None, body: Any = None) -> Any:
        """The parsed JSON response of a request; arguments and errors as `send`. RequestError if it is not JSON."""
        data = self.send(method, path, params, body)
        try:
            return json.loads(data or b"null")
        except ValueError:
            raise self.no_opensearch() from None

    def named(self, answer: Any) -> dict[str, dict[str, Any]]:
        """`answer` if it has an object for each name, as answers about indices have. Raises RequestError."""
        answer = {} if answer is None else answer
        if not isinstance(answer, dict) or not all(isinstance(entry, dict) for entry in answer.values()):
            raise self.no_opensearch()
        return answer

    def no_opensearch(self) -> RequestError:
        """What to raise when a success is not what an OpenSearch sends: a web page, or another service's JSON."""
        return RequestError(f"{self._connection.url} does not answer as an OpenSearch does: is the URL right?")

    def send(
        self,
        method: str,
        path: str,
        params: Mapping[str, Any] | None = None,
        body: Any = None,
        accept: str = JSON,
        check: Any = None,
        attempts: int | None = None,
    ) -> Any:
        """Sends a request until it succeeds.

        Args:
          method: HTTP method.
          path: quoted path, e.g. `/my-index/_search`.
          params: query parameters.
          body: JSON value.
          accept: media type of the response wanted.
          check: called with the body of a success; returns what to return. PartialResult or ValueError from it (a page
            that is cut short or does not parse) makes the request be sent again.
          attempts: tries, instead of the session's.

        Returns:
          bytes, or what `check` returns.

        Raises:
          ServerError: the response was an error that trying again does not mend; `explain` says it to users.
          TrainingError: no success in `attempts` tries.
          RequestError: TLS does not trust the server.
        """
        busy_attempts = BUSY_ATTEMPTS if self._gate and attempts is None else attempts or self._attempts
        attempts = attempts or self._attempts
        params = dict(params or {})
        if "filter_path" in params:
            params["filter_path"] += ",error"  # a filter applies to errors too, and would leave nothing of them
        refused = failed = 0
        while True:
            retry_after, busy = None, False
            try:
                with self._permit:
                    started = time.monotonic()
                    data = self._client.transport.perform_request(
                        method, path, params=params, body=body, headers={"accept": accept}
                    )
            except ServerError as error:
                if error.status not in _RETRIED or _NO_MORE_PITS in error.reason:
                    raise
                problem, retry_after, busy = f"answers {error}", error.retry_after, error.status == 429
            except opensearchpy.SSLError as error:
                raise RequestError(self._tls_problem(error)) from None
            except opensearchpy.ConnectionError as error:
                problem = f"cannot be reached: {_connection_problem(error)}"
            else:
                with self._counting:
                    self.stats.requests += 1
                    self.stats.bytes_received += len(data)
                    self.stats.request_msec.append(round((time.monotonic() - started) * 1000))
                try:
                    return data if check is None else check(data)
                except (PartialResult, ValueError) as error:
                    problem = f"sent an unusable answer: {error}"
            refused, failed = refused + busy, failed + (not busy)
            if busy and self._gate:
                self._gate.refused()
            if failed == attempts or refused == busy_attempts or self._cancelled.is_set():
                break
            self.count_retry()
            wait = _wait_s(refused + failed, retry_after)
            if busy:
                self.pause(wait)
            else:
                self._cancelled.wait(wait)
        raise TrainingError(f"OpenSearch at {self._connection.url} {problem} ({refused + failed} tries)")

    def explain(self, error: ServerError) -> RequestError | TrainingError:
        """The error for users: what was refused and what to do about it, without secrets."""
        at = f"OpenSearch at {self._connection.url}"
        if error.status == 401:
            return RequestError(
                f"{at} does not accept the credentials (401): check the user, the password or the token"
            )
        if error.status == 403:
            missing = re.search(r"no permissions for \[([^\]]+)\]", error.reason)
            what = f"the user lacks the permission {missing[1]}" if missing else error.reason
            return RequestError(f"{at} refuses (403): {what}")
        kind = RequestError if error.status < 500 else TrainingError
        return kind(f"{at} answers {error.status}: {error.reason}")

    def _tls_problem(self, error: Exception) -> str:
        text = str(error)
        url = self._connection.url
        if "CERTIFICATE_REQUIRED" in text:
            return f"{url} asks for a client certificate (client_cert, OPENSEARCH_CLIENT_CERT)"
        if "ALERT_CERTIFICATE" in text or "ALERT_BAD_CERTIFICATE" in text:
            return (
                f"{url} refuses the client certificate (client_cert, OPENSEARCH_CLIENT_CERT): "
                "it has expired, or its authority is not known there"
            )
        if "expired" in text:
            return f"the certificate of {url} has expired"
        if "Hostname mismatch" in text or "IP address mismatch" in text or "doesn't match" in text:
            return f"the certificate of {url} is for another host name"
        if "CERTIFICATE_VERIFY_FAILED" in text:
            return (
                f"the certificate of {url} is not signed by a known authority: "
                "give its CA file (ca_certs, OPENSEARCH_CA_CERTS)"
            )
        if "WRONG_VERSION_NUMBER" in text or "record layer failure" in text:
            return f"{url} does not speak TLS: is it http:// ?"
        return f"no TLS connection to {url}: {_last_line(text)}"


class _BytesConnection(opensearchpy.Urllib3HttpConnection):
    """Hands response bodies on untouched and keeps request bodies out of the logs."""

    def perform_request(  # type: ignore[override]
        self,
        method: str,
        url: str,
        params: Mapping[str, Any] | None = None,
        body: bytes | None = None,
        timeout: float | None = None,
        ignore: Any = (),
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, Any, bytes]:
        if self.pool is None:
            self._create_urllib3_pool()
        path = self.url_prefix + url + (f"?{urlencode(params)}" if params else "")
        sent = {**self.headers, **(headers or {})}
        if self.http_compress and body:
            body = self._gzip_compress(body)
            sent["content-encoding"] = "gzip"
        if callable(self.http_auth):
            sent.update(self.http_auth(method, self.host + path, body))
        try:
            response = self.pool.urlopen(  # type: ignore[union-attr]
                method, path, body=body, headers=sent, retries=False, timeout=timeout or self.timeout
            )
        except urllib3.exceptions.SSLError as error:
            raise opensearchpy.SSLError("N/A", str(error), error) from None
        except urllib3.exceptions.NewConnectionError as error:  # which is a TimeoutError too
            raise opensearchpy.ConnectionError("N/A", str(error), error) from None
        except urllib3.exceptions.TimeoutError as error:
            raise opensearchpy.ConnectionTimeout("TIMEOUT", str(error), error) from None
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise opensearchpy.ConnectionError("N/A", str(error), error) from None
        if not 200 <= response.status < 300:
            raise ServerError(response.status, response.data, response.headers.get("retry-after"))
        return response.status, response.headers, response.data


class _Bytes(opensearchpy.serializer.JSONSerializer):
    """Requests are JSON, responses stay bytes."""

    def loads(self, data: Any) -> Any:
        return data


def check_shards(found: Mapping[str, Any]) -> None:
    """Raises PartialResult unless every shard answered this search in full."""
    shards = found.get("_shards", {})
    if shards.get("failed"):
        failure = (shards.get("failures") or [{}])[0].get("reason", {})
        raise PartialResult(
            f"{shards['failed']} of {shards.get('total')} shards failed: {failure.get('reason') or failure}"
        )
    if found.get("timed_out"):
        raise PartialResult("the search timed out")


def _parsed(body: bytes) -> Any:
    """An error's body: JSON, CBOR when that was asked for, or a proxy's page."""
    try:
        return json.loads(body)
    except ValueError:
        pass
    try:
        found = cbor2.loads(body)
    except (cbor2.CBORDecodeError, EOFError, ValueError):
        found = None
    return found if isinstance(found, dict) else body[:500].decode("utf-8", "replace")


def _innermost(body: Any) -> tuple[str, str]:
    """Type and reason of the cause that says most."""
    error = body.get("error", body) if isinstance(body, dict) else body
    if not isinstance(error, dict):
        return "", _last_line(str(error or body))
    causes = [error, *(error.get("root_cause") or [])]
    for failed in (error.get("failed_shards") or [])[:1]:
        causes.append(failed.get("reason", {}))
    while isinstance(causes[-1].get("caused_by"), dict):
        causes.append(causes[-1]["caused_by"])
    last = next((cause for cause in reversed(causes) if cause.get("reason")), error)
    return str(last.get("type", "")), _last_line(str(last.get("reason", "")))


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"


def _connection_problem(error: opensearchpy.ConnectionError) -> str:
    cause = error.info
    if isinstance(error, opensearchpy.ConnectionTimeout):
        return "no answer in time"
    text = str(cause)
    for known in (
        "Connection refused",
        "Name or service not known",
        "Temporary failure in name resolution",
        "No route to host",
    ):
        if known in text:
            return known[0].lower() + known[1:]
    if isinstance(cause, urllib3.exceptions.ProtocolError):
        return "the connection was cut (is it https:// ?)" if "without response" in text else "the connection was cut"
    return _last_line(text)


def _wait_s(attempt: int, retry_after: str | None) -> float:
    """Seconds before the next try: exponential with jitter, so that workers do not come back together."""
    wait = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2.0 ** (attempt - 1)) * random.uniform(0.75, 1.25)
    if retry_after and retry_after.strip().isdigit():
        wait = max(wait, min(60.0, float(retry_after)))
    return wait
