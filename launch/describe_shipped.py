"""Writes model.json and the model card of the shipped model, from the facts of docs/.

    python launch/describe_shipped.py

The weights were trained before `leon export` recorded data and training, so the facts stand here.
`make weights` replaces all of it: its last step is `leon export`.
"""

import pathlib

from leon_jax.export.write import write_description
from leon_jax.model_description import (
    GenerationDefaults,
    IndexAddress,
    ModelDescription,
    TrainingData,
)
from leon_jax.model_folder import ModelFolder, encoder_path
from leon_jax.prepare.encoding_models import digest

ROOT = pathlib.Path(__file__).parents[1]
MEASURED = """\
## Measured

On the held-out designs; `docs/evaluate.md` has all numbers, the commands, and where the first
stage of the decoder differed from what `make weights` does now.

| number | measured |
|---|---|
| tokenizer PSNR | 21.9 dB |
| codes used | 96 % |
| image-token perplexity with 0, 1, 2 retrieved documents | 12.78, 12.75, 12.62 |
| true caption ranked first among 50, with the 2 documents retrieved by each caption | 51.5 % |
| generated images matched to their prompt among 50, with 0 and with 2 documents | 31 % and 45.5 % |
"""

PARTS = ("decoder", "tokenizer", "text", "encoder")


def describe(folder: ModelFolder) -> ModelDescription:
    """Returns the description of the shipped model. Numbers of 0 are not recorded."""
    path, defaults = folder.path, GenerationDefaults()
    notes = (ROOT / "configs" / "emoji" / "model_notes.md").read_text(encoding="utf-8")
    return ModelDescription(
        title="The shipped model: emoji, 32 px",
        prompt="cat face, Twemoji style",
        generation={
            "sampling": defaults.sampling.to_dict(),
            "num_docs": defaults.num_docs,
            "max_docs": folder.max_docs,
        },
        index=IndexAddress(prepare="demo"),
        licences=("CC-BY-SA-4.0",),
        data=(
            TrainingData(
                "emoji",
                PARTS,
                documents=7488,
                licences={"CC-BY-SA-4.0": 0, "CC-BY-4.0": 0},
                sources={"OpenMoji 17.0.0": 0, "Twemoji 2.0.0": 0},
                credits=(
                    "OpenMoji, https://openmoji.org, CC BY-SA 4.0, by the OpenMoji project",
                    "Twemoji, CC BY 4.0, by Twitter, Inc and other contributors",
                ),
            ),
        ),
        training={
            "decoder": {
                "steps": 2000,
                "base": "13,000 steps of configs/emoji/decoder.py",
                "file": "configs/emoji/decoder_second.py",
            },
            "tokenizer": {"file": "configs/emoji/tokenizer.py"},
            "text": {"file": "configs/emoji/text.py"},
            "encoder": {"file": "configs/emoji/encoder.py"},
        },
        digests={
            "decoder": digest(path / "decoder.safetensors"),
            "tokenizer": digest(path / "tokenizer.safetensors"),
            "text": digest(path / "text.json"),
            "encoder": digest(encoder_path(path)),
        },
        notes=f"{notes.strip()}\n\n{MEASURED}",
    )


if __name__ == "__main__":
    shipped = ModelFolder.open()
    write_description(shipped, describe(shipped))
