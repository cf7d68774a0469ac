"""Runs jobs in a worker process, so that one which crashes or hangs costs only itself.

The worker gets JSON on its standard input: the jobs, and the seconds that are left for each row. It
answers in lines: `@{"begin": id}`, `@{"stage": name}`, `@{"note": words}`, `@{"skip": id}` and
`@{"end": id, "result": ...}`. When it dies or a job takes too long, another worker goes on from
there. A stage is named after what it tries; where it was one of the job's candidates that failed,
the job is done again without it, or first without a suspect that the stage may have run.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

_MARK = "@"
_START_SECONDS = 90.0  # importing torch, and what the GPU needs first
_MOST_STARTS_IN_VAIN = 2


@dataclass
class Job:
    """`seconds` are what it may take, `failed` is why candidates no longer take part.

    `suspects` are what is left out, by stage that fails, before the stage is given up.
    """

    id: int
    row: str
    candidates: tuple[str, ...]
    seconds: float
    suspects: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def supervise(
    command: Sequence[str],
    jobs: Sequence[Job],
    budgets: dict[str, float],
    done: Callable[[Job, dict[str, Any]], None],
    *,
    seconds: float,
) -> None:
    """Calls `done` with each job and its result, {} where it `failed`, or {"skipped": why}.

    `budgets` are the seconds of each row; `seconds` those of all, after which the rest is skipped.
    """
    deadline = time.monotonic() + seconds
    budgets, pending, in_vain = dict(budgets), deque(jobs), 0
    while pending:
        if time.monotonic() >= deadline or in_vain >= _MOST_STARTS_IN_VAIN:
            why = "no time left" if time.monotonic() >= deadline else "no worker starts"
            while pending:
                done(pending.popleft(), {"skipped": why})
            return
        before = len(pending)
        worker = _Worker(command, list(pending), budgets)
        try:
            guilty, why = _follow(worker, pending, budgets, done, deadline)
        finally:
            worker.kill()
        if guilty is None:
            # It ended between jobs, or never began one.
            in_vain = in_vain + 1 if len(pending) == before else 0
            continue
        job, stage = guilty
        in_vain = 0
        suspect = job.suspects.get(stage, stage)
        if suspect in job.failed:
            suspect = stage
        again = suspect not in job.failed and (suspect != stage or stage in job.candidates)
        job.failed[suspect] = why
        if not again:
            pending.remove(job)
            done(job, {})


def _follow(
    worker: _Worker, pending: deque[Job], budgets: dict[str, float],
    done: Callable[[Job, dict[str, Any]], None], deadline: float,
) -> tuple[tuple[Job, str] | None, str]:  # fmt: skip
    """Takes what a worker answers, until all is done or it failed: the job and the stage, why."""
    job: Job | None = None
    stage = note = ""
    began = time.monotonic()
    limit = began + _START_SECONDS
    by_id = {job.id: job for job in pending}
    while pending:
        line = worker.line(min(limit, deadline) - time.monotonic())
        now = time.monotonic()
        if line is None:  # no answer in time
            if now >= deadline:
                return None, ""
            why = f"stopped after {now - began:.0f} s"
        elif line == "":
            why = note or worker.last_words()
        else:
            event = json.loads(line)
            if "begin" in event:
                job, stage, note = by_id[event["begin"]], "begin", ""
                began, limit = now, now + job.seconds
            elif "stage" in event:
                stage = event["stage"]
            elif "note" in event:
                note = event["note"]
            elif "skip" in event:
                skipped = by_id[event["skip"]]
                pending.remove(skipped)
                done(skipped, {"skipped": "no time left for this row"})
            elif "end" in event and job is not None:
                budgets[job.row] -= now - began
                pending.remove(job)
                done(job, event["result"])
                job, began, limit = None, now, now + _START_SECONDS
            continue
        if job is not None:
            budgets[job.row] -= now - began
        return (None if job is None else (job, stage)), why
    return None, ""


class _Worker:
    def __init__(
        self, command: Sequence[str], jobs: Sequence[Job], budgets: dict[str, float]
    ) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, start_new_session=True,
        )  # fmt: skip
        self._lines: queue.Queue[str] = queue.Queue()
        self._words: deque[str] = deque(maxlen=6)
        threading.Thread(target=self._read, daemon=True).start()
        work = [{"id": job.id, "without": list(job.failed)} for job in jobs]
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps({"jobs": work, "budgets": budgets}))
            self._process.stdin.close()
        except BrokenPipeError:  # it died at once
            pass

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(_MARK):
                self._lines.put(line[len(_MARK) :].strip())
            elif line.strip():
                self._words.append(line.strip())
        self._lines.put("")

    def line(self, seconds: float) -> str | None:
        """The next answer, "" after the last, None where none comes in time."""
        end = time.monotonic() + seconds
        while True:
            ended = self._process.poll() is not None
            try:
                return self._lines.get(timeout=min(max(end - time.monotonic(), 0.0), 0.5))
            except queue.Empty:
                # What it started may live on and keep the pipe open.
                if ended:
                    return ""
                if time.monotonic() >= end:
                    return None

    def last_words(self) -> str:
        try:
            code: int | str = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            code = "no status"
        return f"the process ended with {code}: {' | '.join(self._words)}"[-1500:]

    def kill(self) -> None:
        with suppress(ProcessLookupError):  # its group: compilers that it started too
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def answer(**event: Any) -> None:
    """What a worker says."""
    print(_MARK + json.dumps(event), flush=True)
