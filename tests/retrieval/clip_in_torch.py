"""Runs the CLIP of transformers on folders, texts and images, in the peers' environment.

This is not a test; `test_openai_clip_folder.py` and others run it through `tests/peers.py`.
"""

import json

import numpy as np
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil


def main(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Runs the task in the JSON text `task`: `do` is its name, the other keys are arguments."""
    task = json.loads(arrays.pop("task").tobytes())
    return {"embed": embed, "tokenize": tokenize, "square": square, "save": save}[task.pop("do")](
        arrays, **task
    )


def embed(
    arrays: dict[str, np.ndarray], folders: list[str], texts: list[str]
) -> dict[str, np.ndarray]:
    """Embeds the texts and the images (uint8[h, w, 3]) with each folder's model."""
    return {
        f"{folder}.{kind}": rows
        for folder in folders
        for kind, rows in _embed(arrays, folder, texts).items()
    }


def _embed(arrays: dict[str, np.ndarray], folder: str, texts: list[str]) -> dict[str, np.ndarray]:
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    length = model.config.text_config.max_position_embeddings
    tokens = tokenizer(
        texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    )
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    images = processor(
        [arrays[name] for name in sorted(arrays)],
        input_data_format="channels_last",
        return_tensors="pt",
    )
    with torch.inference_mode():
        text = model.get_text_features(**tokens).pooler_output
        image = model.get_image_features(**images).pooler_output
    return {
        name: torch.nn.functional.normalize(rows, dim=-1).numpy()
        for name, rows in (("text", text), ("image", image))
    }


def tokenize(
    arrays: dict[str, np.ndarray], folder: str, texts: list[str], length: int, out: str
) -> dict[str, np.ndarray]:
    """Returns the ids of each text, cut to `length`, and saves the tokenizer to `out`."""
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    ids = {
        str(number): np.array(tokenizer(text, truncation=True, max_length=length)["input_ids"])
        for number, text in enumerate(texts)
    }
    tokenizer.save_pretrained(out)
    return ids


def square(arrays: dict[str, np.ndarray], settings: list[dict]) -> dict[str, np.ndarray]:
    """Preprocesses each image (uint8[h, w, 3]) with each settings to uint8[3, side, side]."""
    squares = {}
    for number, arguments in enumerate(settings):
        processor = CLIPImageProcessorPil(**arguments, do_rescale=False, do_normalize=False)
        for name, pixels in arrays.items():
            batch = processor([pixels], input_data_format="channels_last")
            squares[f"{number}.{name}"] = np.ascontiguousarray(batch["pixel_values"][0])
    return squares


def save(
    arrays: dict[str, np.ndarray], folder: str, sizes: dict, shard: str = "50GB"
) -> dict[str, np.ndarray]:
    """Saves a CLIP with random weights to the folder and embeds `ids` and `squares` with it.

    Every tensor is random, so that no tensor of zeros or ones hides a missing term.

    Args:
      arrays: ids int64[n, t] and squares uint8[n, size, size, 3].
      folder: the folder to write.
      sizes: arguments of CLIPConfig.
      shard: the largest size of a file.
    """
    config = CLIPConfig(**sizes)
    torch.manual_seed(0)
    model = CLIPModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, parameter[0].numel() ** -0.5)
            else:
                scale = name.endswith(("norm.weight", "norm1.weight", "norm2.weight"))
                parameter.normal_(float(scale), 0.2)
    model.save_pretrained(folder, max_shard_size=shard)
    pixels = torch.from_numpy(arrays["squares"]).permute(0, 3, 1, 2) / 255
    processor = CLIPImageProcessorPil()
    mean, deviation = (
        torch.tensor(values)[:, None, None]
        for values in (processor.image_mean, processor.image_std)
    )
    with torch.inference_mode():
        text = model.get_text_features(torch.from_numpy(arrays["ids"])).pooler_output
        image = model.get_image_features((pixels - mean) / deviation).pooler_output
    return {
        name: torch.nn.functional.normalize(rows, dim=-1).numpy()
        for name, rows in (("text", text), ("image", image))
    }
