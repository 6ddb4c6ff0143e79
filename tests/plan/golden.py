"""Records the collectives and memory of two plans, so that a test detects changes.

After an intended change, run python -m tests.plan.golden
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from tests import tpu

GOLDEN = Path(__file__).with_name("golden.json")
PLANS = {
    "350M on v5e:4x4": [
        "--config=configs/cm3leon_350m.py",
        "--topology=v5e:4x4",
        "--config.microbatches=8",
    ],
    "7B on v5p:4x4x4": [
        "--config=configs/cm3leon_7b.py",
        "--topology=v5p:4x4x4",
        "--config.microbatches=4",
    ],
}


def plan(*flags: str) -> dict:
    """Runs `leon plan` and returns its plan.json."""
    with tempfile.TemporaryDirectory() as folder:
        result = subprocess.run(
            [sys.executable, "-m", "leon_jax.cli.main", "plan", *flags, f"--out={folder}"],
            env=tpu.environment(),
            cwd=tpu.ROOT,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        return json.loads(Path(folder, "plan.json").read_text())


def summary(content: dict) -> dict:
    """Returns the recorded numbers of a plan."""
    collectives = content["collectives"]
    return {
        "peak_gib": round(content["memory"]["peak"] / 2**30, 3),
        "collectives": {kind: counts["instructions"] for kind, counts in collectives.items()},
        "sent_gb": {
            kind: round(counts["bytes_sent"] / 1e9, 3) for kind, counts in collectives.items()
        },
    }


if __name__ == "__main__":
    golden = {name: summary(plan(*flags)) for name, flags in PLANS.items()}
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
