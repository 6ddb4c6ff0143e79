"""Converts the decoder's weights to the names and layouts of Llama in transformers."""

import numpy as np

from leon_jax.models.decoder import Decoder

# Our names by those of a layer in transformers, without `.weight` and `.bias`.
_PRODUCTS = {
    "self_attn.q_proj": "query",
    "self_attn.k_proj": "key",
    "self_attn.v_proj": "value",
    "self_attn.o_proj": "out",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "fc1",
    "mlp.down_proj": "fc2",
}
_NORMS = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "mlp_norm",
    "self_attn.q_norm": "query_norm",
    "self_attn.k_norm": "key_norm",
}


def to_llama(model: Decoder) -> dict[str, np.ndarray]:
    """Returns the decoder's weights (or gradients) by the names of Llama.

    The names are the same in Qwen3 and in Chameleon. Matrices are in PyTorch's layout, [out, in].
    """
    weights = {
        "model.embed_tokens.weight": np.asarray(model.table[...]),
        "model.norm.weight": np.asarray(model.final_norm_scale[...]),
    }
    if not model.config.form.tied_head:
        weights["lm_head.weight"] = np.asarray(model.head_table[...])
    for layer in range(model.config.layers):

        def add(name: str, part: str, ours: str, layer: int = layer) -> None:
            weight = getattr(model.blocks, ours, None)
            if weight is not None:
                weights[f"model.layers.{layer}.{name}.{part}"] = np.asarray(weight[...][layer])

        for name, ours in _PRODUCTS.items():
            add(name, "weight", ours)
            add(name, "bias", f"{ours}_bias")
            full, summed = f"model.layers.{layer}.{name}", 2 if ours == "out" else 1
            matrix = weights[f"{full}.weight"]
            inputs = int(np.prod(matrix.shape[:summed]))
            weights[f"{full}.weight"] = matrix.reshape(inputs, -1).T
            if f"{full}.bias" in weights:
                weights[f"{full}.bias"] = weights[f"{full}.bias"].reshape(-1)
        for name, ours in _NORMS.items():
            add(name, "weight", f"{ours}_scale")
            add(name, "bias", f"{ours}_bias")
    return weights
