"""A small CM3Leon on emoji: captions and images of 8 x 8 codes, with retrieval.

    leon train --config=configs/emoji/decoder.py --workdir=runs/emoji/decoder

Reads a prepared folder and the text tokenizer. 3.3 million parameters; takes about ninety minutes
on two CPU cores. docs/train.md lists the differences from the paper; docs/evaluate.md has the
results.
"""

from ml_collections import ConfigDict

IMAGE_CODES, TEXT_TOKENS, SENTINELS = 512, 2048, 16


def get_config() -> ConfigDict:
    """Returns the configuration of `leon_jax.train.decoder.DecoderProgram`."""
    config = ConfigDict()
    config.kind = "decoder"
    config.seed = 0
    config.batch_size = 8
    config.steps = 13_000

    # The layout of Vocabulary.compact: no reserved ids between sentinels and text.
    text_start = 4 + IMAGE_CODES + 2 + SENTINELS
    config.vocabulary = ConfigDict(
        {
            "image_codes": IMAGE_CODES,
            "sentinels": SENTINELS,
            "text_start": text_start,
            "text_tokens": TEXT_TOKENS,
        }
    )
    config.model = ConfigDict(
        {
            "vocab_size": text_start + TEXT_TOKENS,
            "max_length": 640,
            "layers": 6,
            "embed": 192,
            "heads": 4,
            "mlp": 768,
            "dtype": "float32",
            "remat": "none",
            # The paper's std of 0.006 suits width 1024 and more; a narrow model needs a larger one.
            "init_std": 0.02,
            # With sinusoids a shift by a row or column is a rotation from the first step on.
            "position_init": "sinusoids",
            "position_std": 0.02,
            # Few captions have more than 30 tokens, so a document takes 128 positions.
            "part_step": 32,
        }
    )
    config.optimizer = ConfigDict(
        {
            "learning_rate": 2e-3,
            "warmup_steps": 150,
            "schedule": "cosine",
            "final_fraction": 0.02,
        }
    )
    config.optimizer.total_steps = config.get_ref("steps")
    config.data = ConfigDict(
        {
            "folder": "data/emoji_prepared",
            "split": "train",
            "text": "runs/emoji/text/export/text.json",
            "image_shape": (8, 8),
            "length": 384,
            # 0 to 3 retrieved documents: with the query, up to 4 x 64 image tokens and text.
            "retrieved": (0.15, 0.15, 0.3, 0.4),
            # The model would memorise so few images. Variants prevent this, so that retrieved
            # documents stay useful. Three in ten examples show the plain images. The weights keep
            # skin tones from dominating.
            "variants": 48,
            "unchanged": 0.3,
            "balance": 0.7,
        }
    )
    config.masking = ConfigDict({"placement": "segment", "whole_segment": 0.6, "query_text": 0.6})
    config.samples = ConfigDict(
        {
            "image": "runs/emoji/tokenizer/export/tokenizer.safetensors",
            "captions": (
                "red heart, Twemoji style",
                "red heart, OpenMoji style",
                "cat face, Twemoji style",
                "house, OpenMoji style",
            ),
            "guidance": 3.0,
        }
    )
    config.loss_chunk = 512
    # An evaluation takes as long as about fifteen steps.
    config.loop = ConfigDict(
        {
            "log_every": 10,
            "save_every": 200,
            "sample_every": 400,
            "eval_every": 600,
            "init_from": "",
        }
    )
    return config
