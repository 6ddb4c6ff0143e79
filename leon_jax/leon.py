"""The public interface: generates images, captions and answers, and completes documents.

leon = Leon.load()
leon.generate("cat face, Twemoji style", num_images=4)[0].image
leon.caption("cat.png").text
"""

import functools
import os
from collections.abc import Iterable, Iterator, Sequence

import jax
from tqdm import tqdm

from leon_jax.config import UserError
from leon_jax.documents import Document, Hole, Text, normalise_text
from leon_jax.engine.engine import Sample
from leon_jax.engine.guidance import TwoConditions
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
from leon_jax.generate.retriever import Retriever, check_index, fill_settings, find_index
from leon_jax.model_folder import ModelFolder
from leon_jax.models.weight_conversion import WeightType

__all__ = ["Caption", "GeneratedImage", "ImageSettings", "Leon", "SamplingParams", "credit"]

# Maximum number of requests that wait for slots. Their documents are already retrieved.
_WINDOW = 64
# The guidance weights of CM3Leon, section 4.1.
_EDITING = SamplingParams(TwoConditions(1.5, 7.5))


class Leon:
    """A loaded model with a retriever. Create one with `Leon.load`.

    Args:
      model: the loaded model.
      index: the index, a prepared folder; None: see `load`.
    """

    def __init__(self, model: Model, index: str | os.PathLike | None = None):
        self.model = model
        self._index = index

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
          model: a model folder, or a `.tar` of one (docs/model_folder.md); None: the shipped one.
          index: the index, a prepared folder; None: the one that the model folder names
            (see `leon_jax.generate.retriever.find_index`).
          weights: dtype of the decoder's weights: "float32", "bfloat16" or "int8".
          cache: dtype of the KV cache: "compute" (the decoder's compute dtype) or "int8".

        Raises:
          UserError: a file is missing, damaged or does not fit the others, or a dtype is unknown.
        """
        folder = model if isinstance(model, ModelFolder) else ModelFolder.open(model)
        if index is not None:
            check_index(index, folder.path)
        return cls(Model.load(folder, weights, cache), index)

    @property
    def name(self) -> str:
        """Name and version of the model."""
        return self.model.folder.name

    @functools.cached_property
    def retriever(self) -> Retriever:
        """The documents and their index. They are opened, or created, at the first access."""
        with jax.set_mesh(self.model.mesh):
            return Retriever(
                find_index(self.model.folder, self._index), self.model.retrieval_encoder
            )

    def generate(
        self,
        prompt: str,
        num_images: int = 1,
        num_docs: int | None = None,
        guidance: float | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int = 0,
        best_of: int | None = None,
        rank_by: ranking.Ranking = "clip",
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[GeneratedImage]:
        """Generates images for a prompt and returns them in the order that `ImageSettings` defines.

        Args:
          prompt: the prompt, for example "cat face, Twemoji style" for the shipped model.
          num_images, num_docs, seed, best_of, rank_by: see `ImageSettings`.
          guidance: weight of classifier-free guidance; 1 is no guidance; None: the model's.
          temperature, top_p, top_k: see `SamplingParams.replace`; None: the model's.
          params: replaces the four values above; see `ImageSettings`. None: these values are used.

        Raises:
          UserError: an argument is out of range, or the prompt does not fit the context.
        """
        if params is None:
            params = self.model.folder.defaults.sampling.replace(
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
        """Generates images for many prompts, which share the slots.

        Args:
          prompts: any number of prompts; they are read as slots become free.
          settings: the settings of every prompt; None: `ImageSettings()`.

        Returns:
          For each prompt, in the order of completion, its index and its images as `generate`
          returns them, or its error. An error does not stop the other prompts.

        Raises:
          UserError: a setting is out of range, or the model has no index.
        """
        if isinstance(prompts, str):
            raise UserError("prompts is one text; give a list of them, or use generate")
        settings = fill_settings(settings or ImageSettings(), self.model.folder, self._index)
        context_limits.check_num_docs(self.model.folder, settings.max_docs)
        if settings.max_docs:
            _ = self.retriever  # if it fails, all prompts fail
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
        """Generates a new version of an image, following an instruction.

        The prompt has the format of CM3Leon's instructions (table 5). The shipped model was not
        trained on instructions, so it generates the object that the instruction names.

        Args:
          image: a file, a PIL image, or sRGB uint8[height, width, 3].
          instruction: the change to make.
          num_images, seed: see `ImageSettings`.
          params: sampling parameters; by default CM3Leon's guidance by image and text.

        Raises:
          UserError: see `generate`; or the image cannot be read, or the instruction is empty.
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
        params: SamplingParams | None = None,
    ) -> list[GeneratedImage]:
        """Keeps the upper part of an image and generates the rest.

        It keeps tokens, not pixels: the result has the model's resolution. Colours near the border
        may change slightly, because the image tokenizer decodes tokens of both parts together.

        Args:
          image: a file, a PIL image, or sRGB uint8[height, width, 3].
          prompt: a description of the whole image.
          rows: fraction of the image to keep, above 0 and below 1; rounded to rows of tokens.
          num_images, seed: see `ImageSettings`.
          params: sampling parameters; None: the model's.

        Raises:
          UserError: see `generate`; or the image cannot be read, or no row or every row is kept.
        """
        document, kept_rows = extend_document(self.model, image, prompt, rows)
        params = params or self.model.folder.defaults.sampling
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
        """Generates a caption for an image by infilling the text before it.

        Args:
          image: a file, a PIL image, or sRGB uint8[height, width, 3].
          num_docs: maximum number of retrieved documents.
          max_tokens: maximum number of tokens of the caption.
          temperature: sampling temperature; 0 chooses the most likely token at each step.
          top_p, top_k: see `leon_jax.engine.samplers.make_sampler`.
          seed: the random seed, 0..2**32 - 1; not used if the temperature is 0.

        Raises:
          UserError: the image cannot be read, or an argument is out of range.
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
        """Answers a question about an image by infilling the text after the question.

        The question comes before the image, as in CM3Leon's instructions (table 5). The shipped
        model was not trained on instructions; at best it answers with a caption.

        Args:
          image: a file, a PIL image, or sRGB uint8[height, width, 3].
          question: the question.
          num_docs: maximum number of retrieved documents.
          seed: the random seed, 0..2**32 - 1; not used if the temperature is 0.
          params: sampling parameters; None: temperature 0.

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
          documents: one or several documents; their images have pixels, codes or both.
          retrieved: for each document, the documents to read before it, in this order; None: none.
          seeds: for each document, a seed 0..2**32 - 1, used for it alone; None: 0, 1, 2, ...
          params: sampling parameters for all documents, or for each; None: `SamplingParams()`.
            Guidance applies to images only.

        Returns:
          Documents without holes. All their images have pixels; generated images also have codes.

        Raises:
          UserError: a document does not fit the context, or an argument is out of range. If there
            are several, the message has the index, and `complete_each` would finish the others.
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
        """Fills every hole of every document. The arguments are those of `complete`.

        Returns:
          For each document, in the order of completion, its index and its result as in `complete`,
          or its error. An error does not stop the other documents.

        Raises:
          UserError: an argument is of a wrong type, out of range, or not given for each document.
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
        """Fills the holes of a document and returns its drafts; see `completion.stream`.

        The arguments and errors are those of `complete`, for one document. The last draft has the
        result of `complete`, and its `done` is True.
        """
        (request,) = completion.make_requests(
            self.model, [document], [tuple(retrieved)], [seed], params
        )
        return completion.stream(self.model, request)

    def likelihood(
        self, document: Document, part: int | None = None, retrieved: Sequence[Document] = ()
    ) -> float:
        """Returns the log-likelihood, in nats, of a document or of one part given the others.

        Args:
          document: a document without holes; its images have pixels, codes or both.
          part: index of a part. It is scored as the completion of a hole in its place, including
            the id that ends it. This ranks captions for an image. None: scores all ids in order.
          retrieved: documents to read before it, in this order; they are not scored.

        Raises:
          UserError: the document has holes, lacks the part, or does not fit the context.
        """
        document, retrieved = self.tokenize(document), [*map(self.tokenize, retrieved)]
        ids, weights = ranking.scored_ids(self.model.tokenizer, document, part, retrieved)
        return float(log_likelihoods(self.model.engine, [ids], [weights])[0])

    def retrieve(self, document: Document, num_docs: int) -> list[Document]:
        """Retrieves at most `num_docs` documents for a prompt, most relevant first.

        Raises:
          UserError: the index cannot be read, found or created.
        """
        with jax.set_mesh(self.model.mesh):
            return self.retriever.retrieve(document, num_docs) if num_docs > 0 else []

    def retrieve_fitting(
        self, document: Document, num_docs: int, new_tokens: int
    ) -> tuple[Document, ...]:
        """Retrieves documents that fit with `new_tokens` more tokens, the most relevant last."""
        retrieved = self.retrieve(document, num_docs)
        return tuple(
            context_limits.select_fitting(self.model.folder, retrieved, document, new_tokens)
        )

    def tokenize(self, document: Document) -> Document:
        """Returns the document with codes added to each image that has only pixels."""
        return self.model.encode_images(document)

    def warm(self, settings: ImageSettings, prompts: int = 1) -> int:
        """Compiles the programs of `generate_each` for prompts and documents of any length.

        Args:
          settings, prompts: the settings for `generate_each`, and the number of prompts.

        Returns:
          The number of padded prompt lengths.

        Raises:
          UserError: a setting or `prompts` is out of range, or the images do not fit the context.
        """
        settings = fill_settings(settings, self.model.folder, self._index)
        context_limits.check_num_docs(self.model.folder, settings.max_docs)
        self.retrieve(Document((Text("a"),)), settings.max_docs)
        return warm_up(self.model, settings, min(prompts, _WINDOW))

    def save(self, folder: str | os.PathLike) -> None:
        """Copies each file of the model folder atomically to a folder that `load` can read.

        It copies weights in the dtype of their files. It does not change the model's own folder.
        """
        self.model.folder.copy_to(folder)

    def _generate_last(
        self, document: Document, prompt: str, settings: ImageSettings, task: str
    ) -> list[GeneratedImage]:
        """Generates the images for the last hole of a document. The metadata gets `prompt`."""
        request = Request(self.tokenize(document), samples=settings.samples)
        (result,) = self._complete([request])
        return finished_images(self.model, result, settings, normalise_text(prompt), task)

    def _generate_text(
        self, document: Document, part: int, num_docs: int, sample: Sample
    ) -> Caption:
        """Generates the text for the hole at index `part` of a document with an image."""
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
