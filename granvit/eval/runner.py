"""``granvit eval``: asks a model about images, keeps every answer, and writes what they are worth."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from granvit.data.sources import Broken, Shown, Source
from granvit.errors import UserError
from granvit.eval.answers import AnswerFile, read_evaluation, write_evaluation
from granvit.eval.metrics import rouge_scorer
from granvit.eval.predict import predict
from granvit.eval.provenance import device_name, versions
from granvit.eval.questions import QUESTION, Asked, Asking, SettingsError, ask, back
from granvit.eval.scores import Answer, summary
from granvit.eval.sources import checksum, chosen, readable
from granvit.model import checkpoint
from granvit.model.granvit import GranViT
from granvit.model.packing import Sample
from granvit.model.prompts import Prompts
from granvit.recipe import MAX_BROKEN

FORMAT = "granvit evaluation 1"
DTYPES = ("float32", "bfloat16")
Progress = Callable[[int, int], None]  # images that are answered, of how many


@dataclass(frozen=True)
class Settings:
    """How a model is evaluated.

    Attributes:
        asking: what is asked.
        images: of each source, drawn at random; None is all.
        wrong_image: show the next image of the source in place of each, the control for what is known without looking.
        batch_size: questions that are answered together.
        max_new_tokens: of an answer, at most.
        tiles: with which a large image is shown beside the overview, at most; as in training.
        seed: of the draw of images.
        dtype: of the weights and the arithmetic.
        device: as torch names it.

    Raises:
        SettingsError: a setting that is none of these.
    """

    asking: Asking = field(default_factory=Asking)
    images: int | None = None
    wrong_image: bool = False
    batch_size: int = 32
    max_new_tokens: int = 64
    tiles: int = 0
    seed: int = 0
    dtype: str = "float32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("images", "batch_size", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingsError(f"{name}: expected at least 1, got {value}")
        if self.tiles < 0:
            raise SettingsError(f"tiles: expected at least 0, got {self.tiles}")
        if self.dtype not in DTYPES:
            raise SettingsError(f"dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}")


def evaluate(
    model: str | Path,
    sources: Sequence[Source],
    settings: Settings,
    folder: str | Path,
    *,
    overwrite: bool = False,
    max_broken: float = MAX_BROKEN,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Answers every question once and writes ``evaluation.json``; the same call goes on where it was stopped.

    Answers are appended to ``answers.jsonl`` as they are made, a chunk of images at a time. A chunk that a kill may
    have cut is done again whole, so that every question is always answered in the same company.

    Args:
        model: folder that :func:`granvit.model.checkpoint.save` wrote.
        sources: what is asked about; their names must differ.
        settings: how.
        folder: of the results; one of another evaluation is refused.
        overwrite: delete the results that are there.
        max_broken: share of the images that may be unreadable, see :class:`granvit.data.sources.Broken`; they are left
            out, and counted as ``not read``.
        progress: is told how far it is.
        note: is told of each image that cannot be read.

    Returns:
        What ``evaluation.json`` holds.

    Raises:
        UserError: what cannot be read, asked or written, in one sentence.
    """
    model = Path(model)
    if not (model / checkpoint.SETTINGS).is_file():
        raise checkpoint.CheckpointError(f"{model}: holds no model that granvit wrote: no {checkpoint.SETTINGS}")
    numbers = [chosen(source, settings.images, settings.seed) for source in sources]
    _check(sources, numbers, settings)
    config = _config(checksum(model), sources, settings)
    with AnswerFile(folder, config, overwrite=overwrite) as file:
        done = read_evaluation(folder)
        if done is not None:
            return done
        began = time.perf_counter()
        broken = Broken(max_broken)
        skipped = _answer(model, sources, numbers, settings, file, broken, progress, note)
        report = _report(model, config, settings, file.read(), broken, skipped)
        report["seconds"] = round(time.perf_counter() - began, 3)
        write_evaluation(folder, report)
    return report


def _check(sources: Sequence[Source], numbers: Sequence[Sequence[int]], settings: Settings) -> None:
    names = Counter(source.name for source in sources)
    if not names:
        raise SettingsError("data: expected at least one source, got none")
    if max(names.values()) > 1:
        raise SettingsError(f"data: expected sources of different names, got {max(names, key=names.__getitem__)} twice")
    for source, own in zip(sources, numbers, strict=True):
        if len(own) < 1 + settings.wrong_image:
            needed = "two images, to show the wrong one of" if settings.wrong_image else "at least one image"
            raise SettingsError(f"{source.name}: expected {needed}, got {len(own)}")
    if not all(source.asks for source in sources) and set(settings.asking.tasks) - {"caption_to_bbox"}:
        rouge_scorer()  # what is missing is to be known before anything is answered


