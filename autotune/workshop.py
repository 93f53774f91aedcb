"""The tuner's side of the worker: one process that is asked, killed when it hangs, and started again when it dies.

It is no child of ``multiprocessing``, whose spawn would run the caller's ``__main__`` again.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from types import TracebackType
from typing import Any

# A first answer brings the worker's imports; a kernel's first run may compile it.
START = 90.0


class Lost(Exception):
    """The worker died or hung, and why; the next question goes to a new one."""


class Workshop:
    """A worker, while the block lasts.

    Attributes:
        problem: what is sent to a new worker before anything else.
    """

    def __init__(self) -> None:
        self.opening: dict[str, Any] = {}
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str] = queue.Queue()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115

    def __enter__(self) -> "Workshop":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
        self._errors.close()

    def open(self, problem: dict[str, Any], part: str, forward: tuple[str, Any] | None) -> None:
        """Set the worker to a pass of a problem.

        Raises:
            ValueError: it knows no such mixer.
        """
        self.opening = {"do": "open", "problem": problem, "part": part, "forward": forward}
        if self._process is not None:
            with contextlib.suppress(Lost):  # it died of an earlier candidate; the next question goes to a new one
                self._open()

    def _open(self) -> None:
        found = self._exchange(self.opening, START)
        if "failed" in found:
            raise ValueError(f"the tuner's worker cannot make the problem: {found['failed']}")

    def ask(self, do: str, name: str, config: Any, patience: float, **rest: Any) -> dict[str, Any]:
        """Put one question about one candidate.

        Args:
            do: ``try``, ``time`` or ``guard``.
            name: ``backend/kernel``.
            config: its configuration.
            patience: seconds until it counts as hanging.
            rest: further fields.

        Raises:
            Lost: the worker died or hung.
        """
        if self._process is None:
            self.start(self.opening["problem"]["library"])
            self._open()
        found = self._exchange({"do": do, "name": name, "config": dict(config), **rest}, patience)
        if found.get("fatal"):
            self.close()
            raise Lost(f"it destroyed the GPU's context: {found['failed']}")
        return found

    def start(self, library: str) -> None:
        """Start a worker, which imports an array library before it listens; nothing is waited for."""
        path = os.pathsep.join([p or os.getcwd() for p in sys.path])
        self._answers = queue.Queue()
        self._errors.seek(0)
        self._errors.truncate()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "mixers.autotune.worker", library],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=os.environ | {"PYTHONPATH": path},
        )
        threading.Thread(target=self._listen, args=(self._process, self._answers), daemon=True).start()

    @staticmethod
    def _listen(process: "subprocess.Popen[str]", answers: "queue.Queue[str]") -> None:
        assert process.stdout is not None
        for line in process.stdout:
            answers.put(line)
        answers.put("")

    def _exchange(self, request: dict[str, Any], patience: float) -> dict[str, Any]:
        process = self._process
        assert process is not None and process.stdin is not None
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = self._answers.get(timeout=patience)
        except queue.Empty:
            self.close()
            raise Lost(f"it hung: no answer within {patience:.3g} s") from None
        except OSError:
            line = ""
        if not line:
            raise Lost(self._death())
        found: dict[str, Any] = json.loads(line)
        return found

    def _death(self) -> str:
        """Why the worker died."""
        process = self._process
        assert process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        code = process.poll()
        self.close()
        reason = f"exit code {code}"
        if code is not None and code < 0:
            with contextlib.suppress(ValueError):
                reason = signal.Signals(-code).name
        self._errors.seek(0)
        last = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"it crashed: {reason}" + (f" ({last[-1][:200]})" if last else "")

    def close(self) -> None:
        """End the worker."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                if stream is not None:
                    stream.close()
