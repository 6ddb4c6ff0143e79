"""The public interface: generates images, captions and answers, and completes documents.

leon = Leon.load()
leon.generate("cat face, Twemoji style", num_images=4)[0].image
leon.caption("cat.png").text
"""

import os
from collections.abc import Iterable, Iterator, Sequence

import jax
from tqdm import tqdm

from leon_jax.config import UserError
from leon_jax.documents import Document, Hole, Text, normalise_text
from leon_jax.engine.engine import Sample
from leon_jax.engine.guidance import ClassifierFree, TwoConditions
from leon_jax.engine.kv_cache import CacheDtype
from leon_jax.engine.likelihood import log_likelihoods
from leon_jax.engine.sampling_params import MAX_TOKENS, SamplingParams
from leon_jax.generate import completion, context_limits, ranking
from leon_jax.generate.edit_prompts import edit_document, extend_document
from leon_jax.generate.image_metadata import credit
from leon_jax.generate.image_settings import ImageSettings, check_seed
from leon_jax.generate.images import finished_images, image_request, warm_up
from leon_jax.generate.inputs import ImageInput, image_part, text_part
from leon_jax.generate.model import Model
from leon_jax.generate.prompt_builder import Draft, Request
from leon_jax.generate.results import Caption, GeneratedImage
from leon_jax.generate.retriever import Retriever, find_index
from leon_jax.model_folder import ModelFolder
from leon_jax.models.weight_conversion import WeightType

__all__ = ["Caption", "GeneratedImage", "ImageSettings", "Leon", "SamplingParams", "credit"]

# Prompts whose documents are retrieved before they have slots.
_WINDOW = 64
_GUIDED = SamplingParams(ClassifierFree(3.0))
# The weights of CM3Leon, section 4.1.
_EDITING = SamplingParams(TwoConditions(1.5, 7.5))


