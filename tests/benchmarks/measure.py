# SPDX-License-Identifier: Apache-2.0
"""Wall time, processor time and memory of whole commands, measured from outside."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class Measured:
    """Of a process tree: seconds, processor seconds (user and system), peak bytes (sum of resident sets), output."""

    seconds: float
    processor_seconds: float
    peak_bytes: int
    output: str


def measure(command: Sequence[str]) -> Measured:
    """Runs `command` to its end; raises if it fails."""
    start = time.monotonic()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert child.stdout is not None
    ended = threading.Event()
    peak = 0

    def watch() -> None:
        nonlocal peak
        process = psutil.Process(child.pid)
        while not ended.wait(0.05):
            total = 0
            for each in (process, *_children(process)):
                try:
                    total += each.memory_info().rss  # shared pages count in each process: against us, who have two
                except psutil.Error:
                    continue
            peak = max(peak, total)

    watcher = threading.Thread(target=watch)
    watcher.start()
    output = child.stdout.read()
    _, status, used = os.wait4(child.pid, 0)  # with the children that it waited for
    child.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.monotonic() - start
    ended.set()
    watcher.join()
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {child.returncode}:\n{output}")
    return Measured(seconds, used.ru_utime + used.ru_stime, peak, output)


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []
