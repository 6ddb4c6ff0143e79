"""All models from a collection of captioned images of your own, in one command.

    leon pipeline --config=configs/own.py --data=my_cats --licence=CC-BY-4.0 --workdir=runs/cats

The argument of the file is the size: configs/own.py:tiny (the default), :small or :base. `leon
pipeline --size=small` is the same.

| size  | images  | codes of an image | decoder        | meant for                       |
|-------|---------|-------------------|----------------|---------------------------------|
| tiny  | 64 px   | 8 x 8 of 1,024    | 3 million      | two CPU cores, 45 minutes       |
| small | 128 px  | 16 x 16 of 2,048  | 31 million     | one GPU, hours                  |
| base  | 256 px  | 32 x 32 of 8,192  | CM3Leon-350M   | a TPU pod or many GPUs, days    |
"""

import pathlib
import runpy

from ml_collections import ConfigDict

# For each size: the numbers that differ.
SIZES = {
    "tiny": {
        "side": 64,
        "grid": 8,
        "codes": 1024,
        "text": 2048,
        "tokenizer": {"channels": 16, "multipliers": (1, 2, 4, 8), "latent": 64, "code_dim": 16},
        "tokenizer_steps": 2000,
        "tokenizer_batch": 16,
        # A discriminator would take more than half of the time.
        "adversarial_share": 0.0,
        "encoder_side": 48,
        "encoder_steps": 400,
        "encoder_batch": 128,
        "decoder": {"layers": 6, "embed": 192, "heads": 4},
        "decoder_steps": 1600,
        "decoder_batch": 8,
        "variants": 16,
        "text_positions": 32,
        # Measured; those of the other sizes are estimates.
        "seconds": {"tokenizer": 950, "encoder": 480, "decoder": 1070},
    },
    "small": {
        "side": 128,
        "grid": 16,
        "codes": 2048,
        "text": 8192,
        "tokenizer": {"channels": 64, "multipliers": (1, 2, 2, 4), "latent": 128, "code_dim": 32},
        "tokenizer_steps": 20_000,
        "tokenizer_batch": 32,
        "adversarial_share": 0.25,
        "encoder_side": 64,
        "encoder_steps": 8000,
        "encoder_batch": 512,
        "decoder": {"layers": 8, "embed": 512, "heads": 8},
        "decoder_steps": 30_000,
        "decoder_batch": 32,
        "variants": 8,
        "text_positions": 64,
        "seconds": {"tokenizer": 300_000, "encoder": 40_000, "decoder": 900_000},
    },
    "base": {
        "side": 256,
        "grid": 32,
        "codes": 8192,
        "text": 32_768,
        "tokenizer": {"channels": 128, "multipliers": (1, 1, 2, 4), "latent": 256, "code_dim": 256},
        "tokenizer_steps": 400_000,
        "tokenizer_batch": 192,
        "adversarial_share": 0.25,
        "encoder_side": 224,
        "encoder_steps": 50_000,
        "encoder_batch": 2048,
        "decoder": {"layers": 24, "embed": 1024, "heads": 16},
        "decoder_steps": 100_000,
        "decoder_batch": 512,
        "variants": 1,
        "text_positions": 128,
        "seconds": {"tokenizer": 3e8, "encoder": 1e8, "decoder": 6e9},
    },
}

RETRIEVED = 2  # documents that an example reads at most
SENTINELS = 64


def get_config(size: str = "tiny") -> ConfigDict:
    """Returns the configuration of `leon_jax.pipeline`.

    Args:
      size: "tiny", "small" or "base".
    """
    if size not in SIZES:
        raise ValueError(f"size is {size!r}; it must be one of {', '.join(SIZES)}")
    numbers = SIZES[size]
    return ConfigDict(
        {
            "kind": "pipeline",
            "size": size,
            "prepare": {"picture_side": numbers["side"], "held_out": 0.05},
            "encode": {"variants": numbers["variants"]},
            "stages": {
                "text": {"kind": "text", "size": numbers["text"]},
                "tokenizer": tokenizer(numbers),
                "encoder": encoder(numbers),
                "decoder": decoder(numbers),
            },
            "seconds": numbers["seconds"],
        }
    )