class Leon:
    """A model with everything it needs to answer. Make one with `Leon.load`.

    Args:
      model: the loaded model: its folder, engine, tokenizers and encoder.
      index: the prepared folder to retrieve from; None: one is found, or made.
    """

    def __init__(self, model: Model, index: str | os.PathLike | None = None):
        self.model = model
        self._index = index
        self._retriever: Retriever | None = None

    @classmethod
    def load(
        cls,
        model: str | os.PathLike | ModelFolder | None = None,
        index: str | os.PathLike | None = None,
        weights: WeightType = "float32",
        cache: CacheDtype = "compute",
    ) -> "Leon":
        """Reads a model folder.

        Args:
          model: decoder.safetensors, tokenizer.safetensors, text.json, and encoder.safetensors or
            a folder `encoder` with OpenAI's CLIP; None: the model that comes with the package.
          index: the prepared folder to retrieve from; None: one is found, or made when it is first
            needed (see `leon_jax.generate.retriever.find_index`).
          weights: the dtype of the decoder's weights: "float32", "bfloat16" or "int8".
          cache: the dtype of cached keys and values: the decoder's "compute" dtype, or "int8".

        Raises:
          UserError: a file is missing or damaged, the files do not belong together, or there is no
            such dtype.
        """
        folder = model if isinstance(model, ModelFolder) else ModelFolder.open(model)
        if index is not None:
            find_index(folder.path, index)
        return cls(Model.load(folder, weights, cache), index)

    @property
    def name(self) -> str:
        """Name and version of the model."""
        return self.model.folder.name

    @property
    def retriever(self) -> Retriever:
        """What documents are retrieved from; read or made when it is first needed."""
        if self._retriever is None:
            with jax.set_mesh(self.model.mesh):
                folder = find_index(self.model.folder.path, self._index)
                self._retriever = Retriever(folder, self.model.encoder)
        return self._retriever

    def generate(
        self,
        prompt: str,
        num_images: int = 1,
        num_docs: int = 2,
        guidance: float = 3.0,
        temperature: float = 1.0,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int = 0,
        best_of: int | None = None,
        rank_by: ranking.Ranking = "clip",
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[GeneratedImage]:
        """Generates images for a prompt.

        Args:
          prompt: what to show; the demo model's captions read "cat face, Twemoji style".
          num_images, num_docs, seed, best_of, rank_by: see `ImageSettings`.
          guidance: classifier-free guidance weight; 1 is none.
          temperature, top_p, top_k: see `leon_jax.engine.samplers.make_sampler`.
          params: used instead of `guidance`, `temperature`, `top_p` and `top_k`; of several, the
            images take turns.

        Raises:
          UserError: an argument is out of range, or the prompt does not fit.
        """
        if params is None:
            params = SamplingParams.of(
                guidance=guidance, temperature=temperature, top_p=top_p, top_k=top_k
            )
        several = (params,) if isinstance(params, SamplingParams) else tuple(params)
        settings = ImageSettings(several, num_images, num_docs, seed, best_of, rank_by)
        ((_, result),) = self.generate_each([prompt], settings)
        if isinstance(result, UserError):
            raise result
        return result

    def generate_each(
        self, prompts: Iterable[str], settings: ImageSettings | None = None
    ) -> Iterator[tuple[int, list[GeneratedImage] | UserError]]:
        """Generates images for many prompts. They share the device, and come as they are done.

        Args:
          prompts: any number; they are taken as slots become free.
          settings: of every prompt.

        Returns:
          The index of a prompt, and its images as `generate` returns them; or its error, which
          does not stop the others.

        Raises:
          UserError: a setting is out of range, or there is nothing to retrieve from.
        """
        if isinstance(prompts, str):
            raise UserError("prompts is one text; give a list of them, or use generate")
        settings = settings or ImageSettings()
        context_limits.check_num_docs(self.model.folder, settings.num_docs)
        if settings.num_docs:
            _ = self.retriever  # an error of it is an error of all prompts
        requests = (
            image_request(self.model, self.retrieve_fitting, prompt, settings) for prompt in prompts
        )
        return (
            (result.index, result.error or finished_images(self.model, result, settings))
            for result in completion.complete(
                self.model.engine, self.model.tokenizer, requests, _WINDOW
            )
        )

    def edit(
        self,
        image: ImageInput,
        instruction: str,
        num_images: int = 1,
        seed: int = 0,
        params: SamplingParams = _EDITING,
    ) -> list[GeneratedImage]:
        """Generates an image anew as an instruction says.

        The prompt has the form of CM3Leon's instructions (table 5). The demo model was not trained
        on any, so it generates what the instruction names.

        Args:
          image: a file, a PIL image, or sRGB uint8[height, width, 3].
          instruction: what to change.
          num_images, seed: see `ImageSettings`.
          params: how ids are sampled; with CM3Leon's guidance by image and text if not given.
        """
        document = edit_document(image, instruction)
        settings = ImageSettings((params,), num_images, 0, seed)
        return self._generate_last(document, instruction, settings, "edit")

    def extend(
        self,
        image: ImageInput,
        prompt: str,
        rows: float = 0.5,
        num_images: int = 1,
        seed: int = 0,
        params: SamplingParams = _GUIDED,
    ) -> list[GeneratedImage]:
        """Keeps the upper part of an image and generates the rest.

        Its tokens are kept: the result has the model's size, and colours near the border may change
        a little, for the image tokenizer looks across it.

        Args:
          image: a file, a PIL image, or sRGB uint8[height, width, 3].
          prompt: what the whole image shows.
          rows: the share that is kept, more than 0 and less than 1; rounded to rows of tokens.
          num_images, seed: see `ImageSettings`.
          params: how ids are sampled; guidance of 3 if not given.

        Raises:
          UserError: see `generate`; or nothing, or all, of the image is kept.
        """
        document, kept_rows = extend_document(self.model, image, prompt, rows)
        settings = ImageSettings((params,), num_images, 0, seed)
        return self._generate_last(document, prompt, settings, f"extend, {kept_rows}")

    def caption(
        self,
        image: ImageInput,
        num_docs: int = 0,
        max_tokens: int = MAX_TOKENS,
        temperature: float = 0.0,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int = 0,
    ) -> Caption:
        """Generates a caption for an image: the text before it is infilled.

        Args:
          image: a file, a PIL image, or sRGB uint8[height, width, 3].
          num_docs: how many documents to retrieve and read first, at most.
          max_tokens: where a caption is cut.
          temperature: 0 gives the most likely caption, token by token.
          top_p, top_k: see `leon_jax.engine.samplers.make_sampler`.
          seed: decides the caption if the temperature is above 0.

        Raises:
          UserError: the file is no image that can be read, or an argument is out of range.
        """
        document = Document((Hole("text"), image_part(image)))
        context_limits.check_caption(self.model.folder, max_tokens, num_docs)
        params = SamplingParams.of(
            temperature=temperature, top_p=top_p, top_k=top_k, max_tokens=max_tokens
        )
        return self._generate_text(document, 0, num_docs, Sample(seed, params))

    def answer(
        self,
        image: ImageInput,
        question: str,
        num_docs: int = 0,
        seed: int = 0,
        params: SamplingParams | None = None,
    ) -> Caption:
        """Answers a question about an image: the text after the question is infilled.

        The question stands before the image, as in CM3Leon's instructions (table 5). The demo model
        was not trained on any, so its answer is a caption at best.

        Args:
          image: a file, a PIL image, or sRGB uint8[height, width, 3].
          question: any text.
          num_docs: how many documents to retrieve and read first, at most.
          seed: decides the answer if the temperature is above 0.
          params: how ids are sampled; temperature 0 if not given.

        Raises:
          UserError: see `caption`; or the question is empty or too long.
        """
        text = text_part("question", f"Question: {question} Answer:")
        if not question.strip():
            raise UserError("the question is empty; ask something about the image")
        document = Document((text, Hole("text"), image_part(image)))
        sample = Sample(seed, params or SamplingParams.of(temperature=0.0))
        context_limits.check_caption(self.model.folder, sample.params.max_tokens, num_docs)
        return self._generate_text(document, 1, num_docs, sample)

    def complete(
        self,
        documents: Document | Sequence[Document],
        *,
        retrieved: Sequence[Sequence[Document]] | None = None,
        seeds: Sequence[int] | None = None,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Document]:
        """Fills every hole of every document.

        Args:
          documents: one, or several; images may have pixels or codes.
          retrieved: for each document, those to read first; by default none.
          seeds: for each document, 0..2**32 - 1; by default 0, 1, ... The result of a document
            depends on its own seed only.
          params: how ids are sampled, for all documents or for each. Guidance applies to images.

        Returns:
          Documents without holes; images that filled one have pixels and codes.

        Raises:
          UserError: a document does not fit the context, or an argument is out of range; of several
            documents the message says which one. `complete_each` finishes the others.
        """
        documents = [documents] if isinstance(documents, Document) else list(documents)
        requests = completion.make_requests(self.model, documents, retrieved, seeds, params)
        filled: list = [None] * len(requests)
        is_short = len(requests) <= self.model.engine.slots
        with tqdm(total=len(requests), unit="doc", disable=is_short, leave=False) as bar:
            for result in self._complete(requests):
                if result.error:
                    prefix = f"document {result.index}: " if len(requests) > 1 else ""
                    raise UserError(f"{prefix}{result.error}") from result.error
                (filled[result.index],) = result.documents
                bar.update()
        return self.model.decode_images(filled)

    def complete_each(
        self,
        documents: Iterable[Document],
        *,
        retrieved: Sequence[Sequence[Document]] | None = None,
        seeds: Sequence[int] | None = None,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[tuple[int, Document | UserError]]:
        """Fills every hole of every document. Results come as they are done.

        The arguments are those of `complete`. The result is the index of a document, and what
        `complete` returns for it; or its error, which does not stop the others.

        Raises:
          UserError: an argument other than a document is out of range.
        """
        several = [documents] if isinstance(documents, Document) else list(documents)
        requests = completion.make_requests(self.model, several, retrieved, seeds, params)
        return (
            (result.index, result.error or self.model.decode_images(result.documents)[0])
            for result in self._complete(requests)
        )

    def stream(
        self,
        document: Document,
        *,
        retrieved: Sequence[Document] = (),
        seed: int = 0,
        params: SamplingParams | None = None,
    ) -> Iterator[Draft]:
        """Fills the holes of a document and shows how it grows.

        A draft comes after each row of an image's tokens, and after as many tokens of a text. Texts
        have the words so far. Images have pixels, white where nothing is generated yet. The last
        draft is `done` and equals what `complete` returns. The arguments are those of `complete`.
        """
        (request,) = completion.make_requests(
            self.model, [document], [tuple(retrieved)], [seed], params
        )
        return completion.stream(self.model, request)

    def likelihood(
        self, document: Document, part: int | None = None, retrieved: Sequence[Document] = ()
    ) -> float:
        """Log-likelihood in nats of a document without holes, or of one part given the others.

        Args:
          document: images may have pixels or codes.
          part: the index of a part. It is scored as what fills a hole in its place, its end
            included, which ranks captions for an image. None: all ids in order are scored.
          retrieved: documents to read first; they are not scored.

        Raises:
          UserError: the document has holes, or does not fit the context.
        """
        document, retrieved = self.tokenize(document), [*map(self.tokenize, retrieved)]
        ids, weights = ranking.scored_ids(self.model.tokenizer, document, part, retrieved)
        return float(log_likelihoods(self.model.engine, [ids], [weights])[0])

    def retrieve(self, document: Document, num_docs: int) -> list[Document]:
        """At most `num_docs` documents for a prompt, the most relevant first.

        Raises:
          UserError: there is no folder to retrieve from and none can be made.
        """
        if num_docs < 1:
            return []
        retriever = self.retriever
        with jax.set_mesh(self.model.mesh):
            return retriever.retrieve(document, num_docs)

    def retrieve_fitting(
        self, document: Document, num_docs: int, new_tokens: int
    ) -> tuple[Document, ...]:
        """Those documents of `retrieve` that fit beside a prompt and `new_tokens` more tokens."""
        retrieved = self.retrieve(document, num_docs)
        return tuple(
            context_limits.select_fitting(self.model.folder, retrieved, document, new_tokens)
        )

    def tokenize(self, document: Document) -> Document:
        """The document with codes beside the pixels of every image."""
        return self.model.encode_images(document)

    def warm(self, settings: ImageSettings, prompts: int = 1) -> int:
        """Compiles what `generate_each` needs for prompts and documents of any length.

        Args:
          settings: as they will be given to `generate_each`.
          prompts: how many prompts there will be.

        Returns:
          For how many lengths of prompts.
        """
        context_limits.check_num_docs(self.model.folder, settings.num_docs)
        self.retrieve(Document((Text("a"),)), settings.num_docs)
        return warm_up(self.model, settings, min(prompts, _WINDOW))

    def save(self, folder: str | os.PathLike) -> None:
        """Copies the model folder to one that `load` reads, each file whole or not at all.

        Weights are copied as they were read, whatever their dtype is now. Nothing is written into
        the model's own folder.
        """
        self.model.folder.copy_to(folder)

    def _generate_last(
        self, document: Document, prompt: str, settings: ImageSettings, task: str
    ) -> list[GeneratedImage]:
        """The images for the last hole of a document; they are said to be for `prompt`."""
        request = Request(self.tokenize(document), samples=settings.samples)
        (result,) = self._complete([request])
        return finished_images(self.model, result, settings, normalise_text(prompt), task)

    def _generate_text(
        self, document: Document, part: int, num_docs: int, sample: Sample
    ) -> Caption:
        """What fills the text hole of a document about an image."""
        check_seed(sample.seed)
        document = self.tokenize(document)
        retrieved = self.retrieve_fitting(document, num_docs, sample.params.max_tokens)
        (result,) = self._complete([Request(document, retrieved, (sample,))])
        if result.error:
            raise result.error
        text = result.documents[0].parts[part]
        assert isinstance(text, Text)
        return Caption(text.text.strip(), sample.seed, retrieved)

    def _complete(self, requests: Iterable[Request]) -> Iterator[completion.Completion]:
        return completion.complete(self.model.engine, self.model.tokenizer, requests)
