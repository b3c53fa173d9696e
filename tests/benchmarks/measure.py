# SPDX-License-Identifier: Apache-2.0
"""Wall time and memory of whole commands, measured from outside."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class Measured:
    """Seconds, the peak memory of the process tree in bytes (sum of resident set sizes), and what was printed."""

    seconds: float
    peak_bytes: int
    output: str


def measure(command: Sequence[str]) -> Measured:
    """Runs `command` to its end; raises if it fails."""
    start = time.monotonic()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    peak = 0

    def watch() -> None:
        nonlocal peak
        process = psutil.Process(child.pid)
        while child.poll() is None:
            total = 0
            for each in (process, *_children(process)):
                try:
                    total += each.memory_info().rss  # shared pages count in each process: against us, who have two
                except psutil.Error:
                    continue
            peak = max(peak, total)
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    output = child.communicate()[0]
    seconds = time.monotonic() - start
    watcher.join()
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {child.returncode}:\n{output}")
    return Measured(seconds, peak, output)


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []
