"""What others do to a measurement is seen."""

import os
import subprocess
import sys
import time

import pytest

from benchmarks.quiet import Watch

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="needs Linux's /proc")


def test_a_program_beside_is_seen_unless_it_is_the_one_measured():
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        stranger, known = Watch(()), Watch((busy.pid,))
        time.sleep(1.5)
        # At least a tenth of a core, even where many others want it too.
        cores = os.cpu_count() or 1
        assert stranger.others() > 0.1 / cores
        assert stranger.others() - known.others() > 0.1 / cores
    finally:
        busy.kill()
        busy.wait()
