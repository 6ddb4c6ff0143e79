"""The calls a person makes, on a tiny model with random weights."""

import json

import numpy as np
import PIL.Image
import pytest

from leon_jax.config import UserError
from leon_jax.documents import Document, Hole, Image, Text
from leon_jax.engine.guidance import ClassifierFree, Contrastive, TwoConditions
from leon_jax.engine.likelihood import log_likelihoods
from leon_jax.engine.samplers import Categorical
from leon_jax.engine.sampling_params import SamplingParams
from leon_jax.generate import context_limits
from leon_jax.generate.image_settings import ImageSettings
from leon_jax.leon import Leon
from tests import tiny

PROMPT = tiny.PROMPT


@pytest.fixture(scope="module")
def leon() -> Leon:
    return Leon.load(*tiny.folders())


def test_generate_gives_pictures_with_their_story(leon):
    first, second = leon.generate(PROMPT, num_images=2, seed=5)
    assert (first.seed, second.seed) == (5, 6)
    assert first.image.size == (tiny.RESOLUTION, tiny.RESOLUTION)
    assert first.prompt == PROMPT and first.params.guidance == ClassifierFree(3.0)
    assert len(first.retrieved) == 2
    assert {d.provenance.licence for d in first.retrieved} <= {"CC-BY-4.0", "CC-BY-SA-4.0"}
    assert np.asarray(first.image).tobytes() != np.asarray(second.image).tobytes()


def test_the_same_seed_gives_the_same_picture_in_any_batch(leon):
    together = leon.generate(PROMPT, num_images=3, seed=5)
    (alone,) = leon.generate(PROMPT, num_images=1, seed=6)
    np.testing.assert_array_equal(np.asarray(together[1].image), np.asarray(alone.image))


def test_a_png_tells_where_it_came_from(leon, tmp_path):
    prompt = "cat face, 日本 style"
    (generation,) = leon.generate(prompt, num_docs=1, seed=3, guidance=2.5)
    generation.save(tmp_path / "new" / "cat.png")
    with PIL.Image.open(tmp_path / "new" / "cat.png") as picture:
        text = picture.text
        np.testing.assert_array_equal(np.asarray(picture), np.asarray(generation.image))
    assert (text["prompt"], text["seed"], text["guidance"]) == (prompt, "3", "2.5")
    assert text["model"].startswith("leon_jax ") and text["model"].endswith("tiny")
    (credit,) = json.loads(text["retrieved"])
    origin = generation.retrieved[0].provenance
    assert credit == {
        "caption": generation.retrieved[0].parts[0].text,
        "key": origin.key,
        "source": origin.source,
        "licence": origin.licence,
        "attribution": origin.attribution,
    }
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["cat.png"]


def test_caption_takes_a_picture_in_any_form(leon, tmp_path):
    pixels = tiny.documents()[0].parts[1].pixels
    PIL.Image.fromarray(pixels).save(tmp_path / "cat.png")
    forms = [pixels, PIL.Image.fromarray(pixels), tmp_path / "cat.png", str(tmp_path / "cat.png")]
    captions = [leon.caption(form, max_tokens=6) for form in forms]
    assert captions[0].text and len({caption.text for caption in captions}) == 1
    assert captions[0].retrieved == ()
    assert len(leon.caption(pixels, num_docs=2, max_tokens=6).retrieved) == 2


def test_complete_fills_every_hole_and_leaves_the_rest(leon):
    cat = tiny.documents()[0].parts[1]
    document = Document((Text("a "), Hole("text"), cat, Hole("text"), Hole("image")))
    first, second = leon.complete(
        [document, document], params=SamplingParams.of(guidance=2.0, max_tokens=5)
    )
    for done in (first, second):
        assert not done.holes
        assert done.parts[0] == Text("a ")
        np.testing.assert_array_equal(done.parts[2].pixels, cat.pixels)
        assert isinstance(done.parts[1], Text) and isinstance(done.parts[3], Text)
        assert done.parts[4].codes.shape == (tiny.GRID, tiny.GRID)
        assert done.parts[4].pixels.shape == (tiny.RESOLUTION, tiny.RESOLUTION, 3)
    assert first != second
    assert leon.complete(document, params=SamplingParams.of(guidance=2.0, max_tokens=5)) == [first]


