"""A model folder with tiny random weights and a prepared folder, for tests of generation."""

import atexit
import dataclasses
import functools
import pathlib
import shutil
import tempfile

import jax
import numpy as np
from flax import nnx

from leon_jax import sharding, weight_files
from leon_jax.config import to_dict
from leon_jax.data.sources.raw_record import SourceConfig
from leon_jax.documents import Document, Image, Provenance, Text
from leon_jax.models.clip import CLIPConfig, TextConfig, VisionConfig, create
from leon_jax.models.decoder import Decoder
from leon_jax.models.decoder_config import DecoderConfig
from leon_jax.models.vqgan import VQGAN, VQGANConfig
from leon_jax.prepare import prepare
from leon_jax.prepare.config import DuplicatesConfig, PrepareConfig
from leon_jax.retrieval.neighbour_selection import SelectionConfig
from leon_jax.tokenizers.text import TextTokenizer
from leon_jax.vocabulary import Vocabulary
from tests.listed import Listed

CONCEPTS = ("cat face", "red heart", "blue car", "green tree", "old clock", "ripe apple")
PROMPT = "cat face, Twemoji style"
CODES, GRID, RESOLUTION, CONTEXT = 32, 4, 16, 160


@functools.cache
def folders() -> tuple[pathlib.Path, pathlib.Path]:
    """Returns a model folder and a prepared folder, written once. Tests must not change them."""
    root = pathlib.Path(tempfile.mkdtemp(prefix="leon_tiny_"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    with jax.set_mesh(sharding.make_mesh((1, 1, 1, 1), jax.devices()[:1])):
        model_folder = write_model_folder(root / "tiny")
        return model_folder, write_prepared(root / "prepared", model_folder)


def randomise[M: nnx.Module](module: M, scale: float = 0.3, seed: int = 0) -> M:
    """Replaces all arrays by random ones, because identity blocks would hide errors of a cache.

    Args:
      module: concrete, or abstract from `jax.eval_shape`, which compiles nothing.
      scale: the standard deviation.
      seed: seed of the random numbers.
    """
    leaves, structure = jax.tree.flatten(module)
    rng = np.random.default_rng(seed)
    arrays = []
    for leaf in leaves:
        layout = jax.NamedSharding(jax.sharding.get_mesh(), leaf.sharding.spec)
        array = np.asarray(rng.normal(0, scale, leaf.shape), leaf.dtype)
        arrays.append(jax.device_put(array, layout))
    return jax.tree.unflatten(structure, arrays)


def random_decoder(vocab_size: int, max_length: int, seed: int = 0, **options) -> Decoder:
    """Returns a decoder with two layers of width 32, in float32.

    Args:
      vocab_size, max_length: see `DecoderConfig`.
      seed: seed of the weights.
      options: other fields of `DecoderConfig`.
    """
    config = DecoderConfig(vocab_size, max_length, layers=2, embed=32, heads=4, mlp=64, **options)
    return randomise(jax.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))), seed=seed)


def documents() -> list[Document]:
    """Returns captions in two styles, each with an image of random stripes."""
    documents = []
    for style, licence in (("Twemoji", "CC-BY-4.0"), ("OpenMoji", "CC-BY-SA-4.0")):
        for number, concept in enumerate(CONCEPTS):
            rng = np.random.default_rng([number, len(style)])
            pixels = rng.integers(0, 256, (1, RESOLUTION, 3), np.uint8).repeat(RESOLUTION, axis=0)
            provenance = Provenance(f"{style.lower()}/{number}", style, licence, f"{style} authors")
            caption = Text(f"{concept}, {style} style")
            documents.append(Document((caption, Image(pixels=pixels)), provenance))
    return documents


def held_out() -> list[Document]:
    """Returns four documents whose keys and images are not in `documents`."""
    held_out = []
    for number, document in enumerate(documents()[:4]):
        provenance = dataclasses.replace(document.provenance, key=f"held_out/{number}")
        caption, image = document.parts
        held_out.append(Document((caption, Image(pixels=255 - image.pixels)), provenance))
    return held_out


def write_model_folder(folder: pathlib.Path) -> pathlib.Path:
    """Writes the four files of a model folder. Needs a mesh to be set."""
    folder.mkdir(parents=True, exist_ok=True)
    text = TextTokenizer.train([document.parts[0].text for document in documents()], 300)
    text.save(folder / "text.json")
    vocabulary = Vocabulary.compact(CODES, text.size, sentinels=4)
    decoder = random_decoder(vocabulary.size, CONTEXT)
    header = {
        "model": to_dict(decoder.config),
        "vocabulary": to_dict(vocabulary),
        "image_shape": [GRID, GRID],
    }
    weight_files.save(folder / "decoder.safetensors", decoder, "decoder", header)
    config = VQGANConfig(
        resolution=RESOLUTION, channels=8, multipliers=(1, 1, 2), blocks=1, attention_sizes=(),
        groups=4, latent=8, code_dim=4, codes=CODES,
    )  # fmt: skip
    vqgan = randomise(jax.eval_shape(lambda: VQGAN(config, rngs=nnx.Rngs(0))))
    weight_files.save(folder / "tokenizer.safetensors", vqgan, "tokenizer", to_dict(config))
    clip = CLIPConfig(
        VisionConfig(image_size=RESOLUTION, patch_size=8, width=16, layers=1, heads=2),
        TextConfig(context_length=24, vocab_size=text.size + 3, width=16, layers=1, heads=2),
        embed_dim=8,
    )
    encoder = randomise(jax.eval_shape(lambda: create(clip, jax.random.key(0))))
    weight_files.save(folder / "encoder.safetensors", encoder, "encoder", to_dict(clip))
    return folder


def write_prepared(folder: pathlib.Path, model_folder: pathlib.Path) -> pathlib.Path:
    """Prepares `documents` with the files of a model folder. Needs a mesh to be set."""
    config, sources = preparation(model_folder, {"train": documents(), "unseen_design": held_out()})
    prepare.prepare(config, folder, sources=sources, progress=False)
    return folder


def preparation(
    model_folder: pathlib.Path, splits: dict[str, list[Document]], shard_size: int = 5, **changes
) -> tuple[PrepareConfig, prepare.Sources]:
    """Returns the arguments of `prepare`: a configuration, and documents in memory as sources."""
    values = {
        "sources": tuple(SourceConfig("jsonl", "tiny", split) for split in splits),
        "tokenizer": str(model_folder / "tokenizer.safetensors"),
        "encoder": str(model_folder / "encoder.safetensors"),
        "text": str(model_folder / "text.json"),
        "min_side": 1,
        "duplicates": DuplicatesConfig(exact=False),
        # With a random encoder all documents are similar.
        "selection": SelectionConfig(
            near_copy_query=2.0, near_copy_document=0.999, near_copy_picture=None
        ),
    }
    config = PrepareConfig(**values | changes)
    sources = [Listed(documents, shard_size) for documents in splits.values()]
    return config, list(zip(config.sources, sources, strict=False))
