"""The shipped image tokenizer: 64 px images as 8 x 8 codes out of 4,096.

    leon train --config=configs/emoji/tokenizer.py --workdir=runs/emoji/tokenizer

Reads the documents of configs/emoji/designs.py.
"""

from ml_collections import ConfigDict

SIDE = 64
# By side of the grid of codes: downsampling by 4 and by 8.
MULTIPLIERS = {16: (1, 2, 4), 8: (1, 2, 4, 8)}
CODEBOOKS = {
    # Directions in 8 dimensions, as in LlamaGen (arXiv 2406.06525, section 2.2).
    "unit": {"code_dim": 8, "unit_codes": True},
    "plain": {"code_dim": 16},
}


def get_config() -> ConfigDict:
    """Returns the configuration of `leon_jax.train.image_tokenizer`."""
    return ConfigDict({**stage(), "data": {"folder": "data/emoji_designs"}})


def stage(grid: int = 8, codebook: str = "unit") -> dict:
    """Returns the configuration without the data, which the pipeline sets.

    Args:
      grid: side of the grid of codes, a key of `MULTIPLIERS`.
      codebook: a key of `CODEBOOKS`.
    """
    steps = 4000
    return {
        "kind": "tokenizer",
        "seed": 0,
        "steps": steps,
        "batch_size": 16,
        "model": {
            "resolution": SIDE,
            "channels": 24,
            # The finest level would take half of the time.
            "pixel_patch": 2,
            "multipliers": MULTIPLIERS[grid],
            "blocks": 1,
            "attention_sizes": (),
            "groups": 8,
            "latent": 64,
            "codes": 4096,
            # With a halo, white background has one code, and equal details have equal codes.
            "halo": 1,
            **CODEBOOKS[codebook],
        },
        "losses": {
            "network": "alexnet",
            "perceptual": 0.5,
            # A discriminator would take more than half of the time.
            "adversarial_start": steps,
            "discriminator_channels": 16,
            "discriminator_layers": 2,
            "revive_after": 60,
        },
        "optimizer": {
            "learning_rate": 1e-3,
            "warmup_steps": 40,
            "total_steps": steps,
            "schedule": "cosine",
            "final_fraction": 0.02,
            "beta1": 0.8,
            "beta2": 0.95,
            "weight_decay": 0.0,
        },
        # A quarter shows several small drawings, for tasks with more than one.
        "augment": {"crop": 0.75, "mirror": 0.5, "scenes": 0.25},
        "loop": {"save_every": 200, "sample_every": 400, "eval_every": 400},
    }
