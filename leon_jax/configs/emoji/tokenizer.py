"""The shipped image tokenizer: 32 px images as 8 x 8 codes out of 512.

    leon train --config=configs/emoji/tokenizer.py --workdir=runs/emoji/tokenizer

docs/evaluate.md has the results.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    steps = 800
    return ConfigDict(
        {
            "kind": "tokenizer",
            "seed": 0,
            "steps": steps,
            "batch_size": 32,
            "model": {
                "resolution": 32,
                "channels": 32,
                "multipliers": (1, 2, 4),
                "blocks": 1,
                "attention_sizes": (),
                "groups": 8,
                "latent": 64,
                "code_dim": 16,
                "codes": 512,
                # With a halo, white background has one code, and equal details have equal codes.
                "halo": 1,
            },
            "losses": {
                "network": "alexnet",
                "adversarial": 0.4,
                "adversarial_start": steps * 3 // 4,
                "discriminator_channels": 16,
                "discriminator_layers": 2,
                "revive_after": 60,
            },
            "optimizer": {
                "learning_rate": 1e-3,
                "warmup_steps": 20,
                "total_steps": steps,
                "schedule": "cosine",
                "final_fraction": 0.05,
                "beta1": 0.8,
                "beta2": 0.95,
                "weight_decay": 0.0,
            },
            "data": {"folder": "data/emoji_prepared"},
            "loop": {"eval_every": 100},
        }
    )
