"""Tests the decoder's training program: learning, metrics, samples, export and configs."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from leon_jax import config as configuration
from leon_jax import sharding, weight_files
from leon_jax.config import ConfigError, UserError
from leon_jax.documents import Document, Image, Text
from leon_jax.leon import Leon
from leon_jax.model_folder import ModelFolder
from leon_jax.models.clip import CLIPConfig, TextConfig, VisionConfig, create
from leon_jax.models.decoder import Decoder
from leon_jax.models.decoder_config import DecoderConfig, Form
from leon_jax.models.vqgan import VQGAN, VQGANConfig
from leon_jax.retrieval.prepared_folder import write_split
from leon_jax.tokenizers.text import TextTokenizer
from leon_jax.train.decoder import DecoderProgram
from leon_jax.train.decoder_config import DecoderTraining
from leon_jax.train.decoder_loss import batch_loss
from leon_jax.vocabulary import Vocabulary

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
NAMES = ("red heart", "blue car", "green tree", "old clock")


def write_data(folder: pathlib.Path) -> None:
    """Writes four documents with image codes; each document's neighbour is the next one."""
    rng = np.random.default_rng(0)
    documents = [
        Document((Text(name), Image(codes=rng.integers(0, 16, (2, 2)).astype(np.int32))))
        for name in NAMES
    ]
    ids = np.array([[(i + 1) % 4] for i in range(4)], np.int32)
    write_split(folder, "train", documents, np.stack([ids, ids]))
    TextTokenizer.train(NAMES, 270).save(folder / "text.json")


def write_folder(folder: pathlib.Path) -> None:
    """Writes the data and an image tokenizer for samples."""
    write_data(folder)
    shape = VQGANConfig(
        resolution=8, channels=8, multipliers=(1, 1, 2), blocks=1, attention_sizes=(),
        groups=4, latent=8, code_dim=4, codes=16,
    )  # fmt: skip
    vqgan = jax.jit(lambda: VQGAN(shape, rngs=nnx.Rngs(0)))()
    weight_files.save(
        folder / "tokenizer.safetensors", vqgan, "tokenizer", configuration.to_dict(shape)
    )


def make_config(folder: pathlib.Path) -> ConfigDict:
    text = TextTokenizer.load(folder / "text.json")
    vocabulary = Vocabulary.compact(image_codes=16, text_tokens=text.size, sentinels=4)
    return ConfigDict(
        {
            "kind": "decoder",
            "seed": 0,
            "batch_size": 8,
            "steps": 60,
            "loss_chunk": 100,
            "vocabulary": configuration.to_dict(vocabulary),
            "model": {
                "vocab_size": vocabulary.size,
                "max_length": 64,
                "layers": 2,
                "embed": 32,
                "heads": 2,
                "mlp": 128,
                "init_std": 0.1,
            },
            "optimizer": {"learning_rate": 1e-2, "warmup_steps": 5, "total_steps": 60},
            "data": {
                "folder": str(folder),
                "text": str(folder / "text.json"),
                "image_shape": (2, 2),
                "length": 64,
                "retrieved": (0.5, 0.5),
                "threads": 0,
            },
            "samples": {
                "image": str(folder / "tokenizer.safetensors"),
                "captions": ("red heart", "blue car"),
                "guidance": 2.0,
            },
        }
    )


def build_program(config: ConfigDict) -> DecoderProgram:
    """Builds the program as the command line does."""
    return DecoderProgram(configuration.build(DecoderTraining, config))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    with jax.set_mesh(sharding.make_mesh((1, 1, 1, 1), jax.devices()[:1])):
        write_folder(folder)
    return folder


@pytest.fixture(scope="module")
def trained(folder):
    """Returns the program, the final state and the metrics of every step."""
    with jax.set_mesh(sharding.make_mesh((1, 1, 1, 1), jax.devices()[:1])):
        program = build_program(make_config(folder))
        state = jax.jit(program.init)(jax.random.key(0))
        step, history = jax.jit(program.step, donate_argnums=0), []
        data = iter(program.batches())
        for _ in range(program.config.steps):
            state, metrics = step(state, next(data))
            history.append(jax.device_get(metrics))
        return program, state, history


@pytest.mark.slow
def test_both_modalities_are_learnt(trained):
    """A model that has memorised the four documents must still guess which one, and the masks."""
    _, state, history = trained
    assert int(state.step) == 60
    for name in ("loss", "loss_text", "loss_image"):
        start, end = history[0][name], np.mean([metrics[name] for metrics in history[-10:]])
        assert start > 4 and end < 1.2, (name, start, end)
        assert all(np.isfinite(metrics[name]) for metrics in history)


def test_the_first_loss_is_that_of_a_uniform_distribution(folder):
    config = make_config(folder)
    config.model.init_std = 0.006
    program = build_program(config)
    state = jax.jit(program.init)(jax.random.key(0))
    _, metrics = batch_loss(
        state.model,
        next(iter(program.batches())),
        vocabulary=program.config.vocabulary,
        chunk=64,
    )
    # The hidden states have norm sqrt(embed) and the table std 0.006: logits are nearly equal.
    np.testing.assert_allclose(metrics["loss"], np.log(config.model.vocab_size), rtol=0.02)


