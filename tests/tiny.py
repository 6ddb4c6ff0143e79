"""A complete Leon with tiny random weights: everything that the answering side reads."""

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
from leon_jax.models.decoder import Decoder, DecoderConfig
from leon_jax.models.vqgan import VQGAN, VQGANConfig
from leon_jax.prepare import prepare
from leon_jax.prepare.config import DuplicatesConfig, PrepareConfig
from leon_jax.retrieval.selection import SelectionConfig
from leon_jax.tokenizers.text import TextTokenizer
from leon_jax.vocabulary import Vocabulary
from tests.listed import Listed

CONCEPTS = ("cat face", "red heart", "blue car", "green tree", "old clock", "ripe apple")
PROMPT = "cat face, Twemoji style"
CODES, GRID, RESOLUTION, CONTEXT = 32, 4, 16, 160


@functools.cache
def folders() -> tuple[pathlib.Path, pathlib.Path]:
    """A model folder and a prepared folder, made once a process; do not change them."""
    root = pathlib.Path(tempfile.mkdtemp(prefix="leon_tiny_"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    with jax.set_mesh(sharding.make_mesh((1, 1, 1, 1), jax.devices()[:1])):
        checkpoint = write_checkpoint(root / "tiny")
        return checkpoint, write_prepared(root / "prepared", checkpoint)


def randomise[M: nnx.Module](module: M, scale: float = 0.3, seed: int = 0) -> M:
    """Every array drawn anew. Blocks that start as the identity would hide mistakes in a cache.

    Args:
      module: concrete, or abstract from `jax.eval_shape`, which compiles nothing.
      scale: the standard deviation.
      seed: decides the numbers.
    """
    leaves, structure = jax.tree.flatten(module)
    rng = np.random.default_rng(seed)
    drawn = []
    for leaf in leaves:
        layout = jax.NamedSharding(jax.sharding.get_mesh(), leaf.sharding.spec)
        array = np.asarray(rng.normal(0, scale, leaf.shape), leaf.dtype)
        drawn.append(jax.device_put(array, layout))
    return jax.tree.unflatten(structure, drawn)


def random_decoder(vocab_size: int, max_length: int, seed: int = 0, part_step: int = 1) -> Decoder:
    """Two layers, 32 wide, float32."""
    config = DecoderConfig(
        vocab_size, max_length, layers=2, embed=32, heads=4, mlp=64, part_step=part_step
    )
    return randomise(jax.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))), seed=seed)


def documents() -> list[Document]:
    """Captions in two styles, each with a picture of random stripes."""
    made = []
    for style, licence in (("Twemoji", "CC-BY-4.0"), ("OpenMoji", "CC-BY-SA-4.0")):
        for number, concept in enumerate(CONCEPTS):
            rng = np.random.default_rng([number, len(style)])
            pixels = rng.integers(0, 256, (1, RESOLUTION, 3), np.uint8).repeat(RESOLUTION, axis=0)
            provenance = Provenance(f"{style.lower()}/{number}", style, licence, f"{style} authors")
            made.append(
                Document((Text(f"{concept}, {style} style"), Image(pixels=pixels)), provenance)
            )
    return made


def held_out() -> list[Document]:
    """Four more, of which `documents` holds neither the keys nor the pictures."""
    made = []
    for number, document in enumerate(documents()[:4]):
        provenance = dataclasses.replace(document.provenance, key=f"held_out/{number}")
        caption, picture = document.parts
        made.append(Document((caption, Image(pixels=255 - picture.pixels)), provenance))
    return made


def write_checkpoint(folder: pathlib.Path) -> pathlib.Path:
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


def write_prepared(folder: pathlib.Path, checkpoint: pathlib.Path) -> pathlib.Path:
    """Prepares `documents` with the files of a model folder. Needs a mesh to be set."""
    config, sources = preparation(checkpoint, {"train": documents(), "unseen_design": held_out()})
    prepare.prepare(config, folder, sources=sources, progress=False)
    return folder


def preparation(
    checkpoint: pathlib.Path, splits: dict[str, list[Document]], shard_size: int = 5, **changes
) -> tuple[PrepareConfig, prepare.Sources]:
    """What `prepare` takes: a configuration, and documents of memory as its sources."""
    values = {
        "sources": tuple(SourceConfig("jsonl", "tiny", split) for split in splits),
        "tokenizer": str(checkpoint / "tokenizer.safetensors"),
        "encoder": str(checkpoint / "encoder.safetensors"),
        "text": str(checkpoint / "text.json"),
        "min_side": 1,
        "duplicates": DuplicatesConfig(exact=False),
        # A random encoder finds everything alike.
        "selection": SelectionConfig(
            near_copy_query=2.0, near_copy_document=0.999, near_copy_picture=None
        ),
    }
    config = PrepareConfig(**values | changes)
    sources = [Listed(documents, shard_size) for documents in splits.values()]
    return config, list(zip(config.sources, sources, strict=False))
