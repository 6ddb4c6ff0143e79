"""Runs the OPT of transformers with the sizes of CM3Leon and given weights, for the peers.

This is not a test; `test_decoder_parity.py` runs it through `tests/peers.py`.
"""

import numpy as np
import torch
from transformers import OPTConfig, OPTForCausalLM

# OPT's position table has two rows before the first position.
OFFSET = 2


def build(
    weights: dict[str, np.ndarray], heads: int, attention: str = "eager", biases: bool = False
) -> OPTForCausalLM:
    """Builds an OPT with the weights, in float32.

    Args:
      weights: weights by OPT's names without the prefix `model.decoder.`; see `opt_weights.py`.
      heads: attention heads.
      attention: the `attn_implementation` of transformers.
      biases: add the biases, and the scales and shifts of norms, that CM3Leon does not have. Those
        that are not in `weights` are zeros and ones, so they do not change the result.
    """
    vocab, embed = weights["embed_tokens.weight"].shape
    layers = sum(name.endswith(".fc1.weight") for name in weights)
    model = OPTForCausalLM(
        OPTConfig(
            vocab_size=vocab,
            hidden_size=embed,
            word_embed_proj_dim=embed,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            ffn_dim=weights["layers.0.fc1.weight"].shape[0],
            max_position_embeddings=weights["embed_positions.weight"].shape[0] - OFFSET,
            do_layer_norm_before=True,
            layer_norm_elementwise_affine=biases,
            enable_bias=biases,
            activation_function="relu",
            tie_word_embeddings=True,
            dropout=0.0,
            attention_dropout=0.0,
            attn_implementation=attention,
        )
    )
    decoder = model.model.decoder
    state = {name: torch.from_numpy(array) for name, array in weights.items()}
    if biases:
        neutral = {"bias": torch.zeros_like, "weight": torch.ones_like}
        state |= {
            name: neutral[name.rpartition(".")[2]](parameter)
            for name, parameter in decoder.named_parameters()
            if name not in state
        }
    # strict: the state must have exactly the weights of OPT.
    decoder.load_state_dict(state, strict=True)
    model.tie_weights()
    return model


def main(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the logits of `ids`, and the gradients of the mean next-token loss.

    `heads` is the number of attention heads. All other arrays are weights, see `build`. The model
    has biases and affine norms if there are weights of them.
    """
    ids, heads = torch.from_numpy(arrays.pop("ids")), arrays.pop("heads").item()
    model = build(arrays, heads, biases="layers.0.fc1.bias" in arrays)
    logits = model(input_ids=ids).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    decoder = model.model.decoder
    gradients = {f"gradient.{k}": v.grad.numpy() for k, v in decoder.named_parameters()}
    return {"logits": logits.detach().numpy(), **gradients}
