#!/usr/bin/env bash
# Trains the shipped model again from scratch, and writes it to leon_jax/weights/emoji. Run it again to
# resume an interrupted run.
set -euo pipefail
cd "$(dirname "$0")/.."

bin=${BIN:-.venv/bin}
runs=${RUNS:-runs/emoji}
weights=${WEIGHTS:-leon_jax/weights/emoji}

"$bin/python" - <<'CHECK'
import sys

from leon_jax.config import UserError
from leon_jax.datasets.emoji.npm_designs import check_packages

try:
    check_packages("data/npm")
except UserError as error:
    sys.exit(f"make weights: {error}")
CHECK

echo "Training the shipped model takes about twelve hours on 2 CPU cores; an estimate for this machine follows."
echo "It reads data/npm, writes into data/emoji and $runs, and at the end replaces $weights."

"$bin/leon" pipeline --config=configs/emoji/pipeline.py --workdir="$runs"
"$bin/leon" export --workdir="$runs/decoder_second" --index=prepare:demo --licence=CC-BY-SA-4.0 \
  --tokenizer="$runs/tokenizer/export/tokenizer.safetensors" \
  --encoder="$runs/encoder/export/encoder.safetensors" \
  --selection="$runs/encoder/export/selection.json" --dtype=bfloat16 \
  --title="The shipped model: emoji, 64 px" --prompt="cat face, Twemoji style" \
  --notes=configs/emoji/model_notes.md --out="$weights"
ls -l "$weights"
