"""Settings of the three CM3Leon models of arXiv 2309.02591; `make` takes those that differ.

The source of each number:
  paper     layers, width, length 4096, batch 8M tokens, peak learning rate, 1,500 warm-up steps,
            tokens (Table 3); initialisation, no biases, norms without parameters (section 2.3);
            vocabulary sizes; up to three retrieved documents a query; no loss weights.
  inferred  (from metaseq and OPT, which the paper's code builds on) heads, MLP of 4 x width, ReLU,
            AdamW (0.9, 0.95), eps 1e-8, weight decay 0.1, clipping at 1.0, linear decay to a tenth,
            Poisson(1) spans clamped at 0, 512 sentinels, ids 0..3.
  ours      bfloat16 compute with float32 weights; whole documents in a row instead of blocks cut
            from a stream (`data.packing`), so that K = 2 retrieved images and the query's image fit
            in 4,096 tokens; K uniform over 0..2; half of the masked documents lose whole segments
            (the paper gives no number).
"""

from ml_collections import ConfigDict

ROW = 4096
BATCH_TOKENS = 2048 * ROW  # 8,388,608: the paper's "8M"


def make(*, layers: int, embed: int, heads: int, learning_rate: float, tokens: float) -> ConfigDict:
    """Returns the configuration of `leon_jax.train.decoder.DecoderProgram` for one size.

    Args:
      layers, embed, heads: the model's shape.
      learning_rate: the peak learning rate.
      tokens: number of training tokens, including padding.
    """
    config = ConfigDict(
        {
            "kind": "decoder",
            "seed": 0,
            "batch_size": BATCH_TOKENS // ROW,
            "steps": round(tokens / BATCH_TOKENS),
            "loss_chunk": 2048,
            "microbatches": 1,
            "head_exchange": "bfloat16",
            "vocabulary": {
                "image_codes": 8192,
                "sentinels": 512,
                "text_start": 9216,
                "text_tokens": 56320,
            },
            "model": {
                "vocab_size": 65536,
                "max_length": ROW,
                "layers": layers,
                "embed": embed,
                "heads": heads,
                "mlp": 4 * embed,
                "dtype": "bfloat16",
                "remat": "full",
                "init_std": 0.006,
                "position_std": 0.0002,
            },
            "optimizer": {
                "learning_rate": learning_rate,
                "warmup_steps": 1500,
                "schedule": "linear",
                "final_fraction": 0.1,
                "beta1": 0.9,
                "beta2": 0.95,
                "eps": 1e-8,
                "first_moment": "float32",
                "weight_decay": 0.1,
                "clip_norm": 1.0,
            },
            "data": {
                "folder": "data/prepared",
                "split": "train",
                "text": "data/prepared/text.json",
                "image_shape": (32, 32),
                "length": ROW,
                "retrieved": (0.34, 0.33, 0.33),
            },
            "masking": {
                "spans": "poisson",
                "rate": 1.0,
                "clamp_min": 0,
                "placement": "document",
                "whole_segment": 0.5,
                "query_text": 0.5,
            },
            # FSDP over all chips; `leon plan` checks whether the run fits.
            "loop": {"mesh": (1, -1, 1, 1), "save_every": 1000, "sample_every": 1000},
        }
    )
    # A reference, so that an override of `steps` also moves the end of the decay.
    config.optimizer.total_steps = config.get_ref("steps")
    return config
