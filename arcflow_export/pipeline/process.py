"""Run one stage as a subprocess: command -> exit code and peak memory. It ends when this process ends."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

#: The beginning of a command line that runs one of the package's commands.
COMMAND: tuple[str, ...] = (sys.executable, "-m", "arcflow_runtime.cli")
_PR_SET_PDEATHSIG = 1
_GRACE_SECONDS = 1.0


@dataclass(frozen=True)
class Ended:
    """The result of a process: exit code (minus the signal if it was killed), peak resident bytes, captured stdout."""

    code: int
    peak_bytes: int
    output: str


def run_process(
    arguments: Sequence[str], lock: int | None, stdout: int | None = None, stderr: int | None = None
) -> Ended:
    """Run `arcflow ARGUMENTS` and wait for its end.

    Args:
        arguments: the command's name and arguments.
        lock: a descriptor of a lock that the process inherits, so that the lock lasts until the process ends.
        stdout: as for `subprocess.Popen`; `subprocess.PIPE` captures it.
        stderr: as for `subprocess.Popen`; it is not captured.

    Raises:
        KeyboardInterrupt, SystemExit: this process was told to stop; the subprocess has ended by then.
    """
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        stdout=stdout,
        stderr=stderr,
        pass_fds=() if lock is None else (lock,),
        preexec_fn=_ends_with(os.getpid()) if sys.platform == "linux" else None,
    )
    try:
        output = process.stdout.read() if process.stdout is not None else b""
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException as e:
        _stop(process, ask=not isinstance(e, KeyboardInterrupt))
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.stdout is not None:
        process.stdout.close()
    # Linux counts in KiB, macOS in bytes.
    return Ended(process.returncode, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024), output.decode())


def _stop(process: subprocess.Popen[bytes], ask: bool) -> None:
    """Wait for the process to clean up and end; a second Ctrl-C kills it.

    Ctrl-C in a terminal reaches the process too. If it has not ended after a second, it gets SIGTERM.
    """
    try:
        if not ask:
            try:
                process.wait(_GRACE_SECONDS)
                return
            except subprocess.TimeoutExpired:
                pass
        process.terminate()
        process.wait()
    except BaseException:
        process.kill()
        process.wait()
        raise


def _ends_with(parent: int) -> Callable[[], None]:
    """A function that a new process runs first, so that it gets SIGTERM when process `parent` dies for any reason."""
    prctl = ctypes.CDLL(None).prctl

    def prepare() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:  # the parent died before prctl took effect
            os.kill(os.getpid(), signal.SIGTERM)

    return prepare
