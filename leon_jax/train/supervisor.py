"""The parent of one process of a distributed run: it has the last word when a peer is lost.

When a process of a run is lost, JAX's coordination service ends all others from C++, with a dump of
the stack, and nothing in such a process can speak after that. So `leon train --distributed` runs
the training in a child. The parent copies what the child writes to stderr, passes signals on, and
says in one sentence what a dump means.

Nothing here loads JAX.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence

# The exit code of a process that ended because another one was lost: 128 + SIGABRT, JAX's own way.
LOST_PEER = 134

# What JAX writes when its coordination service ends a process (xla/pjrt/distributed/client.h), and
# what else if the process had not met the others yet.
LOST_PEER_MARK = "JAX distributed service detected fatal errors"
NEVER_MET_MARK = "CoordinationService/RegisterTask"

# Holds the number of the file descriptor that shows a child the end of its parent.
_LIFELINE = "LEON_TRAIN_LIFELINE"


def is_child() -> bool:
    """Whether this process was started by `supervise`; if so it dies with its parent from now on.

    The answer is yes only once, so that what this process starts is not taken for such a child.
    """
    number = os.environ.pop(_LIFELINE, None)
    if number is None:
        return False
    threading.Thread(target=_die_with_parent, args=(int(number),), daemon=True).start()
    return True


def supervise(command: Sequence[str], explanations: Mapping[str, str]) -> int:
    """Runs a command as a child to its end, and returns its exit code.

    SIGTERM, SIGINT and SIGHUP are passed on. If this process is killed, the child dies too.

    Args:
      command: a program that calls `is_child` early.
      explanations: what the child may write to stderr before it ends with `LOST_PEER` or 1, to a
        sentence about it. The sentence of the first such text is written to stderr, after all else.

    Returns:
      The child's exit code, or 128 + the number of the signal that ended it; `LOST_PEER` after an
      explanation.
    """
    child: subprocess.Popen[bytes] | None = None
    early_signals: list[int] = []

    def pass_on(number: int, frame: object) -> None:
        if child is None:
            early_signals.append(number)
        else:
            child.send_signal(number)

    for name in ("SIGTERM", "SIGINT", "SIGHUP"):
        # What is ignored, as under nohup, the child ignores as well.
        if signal.getsignal(getattr(signal, name)) is not signal.SIG_IGN:
            signal.signal(getattr(signal, name), pass_on)
    # The parent alone holds the writing end, so the reading end shows when the parent is gone.
    lifeline, _held_open = os.pipe()
    child = subprocess.Popen(
        command,
        env={**os.environ, _LIFELINE: str(lifeline)},
        pass_fds=(lifeline,),
        stderr=subprocess.PIPE,
        start_new_session=True,  # a terminal's Ctrl-C comes once, through this process
    )
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
    """Copies a child's stderr to this process's, and notes which of some texts it holds."""

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
                continue  # nobody reads any more; the child must not wait for it

    def finish(self) -> None:
        """Waits for the last bytes; not for ever, because another process may hold the pipe."""
        self.join(timeout=5)


def _die_with_parent(lifeline: int) -> None:
    os.read(lifeline, 1)  # returns when the writing end is closed
    os.kill(os.getpid(), signal.SIGKILL)