def tokenizer(numbers: dict) -> dict:
    """Returns the configuration of the image tokenizer."""
    steps, is_large = numbers["tokenizer_steps"], numbers["side"] >= 128
    factor = numbers["side"] // numbers["grid"]
    multipliers = numbers["tokenizer"]["multipliers"]
    assert 2 ** (len(multipliers) - 1) == factor
    return {
        "kind": "tokenizer",
        "seed": 0,
        "steps": steps,
        "batch_size": numbers["tokenizer_batch"],
        "model": {
            "resolution": numbers["side"],
            **numbers["tokenizer"],
            "blocks": 2 if is_large else 1,
            "attention_sizes": (numbers["grid"],) if is_large else (),
            "groups": 32 if is_large else 8,
            "codes": numbers["codes"],
            "halo": None if is_large else 1,
        },
        "losses": {
            "network": "vgg16" if is_large else "alexnet",
            "perceptual": 1.0 if is_large else 0.5,
            "adversarial": 0.8 if is_large else 0.4,
            "adversarial_start": round(steps * (1 - numbers["adversarial_share"])),
            "discriminator_channels": 64 if is_large else 16,
            "discriminator_layers": 3 if is_large else 2,
            "revive_after": 1000 if is_large else 60,
        },
        "optimizer": {
            "learning_rate": 3e-4 if is_large else 1e-3,
            "warmup_steps": max(20, steps // 100),
            "total_steps": steps,
            "schedule": "cosine",
            "final_fraction": 0.05,
            "beta1": 0.8,
            "beta2": 0.95,
            "weight_decay": 0.0,
        },
        "augment": {"crop": 0.75, "mirror": 0.5},
        # Evaluations take at most 3 % of the time in every stage.
        "loop": {
            "save_every": 200,
            "sample_every": max(200, steps // 20),
            "eval_every": max(200, steps // 20),
        },
    }


def encoder(numbers: dict) -> dict:
    """Returns the configuration of the retrieval encoder."""
    steps, is_base = numbers["encoder_steps"], numbers["encoder_side"] == 224
    return {
        "kind": "encoder",
        "seed": 0,
        "steps": steps,
        "batch_size": numbers["encoder_batch"],
        "model": {
            "vision": {
                "image_size": numbers["encoder_side"],
                "patch_size": 32 if is_base else 8,
                "width": 768 if is_base else 192,
                "layers": 12 if is_base else 4,
                "heads": 12 if is_base else 3,
                "stem": "patch" if is_base else "convolution",
            },
            "text": {
                "context_length": 77 if is_base else 32,
                "vocab_size": 0,  # that of the text tokenizer
                "width": 512 if is_base else 128,
                "layers": 12 if is_base else 2,
                "heads": 8 if is_base else 2,
            },
            "embed_dim": 512 if is_base else 128,
            "remat": is_base,
        },
        # Images may show text or a direction, so none is mirrored.
        "augment": {"crop": 0.8, "zoom": 0.1, "shift": 0.05, "mirror": 0.0},
        "optimizer": {
            "learning_rate": 5e-4 if is_base else 1e-3,
            "warmup_steps": max(50, steps // 50),
            "total_steps": steps,
            "schedule": "cosine",
            "final_fraction": 0.02,
            "beta1": 0.9,
            "beta2": 0.98,
            "weight_decay": 0.1,
        },
        "loop": {"save_every": 200, "eval_every": max(50, steps // 20)},
    }


def decoder(numbers: dict) -> dict:
    """Returns the configuration of the decoder. The pipeline sets the vocabulary and the files."""
    steps, grid = numbers["decoder_steps"], numbers["grid"]
    if numbers["side"] == 256:
        path = pathlib.Path(__file__).with_name("cm3leon_base.py")
        make = runpy.run_path(str(path))["make"]
        config = make(layers=24, embed=1024, heads=16, learning_rate=6e-4, tokens=1e9).to_dict()
        config |= {"steps": steps, "batch_size": numbers["decoder_batch"]}
        config["optimizer"]["total_steps"] = steps
        config["samples"] = {}
        config["loop"]["eval_every"] = 1000
        del config["vocabulary"], config["model"]["vocab_size"]
        return config
    document = grid * grid + numbers["text_positions"]
    length = document * (RETRIEVED + 1) + 32
    return {
        "kind": "decoder",
        "seed": 0,
        "steps": steps,
        "batch_size": numbers["decoder_batch"],
        "loss_chunk": 512,
        "vocabulary": {"sentinels": SENTINELS},
        "model": {
            # Each part begins at a multiple of part_step, so that a text of any length keeps the
            # images at the same positions.
            "max_length": 2 * length,
            **numbers["decoder"],
            "mlp": 4 * numbers["decoder"]["embed"],
            "dtype": "float32" if numbers["side"] == 64 else "bfloat16",
            "remat": "none" if numbers["side"] == 64 else "full",
            "init_std": 0.02,
            "position_init": "sinusoids",
            "position_std": 0.02,
            "part_step": 32,
        },
        "optimizer": {
            "learning_rate": 2e-3 if numbers["side"] == 64 else 6e-4,
            "warmup_steps": max(100, steps // 100),
            "total_steps": steps,
            "schedule": "cosine",
            "final_fraction": 0.02,
        },
        "data": {
            "image_shape": (grid, grid),
            "length": length,
            "retrieved": (0.2, 0.3, 0.5),
            "unchanged": 0.3,
            "eval_documents": 128,
        },
        "masking": {"placement": "segment", "whole_segment": 0.6, "query_text": 0.6},
        "samples": {"guidance": 3.0},
        "loop": {
            "log_every": 20,
            "save_every": 200,
            "sample_every": max(400, steps // 10),
            "eval_every": max(400, steps // 40),
        },
    }
