"""Tests the metrics of a tiny model against independent computations, and the demo's report."""

import html.parser
import re

import numpy as np
import PIL.Image
import pytest

from leon_jax.documents import Document, Hole, Provenance, Text
from leon_jax.engine.likelihood import log_likelihoods
from leon_jax.evaluate import meanings, measurements, report_page
from leon_jax.leon import GeneratedImage, Leon
from leon_jax.retrieval.prepared_folder import PreparedFolder
from tests import tiny


@pytest.fixture(scope="module")
def leon() -> Leon:
    return Leon.load(*tiny.folders())


@pytest.fixture(scope="module")
def documents(leon) -> list[Document]:
    source = PreparedFolder(tiny.folders()[1]).records()
    return [source[i] for i in range(4)]


def test_psnr_and_codes_used_equal_their_definitions(leon, documents):
    reconstruction = measurements.reconstruct(leon, documents)
    originals, outputs = reconstruction.images
    assert originals.shape == outputs.shape == (4, tiny.RESOLUTION, tiny.RESOLUTION, 3)
    expected = [
        10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2))
        for a, b in zip(originals, outputs, strict=True)
    ]
    assert reconstruction.psnr_db == pytest.approx(np.mean(expected))
    codes = {int(code) for document in documents for code in document.parts[1].codes.ravel()}
    assert reconstruction.codes_used == len(codes) / tiny.CODES


@pytest.mark.parametrize("num_docs", [0, 1])
def test_perplexity_is_the_exponential_of_the_mean_likelihood(leon, documents, num_docs):
    total, tokens = 0.0, 0
    for document in documents:
        prompt = Document((document.parts[0],))
        retrieved = leon.retrieve(prompt, num_docs)
        document_score = leon.likelihood(document, retrieved=retrieved)
        # The score of the image tokens alone, given the text; without <break> and </s>.
        ids = leon.model.tokenizer.encode([*retrieved, document])
        weights = np.zeros(len(ids), np.float32)
        weights[-1 - tiny.GRID**2 : -1] = 1
        (score,) = _score(leon, ids, weights)
        assert document_score < score
        total, tokens = total + score, tokens + tiny.GRID**2
    perplexity = np.exp(measurements.image_losses(leon, documents, num_docs).mean())
    assert perplexity == pytest.approx(np.exp(-total / tokens), rel=1e-4)


def test_gains_are_paired_differences_with_their_standard_errors():
    losses = [np.array([3.0, 2.0, 4.0]), np.array([2.0, 2.0, 2.0]), np.array([2.0, 2.5, 1.0])]
    gains, errors = measurements.retrieval_gains(losses)
    assert gains == pytest.approx([1.0, 1 / 6])
    # The standard deviations are 1 and sqrt(7 / 12).
    assert errors == pytest.approx([1 / np.sqrt(3), np.sqrt(7 / 12 / 3)])


@pytest.mark.parametrize("num_docs", [0, 1])
def test_caption_ranks_agree_with_the_scores(leon, documents, num_docs):
    ranks, scores = measurements.caption_ranks(leon, documents, num_docs)
    assert scores.shape == (4, 4) and np.isfinite(scores).all()
    for row in range(4):
        assert ranks[row] == sorted(scores[row], reverse=True).index(scores[row, row])
    # The score of image 1 with caption 2 and the documents that caption 2 retrieves.
    caption, image = documents[2].parts[0], documents[1].parts[1]
    retrieved = leon.retrieve(Document((caption, Hole("image"))), num_docs)
    assert len(retrieved) == num_docs
    ids = leon.model.tokenizer.encode([*retrieved, Document((caption, image))])
    weights = np.zeros(len(ids), np.float32)
    weights[-1 - tiny.GRID**2 : -1] = 1
    assert scores[1, 2] == pytest.approx(_score(leon, ids, weights)[0], rel=1e-4)