def test_loss_metrics_are_means_over_targets_of_their_kind(folder):
    program = build_program(make_config(folder))
    model = jax.jit(program.init)(jax.random.key(1)).model
    batch, vocabulary = next(iter(program.batches())), program.config.vocabulary
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
        name: (shape.shape, shape.dtype) for name, shape in program.batch_shapes().items()
    }
    _, metrics = batch_loss(model, batch, vocabulary=vocabulary, chunk=64)
    hidden = model(batch["ids"], batch["positions"], batch["segment_ids"])
    scores = np.asarray(jax.nn.log_softmax(model.logits(hidden)))
    losses = -np.take_along_axis(scores, batch["targets"][..., None], axis=-1)[..., 0]
    is_target = batch["segment_ids"] > 0
    for name, mask in [
        ("loss", is_target),
        ("loss_text", is_target & vocabulary.is_text(batch["targets"])),
        ("loss_image", is_target & vocabulary.is_image(batch["targets"])),
    ]:
        np.testing.assert_allclose(metrics[name], losses[mask].mean(), rtol=1e-5)
    assert metrics["tokens"] == is_target.sum()


def test_targets_with_weight_zero_do_not_change_the_loss(folder):
    config = make_config(folder)
    config.masking = ConfigDict({"sentinel_weight": 0.0, "spans": "fim"})
    program = build_program(config)
    batch, vocabulary = next(iter(program.batches())), program.config.vocabulary
    sentinels = vocabulary.is_sentinel(batch["targets"])
    assert sentinels.any() and (batch["weights"][sentinels] == 0).all()
    model = jax.jit(program.init)(jax.random.key(0)).model
    changed = {**batch, "targets": np.where(sentinels, vocabulary.eoss, batch["targets"])}
    before = batch_loss(model, batch, vocabulary=vocabulary, chunk=64)[0]
    assert before == batch_loss(model, changed, vocabulary=vocabulary, chunk=64)[0]


@pytest.mark.parametrize("microbatches", [2, 4])
def test_microbatches_give_the_same_update(folder, microbatches):
    """Compares Adam's first moments, which are a tenth of the gradients."""
    config = make_config(folder)
    config.z_loss = 1e-3
    whole = build_program(config)
    config.microbatches = microbatches
    parts = build_program(config)
    state = jax.jit(whole.init)(jax.random.key(2))
    batch = next(iter(whole.batches()))
    batch["weights"][:3] *= 0.1  # microbatches of different total weight
    (expected, expected_metrics), (updated, metrics) = (
        jax.jit(program.step)(state, batch) for program in (whole, parts)
    )
    for name, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
    leaves = zip(
        jax.tree.leaves(expected.opt_state), jax.tree.leaves(updated.opt_state), strict=True
    )
    for left, right in leaves:
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-6 * np.abs(left).max())


def test_a_batch_size_that_is_no_multiple_of_the_microbatches_is_refused(folder):
    config = make_config(folder)
    config.microbatches = 3
    with pytest.raises(UserError, match="batch_size is 8; it must be a multiple of the 3 microb"):
        build_program(config)


def test_the_first_moment_can_be_stored_in_bfloat16(folder):
    config = make_config(folder)
    config.optimizer.first_moment = "bfloat16"
    program = build_program(config)
    state, _ = jax.jit(program.step)(
        jax.jit(program.init)(jax.random.key(0)), next(iter(program.batches()))
    )
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert dtypes.count(jnp.bfloat16) == len(dtypes) / 2  # the second moment stays in float32


@pytest.mark.slow
def test_a_trained_model_generates_sample_images(trained):
    program, state, _ = trained
    images = program.samples(state)
    assert set(images) == {"samples"}
    assert images["samples"].shape == (8, 16, 3) and images["samples"].dtype == np.uint8


@pytest.mark.slow
def test_the_export_restores_the_model_the_vocabulary_and_the_text_tokenizer(trained, tmp_path):
    program, state, _ = trained
    program.export(state, tmp_path)
    arrays, header = weight_files.load(tmp_path / "decoder.safetensors", "decoder")
    config = configuration.build(DecoderConfig, header["model"])
    assert configuration.build(Vocabulary, header["vocabulary"]) == program.config.vocabulary
    assert header["image_shape"] == [2, 2]
    assert TextTokenizer.load(tmp_path / "text.json").size == program.text.size
    abstract = jax.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    model = weight_files.restore(abstract, arrays)
    ids = np.arange(10, dtype=np.int32)[None]
    np.testing.assert_array_equal(model(ids), state.model(ids))