def test_documents_of_different_shapes_share_a_call(leon):
    cat = tiny.documents()[0]
    picture = Document((Text(PROMPT), Hole("image")))
    caption = Document((Hole("text"), cat.parts[1]))
    drawn, written = leon.complete(
        [picture, caption], seeds=[7, 8], params=SamplingParams(max_tokens=5)
    )
    assert leon.complete(picture, seeds=[7]) == [drawn]
    assert leon.complete(caption, seeds=[8], params=SamplingParams(max_tokens=5)) == [written]


def test_an_infilled_picture_comes_before_the_end(leon):
    document = Document((Text("a cat"), Hole("image"), Text("and a dog")))
    for guidance in (1.0, 3.0):
        (done,) = leon.complete(document, params=SamplingParams.of(guidance=guidance))
        assert done.parts[1].codes.shape == (tiny.GRID, tiny.GRID)


def test_retrieved_documents_change_the_answer(leon):
    document = Document((Text(PROMPT), Hole("image")))
    (without,) = leon.complete(document)
    (read,) = leon.complete(document, retrieved=[leon.retrieve(document, 2)])
    assert (without.parts[1].codes != read.parts[1].codes).any()


def test_guidance_0_sees_neither_text_nor_retrieved_documents(leon):
    document = Document((Text(PROMPT), Hole("image")))
    other = Document((Text("another prompt"), Hole("image")))
    found = leon.retrieve(document, 2)
    params = SamplingParams.of(guidance=0.0, temperature=0.0)
    (alone,) = leon.complete(document, params=params)
    for asked, read in ((other, []), (document, found)):
        (done,) = leon.complete(asked, params=params, retrieved=[read])
        np.testing.assert_array_equal(done.parts[1].codes, alone.parts[1].codes)


def test_the_likelihood_of_a_document_is_that_of_its_parts(leon):
    cat = leon.tokenize(tiny.documents()[0])
    whole, picture = leon.likelihood(cat), leon.likelihood(cat, part=1)
    # The chain rule: the caption with its <break>, then the image with its </s>.
    ids = leon.model.tokenizer.encode(cat)
    caption = log_likelihoods(leon.model.engine, [ids[: -(tiny.GRID**2) - 1]])[0]
    assert whole == pytest.approx(caption + picture, abs=1e-2)
    assert leon.likelihood(cat, part=0) < 0
    assert leon.likelihood(cat, retrieved=leon.retrieve(cat, 1)) != pytest.approx(whole, abs=1e-3)
    with pytest.raises(UserError, match="holes"):
        leon.likelihood(Document((Hole("text"), cat.parts[1])))
    with pytest.raises(UserError, match="part is 2; the document has the parts 0 to 1"):
        leon.likelihood(cat, part=2)


def test_the_best_of_several_pictures_are_kept(leon):
    drawn = leon.generate(PROMPT, num_images=5, num_docs=0, seed=3)
    text = leon.model.encoder.embed_texts([PROMPT])[0]
    clip = leon.model.encoder.embed_images([np.asarray(one.image) for one in drawn]) @ text
    best = leon.generate(PROMPT, num_images=2, num_docs=0, seed=3, best_of=5)
    assert [one.seed - 3 for one in best] == np.argsort(-clip)[:2].tolist()
    document = Document((Text(PROMPT), Hole("image")))
    done = leon.complete([document] * 5, seeds=range(3, 8), params=SamplingParams.of(guidance=3.0))
    caption = [leon.likelihood(each, part=0) for each in done]
    (likely,) = leon.generate(PROMPT, num_docs=0, seed=3, best_of=5, rank_by="likelihood")
    assert likely.seed - 3 == np.argmax(caption)
    with pytest.raises(UserError, match="best_of is 1; it must be at least num_images, 2"):
        leon.generate(PROMPT, num_images=2, best_of=1)
    with pytest.raises(UserError, match="rank_by is 'luck'; it must be one of clip, likelihood"):
        leon.generate(PROMPT, best_of=2, rank_by="luck")


