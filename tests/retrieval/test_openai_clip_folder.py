"""OpenAI's CLIP, read from folders in the format of transformers, against transformers."""

import json
import tempfile
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import PIL.Image
import pytest
from safetensors.numpy import load_file, save_file

from leon_jax.config import UserError
from leon_jax.retrieval import convert_openai_clip, openai_clip_folder
from leon_jax.retrieval.encoder import RetrievalEncoder
from leon_jax.retrieval.openai_clip_folder import ImageProcessor, read_image_processor
from tests import peers
from tests.retrieval import clip_folder

SCRIPT = Path(__file__).with_name("clip_in_torch.py")
SIZES = [(16, 16), (40, 17), (9, 31), (3, 2), (64, 64), (1, 1)]  # height, width


def run_peer(arrays: dict[str, np.ndarray], **task) -> dict[str, np.ndarray]:
    encoded = np.frombuffer(json.dumps(task).encode(), np.uint8)
    return peers.run_peer(SCRIPT, {**arrays, "task": encoded})


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Noise on a colour gradient, so that a wrong filter or a shift of a pixel is visible."""
    rng = np.random.default_rng(seed)
    slope = np.linspace(0, 1, height)[:, None, None] * rng.uniform(0, 127, 3)
    return (rng.integers(0, 128, (height, width, 3)) + slope).astype(np.uint8)


def edit(folder: Path, name: str = "config.json", **changes) -> None:
    """Changes keys of a JSON file; `text_config__x` is the key x of the group text_config."""
    values = json.loads((folder / name).read_text())
    for key, value in changes.items():
        *groups, last = key.split("__")
        target = values
        for group in groups:
            target = target[group]
        target[last] = value
    (folder / name).write_text(json.dumps(values))


def rewrite(folder: Path, change) -> None:
    """Applies `change` to the tensors of model.safetensors, by name, and writes the file again."""
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")


def half(dtype):
    return lambda tensors: {name: array.astype(dtype) for name, array in tensors.items()}


def make_sharded(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shards = {name: f"model-0000{i % 3 + 1}.safetensors" for i, name in enumerate(sorted(tensors))}
    for shard in set(shards.values()):
        arrays = {name: array for name, array in tensors.items() if shards[name] == shard}
        save_file(arrays, folder / shard, {"format": "pt"})
    index = {"metadata": {}, "weight_map": shards}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def make_legacy(folder: Path) -> None:
    """Like OpenAI's first folders: wrong ids, duplicate groups, position ids and older settings."""
    values = json.loads((folder / "config.json").read_text())
    for tower in ("text", "vision"):
        correct = values[f"{tower}_config"]
        values[f"{tower}_config_dict"] = correct
        values[f"{tower}_config"] = correct | {"num_hidden_layers": 7}
    values["text_config_dict"] |= {"bos_token_id": 0, "eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps(values))

    positions = {
        "text_model.embeddings.position_ids": np.arange(77)[None],
        "vision_model.embeddings.position_ids": np.arange(5)[None],
    }
    rewrite(folder, lambda tensors: tensors | positions)
    size = clip_folder.SIZE
    settings = {"feature_extractor_type": "CLIPFeatureExtractor", "size": size, "crop_size": size}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings | {"resample": 3}))


def gelu(folder: Path) -> None:
    edit(folder, text_config__hidden_act="gelu", vision_config__hidden_act="gelu")