def write_encoder(folder: pathlib.Path) -> pathlib.Path:
    """Writes a random encoder for the text tokenizer of a folder."""
    vocab_size = TextTokenizer.load(folder / "text.json").size + 3
    shape = CLIPConfig(
        VisionConfig(image_size=8, patch_size=4, width=16, layers=1, heads=2),
        TextConfig(context_length=8, vocab_size=vocab_size, width=16, layers=1, heads=2),
        embed_dim=8,
    )
    encoder = jax.jit(lambda: create(shape, jax.random.key(0)))()
    path = folder / "encoder.safetensors"
    weight_files.save(path, encoder, "encoder", configuration.to_dict(shape))
    return path


def test_a_run_ends_in_a_model_folder_if_its_config_names_the_files(trained, folder, tmp_path):
    program, state, _ = trained
    export = tmp_path / "run" / "export"
    sentence = program.check_export(export)
    assert "ends in a decoder and its text tokenizer" in sentence
    assert "set config.export.encoder for a model folder" in sentence
    config = make_config(folder)
    config.export = ConfigDict({"encoder": str(write_encoder(folder))})
    program = build_program(config)
    assert program.check_export(export) == f"the run ends in the model folder {export}"
    program.export(state, export)
    assert [path.name for path in export.parent.iterdir()] == ["export"]
    opened = ModelFolder.open(export)
    assert opened.defaults.sampling.guidance.weight == 2.0
    # The run was trained with at most one document, and its data record no licence.
    assert opened.defaults.num_docs == 1
    assert opened.description.unknown_licences == ("decoder", "tokenizer", "text", "encoder")
    assert opened.description.training["decoder"]["steps"] == 60
    assert opened.description.data[0].documents == 4
    (image,) = Leon.load(export).generate("red heart", num_docs=0)
    assert image.image.size == (8, 8)
    program.export(state, export)  # a run that was made longer writes it again
    assert ModelFolder.open(export).description == opened.description


def test_files_that_the_end_of_a_run_needs_are_missed_at_its_start(folder, tmp_path):
    config = make_config(folder)
    config.export = ConfigDict({"encoder": "nowhere.safetensors"})
    config.samples.image = "nothing.safetensors"
    message = r"config\.export\.tokenizer names nothing\.saf.*config\.export\.encoder names nowhere"
    with pytest.raises(UserError, match=message):
        build_program(config).check_export(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.vocab_size", 7, "vocab_size is 7, but the vocabulary has"),
        ("data.length", 65, "data.length is 65; it must be at most model.max_length"),
        ("data.image_shape", (2,), "rows and columns"),
        ("loss_chunk", 0, "loss_chunk is 0"),
    ],
)
def test_contradictory_configurations_are_refused(folder, key, value, message):
    config = make_config(folder)
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=message):
        build_program(config)


def test_a_program_needs_its_files_only_for_batches(folder):
    """`leon plan` builds the program without data."""
    config = make_config(folder)
    config.data.text = "nowhere.json"
    program = build_program(config)
    jax.eval_shape(program.init, jax.random.key(0))
    with pytest.raises(UserError, match=r"cannot read the text tokenizer nowhere\.json"):
        program.batches()


def test_an_unknown_config_key_is_named(folder):
    config = make_config(folder)
    config.masking = ConfigDict({"whole_segments": 0.5})
    with pytest.raises(ConfigError, match=r"config\.masking\.whole_segments.*whole_segment\?"):
        build_program(config)


def load_config(path: pathlib.Path) -> DecoderTraining:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    values = module.get_config().to_dict()
    values.pop("loop", None)  # read by the training loop
    return configuration.build(DecoderTraining, values)


@pytest.mark.parametrize(
    ("name", "millions", "thousand_steps"),
    [("350m", 373, 167), ("760m", 786, 226), ("7b", 6728, 286)],
)
def test_the_papers_configs_have_its_sizes_and_steps(name, millions, thousand_steps):
    config = load_config(CONFIGS / f"cm3leon_{name}.py")
    assert round(config.model.parameter_count() / 1e6) == millions
    assert round(config.steps / 1e3) == thousand_steps == round(config.optimizer.total_steps / 1e3)
    assert config.batch_size * config.data.length == 2**23
    assert config.vocabulary == Vocabulary()
    # Three documents with an image and a caption of up to 300 tokens fit in a row.
    assert config.data.length > 3 * (1024 + 300) + 2 * 3


def test_the_demo_config_is_small_and_has_a_compact_vocabulary():
    config = load_config(CONFIGS / "emoji" / "decoder.py")
    vocabulary = config.vocabulary
    assert vocabulary == Vocabulary.compact(vocabulary.image_codes, vocabulary.text_tokens)
    assert config.model.parameter_count() < 10e6


def test_a_small_config_has_the_form_of_the_paper_at_the_size_of_the_demos():
    config = load_config(CONFIGS / "emoji" / "decoder_paper.py")
    demo = load_config(CONFIGS / "emoji" / "decoder.py")
    assert (config.model.form, config.model.part_step) == (Form(), 1)
    ratio = config.model.parameter_count() / demo.model.parameter_count()
    assert ratio == pytest.approx(1, abs=0.01)
