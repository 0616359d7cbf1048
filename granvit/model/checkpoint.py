"""A trained model on disk: a stock LLaVA folder, with the region prompts beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor
from transformers import AutoTokenizer, LlavaForConditionalGeneration, PreTrainedTokenizerBase
from transformers.utils import logging

from granvit.errors import UserError, why_not_written
from granvit.model.granvit import GranViT
from granvit.model.processor import processor_of

SETTINGS, HEADS = "granvit.json", "granvit.safetensors"


class CheckpointError(UserError):
    """A folder that holds no model, or cannot be written; the text names it."""


@dataclass(frozen=True)
class Checkpoint:
    """What a folder holds.

    Attributes:
        model: float32, as all training begins.
        tokenizer: with the special tokens.
        image_size: side of the square frame in pixels.
    """

    model: GranViT
    tokenizer: PreTrainedTokenizerBase
    image_size: int


def save(
    model: GranViT,
    tokenizer: PreTrainedTokenizerBase,
    image_size: int,
    folder: str | Path,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes a folder that transformers loads as LLaVA, with its processor; what LLaVA has no place for lies beside it.

    Args:
        model: to write.
        tokenizer: with the special tokens.
        image_size: side of the square frame in pixels.
        folder: appears when it is whole; what it held is replaced.
        weights: to write in place of the model's own, which are spread over processes; named as those.

    Raises:
        CheckpointError: it cannot be written.
    """
    folder = Path(folder)
    partial, old = (folder.with_name(f".{folder.name}.{what}") for what in ("partial", "old"))
    settings = {"prompt": model.prompt, "mean": model.mean, "std": model.std, "image_size": image_size}
    values = model.state_dict() if weights is None else weights
    heads = {name: value for name, value in values.items() if not name.startswith("llava.")}
    llava = {name.removeprefix("llava."): value for name, value in values.items() if name.startswith("llava.")}
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        model.llava.save_pretrained(partial, state_dict=llava)
        processor = processor_of(model, tokenizer, image_size)
        processor.save_pretrained(partial)  # with the tokenizer
        processor.image_processor.save_pretrained(partial)  # alone too, where older readers and converters look
        safetensors.torch.save_file(heads, partial / HEADS)
        (partial / SETTINGS).write_text(json.dumps(settings, indent=1), encoding="utf-8")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.replace(old)
        partial.replace(folder)
        shutil.rmtree(old, ignore_errors=True)
    except Exception as error:  # each library reports a full disk in its own way, tokenizers by nothing more special
        shutil.rmtree(partial, ignore_errors=True)
        why = why_not_written(error) if isinstance(error, OSError) else f"cannot be written: {_one_line(error)}"
        raise CheckpointError(f"{folder}: {why}") from error


def load(folder: str | Path, *, attention: str = "sdpa") -> Checkpoint:
    """Reads what :func:`save` wrote.

    Args:
        folder: to read.
        attention: of the language model, as transformers names it.

    Raises:
        CheckpointError: it holds no such model, or not a whole one.
    """
    folder = Path(folder)
    try:
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        for name in ("config.json", "tokenizer.json"):  # else transformers makes up 7 billion weights
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{name} is missing")
        llava = _llava(folder, attention)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = GranViT(llava, prompt=settings["prompt"], mean=settings["mean"], std=settings["std"])
        missing, unknown = model.load_state_dict(safetensors.torch.load_file(folder / HEADS), strict=False)
        _complete(folder / HEADS, [name for name in missing if not name.startswith("llava.")], unknown)
        return Checkpoint(model, tokenizer, settings["image_size"])
    except CheckpointError:
        raise
    except Exception as error:  # as for writing
        raise CheckpointError(f"{folder}: holds no model that granvit wrote: {_one_line(error)}") from error


def _llava(folder: Path, attention: str) -> LlavaForConditionalGeneration:
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # transformers warns where this raises
    try:
        llava, info = LlavaForConditionalGeneration.from_pretrained(
            folder,
            local_files_only=True,
            dtype=torch.float32,
            attn_implementation={"text_config": attention, "vision_config": "sdpa"},
            output_loading_info=True,
        )
    finally:
        logging.set_verbosity(verbosity)
    # It would begin with random weights for what is not there.
    _complete(folder / "model.safetensors", sorted(info["missing_keys"]), sorted(info["unexpected_keys"]))
    return llava


def _complete(path: Path, missing: list[str], unknown: list[str]) -> None:
    if missing or unknown:
        raise CheckpointError(f"{path}: lacks {missing or 'nothing'}, has unknown {unknown or 'nothing'}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
