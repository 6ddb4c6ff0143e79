"""For the peers' environment: OPT of transformers, shaped as CM3Leon, with weights given to it.

Not a test by itself; `test_decoder_parity.py` runs it through `tests/peers.py`.
"""

import numpy as np
import torch
from transformers import OPTConfig, OPTForCausalLM

# OPT's position table has two rows before the first position.
OFFSET = 2


def build(
    weights: dict[str, np.ndarray], heads: int, attention: str = "eager", biases: bool = False
) -> OPTForCausalLM:
    """OPT with the given weights, in float32.

    Args:
      weights: by OPT's own names, without its prefix `model.decoder.`; see `opt_weights.py`.
      heads: attention heads.
      attention: transformers' `attn_implementation`.
      biases: with the biases and the scales and shifts of norms that CM3Leon leaves out, so that
        they change nothing: zeros and ones.
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
    given = {name: torch.from_numpy(array) for name, array in weights.items()}
    if biases:
        neutral = {"bias": torch.zeros_like, "weight": torch.ones_like}
        given |= {
            name: neutral[name.rpartition(".")[2]](parameter)
            for name, parameter in decoder.named_parameters()
            if name not in given
        }
    # strict: every weight OPT has is given, and every weight given is one OPT has.
    decoder.load_state_dict(given, strict=True)
    model.tie_weights()
    return model


def main(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Logits of `ids`, and the gradient of the mean next-token loss for every weight.

    `heads` is how many there are; all other arrays are weights, see `build`.
    """
    ids, heads = torch.from_numpy(arrays.pop("ids")), arrays.pop("heads").item()
    model = build(arrays, heads)
    logits = model(input_ids=ids).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    decoder = model.model.decoder
    gradients = {f"gradient.{k}": v.grad.numpy() for k, v in decoder.named_parameters()}
    return {"logits": logits.detach().numpy(), **gradients}
