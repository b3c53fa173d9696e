# SPDX-License-Identifier: Apache-2.0
"""Training in a process of its own.

faiss can abort and the kernel can kill a process that asks for too much memory. Neither may take a Beam worker with
it, nor leave the user without a reason, so the worker starts `python -m transforms.trainer_process JOB`, listens to
its progress and reads its result. The child imports no Beam unless the sample lies on a remote filesystem.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transforms import files, spill
from transforms.comparison import FEWEST_VECTORS, Previous
from transforms.errors import TrainingError
from transforms.files import is_local, read_whole
from transforms.request import TrainingRequest
from transforms.spill import Spill

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class TrainingJob:
    """What the child is told.

    Attributes:
      body: the request, as the Train API takes it.
      target_version: the rules that the request was read by.
      spills, threshold: the sample; see `sampling.Sample`.
      size: rows to train on, those with the smallest priorities.
      held_out: rows to set aside after them, never trained on.
      threads: OpenMP threads.
      niter, nredo: iterations and restarts of k-means, None for faiss's own.
      corpus: vectors in the source, to evaluate the model for; 0 to evaluate nothing.
      nprobes: values to measure recall with, beside those of `quality.evaluate`.
      previous: the model to compare with.
    """

    body: dict[str, Any]
    target_version: str
    spills: Sequence[Spill]
    threshold: int
    size: int
    held_out: int
    threads: int
    niter: int | None = None
    nredo: int | None = None
    corpus: int = 0
    nprobes: Sequence[int] = ()
    previous: Previous | None = None


@dataclass(frozen=True)
class TrainingResult:
    """What it answers.

    Attributes:
      blob: the serialised index; None if it was not worth training one.
      vectors, held_out: how many vectors it saw.
      seconds: by stage.
      peak_memory: of the child in bytes.
      gpus: how many it trained with.
      quality: from `quality.evaluate`, with `previous` where there is one to compare with.
      kept: why the previous model is to be kept, empty if it is not.
    """

    blob: bytes | None
    vectors: int
    held_out: int
    seconds: dict[str, float]
    peak_memory: int
    gpus: int = 0
    quality: dict[str, Any] | None = None
    kept: str = ""


#: Running children of this process, and those of them that were told to end.
_children: set[subprocess.Popen[str]] = set()
_stopped: set[subprocess.Popen[str]] = set()


def kill_children() -> None:
    """Ends all trainings of this process; their callers get a TrainingError, "interrupted"."""
    for child in list(_children):
        _stopped.add(child)
        child.kill()


def train_in_process(job: TrainingJob, progress: Progress) -> TrainingResult:
    """Runs `job` in a child process.

    Raises:
      TrainingError: the training failed, or the child died; the message says of what.
    """
    beside = os.path.dirname(job.spills[0].path) if job.spills and is_local(job.spills[0].path) else None
    with tempfile.TemporaryDirectory(prefix="trainer-", dir=beside) as folder:
        Path(folder, "job.json").write_text(json.dumps(asdict(job)))
        environment = {
            # Threads that wait for work must not keep the worker's own, or another training, from the cores.
            "OMP_WAIT_POLICY": "PASSIVE",
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        }
        child = subprocess.Popen(
            [sys.executable, "-m", "transforms.trainer_process", folder],
            stdin=subprocess.PIPE,  # beyond one line: the child ends when it does, and never outlives the worker
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            text=True,
        )
        errors: list[str] = []
        listener = threading.Thread(target=lambda: errors.extend(child.stderr or ()), daemon=True)
        listener.start()
        _children.add(child)
        try:
            with suppress(BrokenPipeError):  # its end will be told
                _hand_over_remote_options(child, job)
            for line in child.stdout or ():
                stage, done, total = json.loads(line)
                progress(stage, done, total)
            code = child.wait()
        finally:
            child.kill()
            child.wait()
            _children.discard(child)
        if child in _stopped:
            _stopped.remove(child)
            raise TrainingError("interrupted")
        listener.join(1)
        answer = Path(folder, "result.json")
        if code == 0 and answer.exists():
            result = json.loads(answer.read_text())
            if "error" in result:
                raise TrainingError(result["error"])
            blob = Path(folder, "model.faiss")
            return TrainingResult(blob=blob.read_bytes() if blob.exists() else None, **result)
        raise TrainingError(f"the training process {_cause_of_death(code, errors)}")


def _hand_over_remote_options(child: subprocess.Popen[str], job: TrainingJob) -> None:
    """Tells the child how to reach remote files, if there are any. Not in a file: this may be secret."""
    paths = [part.path for part in job.spills] + ([job.previous.path] if job.previous else [])
    options = None if all(map(is_local, paths)) else files.remote_options()
    assert child.stdin is not None
    child.stdin.write(json.dumps(options) + "\n")
    child.stdin.flush()


def _cause_of_death(code: int, errors: Sequence[str]) -> str:
    last = next((line.strip() for line in reversed(errors) if line.strip()), "it wrote nothing")
    if code == -signal.SIGKILL:
        return "was killed (SIGKILL): most likely the machine ran out of memory; the plan states how much is needed"
    if code < 0:
        return f"died of {signal.Signals(-code).name}; its last words: {last}"
    return f"ended with code {code}; its last words: {last}"


def run(job: TrainingJob, progress: Progress) -> tuple[bytes | None, dict[str, Any]]:
    """Loads the sample, trains, checks and evaluates, in this process.

    Returns the blob and the rest of a `TrainingResult`.
    """
    from transforms import faiss_training, quality

    request = TrainingRequest.from_fields(
        job.body, target_version=job.target_version, require_index=False, require_field=False
    )
    seconds = {}

    start = time.monotonic()
    rows = sum(part.rows for part in job.spills)
    if not rows:
        raise TrainingError("there are no vectors to train on")
    progress("load sample", 0, 1)
    vectors, positions = spill.load(job.spills, job.size + job.held_out, job.threshold)
    training, held_out = vectors[: job.size], vectors[job.size :]
    request.check_count(len(training))
    progress("load sample", 1, 1)
    seconds["load"] = time.monotonic() - start

    told: dict[str, Any] = {"vectors": len(training), "held_out": len(held_out), "seconds": seconds}
    old = old_error = None
    if job.previous is not None:
        if len(held_out) < FEWEST_VECTORS:
            raise TrainingError(
                f"compare_to needs {FEWEST_VECTORS} vectors or more that are not trained on, but {len(held_out)} of "
                f"{len(vectors):,} are left: lower max_training_vector_count"
            )
        start = time.monotonic()
        old = read_whole(job.previous.path)
        old_error = quality.quantization_error(old, request, held_out)
        seconds["compare"] = time.monotonic() - start
        compared = {"model_id": job.previous.model_id, "error": old_error, "error_then": job.previous.error}
        kept = job.previous.still_good(old_error)
        if kept is not None:
            return None, {**told, "kept": kept, "quality": {"previous": compared}, "peak_memory": _peak_memory()}

    start = time.monotonic()
    history: list[dict[str, float]] = []
    blob = faiss_training.train(training, request, job.threads, progress, job.niter, job.nredo, history)
    seconds["train"] = time.monotonic() - start
    told["gpus"] = faiss_training.usable_gpus(request)

    start = time.monotonic()
    faiss_training.check(blob, request, held_out[:16] if len(held_out) else training[:16])
    seconds["check"] = time.monotonic() - start

    if job.corpus and len(vectors) >= quality.FEWEST_VECTORS:
        start = time.monotonic()
        # Fewer rows than were asked for are all there are, whatever the source counted.
        corpus = job.corpus if len(vectors) == job.size + job.held_out else len(vectors)
        told["quality"] = quality.evaluate(
            blob,
            request,
            vectors,
            len(training),
            corpus,
            threads=job.threads,
            history=history,
            nprobes=job.nprobes,
            positions=positions,
            previous=old,
            progress=progress,
        )
        seconds["evaluate"] = time.monotonic() - start
    if job.previous is not None and old_error is not None:
        new_error = quality.quantization_error(blob, request, held_out)
        told["kept"] = job.previous.kept(old_error, new_error) or ""
        evaluated = told.setdefault("quality", {})
        evaluated["previous"] = {**evaluated.get("previous", {}), **compared, "error_of_new": new_error}
    return blob, {**told, "peak_memory": _peak_memory()}


def main(folder: str) -> None:
    options = json.loads(sys.stdin.readline() or "null")
    if options is not None:
        files.set_remote_options(options)
    threading.Thread(target=_end_with_run, args=(folder,), daemon=True).start()
    fields = json.loads(Path(folder, "job.json").read_text())
    fields["spills"] = [Spill(**part) for part in fields["spills"]]
    fields["previous"] = Previous(**fields["previous"]) if fields["previous"] else None
    try:
        blob, result = run(TrainingJob(**fields), _tell)
        if blob is not None:
            Path(folder, "model.faiss").write_bytes(blob)
    except (TrainingError, ValueError, MemoryError, OSError) as error:
        reason = "not enough memory" if isinstance(error, MemoryError) else str(error)
        result = {"error": reason}
    Path(folder, "result.json").write_text(json.dumps(result))


def _peak_memory() -> int:
    """Largest resident set of this process in bytes."""
    try:
        # Not getrusage where this can be had: its figure starts at what the parent had when it forked.
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    except (OSError, IndexError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _tell(stage: str, done: int, total: int) -> None:
    print(json.dumps([stage, done, total]), flush=True)


def _end_with_run(folder: str) -> None:
    """Ends this process when the worker is gone, or when the launcher has given up and removed the run's folder."""
    # Not through sys.stdin, whose lock this thread would still hold when the interpreter ends.
    while not select.select([0], [], [], 1.0)[0] and os.path.exists(folder):
        pass
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1])
