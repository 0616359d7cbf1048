"""A trained model on disk: a stock LLaVA folder, with the region prompts beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoTokenizer, LlavaForConditionalGeneration, PreTrainedTokenizerBase

from granvit.errors import UserError
from granvit.model.granvit import GranViT

SETTINGS, HEADS = "granvit.json", "granvit.safetensors"


class CheckpointError(UserError):
    """A folder that holds no model, or cannot be written; the text names it."""


@dataclass(frozen=True)
class Checkpoint:
    """What a folder holds.

    Attributes:
        model: with the weights in the dtypes in which they were saved.
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
    """Writes a folder that transformers loads as LLaVA; what LLaVA has no place for lies beside it.

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
    partial = folder.with_name(f".{folder.name}.partial")
    settings = {"prompt": model.prompt, "mean": model.mean, "std": model.std, "image_size": image_size}
    values = model.state_dict() if weights is None else weights
    heads = {name: value for name, value in values.items() if not name.startswith("llava.")}
    llava = {name.removeprefix("llava."): value for name, value in values.items() if name.startswith("llava.")}
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        model.llava.save_pretrained(partial, state_dict=llava)
        tokenizer.save_pretrained(partial)
        safetensors.torch.save_file(heads, partial / HEADS)
        (partial / SETTINGS).write_text(json.dumps(settings, indent=1), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        partial.replace(folder)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"{folder}: the model cannot be written: {error}") from error


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
        llava = LlavaForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, attn_implementation={"text_config": attention, "vision_config": "sdpa"}
        )
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = GranViT(llava, prompt=settings["prompt"], mean=settings["mean"], std=settings["std"])
        heads = safetensors.torch.load_file(folder / HEADS)
        missing, unknown = model.load_state_dict(heads, strict=False)
        lacking = [name for name in missing if not name.startswith("llava.")]
        if lacking or unknown:
            raise CheckpointError(f"{folder / HEADS}: lacks {lacking or 'nothing'}, has unknown {unknown or 'nothing'}")
        return Checkpoint(model, tokenizer, settings["image_size"])
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: holds no model that granvit wrote: {error}") from error
