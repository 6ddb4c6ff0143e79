"""Converted GPTs of LlamaGen equal an independent network in PyTorch, and leave as they came."""

import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from leon_jax.convert import check, published_model, torch_file
from leon_jax.documents import Document, Hole, Image, Text
from leon_jax.engine.engine import Engine, Sample, TokenRequest
from leon_jax.engine.grammar import ImageSpan
from leon_jax.engine.guidance import ClassifierFree
from leon_jax.engine.samplers import Greedy
from leon_jax.engine.sampling_params import SamplingParams
from leon_jax.engine.scheduler import generate
from leon_jax.model_folder import ModelFolder
from tests.convert import small_gpt
from tests.convert.small_gpt import GRID, OPTIONS, convert, flags, random_gpt, run_peer
from tests.tiny import write_model_folder

BATCHES, ROWS = 5, 2


@jax.jit
def logits(decoder, ids, cells):
    return decoder.logits(decoder(ids, cells=cells))


def inputs(rows=BATCHES * ROWS, length=GRID * GRID - 1, codes=OPTIONS["codes"]):
    rng = np.random.default_rng(rows)
    return rng.integers(0, 1000, rows), rng.integers(0, codes, (rows, length))


def assert_equal_to_pytorch(path, classes, codes, expected, steps):
    """Compares logits, guided logits and greedy codes of a model folder."""
    folder = ModelFolder.open(path)
    decoder, vocabulary = folder.load_decoder(), folder.tokenizer.vocabulary
    null = folder.tokenizer.encode(Document((Hole("image"),)))

    def rows(first):
        ids = np.concatenate([first, vocabulary.image_start + codes], axis=1).astype(np.int32)
        cells = np.stack([vocabulary.cells(row) for row in ids])
        return np.concatenate(
            [
                logits(decoder, *part)
                for part in zip(np.split(ids, BATCHES), np.split(cells, BATCHES), strict=True)
            ]
        )

    conditional = rows(vocabulary.text_start + classes[:, None])
    unconditional = rows(np.broadcast_to(null, (len(classes), 1)))
    largest = np.abs(expected["logits"]).max()
    assert largest > 1 and null == vocabulary.text_start + 1000
    np.testing.assert_allclose(conditional, expected["logits"], atol=1e-4 * largest)
    guided = unconditional + 4 * (conditional - unconditional)
    np.testing.assert_allclose(guided, expected["guided"], atol=1e-3 * largest)

    engine = Engine(decoder, vocabulary)
    params = SamplingParams(ClassifierFree(4.0), Greedy())
    requests = [
        TokenRequest(
            (folder.tokenizer.encode(Document((Text(str(each)), Hole("image")))), null),
            (ImageSpan(steps),),
            (Sample(0, params),),
        )
        for each in classes
    ]
    greedy = [spans[0].ids - vocabulary.image_start for (spans,) in generate(engine, requests)]
    np.testing.assert_array_equal(greedy, expected["greedy"])
    assert len(np.unique(greedy)) > 8


@pytest.mark.peers
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_logits_and_greedy_codes_equal_those_of_pytorch(kv_heads, tmp_path, capsys):
    classes, codes = inputs()
    expected = run_peer(tmp_path, classes, codes, kv_heads=kv_heads)
    small_gpt.write_vqgan(tmp_path / "vqgan.pt")
    code, output, error = convert(capsys, *flags(tmp_path), "--nocheck")
    assert code == 0, error
    assert "licence MIT" in output and "1,000 classes" in output and "8 x 8 codes" in output
    assert "left out: 1 tensor; conversion.json says why" in output
    record = json.loads((tmp_path / "model" / "conversion.json").read_text())
    assert "freqs_cis" in record["dropped"]["decoder"]
    assert_equal_to_pytorch(tmp_path / "model", classes, codes, expected, OPTIONS["steps"])


@pytest.mark.slow
@pytest.mark.peers
@pytest.mark.parametrize("size", [(768, 12, 2048), (3200, 32, 8704)], ids=["B", "3B"])
def test_the_published_widths_equal_pytorch(size, tmp_path, capsys):
    """Two layers of the sizes B and 3B, whose heads have 64 and 100 numbers, at 16 x 16 codes."""
    dim, heads, hidden = size
    sizes = {"dim": dim, "heads": heads, "kv_heads": heads, "hidden": hidden, "codes": 16384}
    classes, codes = inputs(BATCHES, 20, 16384)
    expected = run_peer(tmp_path, classes, codes, **sizes, grid=16, steps=20)
    config = dataclasses.replace(
        small_gpt.TOKENIZER, resolution=64, codes=16384, attention_sizes=(16,)
    )
    small_gpt.write_vqgan(tmp_path / "vqgan.pt", config)
    options = [*flags(tmp_path), "--resolution=64", f"--heads={heads}", "--nocheck"]
    assert convert(capsys, *options)[0] == 0
    assert_equal_to_pytorch(tmp_path / "model", classes, codes, expected, 20)


