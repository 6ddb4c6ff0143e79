"""The demo's numbers on a tiny model, each against a computation by hand, and its page."""

import html.parser
import re

import numpy as np
import PIL.Image
import pytest

from leon_jax.documents import Document, Hole, Text
from leon_jax.evaluate import demo_page, measurements
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


def test_psnr_is_the_closed_form_of_what_the_tokenizer_loses(leon, documents):
    measured = measurements.reconstruct(leon, documents)
    originals, rebuilt = measured.pictures
    assert originals.shape == rebuilt.shape == (4, tiny.RESOLUTION, tiny.RESOLUTION, 3)
    by_hand = [
        10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2))
        for a, b in zip(originals, rebuilt, strict=True)
    ]
    assert measured.psnr_db == pytest.approx(np.mean(by_hand))
    codes = {int(code) for document in documents for code in document.parts[1].codes.ravel()}
    assert measured.codes_used == len(codes) / tiny.CODES


@pytest.mark.parametrize("num_docs", [0, 1])
def test_perplexity_is_the_exponential_of_the_mean_likelihood(leon, documents, num_docs):
    total, tokens = 0.0, 0
    for document in documents:
        prompt = Document((document.parts[0],))
        retrieved = leon.retrieve(prompt, num_docs)
        both = leon.likelihood(document, retrieved=retrieved)
        # What the picture adds to the text: the chain rule, with <break> and </s> taken out.
        ids = leon.model.tokenizer.encode([*retrieved, document])
        weights = np.zeros(len(ids), np.float32)
        weights[-1 - tiny.GRID**2 : -1] = 1
        (score,) = _score(leon, ids, weights)
        assert both < score
        total, tokens = total + score, tokens + tiny.GRID**2
    found = measurements.image_perplexity(leon, documents, num_docs)
    assert found == pytest.approx(np.exp(-total / tokens), rel=1e-4)


@pytest.mark.parametrize("num_docs", [0, 1])
def test_ranks_follow_the_scores(leon, documents, num_docs):
    ranks, scores = measurements.caption_ranks(leon, documents, num_docs)
    assert scores.shape == (4, 4) and np.isfinite(scores).all()
    for row in range(4):
        assert ranks[row] == sorted(scores[row], reverse=True).index(scores[row, row])
    # What picture 1 scores with caption 2, and with what caption 2 finds.
    caption, picture = documents[2].parts[0], documents[1].parts[1]
    retrieved = leon.retrieve(Document((caption, Hole("image"))), num_docs)
    assert len(retrieved) == num_docs
    ids = leon.model.tokenizer.encode([*retrieved, Document((caption, picture))])
    weights = np.zeros(len(ids), np.float32)
    weights[-1 - tiny.GRID**2 : -1] = 1
    assert scores[1, 2] == pytest.approx(_score(leon, ids, weights)[0], rel=1e-4)


def test_a_judge_that_knows_the_pictures_matches_them_all(leon, documents, monkeypatch):
    generations = [
        GeneratedImage(PIL.Image.fromarray(d.parts[1].pixels), d.parts[0].text, 0, 1.0, (), "")
        for d in documents
    ]
    monkeypatch.setattr(leon.model.encoder, "embed_images", lambda pictures: np.eye(4))
    monkeypatch.setattr(leon.model.encoder, "embed_texts", lambda texts: np.eye(4))
    assert measurements.prompt_match(leon, generations) == 1.0
    monkeypatch.setattr(leon.model.encoder, "embed_texts", lambda texts: np.roll(np.eye(4), 1, 0))
    assert measurements.prompt_match(leon, generations) == 0.0
    monkeypatch.setattr(leon.model.encoder, "embed_texts", lambda texts: np.eye(4)[[0, 1, 3, 2]])
    assert measurements.prompt_match(leon, generations) == 0.5


def test_drawing_a_batch_equals_drawing_alone(leon, documents):
    drawn = measurements.draw(leon, documents[:2], num_docs=1, guidance=2.0, seed=7)
    (alone,) = leon.generate(drawn[1].prompt, num_docs=1, guidance=2.0, seed=8)
    assert drawn[1].seed == 8 and len(drawn[1].retrieved) == 1
    np.testing.assert_array_equal(np.asarray(drawn[1].image), np.asarray(alone.image))


class _Reader(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.pictures, self.open = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "img":
            self.pictures.append(dict(attributes))
        elif tag not in ("meta", "br", "line", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)


def test_the_page_is_well_formed_and_credits_what_was_retrieved(leon, documents):
    drawn = {n: measurements.draw(leon, documents[:2], n, guidance=1.0) for n in (0, 2)}
    hostile = Document((Text('<script>alert("x")</script>'), documents[0].parts[1]))
    sections = [
        ("Pictures", demo_page.drawings(documents[:2], drawn[0], drawn[2])),
        ("Captions", demo_page.captions([hostile], [("<b>a", "b & c")])),
        ("Loss", demo_page.curve([(1, 2.0), (2, 1.5), (3, 1.25)], 2, "loss, nats")),
        (
            "Numbers",
            demo_page.numbers({"seconds": 61.4, "prompt_match_share_by_documents": {"2": 0.5}}),
        ),
    ]
    text = demo_page.page("A <title>", sections, {"seconds": 1.0})
    reader = _Reader()
    reader.feed(text)
    assert reader.open == [] and "script" not in reader.tags
    for number in ("61 s", "2 documents: 50.0 %", ">loss, nats</text>"):
        assert number in text
    assert len(reader.pictures) == 2 * 3 + sum(len(each.retrieved) for each in drawn[2]) + 1
    assert all(picture["alt"] for picture in reader.pictures)
    for document in drawn[2][0].retrieved:
        assert document.provenance.licence in text and document.provenance.key in text
    points = re.search(r'points="([^"]*)"', text)[1].split()
    heights = [float(point.split(",")[1]) for point in points]
    assert heights == sorted(heights), "a falling loss is drawn falling"


def _score(leon, ids, weights):
    import jax

    with jax.set_mesh(leon.model.mesh):
        return leon.model.engine.score([ids], [weights])