def test_a_question_is_answered_and_a_picture_edited(leon):
    pixels = tiny.documents()[0].parts[1].pixels
    short = SamplingParams.of(temperature=0, max_tokens=5)
    answer = leon.answer(pixels, "what is it?", num_docs=1, params=short)
    assert answer.text == leon.answer(pixels, "what  is it?", num_docs=1, params=short).text
    first, second = leon.edit(pixels, "make it green", num_images=2, seed=4)
    assert (first.seed, second.seed) == (4, 5) and first.prompt == "make it green"
    assert first.image.size == (tiny.RESOLUTION, tiny.RESOLUTION)
    (again,) = leon.edit(pixels, "make it green", seed=5)
    np.testing.assert_array_equal(np.asarray(second.image), np.asarray(again.image))
    # Both the image and the instruction matter.
    (here,) = leon.edit(pixels, "make it green")
    for other in (leon.edit(255 - pixels, "make it green"), leon.edit(pixels, "add a hat")):
        assert (np.asarray(other[0].image) != np.asarray(here.image)).any()
    with pytest.raises(UserError, match="question is empty"):
        leon.answer(pixels, " ")
    with pytest.raises(UserError, match="text_guidance is -1"):
        leon.edit(pixels, "add a hat", params=SamplingParams(TwoConditions(1.5, -1)))


@pytest.mark.slow
def test_samples_of_a_prompt_may_be_drawn_in_different_ways(leon):
    document = Document((Text(PROMPT), Hole("image")))
    several = [
        SamplingParams(ClassifierFree(2.0), Categorical(top_p=0.9)),
        SamplingParams(Contrastive(0.5, 4)),
    ]
    mixed = leon.complete([document] * 4, seeds=[1, 2, 3, 4], params=several * 2)
    for index, done in enumerate(mixed):
        alone = leon.complete(document, seeds=[index + 1], params=several[index % 2])
        assert alone == [done]

    images = leon.generate(PROMPT, num_images=4, num_docs=0, seed=1, params=several)
    for image, done, params in zip(images, mixed, several * 2, strict=True):
        np.testing.assert_array_equal(np.asarray(image.image), done.parts[1].pixels)
        settings = json.loads(image.metadata()["settings"])
        assert SamplingParams.from_dict(settings["sampling"]) == params


def test_a_picture_is_drawn_on_from_its_first_rows(leon):
    pixels = tiny.documents()[0].parts[1].pixels
    codes = leon.tokenize(Document((Image(pixels=pixels),))).codes
    begun = Document((Text(PROMPT), Hole("image", codes[:1])))
    (done,) = leon.complete(begun, seeds=[3], params=SamplingParams.of(guidance=2.0))
    np.testing.assert_array_equal(done.parts[1].codes[0], codes[0])
    for guess in (4, 0.5, "cat.png", pixels):
        with pytest.raises(ValueError, match="first_rows are rows of codes"):
            Hole("image", guess)
    first, second = leon.extend(
        pixels, PROMPT, rows=0.25, num_images=2, seed=3, params=SamplingParams.of(guidance=2.0)
    )
    assert json.loads(first.metadata()["settings"])["task"] == "extend, 1 of 4 rows"
    np.testing.assert_array_equal(np.asarray(first.image), done.parts[1].pixels)
    assert (np.asarray(first.image) != np.asarray(second.image)).any()
    # What the model finds likeliest it finds likeliest when it is given the beginning of it.
    greedy = SamplingParams.of(temperature=0, guidance=2.0)
    (whole,) = leon.complete(Document((Text(PROMPT), Hole("image"))), params=greedy)
    drawn = whole.parts[1].codes
    (again,) = leon.complete(Document((Text(PROMPT), Hole("image", drawn[:3]))), params=greedy)
    np.testing.assert_array_equal(again.parts[1].codes, drawn)
    for rows in (0, 1, 0.05, 0.95, 2):
        with pytest.raises(UserError, match=r"keep 0\.25 of it to 0\.75"):
            leon.extend(pixels, PROMPT, rows=rows)
    for rows in (codes, codes[:1, :2], codes[:1] + 1000):
        with pytest.raises(UserError, match="first rows of an image"):
            leon.complete(Document((Text(PROMPT), Hole("image", rows))))