@pytest.fixture(scope="module")
def vqgan(tmp_path_factory):
    path = tmp_path_factory.mktemp("vqgan") / "vqgan.pt"
    small_gpt.write_vqgan(path)
    return path


@pytest.fixture
def checkpoints(tmp_path, vqgan):
    """A folder with gpt.pt and vqgan.pt of random weights."""
    torch_file.write(tmp_path / "gpt.pt", random_gpt(), "model")
    shutil.copyfile(vqgan, tmp_path / "vqgan.pt")
    return tmp_path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_tensors_leave_as_they_came(dtype, layers, kv_heads, checkpoints, capsys):
    before = {
        name: tensor.astype(jnp.dtype(dtype))
        for name, tensor in random_gpt(layers=layers, kv_heads=kv_heads).items()
    }
    torch_file.write(checkpoints / "gpt.pt", before, "module")
    assert convert(capsys, *flags(checkpoints), "--nocheck")[0] == 0
    back = ["--to=llamagen", f"--source={checkpoints}/model", f"--out={checkpoints}/back"]
    code, _, error = convert(capsys, *back)
    assert code == 0, error
    for name, expected in (
        ("gpt.pt", before),
        ("vqgan.pt", torch_file.read_weights(checkpoints / "vqgan.pt")),
    ):
        after = torch_file.read_weights(checkpoints / "back" / name)
        assert after.keys() == expected.keys()
        for tensor, array in after.items():
            assert array.dtype == expected[tensor].dtype
            np.testing.assert_array_equal(array, expected[tensor])
    records = [
        json.loads((checkpoints / name / "conversion.json").read_text())
        for name in ("model", "back")
    ]
    assert records[0]["tensors"] == records[1]["tensors"]


def test_a_decoder_of_another_form_cannot_become_one_of_llamagen(tmp_path, capsys):
    write_model_folder(tmp_path / "model")
    options = [f"--source={tmp_path}/model", f"--out={tmp_path}/back"]
    code, _, error = convert(capsys, "--to=llamagen", *options)
    assert code == 2 and "LlamaGen has no decoder of this form" in error


def test_plain_names_as_fsdp_writes_them_are_read(checkpoints, capsys):
    folder = checkpoints / "fsdp"
    folder.mkdir()
    torch_file.write(folder / "consolidated.pth", random_gpt())
    options = [*flags(checkpoints), f"--source={folder}", "--nocheck"]
    assert convert(capsys, *options)[0] == 0


def test_rows_that_llamagen_lacks_are_zeros(checkpoints, capsys):
    assert convert(capsys, *flags(checkpoints), "--nocheck")[0] == 0
    folder = ModelFolder.open(checkpoints / "model")
    vocabulary, table = folder.tokenizer.vocabulary, folder.load_decoder().table[...]
    is_used = vocabulary.is_image(np.arange(vocabulary.size)) | vocabulary.is_text(
        np.arange(vocabulary.size)
    )
    assert is_used.sum() == 64 + 1001 and vocabulary.size % 128 == 0
    np.testing.assert_array_equal(np.asarray(table).any(axis=1), is_used)


def missing(tensors):
    del tensors["layers.1.feed_forward.w3.weight"]
    return r"lacks layers\.1\.feed_forward\.w3\.weight"


def unknown(tensors):
    tensors["layers.0.attention.bias"] = np.zeros(3, np.float32)
    return r"unknown tensors: layers\.0\.attention\.bias"


def transposed(tensors):
    name = "layers.1.feed_forward.w1.weight"
    tensors[name] = tensors[name].T
    return r"layers\.1\.feed_forward\.w1\.weight has the shape \(32, 48\); it must be \(48, 32\)"


def not_finite(tensors):
    tensors["norm.weight"] = np.full(32, np.nan, np.float32)
    return r"norm\.weight has NaN"


