"""Converts the decoder's weights to the names and layouts of OPT in transformers."""

import numpy as np

from leon_jax.models.decoder import Decoder

OFFSET = 2  # rows of OPT's position table before the first position

# Our names of scales and biases by OPT's.
_VECTORS = {
    "self_attn.q_proj.bias": "query_bias",
    "self_attn.k_proj.bias": "key_bias",
    "self_attn.v_proj.bias": "value_bias",
    "self_attn.out_proj.bias": "out_bias",
    "fc1.bias": "fc1_bias",
    "fc2.bias": "fc2_bias",
    "self_attn_layer_norm.weight": "attention_norm_scale",
    "self_attn_layer_norm.bias": "attention_norm_bias",
    "final_layer_norm.weight": "mlp_norm_scale",
    "final_layer_norm.bias": "mlp_norm_bias",
}


def to_opt(model: Decoder) -> dict[str, np.ndarray]:
    """Returns the decoder's weights (or gradients) by OPT's names without `model.decoder.`.

    Matrices are in PyTorch's layout, float32[out, in].
    """
    config = model.config
    embed, mlp = config.embed, config.mlp
    positions = np.zeros((OFFSET + config.max_length, embed), np.float32)
    positions[OFFSET:] = model.positions[...]
    weights = {"embed_tokens.weight": np.asarray(model.table[...])}
    weights["embed_positions.weight"] = positions
    blocks = model.blocks
    for layer in range(config.layers):
        # PyTorch has [out, in]. The decoder has [in, heads, head_dim] and [in, out].
        for name, weight, shape in (
            ("self_attn.q_proj", blocks.query, (embed, embed)),
            ("self_attn.k_proj", blocks.key, (embed, embed)),
            ("self_attn.v_proj", blocks.value, (embed, embed)),
            ("self_attn.out_proj", blocks.out, (embed, embed)),
            ("fc1", blocks.fc1, (embed, mlp)),
            ("fc2", blocks.fc2, (mlp, embed)),
        ):
            weights[f"layers.{layer}.{name}.weight"] = (
                np.asarray(weight[...][layer]).reshape(shape).T
            )
        for name, ours in _VECTORS.items():
            if (vector := getattr(blocks, ours, None)) is not None:
                weights[f"layers.{layer}.{name}"] = np.asarray(vector[...][layer]).reshape(-1)
    if config.form.norm_scale:
        weights["final_layer_norm.weight"] = np.asarray(model.final_norm_scale[...])
        weights["final_layer_norm.bias"] = np.asarray(model.final_norm_bias[...])
    return weights
