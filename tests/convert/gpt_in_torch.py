"""LlamaGen's class-conditional GPT in PyTorch, from its published layout; it runs in the peers.

The state is a plain dictionary of tensors under the published names. The rotation is written with
complex numbers, and decoding has no cache, so that little is alike in the two computations.
"""

import json
import math

import torch
import torch.nn.functional as F


def main(arrays):
    """Makes random weights, writes them as a checkpoint, and computes logits and greedy codes.

    The arguments are `options` (JSON as bytes), `classes` int[b] and `codes` int[b, n]. The results
    are `logits` float[b, n + 1, codes], of the class and of each code; `guided`, the same after
    guidance; and `greedy` int[b, steps], the likeliest guided codes one after the other.
    """
    options = json.loads(arrays["options"].tobytes())
    torch.manual_seed(options["seed"])
    torch.set_grad_enabled(False)
    state = random_state(options)
    dtype = getattr(torch, options.get("dtype", "float32"))
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    content = dict(state) | {"freqs_cis": torch.ones(2, 4, 2)}
    if options["envelope"]:
        content = {options["envelope"]: content, "steps": 7, "optimizer": {"state": {}}}
    torch.save(content, options["file"])
    state = {name: tensor.float() for name, tensor in state.items()}
    classes, codes = torch.from_numpy(arrays["classes"]), torch.from_numpy(arrays["codes"])
    null = torch.full_like(classes, options["classes"])
    scale = options["guidance"]

    def guided(codes):
        conditional, unconditional = (logits(state, options, c, codes) for c in (classes, null))
        return unconditional + (conditional - unconditional) * scale

    chosen = codes[:, :0]
    for _ in range(options["steps"]):
        chosen = torch.cat([chosen, guided(chosen)[:, -1].argmax(-1, keepdim=True)], 1)
    results = {
        "logits": logits(state, options, classes, codes), "guided": guided(codes), "greedy": chosen
    }  # fmt: skip
    return {name: value.contiguous().numpy() for name, value in results.items()}


def random_state(options):
    """Returns tensors by name; `options` are the sizes of the network."""
    width, hidden = options["dim"], options["hidden"]
    head = width // options["heads"]
    fused = (options["heads"] + 2 * options["kv_heads"]) * head

    def normal(*shape):
        return torch.randn(shape) / math.sqrt(shape[-1])

    state = {
        "cls_embedding.embedding_table.weight": torch.randn(options["classes"] + 1, width),
        "tok_embeddings.weight": torch.randn(options["codes"], width),
        "norm.weight": torch.rand(width) + 0.5,
        "output.weight": normal(options["codes"], width) * 3,
    }
    for number in range(options["layers"]):
        layer = {
            "attention.wqkv.weight": normal(fused, width) * 2,
            "attention.wo.weight": normal(width, width),
            "feed_forward.w1.weight": normal(hidden, width),
            "feed_forward.w3.weight": normal(hidden, width),
            "feed_forward.w2.weight": normal(width, hidden),
            "attention_norm.weight": torch.rand(width) + 0.5,
            "ffn_norm.weight": torch.rand(width) + 0.5,
        }
        state |= {f"layers.{number}.{name}": tensor for name, tensor in layer.items()}
    return state


def rotations(options):
    """Returns complex[1 + grid^2, head_dim / 2]: zero for the class, then the cells by rows."""
    grid, pairs = options["grid"], options["dim"] // options["heads"] // 2
    half = pairs // 2
    rates = 10_000.0 ** (-torch.arange(half) / half)
    rows, columns = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    angles = torch.cat([place.reshape(-1, 1) * rates for place in (rows, columns)], dim=1)
    turns = torch.polar(torch.ones_like(angles), angles)
    return torch.cat([torch.zeros(1, pairs, dtype=turns.dtype), turns])


def rms(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def logits(state, options, classes, codes):
    """Returns the logits after the class and after each code, float[b, n + 1, codes]."""
    heads, kv_heads = options["heads"], options["kv_heads"]
    x = torch.cat(
        [state["cls_embedding.embedding_table.weight"][classes][:, None],
         state["tok_embeddings.weight"][codes]], 1,
    )  # fmt: skip
    batch, length, width = x.shape
    head = width // heads
    turns = rotations(options)[:length, None]
    future = torch.full((length, length), -torch.inf).triu(1)

    def turned(x):
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], head // 2, 2).contiguous())
        return torch.view_as_real(pairs * turns).flatten(-2)

    for number in range(options["layers"]):
        weights = {
            name.split(".", 2)[2]: tensor
            for name, tensor in state.items()
            if name.startswith(f"layers.{number}.")
        }
        fused = rms(x, weights["attention_norm.weight"]) @ weights["attention.wqkv.weight"].T
        q = turned(fused[..., :width].reshape(batch, length, heads, head))
        k, v = fused[..., width:].reshape(batch, length, 2, kv_heads, head).unbind(2)
        k, v = (each.repeat_interleave(heads // kv_heads, 2) for each in (turned(k), v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(head) + future
        attended = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)
        x = x + attended @ weights["attention.wo.weight"].T
        y = rms(x, weights["ffn_norm.weight"])
        y = F.silu(y @ weights["feed_forward.w1.weight"].T) * (
            y @ weights["feed_forward.w3.weight"].T
        )
        x = x + y @ weights["feed_forward.w2.weight"].T
    return rms(x, state["norm.weight"]) @ state["output.weight"].T