def test_prompt_match_is_the_share_of_images_nearest_to_their_own_prompt(
    leon, documents, monkeypatch
):
    generations = [
        GeneratedImage(PIL.Image.fromarray(d.parts[1].pixels), d.parts[0].text, 0, 1.0, (), "")
        for d in documents
    ]
    monkeypatch.setattr(leon.model.encoder, "embed_images", lambda images: np.eye(4))
    monkeypatch.setattr(leon.model.encoder, "embed_texts", lambda texts: np.eye(4))
    assert measurements.prompt_match(leon, generations) == 1.0
    monkeypatch.setattr(leon.model.encoder, "embed_texts", lambda texts: np.roll(np.eye(4), 1, 0))
    assert measurements.prompt_match(leon, generations) == 0.0
    monkeypatch.setattr(leon.model.encoder, "embed_texts", lambda texts: np.eye(4)[[0, 1, 3, 2]])
    assert measurements.prompt_match(leon, generations) == 0.5


def test_captions_are_those_of_one_image_at_a_time(leon, documents):
    texts = measurements.captions(leon, documents)
    assert texts == [leon.caption(document.pixels).text for document in documents]


def test_a_caption_may_have_another_wording_or_no_style():
    provenance = Provenance("1", "test", "CC0-1.0", "", captions=("cat face", "Katzengesicht"))
    document = Document((Text("cat face, Twemoji style"),), provenance)
    texts = [
        "cat face, Twemoji style",
        " Cat face, twemoji style",
        "Katzengesicht, Noto style",
        "cat face",
        "cat, Twemoji style",
        "",
    ]
    exact, right = measurements.caption_matches(texts, [document] * len(texts))
    assert exact.tolist() == [True, True, False, False, False, False]
    assert right.tolist() == [True, True, True, True, False, False]


def test_generating_a_batch_equals_generating_one_image(leon, documents):
    batch = measurements.generate(leon, documents[:2], num_docs=1, guidance=2.0, seed=7)
    (single,) = leon.generate(batch[1].prompt, num_docs=1, guidance=2.0, seed=8)
    assert batch[1].seed == 8 and len(batch[1].retrieved) == 1
    np.testing.assert_array_equal(np.asarray(batch[1].image), np.asarray(single.image))


class _Reader(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.images, self.open_tags = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "img":
            self.images.append(dict(attributes))
        elif tag not in ("meta", "br", "line", "polyline"):
            self.open_tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open_tags.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)


def test_the_report_is_well_formed_and_credits_retrieved_documents(leon, documents):
    images = {n: measurements.generate(leon, documents[:2], n, guidance=1.0) for n in (0, 2)}
    hostile = Document((Text('<script>alert("x")</script>'), documents[0].parts[1]))
    sections = [
        ("", report_page.gallery(images[2])),
        ("Images", report_page.generated_images(documents[:2], images[0], images[2])),
        ("Captions", report_page.captions([hostile], [("<b>a", "b & c")])),
        ("Loss", report_page.curve([(1, 2.0), (2, 1.5), (3, 1.25)], 2, "loss, nats")),
        (
            "Metrics",
            report_page.metrics_table(
                {"seconds": 61.4, "prompt_match_share_by_documents": {"2": 0.5}}
            ),
        ),
    ]
    text = report_page.page("A <title>", sections)
    reader = _Reader()
    reader.feed(text)
    assert reader.open_tags == [] and "script" not in reader.tags
    for content in ("61 s", "2 documents: 50.0 %", ">loss, nats</text>", "Time of the demo"):
        assert content in text
    assert len(reader.images) == 2 * 4 + sum(len(image.retrieved) for image in images[2]) + 1
    assert all(image["alt"] for image in reader.images)
    for document in images[2][0].retrieved:
        assert document.provenance.licence in text and document.provenance.key in text
    points = re.search(r'points="([^"]*)"', text)[1].split()
    heights = [float(point.split(",")[1]) for point in points]
    assert heights == sorted(heights), "a decreasing loss must slope down"


def _score(leon, ids, weights):
    import jax

    with jax.set_mesh(leon.model.mesh):
        return log_likelihoods(leon.model.engine, [ids], [weights])


def test_every_metric_has_a_label_and_a_meaning():
    assert list(meanings.LABELS) == list(meanings.MEANINGS)
    assert not any("_" in text for text in (*meanings.LABELS.values(), *meanings.MEANINGS.values()))
    judge = {"seen_2": 0.9, "unseen_1": 0.25}
    shares = "seen, 2 documents: 90.0 %; unseen, 1 document: 25.0 %"
    assert meanings.format_metric("judge", judge) == shares
    assert meanings.format_metric("judge_copy", {"seen": 0.5}) == "seen: 50.0 %"
