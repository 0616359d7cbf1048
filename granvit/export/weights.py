"""Weights as files that every library reads, and folders that appear when they are whole."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn

from granvit.data.progress import progress_bar
from granvit.errors import UserError, why_not_written

SHARD_SIZE = "5GB"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class ExportError(UserError):
    """What cannot be exported, written or verified; the text says why."""


def cast_parameters(module: nn.Module, dtype: torch.dtype) -> None:
    """Rounds the parameters in place; buffers stay as wide as transformers makes them when it loads."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)


def write_weights(weights: Mapping[str, Tensor], folder: Path) -> None:
    """Writes ``model.safetensors``, or above 5 GB several and their index, as ``save_pretrained`` of transformers does.

    Args:
        weights: by the names to write; none may share its memory with another.
        folder: that exists.

    Raises:
        OSError: as the system has it.
    """
    split = split_torch_state_dict_into_shards(
        dict(weights), filename_pattern="model{suffix}.safetensors", max_shard_size=SHARD_SIZE
    )
    with progress_bar() as bar:
        for name, keys in bar.track(split.filename_to_tensors.items(), description="writing weights"):
            shard = {key: weights[key].detach().contiguous() for key in keys}
            save_file(shard, folder / name, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def refuse_existing(folder: Path, overwrite: bool) -> None:
    """Looks whether an export may be written there.

    Raises:
        ExportError: the folder holds something, and is not to be overwritten or is no export.
    """
    try:
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            return
        if not overwrite:
            raise ExportError(f"{folder}: exists; choose another --output, or --overwrite")
        if not (folder / "README.md").is_file():
            raise ExportError(f"{folder}: holds other things than an export; it is not deleted")
    except OSError as error:
        raise ExportError(f"{folder}: {error.strerror}") from error


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write to, which takes its name, in place of what had it, only where all of the block went well.

    Raises:
        ExportError: it cannot be written.
    """
    partial, old = (folder.with_name(f".{folder.name}.{what}") for what in ("partial", "old"))
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.replace(old)
        partial.replace(folder)
        shutil.rmtree(old, ignore_errors=True)
    except UserError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    except Exception as error:  # each library reports a full disk in its own way, tokenizers by nothing more special
        shutil.rmtree(partial, ignore_errors=True)
        text = " ".join(str(error).split()) or type(error).__name__
        why = why_not_written(error) if isinstance(error, OSError) else f"cannot be written: {text}"
        raise ExportError(f"{folder}: {why}") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
