"""Runs one process of a distributed run as a child, to explain its exit if a peer is lost.

When one process of a run is lost, JAX's coordination service aborts all others from C++ with a
stack trace. The aborted process cannot print an explanation. So `leon train --distributed` trains
in a child process. The parent copies the child's stderr, forwards signals, and prints one sentence
that explains the abort.

This module does not import JAX.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence

# Exit code of a process that ended because another one was lost: 128 + SIGABRT, as JAX does it.
LOST_PEER = 134
# Exit code of a process in which a step did not end: 128 + SIGALRM. The run is to be started again.
STUCK = 142

# Texts that JAX writes when its coordination service aborts a process: always
# (xla/pjrt/distributed/client.h), and if the process had not connected to the others yet.
LOST_PEER_MARK = "JAX distributed service detected fatal errors"
NEVER_MET_MARK = "CoordinationService/RegisterTask"

# Environment variable with a file descriptor; its end of file tells the child that its parent died.
_LIFELINE = "LEON_TRAIN_LIFELINE"


def is_child() -> bool:
    """Returns whether `supervise` started this process; if so, it now exits with its parent.

    Returns True only once, so that processes which this one starts do not count as such children.
    """
    number = os.environ.pop(_LIFELINE, None)
    if number is None:
        return False
    threading.Thread(target=_die_with_parent, args=(int(number),), daemon=True).start()
    return True


def supervise(command: Sequence[str], explanations: Mapping[str, str]) -> int:
    """Runs a command as a child process and returns its exit code.

    SIGTERM, SIGINT, SIGHUP and SIGUSR1 are forwarded. SIGUSR1 has no effect until the child handles
    it. If this process is killed, the child exits too.

    Args:
      command: a program that calls `is_child` early.
      explanations: sentences by a text on the child's stderr. If the child exits with `LOST_PEER`
        or 1 and wrote one of the texts, the sentence of the first is written to stderr at the end.

    Returns:
      The child's exit code, or 128 + the number of the signal that ended it; `LOST_PEER` after an
      explanation.
    """
    child: subprocess.Popen[bytes] | None = None
    early_signals: list[int] = []

    def forward(number: int, frame: object) -> None:
        if child is None:
            early_signals.append(number)
        else:
            child.send_signal(number)

    for name in ("SIGTERM", "SIGINT", "SIGHUP"):
        # The child inherits ignored signals, as under nohup; keep them ignored.
        if signal.getsignal(getattr(signal, name)) is not signal.SIG_IGN:
            signal.signal(getattr(signal, name), forward)
    # The child inherits that the signal is ignored; its default effect would end the child.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    # Only the parent holds the write end, so the read end reaches end of file when it exits.
    lifeline, _write_end = os.pipe()
    child = subprocess.Popen(
        command,
        env={**os.environ, _LIFELINE: str(lifeline)},
        pass_fds=(lifeline,),
        stderr=subprocess.PIPE,
        start_new_session=True,  # a terminal's Ctrl-C reaches the child only through this process
    )
    signal.signal(signal.SIGUSR1, forward)
    os.close(lifeline)
    for number in early_signals:
        child.send_signal(number)
    relay = _Relay(child, explanations)
    code = child.wait()
    relay.finish()
    if code < 0:
        code = 128 - code
    for mark, sentence in explanations.items():
        if code in (LOST_PEER, 1) and mark in relay.marks_seen:
            print(sentence, file=sys.stderr, flush=True)
            return LOST_PEER
    return code


class _Relay(threading.Thread):
    """Copies a child's stderr to this process's stderr and records which texts occur in it."""

    def __init__(self, child: subprocess.Popen[bytes], marks: Iterable[str]) -> None:
        super().__init__(daemon=True)
        assert child.stderr is not None
        self.marks_seen: set[str] = set()
        self._marks = tuple(marks)
        self._source = child.stderr.fileno()
        self.start()

    def run(self) -> None:
        tail = b""
        while chunk := os.read(self._source, 65536):
            tail += chunk
            self.marks_seen.update(mark for mark in self._marks if mark.encode() in tail)
            tail = tail[-max(map(len, self._marks), default=1) :]
            try:
                while chunk:
                    chunk = chunk[os.write(sys.stderr.fileno(), chunk) :]
            except OSError:
                continue  # stderr is closed; keep reading so that the child does not block

    def finish(self) -> None:
        """Waits up to 5 seconds for the last bytes, as another process may hold the pipe open."""
        self.join(timeout=5)


def _die_with_parent(lifeline: int) -> None:
    os.read(lifeline, 1)  # returns when the write end is closed
    os.kill(os.getpid(), signal.SIGKILL)
