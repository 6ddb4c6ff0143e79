"""Plans whose collectives and memory must not change unnoticed.

After a change that is meant to change them: python -m tests.plan.golden
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
    """What `leon plan` writes."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", "leon_jax.cli.main", "plan", *flags, f"--out={folder}"],
            env=tpu.environment(),
            cwd=tpu.ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(Path(folder, "plan.json").read_text())


def summary(found: dict) -> dict:
    """What is compared."""
    return {
        "peak_gib": round(found["memory"]["peak"] / 2**30, 3),
        "collectives": {kind: each["instructions"] for kind, each in found["collectives"].items()},
        "sent_gb": {
            kind: round(each["bytes_sent"] / 1e9, 3) for kind, each in found["collectives"].items()
        },
    }


if __name__ == "__main__":
    golden = {name: summary(plan(*flags)) for name, flags in PLANS.items()}
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
