"""Runs Llama, Qwen3 or Chameleon of transformers with given weights, for the peers.

This is not a test; `test_form_parity.py` runs it through `tests/peers.py`.
"""

import numpy as np
import torch
from transformers import (
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"


def build(weights: dict[str, np.ndarray], options: dict[str, float]) -> torch.nn.Module:
    """Builds the model that has these weights, in float32.

    Args:
      weights: all weights by their names in transformers. A norm of queries with a bias is that of
        Chameleon, one without a bias that of Qwen3.
      options: numbers of heads (`heads`, `kv_heads`), `base`, `epsilon`, and `post`, which is 1 if
        norms are behind attention and MLP.
    """
    vocab, embed = weights["model.embed_tokens.weight"].shape
    shape = {
        "vocab_size": vocab,
        "hidden_size": embed,
        "intermediate_size": weights[f"{MLP}.up_proj.weight"].shape[0],
        "num_hidden_layers": sum(name.endswith("up_proj.weight") for name in weights),
        "num_attention_heads": int(options["heads"]),
        "num_key_value_heads": int(options["kv_heads"]),
        "head_dim": embed // int(options["heads"]),
        "rms_norm_eps": float(options["epsilon"]),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(options["base"])},
        "tie_word_embeddings": "lm_head.weight" not in weights,
        "attention_bias": f"{ATTENTION}.o_proj.bias" in weights,
        "mlp_bias": f"{MLP}.up_proj.bias" in weights,
        "attn_implementation": "eager",
        "pad_token_id": None,
    }
    if f"{ATTENTION}.q_norm.bias" in weights:
        vq = {"base_channels": 32, "channel_multiplier": [1], "embed_dim": 4, "resolution": 8,
              "num_embeddings": 4, "num_res_blocks": 1, "latent_channels": 4}  # fmt: skip
        image = {"vq_config": vq, "vocabulary_map": {"<image>": vocab - 1}}
        config = ChameleonConfig(**shape, **image, swin_norm=bool(options["post"]))
        model = ChameleonForConditionalGeneration(config)
    elif f"{ATTENTION}.q_norm.weight" in weights:
        model = Qwen3ForCausalLM(Qwen3Config(**shape))
    else:
        model = LlamaForCausalLM(LlamaConfig(**shape))
    state = {name: torch.from_numpy(array) for name, array in weights.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    missing = [name for name in missing if "vqmodel" not in name]
    assert missing == (["lm_head.weight"] if shape["tie_word_embeddings"] else []), missing
    model.tie_weights()
    return model


def main(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the result of layer 0, the logits, and the gradients of the mean next-token loss.

    The arrays are `ids`, the options with the prefix `option.`, and the weights.
    """
    ids = torch.from_numpy(arrays.pop("ids"))
    names = [name for name in arrays if name.startswith("option.")]
    options = {name.removeprefix("option."): arrays.pop(name).item() for name in names}
    model, first = build(arrays, options), []

    def keep(layer, inputs, result):
        first.append(result[0] if isinstance(result, tuple) else result)

    model.model.layers[0].register_forward_hook(keep)
    # Chameleon's own logits are those of texts only.
    logits = model.lm_head(model.model(input_ids=ids).last_hidden_state)
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    parameters = dict(model.named_parameters())
    gradients = {f"gradient.{name}": parameters[name].grad.numpy() for name in arrays}
    return {"logits": logits.detach().numpy(), "layer": first[0].detach().numpy(), **gradients}
