# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np
import psutil
import pytest

from transforms import trainer_process
from transforms.errors import TrainingError
from transforms.memory import training_memory
from transforms.request import TrainingRequest
from transforms.spill import SpillWriter
from transforms.trainer_process import TrainingJob, train_in_process

BODY = {
    "training_index": "i",
    "training_field": "f",
    "dimension": 8,
    "method": {"name": "ivf", "engine": "faiss", "parameters": {"nlist": 4, "nprobes": 2}},
}
VECTORS = np.random.default_rng(0).standard_normal((2_000, 8)).astype(np.float32)


def job(
    folder: Path, size: int = 1_900, held_out: int = 16, vectors: np.ndarray = VECTORS, nlist: int = 4
) -> TrainingJob:
    folder.mkdir(exist_ok=True)
    writer = SpillWriter(str(folder))
    writer.append(np.arange(len(vectors), dtype=np.uint64), vectors, np.linspace(0, 1, len(vectors)))
    written = writer.close()
    body = {**BODY, "method": {"name": "ivf", "engine": "faiss", "parameters": {"nlist": nlist, "nprobes": 2}}}
    return TrainingJob(body, "3.6.0", (written,) if written else (), 2**64 - 1, size, held_out, threads=1)


def test_trains_on_the_sample_and_not_on_what_is_held_out(tmp_path: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    result = train_in_process(job(tmp_path), lambda *step: steps.append(step))
    index = faiss.index_factory(8, "IVF4,Flat")
    index.nprobe = 2
    index.make_direct_map()
    index.train(VECTORS[:1_900])
    assert result.blob == faiss.serialize_index(index).tobytes()
    assert (result.vectors, result.held_out) == (1_900, 16)
    assert set(result.seconds) == {"load", "train", "check"}
    assert result.peak_memory > 10_000_000
    assert ("k-means", 10, 10) in steps
    assert len(os.listdir(tmp_path)) == 2


@pytest.mark.parametrize("rows", [10, 11, 60])
def test_few_vectors_are_evaluated_as_far_as_they_go(tmp_path: Path, rows: int) -> None:
    few = replace(job(tmp_path, rows, 16, VECTORS[:rows]), corpus=rows)
    quality = train_in_process(few, lambda *_: None).quality
    assert (quality is None) == (rows == 10)
    if quality is not None:
        assert set(quality["at"]["expected"]) == {"10"}  # there is no hundredth neighbour


def test_too_few_vectors_are_said_in_the_request_s_words(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="nlist is 50, but there are only 20 training vectors"):
        train_in_process(job(tmp_path, vectors=VECTORS[:20], nlist=50), lambda *_: None)


def test_no_vectors_at_all(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="there are no vectors to train on"):
        train_in_process(job(tmp_path, vectors=VECTORS[:0]), lambda *_: None)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (signal.SIGKILL, r"was killed \(SIGKILL\): most likely the machine ran out of memory"),
        (signal.SIGABRT, r"died of SIGABRT; its last words: "),
        (signal.SIGSEGV, r"died of SIGSEGV; its last words: "),
    ],
)
def test_death_of_the_process_is_reported_with_its_cause(tmp_path: Path, number: int, message: str) -> None:
    def die(stage: str, done: int, total: int) -> None:
        for child in trainer_process._children:
            child.send_signal(number)

    with pytest.raises(TrainingError, match=message):
        train_in_process(job(tmp_path), die)
    assert not trainer_process._children
    assert len(os.listdir(tmp_path)) == 2


def test_an_interpreter_that_cannot_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no such library >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    with pytest.raises(TrainingError, match=r"ended with code 3; its last words: no such library"):
        train_in_process(job(tmp_path), lambda *_: None)


def test_it_dies_with_the_worker(tmp_path: Path) -> None:
    program = f"""
import sys; sys.path[:0] = {sys.path!r}
from pathlib import Path
from tests.test_trainer_process import *
def wait(*step):
    print(next(iter(trainer_process._children)).pid, flush=True)
    time.sleep(60)
train_in_process(job(Path({str(tmp_path)!r}), vectors=np.tile(VECTORS, (200, 1)), size=400_000, nlist=4000), wait)
"""
    worker = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    trainer = psutil.Process(int(worker.stdout.readline()))
    worker.kill()
    worker.wait()
    trainer.wait(10)  # raises TimeoutExpired if it lives on
    assert not trainer.is_running()


def test_it_ends_when_the_run_s_folder_is_gone(tmp_path: Path) -> None:
    """So that a cancelled run does not train on where the runner has not stopped its step."""
    large = job(tmp_path / "run", vectors=np.tile(VECTORS, (200, 1)), size=400_000, nlist=4_000)
    removed = threading.Event()

    def remove(stage: str, *_: int) -> None:
        if stage == "k-means" and not removed.is_set():
            shutil.rmtree(tmp_path / "run")
            removed.set()

    with pytest.raises(TrainingError, match="the training process ended with code 1"):
        train_in_process(large, remove)
    assert removed.is_set()


def test_kill_children_ends_a_training(tmp_path: Path) -> None:
    started = threading.Event()
    timer = threading.Thread(target=lambda: (started.wait(30), time.sleep(0.05), trainer_process.kill_children()))
    timer.start()
    with pytest.raises(TrainingError, match=r"^interrupted$"):
        train_in_process(
            job(tmp_path, vectors=np.tile(VECTORS, (100, 1)), size=200_000, nlist=4_000), lambda *_: started.set()
        )
    timer.join()


@pytest.mark.parametrize("evaluate", [False, True])
@pytest.mark.parametrize(("rows", "dimension", "encoder"), [(65_536, 256, "pq"), (15_000, 1024, "flat")])
def test_memory_estimate_is_about_the_measured_peak(
    tmp_path: Path, rows: int, dimension: int, encoder: str, evaluate: bool
) -> None:
    vectors = np.random.default_rng(1).standard_normal((rows, dimension)).astype(np.float32)
    body = {**BODY, "dimension": dimension, "method": {"name": "ivf", "engine": "faiss", "parameters": {"nlist": 32}}}
    if encoder == "pq":
        body["method"]["parameters"]["encoder"] = {"name": "pq", "parameters": {"m": 8, "code_size": 8}}
    writer = SpillWriter(str(tmp_path))
    writer.append(np.arange(len(vectors), dtype=np.uint64), vectors, np.linspace(0, 1, len(vectors)))
    written = writer.close()
    assert written is not None
    told = TrainingJob(body, "3.6.0", (written,), 2**64 - 1, rows, 0, 2, corpus=rows * evaluate)
    result = train_in_process(told, lambda *_: None)
    estimate = training_memory(TrainingRequest.from_fields(body), rows, evaluate=evaluate)
    assert 0.75 < estimate / result.peak_memory < 1.33


def test_the_child_does_not_load_beam() -> None:
    """A hundred megabytes that the estimate does not have."""
    code = "import sys, transforms.trainer_process, transforms.quality; sys.exit('apache_beam' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_job_s_body_resolves_to_the_same_request() -> None:
    request = TrainingRequest.from_fields({**BODY, "space_type": "cosinesimil"})
    again = TrainingRequest.from_fields(request.body(), target_version=request.target_version)
    assert (again.method, again.space_type, again.index_description) == (
        request.method,
        request.space_type,
        request.index_description,
    )
