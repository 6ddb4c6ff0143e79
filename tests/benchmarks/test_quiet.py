"""Tests that CPU use of other programs is detected."""

import os
import subprocess
import sys
import time

import pytest

from benchmarks.quiet import Watch

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="needs Linux's /proc")


def test_other_programs_are_detected_but_not_the_measured_one():
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        unaware, aware = Watch(()), Watch((busy.pid,))
        time.sleep(1.5)
        # At least a tenth of a core, even on a busy machine.
        cores = os.cpu_count() or 1
        assert unaware.others() > 0.1 / cores
        assert unaware.others() - aware.others() > 0.1 / cores
    finally:
        busy.kill()
        busy.wait()