def other_dtype(tensors):
    tensors["norm.weight"] = tensors["norm.weight"].astype(np.float16)
    return r"norm\.weight is float16"


def texts(tensors):
    del tensors["cls_embedding.embedding_table.weight"]
    tensors["cls_embedding.cap_proj.fc1.weight"] = np.zeros((32, 2048), np.float32)
    return "features of Flan-T5"


def no_classes(tensors):
    del tensors["cls_embedding.embedding_table.weight"]
    return r"lacks cls_embedding\.embedding_table\.weight"


def other_codes(tensors):
    for name in ("tok_embeddings.weight", "output.weight"):
        tensors[name] = tensors[name][:32]
    return r"--vqgan has 64 codes, but the GPT was trained on 32"


DAMAGES = [
    missing, unknown, transposed, not_finite, other_dtype, texts, no_classes, other_codes
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_wrong_tensors_are_refused_by_name_and_nothing_is_written(damage, checkpoints, capsys):
    tensors = random_gpt()
    message = damage(tensors)
    torch_file.write(checkpoints / "gpt.pt", tensors, "model")
    code, _, error = convert(capsys, *flags(checkpoints))
    assert code == 2 and re.search(message, error), error
    assert not (checkpoints / "model").exists() and not list(checkpoints.glob(".*writing"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda each: each.startswith("--heads"), "no published GPT has 2 layers of width 32"),
        (lambda each: each.startswith("--vqgan"), "name the image tokenizer"),
    ],
)
def test_flags_that_a_gpt_needs_are_told(change, message, checkpoints, capsys):
    left = [each for each in flags(checkpoints) if not change(each)]
    code, _, error = convert(capsys, *left)
    assert code == 2 and message in error


@pytest.mark.parametrize("heads", [3, 5, 64])
def test_heads_that_do_not_fit_are_refused(heads, checkpoints, capsys):
    code, _, error = convert(capsys, *flags(checkpoints), f"--heads={heads}")
    assert code == 2 and f"--heads={heads} does not fit" in error


def test_an_image_tokenizer_alone_needs_no_other_one(checkpoints, capsys):
    options = [f"--source={checkpoints}/vqgan.pt", f"--vqgan={checkpoints}/vqgan.pt"]
    code, _, error = convert(capsys, "--from=llamagen", *options, f"--out={checkpoints}/vq")
    assert code == 2 and "has no GPT" in error


def test_random_weights_are_noticed_at_the_end(checkpoints, capsys, monkeypatch):
    codes = np.random.default_rng(0).integers(0, 64, (8, 8))
    known = check.Reconstruction(9.0, codes)
    monkeypatch.setattr(check, "reconstruction", lambda path: known)
    code, output, error = convert(capsys, *flags(checkpoints))
    assert code == 0, error
    assert re.search(r"loss of its codes: [\d.]+ nats a code; .* by chance 4\.16", output)
    assert "below 15 dB" in error and "should have a smaller loss" in error


def test_the_name_of_the_file_says_the_resolution(checkpoints, capsys):
    path = checkpoints / "c2i_T_384.pt"
    (checkpoints / "gpt.pt").rename(path)
    options = [each for each in flags(checkpoints) if not each.startswith("--resolution")]
    code, output, error = convert(capsys, *options, f"--source={path}", "--nocheck")
    assert code == 0, error
    assert "384 px, 96 x 96 codes" in output
    assert ModelFolder.open(checkpoints / "model").config.max_length == 1 + 96 * 96


def test_decoding_gives_the_document_again(checkpoints, capsys):
    assert convert(capsys, *flags(checkpoints), "--nocheck")[0] == 0
    tokenizer = ModelFolder.open(checkpoints / "model").tokenizer
    image = Image(codes=np.arange(64, dtype=np.int32).reshape(8, 8))
    for document in (Document((Text("tench, Tinca tinca"), image)), Document((image,))):
        ids = tokenizer.encode(document)
        assert len(ids) == 65
        decoded = tokenizer.decode(ids)
        assert decoded.text == document.text
        np.testing.assert_array_equal(decoded.codes, image.codes)


@pytest.mark.parametrize(
    ("losses", "is_plausible"),
    [((7.0, 9.0, 9.7), True), ((9.69, 9.7, 9.7), False), ((9.0, 8.9, 9.7), False)],
)
def test_a_trained_decoder_knows_codes_and_their_order(losses, is_plausible):
    assert published_model.CodeLosses(*losses).is_plausible == is_plausible
