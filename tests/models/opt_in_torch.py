"""For the peers' environment: OPT of transformers, shaped as CM3Leon, with weights given to it.

Not a test by itself; `test_decoder_parity.py` runs it through `tests/peers.py`.
"""

import numpy as np
import torch
from transformers import OPTConfig, OPTForCausalLM

# OPT's position table has two rows before the first position.
OFFSET = 2


def main(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Logits of `ids`, and the gradient of the mean next-token loss for every weight.

    Weights come and go under OPT's own names, without its prefix `model.decoder.`; `shape` holds
    (layers, heads).
    """
    ids = torch.from_numpy(arrays.pop("ids"))
    layers, heads = arrays.pop("shape").tolist()
    vocab, embed = arrays["embed_tokens.weight"].shape
    model = OPTForCausalLM(
        OPTConfig(
            vocab_size=vocab,
            hidden_size=embed,
            word_embed_proj_dim=embed,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            ffn_dim=arrays["layers.0.fc1.weight"].shape[0],
            max_position_embeddings=arrays["embed_positions.weight"].shape[0] - OFFSET,
            do_layer_norm_before=True,
            layer_norm_elementwise_affine=False,
            enable_bias=False,
            activation_function="relu",
            tie_word_embeddings=True,
            dropout=0.0,
            attention_dropout=0.0,
            attn_implementation="eager",
        )
    )
    decoder = model.model.decoder
    # strict: every weight OPT has is given, and every weight given is one OPT has.
    decoder.load_state_dict({k: torch.from_numpy(v) for k, v in arrays.items()}, strict=True)
    model.tie_weights()
    logits = model(input_ids=ids).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    gradients = {f"gradient.{k}": v.grad.numpy() for k, v in decoder.named_parameters()}
    return {"logits": logits.detach().numpy(), **gradients}
