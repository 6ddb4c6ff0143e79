#!/usr/bin/env bash
# Retrains all shipped models from scratch in the order of their dependencies, and copies them to
# leon_jax/weights/emoji. Run it again to resume an interrupted run.
set -euo pipefail
cd "$(dirname "$0")/.."

leon=${LEON:-.venv/bin/leon}
runs=${RUNS:-runs/emoji}
data=${DATA:-data}
weights=${WEIGHTS:-leon_jax/weights/emoji}

echo "Retraining all four models takes about two and a half hours on 2 CPU cores and minutes on a GPU;"
echo "it writes into $data and $runs, and at the end replaces $weights."

# The documents that the first three models train on; their codes are not used.
documents="$data/emoji_documents"
"$leon" prepare --data_dir="$data/emoji" --out="$documents"
"$leon" train --config=configs/emoji/text.py --workdir="$runs/text" \
  --config.data.folder="$documents"
"$leon" train --config=configs/emoji/tokenizer.py --workdir="$runs/tokenizer" \
  --config.data.folder="$documents"
"$leon" train --config=configs/emoji/encoder.py --workdir="$runs/encoder" \
  --config.data.folder="$documents" --config.data.text="$runs/text/export/text.json"
# The thresholds for this encoder; docs/retrieval.md explains them.
cp configs/emoji/selection.json "$runs/encoder/export/selection.json"
"$leon" prepare --data_dir="$data/emoji" --out="$data/emoji_prepared" \
  --tokenizer="$runs/tokenizer/export/tokenizer.safetensors" \
  --encoder="$runs/encoder/export/encoder.safetensors" --text="$runs/text/export/text.json" \
  --variants=48
"$leon" train --config=configs/emoji/decoder.py --workdir="$runs/decoder" \
  --config.data.folder="$data/emoji_prepared" --config.data.text="$runs/text/export/text.json" \
  --config.samples.image="$runs/tokenizer/export/tokenizer.safetensors"
"$leon" train --config=configs/emoji/decoder_second.py --workdir="$runs/decoder_second" \
  --config.data.folder="$data/emoji_prepared" --config.data.text="$runs/text/export/text.json" \
  --config.samples.image="$runs/tokenizer/export/tokenizer.safetensors" \
  --config.loop.init_from="$runs/decoder/export/decoder.safetensors"

"$leon" export --workdir="$runs/decoder_second" --index=prepare:demo --licence=CC-BY-SA-4.0 \
  --title="The demonstration models: emoji, 32 px" --prompt="cat face, Twemoji style" \
  --notes=configs/emoji/model_notes.md --out="$weights"
ls -l "$weights"