VARIANTS = {
    "float32": lambda folder: None,
    "float16": lambda folder: rewrite(folder, half(np.float16)),
    "bfloat16": lambda folder: rewrite(folder, half(ml_dtypes.bfloat16)),
    "shards": make_sharded,
    "legacy": make_legacy,
    "gelu": gelu,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of every variant, the images, and the embeddings of transformers."""
    root = tmp_path_factory.mktemp("clip")
    paths = {}
    for name, change in VARIANTS.items():
        paths[name] = clip_folder.write(root / name)
        change(paths[name])
    images = {f"{i}": noise(*size, seed=i) for i, size in enumerate(SIZES)}
    expected = run_peer(
        images,
        do="embed",
        folders=[str(folder) for folder in paths.values()],
        texts=clip_folder.HARD,
    )
    return paths, list(images.values()), expected


@pytest.mark.peers
@pytest.mark.parametrize("variant", VARIANTS)
def test_embeddings_equal_transformers(folders, variant):
    """From strings and images to unit vectors, in float32, within 1e-5."""
    paths, images, expected = folders
    encoder = RetrievalEncoder.load(paths[variant], batch_size=8)
    text_rows, image_rows = (expected[f"{paths[variant]}.{kind}"] for kind in ("text", "image"))
    np.testing.assert_allclose(encoder.embed_texts(clip_folder.HARD), text_rows, atol=1e-5)
    np.testing.assert_allclose(encoder.embed_images(images), image_rows, atol=1e-5)
    # The comparison is only meaningful if different inputs have different embeddings.
    for rows in (text_rows, image_rows):
        assert np.mean(rows @ rows.T) < 0.9


@pytest.mark.peers
@pytest.mark.parametrize(
    ("sizes", "side", "width"),
    [
        pytest.param({}, 224, 512, id="ViT-B/32"),
        pytest.param(
            {
                "projection_dim": 768,
                "text_config": {
                    "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12,
                },
                "vision_config": {
                    "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
                    "num_hidden_layers": 24, "patch_size": 14,
                },
            },
            224,
            768,
            id="ViT-L/14",
            marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_real_sizes_equal_transformers(sizes, side, width):
    """All layers, all widths, random weights as `save_pretrained` writes them: within 1e-5."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 49_406, (3, 77))
    ids[:, 0] = 49_406
    for row, end in enumerate((1, 20, 76)):
        ids[row, end:] = 49_407
    squares = np.stack([noise(side, side), 255 - noise(side, side, seed=1)])
    # Pytest would not delete its temporary folder, and this one has up to 1.7 GB.
    with tempfile.TemporaryDirectory() as folder:
        expected = run_peer({"ids": ids, "squares": squares}, do="save", folder=folder, sizes=sizes)
        model = convert_openai_clip.load(Path(folder), openai_clip_folder.read_config(Path(folder)))
    for name, rows in (
        ("text", jax.jit(lambda m, x: m.embed_text(x))(model, ids.astype(np.int32))),
        ("image", jax.jit(lambda m, x: m.embed_image(x / 255))(model, squares)),
    ):
        assert rows.shape == (len(expected[name]), width)
        np.testing.assert_allclose(rows, expected[name], atol=1e-5)
        assert np.abs(rows[0] - rows[1]).max() > 0.02


@pytest.mark.peers
def test_preprocessed_images_equal_transformers_bit_for_bit():
    settings = [
        {},
        {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}},
        {"size": {"shortest_edge": 73}, "crop_size": {"height": 64, "width": 64}, "resample": 2},
    ]
    sizes = [
        *SIZES, (224, 224), (225, 224), (224, 227), (480, 640), (641, 479), (1000, 33), (17, 900),
        (223, 222), (1, 300), (300, 2), (448, 449),
    ]  # fmt: skip
    images = {f"{height}x{width}": noise(height, width) for height, width in sizes}
    expected = run_peer(images, do="square", settings=settings)
    processors = (
        ImageProcessor(224, 224),
        ImageProcessor(336, 336),
        ImageProcessor(64, 73, PIL.Image.Resampling.BILINEAR),
    )
    for number, processor in enumerate(processors):
        for name, pixels in images.items():
            square = processor(pixels)
            assert square.dtype == np.uint8
            np.testing.assert_array_equal(
                square, expected[f"{number}.{name}"].transpose(1, 2, 0), err_msg=f"{number}.{name}"
            )


def test_of_a_very_long_image_only_the_centre_is_resized():
    """One pixel by 16,384 would become an image of 2.5 GB."""
    long, processor = noise(1, 16_384), ImageProcessor(224, 224)
    np.testing.assert_array_equal(processor(long), processor(long[:, 7692:8692]))
    upright = np.swapaxes(long, 0, 1)
    assert processor(upright).shape == (224, 224, 3)


@pytest.fixture
def folder(tmp_path):
    return clip_folder.write(tmp_path / "clip")


def settings(**changes):
    return lambda folder: edit(folder, "preprocessor_config.json", **changes)