def _config(model: str, sources: Sequence[Source], settings: Settings) -> dict[str, Any]:
    """What answers depend on, and what nobody may change between two runs into one folder; as JSON gives it back."""
    plain = {"model": model, "sources": [source.identity() for source in sources], **asdict(settings)}
    found: dict[str, Any] = json.loads(json.dumps(plain))
    return found


def _answer(
    folder: Path,
    sources: Sequence[Source],
    numbers: Sequence[Sequence[int]],
    settings: Settings,
    file: AnswerFile,
    broken: Broken,
    progress: Progress | None,
    note: Callable[[str], None] | None,
) -> Counter[str]:
    """Answers what is not answered yet; counts the regions that could not be asked about, of all images."""
    loaded = checkpoint.load(folder)
    prompts = Prompts(loaded.tokenizer)
    model = loaded.model.to(getattr(torch, settings.dtype)).to(settings.device).eval()
    _check_prompt(model, settings.asking.prompt)
    skipped: Counter[str] = Counter()
    chunk, total, seen = 0, sum(map(len, numbers)), 0
    for source, own in zip(sources, numbers, strict=True):
        # Images of a chunk: with one question each, or with about four.
        width = settings.batch_size if source.asks else max(1, settings.batch_size // 4)
        for begin in range(0, len(own), width):
            part = own[begin : begin + width]
            read, reasons = readable(source, part, loaded.image_size, settings.tiles)
            if note is not None:
                for reason in reasons:
                    note(f"left out: {reason}")
            broken.add(len(part), reasons)
            own_images = list(read.values())
            asked = [ask(image, settings.asking, skipped) for image in own_images]
            if read and chunk not in file:
                seen_images = own_images
                if settings.wrong_image:
                    last = next(reversed(read))
                    following = [i for i in (*own[begin + width :], *own[: begin + width]) if i != last]
                    seen_images = [*own_images[1:], _first(source, following, loaded.image_size, settings.tiles)]
                about = zip(read, own_images, seen_images, asked, strict=True)
                file.append(_chunk(model, prompts, chunk, source.name, list(about), settings))
            chunk, seen = chunk + 1, seen + len(part)
            if progress is not None:
                progress(seen, total)
    return skipped


def _first(source: Source, numbers: Sequence[int], size: int, tiles: int) -> Shown:
    """The first image that can be read."""
    found = next((image for i in numbers for image in readable(source, [i], size, tiles)[0].values()), None)
    if found is None:
        raise SettingsError(f"{source.name}: expected two images that can be read, to show the wrong one of, got one")
    return found


def _check_prompt(model: GranViT, prompt: str) -> None:
    has = {"text": True, "region": model.region_prompt is not None, "box": model.box_prompt is not None}
    if not has["region" if prompt == "mixed" else prompt]:
        raise SettingsError(f"prompt: {prompt} needs a model that was trained with it, got one of {model.prompt}")


def _chunk(
    model: GranViT,
    prompts: Prompts,
    number: int,
    source: str,
    about: Sequence[tuple[int, Shown, Shown, Sequence[Asked]]],
    settings: Settings,
) -> list[Answer]:
    """The answers about some images: their numbers, they, what the model sees, and the questions."""
    answered = predict(
        model,
        prompts,
        [Sample(seen.frames, [question.pair for question in asked]) for _, _, seen, asked in about],
        style=settings.asking.style,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
    )
    found = []
    for (image, own, seen, asked), of_image in zip(about, answered, strict=True):
        for question, prediction in zip(asked, of_image.predictions, strict=True):
            found.append(
                Answer(
                    chunk=number,
                    source=source,
                    image=image,
                    key=own.record.key,
                    task=question.pair.task,
                    question=question.pair.question,
                    references=question.references,
                    answer=prediction.answer,
                    region=question.region,
                    box=question.box,
                    found=None if prediction.box is None else back(own.transform, prediction.box),
                    groups=_groups(own, question),
                    number=None if own.question is None else own.question.number,
                    wrong_image=seen.record.key if settings.wrong_image else None,
                )
            )
    return found


def _groups(shown: Shown, asked: Asked) -> dict[str, str]:
    if asked.pair.task == QUESTION:
        return {}
    split = shown.record.meta.get("split")
    return {"kind": shown.record.kind, **({"split": str(split)} if split else {}), **asked.groups}


def _report(
    model: Path,
    config: dict[str, Any],
    settings: Settings,
    answers: Sequence[Answer],
    broken: Broken,
    skipped: Counter[str],
) -> dict[str, Any]:
    images = broken.wanted - broken.count
    if not answers:
        raise UserError(f"nothing could be asked about {images} images: {dict(skipped) or 'they have no regions'}")
    return {
        "format": FORMAT,
        "metrics": summary(answers),
        "counts": {
            "images": images,
            "not read": broken.count,
            "answers": len(answers),
            "not asked": dict(skipped),
        },
        "checkpoint": {"path": str(model.resolve()), "sha256": config["model"]},
        "config": config,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(settings.device),
        **versions(),
    }
