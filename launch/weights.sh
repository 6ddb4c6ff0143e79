#!/usr/bin/env bash
# Trains the shipped model again from scratch, and writes it to leon_jax/weights/emoji. Run it again to
# resume an interrupted run.
set -euo pipefail
cd "$(dirname "$0")/.."

leon=${LEON:-.venv/bin/leon}
runs=${RUNS:-runs/emoji}
weights=${WEIGHTS:-leon_jax/weights/emoji}

echo "Training the shipped model takes about two and a half hours on 2 CPU cores and minutes on a GPU;"
echo "it writes into data/emoji and $runs, and at the end replaces $weights."

"$leon" pipeline --config=configs/emoji/pipeline.py --workdir="$runs"
"$leon" export --workdir="$runs/decoder_second" --index=prepare:demo --licence=CC-BY-SA-4.0 \
  --tokenizer="$runs/tokenizer/export/tokenizer.safetensors" \
  --encoder="$runs/encoder/export/encoder.safetensors" \
  --selection=configs/emoji/selection.json \
  --title="The shipped model: emoji, 32 px" --prompt="cat face, Twemoji style" \
  --notes=configs/emoji/model_notes.md --out="$weights"
ls -l "$weights"