def test_the_image_processor_is_read_from_either_file_or_is_openais(folder):
    size = clip_folder.SIZE
    edit(folder, "preprocessor_config.json", size={"shortest_edge": 20}, resample=2)
    expected = ImageProcessor(size, 20, PIL.Image.Resampling.BILINEAR)
    assert read_image_processor(folder, size) == expected
    values = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": values}))
    assert read_image_processor(folder, size) == expected
    (folder / "processor_config.json").unlink()
    default = ImageProcessor(size, size, PIL.Image.Resampling.BICUBIC)
    assert read_image_processor(folder, size) == default


def drop(name):
    return lambda folder: rewrite(
        folder, lambda tensors: {key: array for key, array in tensors.items() if key != name}
    )


def config(**changes):
    return lambda folder: edit(folder, **changes)


def replace(name, make):
    return lambda folder: rewrite(folder, lambda tensors: tensors | {name: make(tensors.get(name))})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), r"cannot read .*config\.json"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json is not JSON"),
        (config(model_type="siglip"), "model_type 'siglip'"),
        (config(text_config__hidden_act="relu"), r"text_config\.hidden_act is 'relu'"),
        (config(text_config__hidden_act="gelu"), r"vision_config\.hidden_act is 'quick_gelu'"),
        (config(vision_config__layer_norm_eps=1e-6), r"vision_config\.layer_norm_eps is 1e-06"),
        (config(vision_config__intermediate_size=100), "is 100, and leon_jax computes only 96"),
        (config(vision_config__num_channels=1), r"num_channels is 1"),
        (config(text_config__eos_token_id=5), r"eos_token_id is 5"),
        (
            config(text_config__hidden_size="16"),
            r"text_config\.hidden_size is '16'; it must be int",
        ),
        (config(text_config=[]), r"text_config is \[\]"),
        (config(vision_config__num_attention_heads=5), "width 24 is not a multiple of heads 5"),
        (
            config(projection_dim=13),
            r"projection.weight in .* \[12, \d+\], but config\.json requires \[13",
        ),
        (drop("text_projection.weight"), r"lacks the tensor text_projection\.weight$"),
        (config(vision_config__num_hidden_layers=3), r"lacks the tensor .* and 15 more"),
        (
            replace("text_model.extra.weight", lambda _: np.zeros(2)),
            r"holds a tensor that is not CLIP's, text_model\.extra\.weight$",
        ),
        (
            replace("logit_scale", lambda old: old[None]),
            r"logit_scale in .* has the shape \[1\], but config\.json requires \[\]",
        ),
        (
            replace("visual_projection.weight", lambda old: old.astype(np.int8)),
            r"visual_projection\.weight in .* is of type I8",
        ),
        (
            replace("visual_projection.weight", lambda old: old * np.inf),
            r"clip has NaN or infinite numbers in 'visual_projection\.weight'",
        ),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
            r"has no model\.safetensors, the only weight format",
        ),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"damaged"),
            r"model\.safetensors is not a whole safetensors file",
        ),
        (
            lambda folder: (make_sharded(folder), (folder / "model-00002.safetensors").unlink()),
            r"there is no .*model-00002\.safetensors",
        ),
        (
            lambda folder: (
                make_sharded(folder),
                (folder / "model.safetensors.index.json").write_text("[]"),
            ),
            r"index\.json does not list the files of the weights",
        ),
        (lambda folder: (folder / "vocab.json").unlink(), "has no text tokenizer"),
        (
            lambda folder: edit(folder, "vocab.json", **{"more": 9999}),
            r"start and end at \d+ and \d+; the model needs",
        ),
        (settings(image_processor_type="ViTImageProcessor"), "is for ViTImageProcessor"),
        (settings(do_center_crop=False), "do_center_crop is False"),
        (settings(image_mean=[0.5, 0.5, 0.5]), r"image_mean is \[0\.5, 0\.5, 0\.5\]"),
        (settings(crop_size=32), "crop_size is 32; the network needs 16"),
        (settings(size={"height": 16, "width": 16}), "it must be the shorter side, 16 or more"),
        (settings(size={"shortest_edge": 8}), "it must be the shorter side, 16 or more"),
        (settings(resample=9), "resample is 9, which is not a filter of Pillow"),
    ],
)
def test_a_folder_that_cannot_be_read_is_an_error(folder, change, message):
    change(folder)
    with pytest.raises(UserError, match=message):
        openai_clip_folder.load(folder)
