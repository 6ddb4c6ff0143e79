"""Writes folders of a tiny CLIP in the format of transformers, with random weights."""

import json
from pathlib import Path

import numpy as np
import tokenizers
from safetensors.numpy import save_file
from tokenizers import models, normalizers, pre_tokenizers, trainers

SIZE, PATCH, EMBED = 16, 8, 12  # side of the image and of a patch in pixels, and embedding length
TEXTS = (
    "a photo of a cat and another photo of a dog",
    "the red heart, the blue car and the green tree; it's 2026 and we'll see",
    "un café à Paris, 日本語 and a smiling face 😀 next to <b>bold</b> text",
)
# Texts that tokenizers often encode differently.
HARD = (
    *TEXTS,
    "",
    " \t\n ",
    "  Hello\tWORLD\n again  ",
    "don't WE'LL it's 'S dogs' store",
    "e\u0301 é ＡＢＣ ﬁ ß İstanbul ǅ Ω",
    "👩\u200d👩\u200d👧 🇩🇪 ☃ 1️⃣",
    "<b>html &amp; &lt;</w></b> x</w>y",
    "العربية हिन्दी ไทย 한국어 עברית",
    "123,456.78 x² №1 Ⅷ ½",
    "a\u00a0b\u200bc\u3000d\ufeffe",
    "\x00\x1f\x7f \ufffd",
    "!!! ... --- ((a)) $%^&*",
    "word " * 200,
    "unbrokenunbroken" * 60,
    "<|endoftext|>",
    "<|STARTOFTEXT|> upper <|EndOfText|>",
    "before <|startoftext|> between <|endoftext|> after",
)


def write_vocabulary(folder: Path, size: int = 700) -> int:
    """Trains a BPE like CLIP's on `TEXTS`, writes vocab.json and merges.txt, and returns its size.

    The ids have the order of OpenAI's: bytes, bytes that end a word, merges, start, end.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    assert len(merges) > 50
    tokens = [*alphabet, *(f"{byte}</w>" for byte in alphabet), *("".join(m) for m in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(tokens)


def configuration(vocabulary: int) -> dict:
    """Returns config.json for towers of two layers with different widths and head counts."""
    shared = {"num_hidden_layers": 2, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
    return {
        "model_type": "clip",
        "projection_dim": EMBED,
        "text_config": {
            "vocab_size": vocabulary,
            "hidden_size": 16,
            "intermediate_size": 64,
            "num_attention_heads": 4,
            "max_position_embeddings": 77,
            "eos_token_id": vocabulary - 1,
            "bos_token_id": vocabulary - 2,
            **shared,
        },
        "vision_config": {
            "hidden_size": 24,
            "intermediate_size": 96,
            "num_attention_heads": 3,
            "image_size": SIZE,
            "patch_size": PATCH,
            **shared,
        },
    }


def random_tensors(config: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """Returns every tensor of the CLIPModel of transformers, float32, none of them constant."""
    text, vision = config["text_config"], config["vision_config"]
    rng = np.random.default_rng(seed)
    tensors = {"logit_scale": np.array(rng.normal(2.6), np.float32)}

    def add(name: str, *shape: int, mean: float = 0.0) -> None:
        tensors[name] = rng.normal(mean, 0.3, shape).astype(np.float32)

    def norm(name: str, width: int) -> None:
        add(f"{name}.weight", width, mean=1.0)
        add(f"{name}.bias", width)

    towers = (("text", "text_model", text), ("visual", "vision_model", vision))
    for short, tower, sizes in towers:
        width, hidden = sizes["hidden_size"], sizes["intermediate_size"]
        add(f"{short}_projection.weight", config["projection_dim"], width)
        for layer in range(sizes["num_hidden_layers"]):
            prefix = f"{tower}.encoder.layers.{layer}"
            norm(f"{prefix}.layer_norm1", width)
            norm(f"{prefix}.layer_norm2", width)
            for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                add(f"{prefix}.self_attn.{name}.weight", width, width)
                add(f"{prefix}.self_attn.{name}.bias", width)
            add(f"{prefix}.mlp.fc1.weight", hidden, width)
            add(f"{prefix}.mlp.fc1.bias", hidden)
            add(f"{prefix}.mlp.fc2.weight", width, hidden)
            add(f"{prefix}.mlp.fc2.bias", width)
    add("text_model.embeddings.token_embedding.weight", text["vocab_size"], text["hidden_size"])
    add(
        "text_model.embeddings.position_embedding.weight",
        text["max_position_embeddings"],
        text["hidden_size"],
    )
    norm("text_model.final_layer_norm", text["hidden_size"])
    width, patch = vision["hidden_size"], vision["patch_size"]
    positions = (vision["image_size"] // patch) ** 2 + 1
    add("vision_model.embeddings.class_embedding", width)
    add("vision_model.embeddings.patch_embedding.weight", width, 3, patch, patch)
    add("vision_model.embeddings.position_embedding.weight", positions, width)
    norm("vision_model.pre_layrnorm", width)
    norm("vision_model.post_layernorm", width)
    return tensors


def write(folder: Path) -> Path:
    """Writes the files of a CLIP, with vocab.json, merges.txt and preprocessor_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    config = configuration(write_vocabulary(folder))
    (folder / "config.json").write_text(json.dumps(config))
    save_file(random_tensors(config), folder / "model.safetensors")
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": SIZE},
        "crop_size": {"height": SIZE, "width": SIZE},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder
