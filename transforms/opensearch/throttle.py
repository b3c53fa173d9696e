# SPDX-License-Identifier: Apache-2.0
"""How hard one process works a cluster: how many of its requests are in flight, and how long it pauses between them.

A search takes a thread of the node that holds the shard, as long as it runs. `Throttle` bounds how many are taken at
one time; `Pace` steps back when the node has no thread to spare: when it refuses a request (429), or while the queue of
its `search` thread pool grows, which is what other users of the cluster feel first. Neither changes what is read.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import ClassVar

from transforms.errors import TrainingError
from transforms.opensearch.session import ServerError, Session

_LOG = logging.getLogger("knn_train")

#: Seconds between looks at a node's queue: a look costs the node about a millisecond.
LOOK_EVERY_S = 2.0

#: Pauses start at the length of a page or two and end where a page every few seconds is no load at all.
SHORTEST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 8.0


class Throttle:
    """Shared by everything that this process reads from one cluster; `Throttle.of` gives it.

    Attributes:
      limit: requests in flight at one time.
    """

    _all: ClassVar[dict[tuple[str, int], Throttle]] = {}
    _all_lock = threading.Lock()

    def __init__(self, limit: int):
        self.limit = limit
        self._permits = threading.BoundedSemaphore(limit)
        self._lock = threading.Lock()
        self._readers = 0
        self._paces: dict[tuple[str, ...], Pace] = {}

    @classmethod
    def of(cls, url: str, limit: int) -> Throttle:
        """This process's throttle for the cluster at `url`."""
        with cls._all_lock:
            return cls._all.setdefault((url, limit), cls(limit))

    @contextmanager
    def reader(self) -> Iterator[None]:
        """Counts the caller among those who share the limit."""
        with self._lock:
            self._readers += 1
        try:
            yield
        finally:
            with self._lock:
                self._readers -= 1

    @property
    def share(self) -> int:
        """Requests that each reader may prepare ahead, so that pages do not pile up in a process with many readers."""
        return max(1, self.limit // max(1, self._readers))

    def pace(self, nodes: Sequence[str]) -> Pace:
        """The pace of all requests to the shard that `nodes`, ids, hold copies of."""
        with self._lock:
            return self._paces.setdefault(tuple(nodes), Pace(self._permits, nodes))


class Pace:
    """When the next request to a shard may be sent.

    A busy node doubles the pause before each request, up to LONGEST_PAUSE_S, and a calm one halves it, down to none.
    Busy is one that refused a request since the last look, or whose search queue is not empty and no shorter than then.
    Where the queue may not be read (`cluster:monitor/nodes/stats`), refusals alone decide.

    Attributes:
      permit: to hold while a request is in flight.
    """

    def __init__(self, permit: AbstractContextManager[object], nodes: Sequence[str]):
        self.permit = permit
        self._nodes = ",".join(nodes)
        self._lock = threading.Lock()
        self._pause = 0.0
        self._queue = 0
        self._refused = False
        self._next_look = time.monotonic() + LOOK_EVERY_S

    def wait(self, session: Session) -> None:
        """Returns when the caller may send a request, or when `session` is cancelled."""
        waited = 0.0
        while True:
            self._look(session)
            left = min(self._pause - waited, LOOK_EVERY_S)
            if left <= 0 or session.pause(left):
                return
            waited += left

    def refused(self) -> None:
        """Notes that the node answered 429."""
        with self._lock:
            # The other requests in flight are refused for the same reason.
            if not self._refused:
                self._refused = True
                self._slower("it refuses requests (429)")

    def _look(self, session: Session) -> None:
        with self._lock:
            now = time.monotonic()
            if now < self._next_look:
                return
            self._next_look = now + LOOK_EVERY_S
        queue = self._read_queue(session)
        with self._lock:
            if queue and queue >= self._queue:
                self._slower(f"{queue} searches wait for a thread")
            elif not self._refused:
                self._pause = self._pause / 2 if self._pause > SHORTEST_PAUSE_S else 0.0
            self._queue, self._refused = queue, False

    def _read_queue(self, session: Session) -> int:
        """Searches that wait on the busiest of the nodes; 0 where that is not known."""
        if not self._nodes:
            return 0
        path, params = f"/_nodes/{self._nodes}/stats/thread_pool", {"filter_path": "nodes.*.thread_pool.search.queue"}
        try:
            found = json.loads(session.send("GET", path, params, attempts=1))
        except ServerError:
            self._nodes = ""  # not permitted, or a service without nodes
            return 0
        except TrainingError:
            return 0
        return max((node["thread_pool"]["search"]["queue"] for node in found.get("nodes", {}).values()), default=0)

    def _slower(self, reason: str) -> None:
        self._pause = min(LONGEST_PAUSE_S, max(SHORTEST_PAUSE_S, 2 * self._pause))
        _LOG.info("OpenSearch is busy (%s): %.2g s between requests", reason, self._pause)
