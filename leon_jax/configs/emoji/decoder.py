"""The shipped decoder: a small CM3Leon on emoji of 8 x 8 codes, with the layers of Llama.

    leon train --config=configs/emoji/decoder.py --workdir=runs/emoji/decoder

Reads a prepared folder and the text tokenizer. 8.5 million parameters; takes about ten hours on two
CPU cores. docs/train.md explains the form, and lists the differences from the paper.
"""

from ml_collections import ConfigDict

TEXT_TOKENS, IMAGE_CODES, SENTINELS = 4096, 4096, 16
RETRIEVED = 2  # documents that an example reads at most
TEXT_POSITIONS = 32  # most captions are shorter


def get_config() -> ConfigDict:
    """Returns the configuration of `leon_jax.train.decoder.DecoderProgram`."""
    config = ConfigDict(stage())
    config.optimizer.total_steps = config.get_ref("steps")
    config.optimizer.decay_steps = config.get_ref("steps") // 5
    # The layout of Vocabulary.compact: no reserved ids between sentinels and text.
    config.vocabulary.image_codes = IMAGE_CODES
    config.vocabulary.text_start = 4 + IMAGE_CODES + 2 + SENTINELS
    config.vocabulary.text_tokens = TEXT_TOKENS
    config.model.vocab_size = config.vocabulary.text_start + TEXT_TOKENS
    config.data.folder = "data/emoji_prepared"
    config.data.text = "runs/emoji/text/export/text.json"
    config.samples.image = "runs/emoji/tokenizer/export/tokenizer.safetensors"
    config.codebook = config.samples.get_ref("image")
    return config


def stage(grid: int = 8) -> dict:
    """Returns the configuration without the vocabulary and the files, which the pipeline sets.

    Args:
      grid: side of the grid of codes.
    """
    steps = 30_000
    document = grid * grid + TEXT_POSITIONS
    return {
        "kind": "decoder",
        "seed": 0,
        "steps": steps,
        "batch_size": 8,
        "loss_chunk": 512,
        "vocabulary": {"sentinels": SENTINELS},
        "model": {
            # Two images, two documents and 128 positions of text, for tasks.
            "max_length": 2 * grid * grid + 2 * document + 128,
            "layers": 8,
            "embed": 256,
            "heads": 4,
            "mlp": 704,
            # The paper's std of 0.006 suits width 1024 and more; a narrow model needs a larger one.
            "init_std": 0.02,
            "products": "auto",
            "form": {
                "norm": "rms",
                "norm_scale": True,
                "mlp": "swiglu",
                "qk_norm": "rms",
                "positions": "rotary_2d",
                "image_columns": grid,
            },
        },
        "optimizer": {
            "kind": "muon",
            "learning_rate": 2e-3,
            "warmup_steps": 200,
            "total_steps": steps,
            "schedule": "wsd",
            "decay_steps": steps // 5,
            "final_fraction": 0.02,
            "average": 0.999,
        },
        "data": {
            "image_shape": (grid, grid),
            "length": 32 * -(-document * (RETRIEVED + 1) // 32),
            "retrieved": (0.2, 0.3, 0.5),
            # The pipeline sets the number of variants.
            "unchanged": 0.3,
            # Skin tones do not dominate.
            "balance": 0.7,
            "eval_documents": 128,
        },
        # More than half of the examples have no masked span, as prompts for an image.
        "masking": {
            "rate": 0.6,
            "placement": "segment",
            "whole_segment": 0.6,
            "query_text": 0.6,
        },
        "samples": {
            "captions": (
                "red heart, Twemoji style",
                "cat face, OpenMoji style",
                "house, Twemoji style",
                "a red apple, Noto style",
            ),
            "guidance": 3.0,
        },
        "loop": {"log_every": 20, "save_every": 200, "sample_every": 1000, "eval_every": 500},
    }