def test_a_document_grows_row_by_row(leon):
    document = Document((Hole("text"), Hole("image")))
    params = SamplingParams.of(guidance=2.0, max_tokens=6)
    drafts = list(leon.stream(document, seed=3, params=params))
    (done,) = leon.complete(document, seeds=[3], params=params)
    assert [draft.done for draft in drafts] == [False] * (len(drafts) - 1) + [True]
    assert drafts[-1].document == done
    rows = [draft.num_codes // tiny.GRID for draft in drafts if draft.image_part == 1]
    assert rows == list(range(1, tiny.GRID))
    for draft in drafts:
        if draft.image_part == 1:
            picture, height = (
                draft.document.parts[1],
                tiny.RESOLUTION * (draft.num_codes // tiny.GRID),
            )
            height //= tiny.GRID
            assert (picture.pixels[height:] == 255).all()
            codes = picture.codes.ravel()[: draft.num_codes]
            np.testing.assert_array_equal(codes, done.parts[1].codes.ravel()[: draft.num_codes])
        assert isinstance(draft.document.parts[0], Text | Hole)
    # The rows are whole whatever was written before them.
    after_text = Document((Hole("text"), Hole("image"), Text("end")))
    drafts = list(leon.stream(after_text, seed=3, params=SamplingParams(max_tokens=5)))
    drawn = [draft.num_codes for draft in drafts if draft.image_part == 1]
    assert [count for count in drawn if count >= tiny.GRID] == [4, 8, 12]
    with pytest.raises(UserError, match="seed is -1"):
        next(leon.stream(document, seed=-1))


def test_a_document_that_does_not_fit_is_named(leon):
    good, long = (Document((Text(text), Hole("image"))) for text in ("a cat", "cat " * 900))
    with pytest.raises(UserError, match="document 1: the prompt of"):
        leon.complete([good, long])
    results = dict(leon.complete_each([long, good], seeds=[1, 0]))
    assert "the prompt of" in str(results[0]) and isinstance(results[0], UserError)
    assert leon.complete(good, seeds=[0]) == [results[1]]


def test_lists_that_do_not_fit_the_documents_are_named(leon):
    cat, found = Document((Text("a cat"), Hole("image"))), tiny.documents()[:1]
    for wrong, message in (
        ({"seeds": [1]}, "seeds: 1 for 2 documents"),
        ({"seeds": 1}, "seeds: 1 for 2 documents"),
        ({"seeds": [0, 2**32]}, f"seed is {2**32}"),
        ({"params": [SamplingParams()]}, "params: 1 for 2"),
        ({"retrieved": found * 2}, "a sequence of documents for each"),
        ({"params": SamplingParams(Contrastive(2.0))}, "alpha is 2"),
        ({"params": SamplingParams(max_tokens=0)}, "max_tokens is 0"),
        ({"params": SamplingParams(3.0)}, "guidance is 3.0; give one as"),
        ({"params": SamplingParams(image=0.9)}, "a sampler is 0.9; give one as"),
    ):
        with pytest.raises(UserError, match=message):
            leon.complete([cat, cat], **wrong)
        with pytest.raises(UserError, match=message):
            leon.complete_each([cat, cat], **wrong)


def test_retrieved_documents_may_come_as_pixels(leon):
    document, read = Document((Text(PROMPT), Hole("image"))), tiny.documents()[:1]
    (done,) = leon.complete(document, retrieved=[read])
    assert leon.complete(document, retrieved=[[leon.tokenize(read[0])]]) == [done]
    assert list(leon.stream(document, retrieved=read))[-1].document == done


def test_likelihood_ranks_what_greedy_decoding_chose_above_other_captions(leon):
    pixels = tiny.documents()[0].parts[1].pixels
    (done,) = leon.complete(
        Document((Hole("text"), Image(pixels=pixels))),
        params=SamplingParams.of(temperature=0, max_tokens=8),
    )
    # The same number of tokens, each replaced by another.
    ids = leon.model.tokenizer.text.encode(done.parts[0].text)
    other = leon.model.tokenizer.text.decode([(i + 7) % 256 for i in ids])
    assert leon.likelihood(done, part=0) > leon.likelihood(done.replace(0, Text(other)), part=0)


def test_a_prompt_that_cannot_be_ranked_keeps_no_other(leon):
    """It fits as a prompt, but as a caption after its image it is too long."""
    room = max(n for n in range(200) if _fits(leon, "q" * n))
    prompts = ["q" * room, "a cat"]
    settings = ImageSettings((SamplingParams(),), num_docs=0, best_of=2, rank_by="likelihood")
    results = dict(leon.generate_each(prompts, settings))
    assert "longer than the model's context" in str(results[0])
    assert len(results[1]) == 1
    assert len(leon.generate(prompts[0], num_docs=0, best_of=2, guidance=1.0)) == 1


def _fits(leon: Leon, prompt: str) -> bool:
    try:
        context_limits.check_prompt(leon.model.folder, prompt, 0)
    except UserError:
        return False
    return True


def test_what_is_wrong_with_all_prompts_is_raised_at_once(leon):
    with pytest.raises(UserError, match="prompts is one text"):
        leon.generate_each("cat")
    with pytest.raises(UserError, match="'cat' is no Document"):
        leon.complete_each(["cat"])
    for wrong in ({"num_docs": 99}, {"num_docs": -1}, {"seed": 2**32 - 1, "num_images": 2}):
        with pytest.raises(UserError):
            leon.generate_each([PROMPT], ImageSettings(**wrong))


def test_prompts_with_one_seed_draw_different_numbers(leon):
    """Else the images of many prompts would be more alike than the model makes them."""
    colours = ["red", "blue", "green", "white", "black", "pink", "brown", "grey"]
    documents = [Document((Text(f"{c} cat"), Hole("image"))) for c in colours]
    drawn = leon.complete(documents, seeds=[0] * 8, params=SamplingParams.of(guidance=0))
    assert len({done.parts[1].codes.tobytes() for done in drawn}) == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": " "}, "prompt is empty"),
        ({"prompt": "cat " * 2500}, "9999 characters"),
        ({"prompt": "\ud800"}, "surrogate"),
        ({"num_images": 0}, "num_images is 0"),
        ({"num_docs": -1}, "num_docs is -1"),
        ({"num_docs": 9}, "at most"),
        ({"guidance": -1.0}, "guidance is -1"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"temperature": -2.0}, "temperature is -2"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_what_cannot_be_done_is_refused(leon, arguments, message):
    with pytest.raises(UserError, match=message):
        leon.generate(**({"prompt": PROMPT} | arguments))


def test_caption_limits_are_checked(leon):
    pixels = tiny.documents()[0].parts[1].pixels
    with pytest.raises(UserError, match="max_tokens is 0"):
        leon.caption(pixels, max_tokens=0)
    with pytest.raises(UserError, match="max_tokens is 500"):
        leon.caption(pixels, max_tokens=500)
    with pytest.raises(UserError, match="image cannot be read"):
        leon.caption(np.zeros((4, 4)))


def test_prompts_have_one_spelling(leon):
    """Unicode NFC, and one space between words."""
    (image,) = leon.generate("caf\u00e9 cat", num_docs=0)
    (other,) = leon.generate("  cafe\u0301 \n cat\t", num_docs=0)
    assert image.prompt == other.prompt == "caf\u00e9 cat"
    assert image.metadata() == other.metadata()
    np.testing.assert_array_equal(np.asarray(image.image), np.asarray(other.image))
