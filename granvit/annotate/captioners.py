"""Captions of images and of their boxes, by models that take an image and a question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from granvit.annotate.detectors import first_line
from granvit.annotate.interfaces import AnnotationError, Box, Captions, batches, loaded_once, running
from granvit.errors import MissingDependencyError

if TYPE_CHECKING:
    from PIL.Image import Image

SHOWS = ("crop", "draw")
# The question for a whole image is the paper's; so is the limit of ten words.
WHOLE_PROMPT = "Describe in detail what is shown in the image in one paragraph"
REGION_PROMPTS = {
    "crop": "Describe the content of the image in no more than 10 words.",
    "draw": "Describe the content contained within the red rectangle in no more than 10 words.",
}


@dataclass(frozen=True)
class Request:
    """One question about one image."""

    image: Image
    prompt: str
    max_tokens: int


@dataclass(frozen=True)
class Questions:
    """What is asked about an image and its boxes, whichever engine answers.

    Attributes:
        show: how the model sees a box: ``"crop"`` cuts it out, ``"draw"`` draws a red rectangle into the image.
        whole_prompt: asked about the image; empty for no caption of the image.
        region_prompt: asked about a box; None for the one that fits `show`.
        region_words: a region's caption is cut after so many.
        whole_tokens: of an answer about an image at most.
        region_tokens: of an answer about a box at most.
    """

    show: str = "crop"
    whole_prompt: str = WHOLE_PROMPT
    region_prompt: str | None = None
    region_words: int = 10
    whole_tokens: int = 256
    region_tokens: int = 32

    def __post_init__(self) -> None:
        if self.show not in SHOWS:
            raise AnnotationError(f"captioner: show: expected one of {', '.join(SHOWS)}, got {self.show!r}")

    def ask(self, images: Sequence[Image], boxes: Sequence[Sequence[Box]]) -> list[Request]:
        """For each image the question about it, then those about its boxes."""
        requests = []
        region_prompt = REGION_PROMPTS[self.show] if self.region_prompt is None else self.region_prompt
        for image, of_image in zip(images, boxes, strict=True):
            if self.whole_prompt:
                requests.append(Request(image, self.whole_prompt, self.whole_tokens))
            shown = _cut_out if self.show == "crop" else _drawn
            requests += [Request(shown(image, box), region_prompt, self.region_tokens) for box in of_image]
        return requests

    def sort(self, answers: Sequence[str], boxes: Sequence[Sequence[Box]]) -> list[Captions]:
        """The answers to :meth:`ask`, each where it belongs, without line breaks and doubled spaces."""
        left = iter(answers)
        captions = []
        for of_image in boxes:
            whole = " ".join(next(left).split()) if self.whole_prompt else ""
            regions = tuple(" ".join(next(left).split()[: self.region_words]) for _ in of_image)
            captions.append(Captions(whole, regions))
        if next(left, None) is not None:
            raise ValueError("Questions.sort: more answers than questions")
        return captions


def _pixels(image: Image, box: Box) -> tuple[int, int, int, int]:
    """Whole pixels that a box touches, at least one."""
    x0, y0 = min(int(box[0] * image.width), image.width - 1), min(int(box[1] * image.height), image.height - 1)
    x1, y1 = (-int(-edge * size // 1) for edge, size in ((box[2], image.width), (box[3], image.height)))
    return x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)


def _cut_out(image: Image, box: Box) -> Image:
    return image.crop(_pixels(image, box))


def _drawn(image: Image, box: Box) -> Image:
    from PIL import ImageDraw

    marked = image.copy()
    x0, y0, x1, y1 = _pixels(image, box)
    ImageDraw.Draw(marked).rectangle((x0, y0, x1 - 1, y1 - 1), outline="red", width=max(2, min(image.size) // 150))
    return marked


@dataclass(frozen=True)
class TransformersCaptioner:
    """Any model of transformers that turns images and text into text and has a chat template.

    Attributes:
        model: name or folder.
        questions: what is asked.
        revision: of the model on the hub.
        dtype: of its weights.
        batch: questions that it answers together.
        device: where it runs.
    """

    model: str
    questions: Questions = Questions()
    revision: str | None = None
    dtype: str = "bfloat16"
    batch: int = 8
    device: str = running("cpu")

    @property
    def name(self) -> str:
        """The model's."""
        return self.model

    def caption(self, images: Sequence[Image], boxes: Sequence[Sequence[Box]]) -> list[Captions]:
        """A caption for each image and one for each of its boxes, always the likeliest words.

        Raises:
            MissingDependencyError: transformers is not installed.
            AnnotationError: the model cannot be loaded, or has no chat template.
        """
        requests = self.questions.ask(images, boxes)
        answers = [""] * len(requests)
        # Long answers together and short ones together: a batch takes as long as its longest.
        order = sorted(range(len(requests)), key=lambda i: requests[i].max_tokens)
        for part in batches(order, self.batch):
            for i, answer in zip(part, self._answer([requests[i] for i in part]), strict=True):
                answers[i] = answer
        return self.questions.sort(answers, boxes)

    def _answer(self, requests: Sequence[Request]) -> list[str]:
        import torch

        processor, model = _captioning_model(self)
        inputs = processor.apply_chat_template(
            [chat(request, "image", "image") for request in requests],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(self.device, model.dtype)
        with torch.inference_mode():
            tokens = model.generate(
                **inputs, do_sample=False, max_new_tokens=max(request.max_tokens for request in requests)
            )
        length = inputs["input_ids"].shape[1]
        new = [row[length : length + request.max_tokens] for row, request in zip(tokens, requests, strict=True)]
        return list(processor.batch_decode(new, skip_special_tokens=True))


@loaded_once
def _captioning_model(captioner: TransformersCaptioner) -> tuple[Any, Any]:
    try:
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor
    except ImportError:
        raise MissingDependencyError("TransformersCaptioner needs transformers: pip install 'granvit[train]'") from None
    try:
        processor = AutoProcessor.from_pretrained(captioner.model, revision=captioner.revision)
        model = AutoModelForImageTextToText.from_pretrained(
            captioner.model, revision=captioner.revision, dtype=getattr(torch, captioner.dtype)
        )
    except (OSError, ValueError) as error:
        raise AnnotationError(f"captioner {captioner.model}: cannot be loaded: {first_line(error)}") from error
    if getattr(processor, "chat_template", None) is None:
        raise AnnotationError(f"captioner {captioner.model}: its processor has no chat template")
    processor.tokenizer.padding_side = "left"  # an answer goes on where its question ends
    return processor, model.to(captioner.device).eval()


def chat(request: Request, kind: str, name: str) -> list[dict[str, Any]]:
    """A question as one turn of a chat.

    Args:
        request: the question.
        kind: what the engine calls an image among the parts of a turn.
        name: under which it finds the image.
    """
    parts = [{"type": kind, name: request.image}, {"type": "text", "text": request.prompt}]
    return [{"role": "user", "content": parts}]


@dataclass(frozen=True)
class VLLMCaptioner:
    """Any model of vLLM that takes images and has a chat template, offline: all questions of a batch at once.

    Attributes:
        model: name or folder.
        questions: what is asked.
        revision: of the model on the hub.
        dtype: of its weights.
        max_model_len: tokens of a question and its answer at most; None for the model's.
        tensor_parallel: GPUs that share the model.
        memory: share of each GPU's memory that vLLM takes.
    """

    model: str
    questions: Questions = Questions()
    revision: str | None = None
    dtype: str = "bfloat16"
    max_model_len: int | None = None
    tensor_parallel: int = running(1)
    memory: float = running(0.9)

    @property
    def name(self) -> str:
        """The model's."""
        return self.model

    def caption(self, images: Sequence[Image], boxes: Sequence[Sequence[Box]]) -> list[Captions]:
        """A caption for each image and one for each of its boxes, always the likeliest words.

        Raises:
            MissingDependencyError: vLLM is not installed.
        """
        engine, sampling = _vllm(self)
        requests = self.questions.ask(images, boxes)
        outputs = engine.chat(
            [chat(request, "image_pil", "image_pil") for request in requests],
            [sampling(temperature=0.0, max_tokens=request.max_tokens) for request in requests],
            use_tqdm=False,
        )
        return self.questions.sort([output.outputs[0].text for output in outputs], boxes)


@loaded_once
def _vllm(captioner: VLLMCaptioner) -> tuple[Any, Any]:
    try:
        from vllm import LLM, SamplingParams
    except ImportError:
        raise MissingDependencyError(
            "VLLMCaptioner needs vLLM: pip install 'granvit[vllm]', on a GPU machine"
        ) from None
    engine = LLM(
        model=captioner.model,
        revision=captioner.revision,
        dtype=captioner.dtype,
        max_model_len=captioner.max_model_len,
        tensor_parallel_size=captioner.tensor_parallel,
        gpu_memory_utilization=captioner.memory,
        limit_mm_per_prompt={"image": 1},
    )
    return engine, SamplingParams
