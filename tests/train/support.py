"""Runs of a few thousand parameters on shards of random images, in this process or in one that can be killed."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from granvit._recipe_reading import convert, dump_yaml
from granvit.data.record import Record, Region
from granvit.data.shards import ShardWriter
from granvit.recipe import Recipe
from granvit.train.run import run
from tests.model.support import byte_level, words

SIZE = 32
# What depends on the clock or the machine.
_CLOCK = ("time", "images_per_second", "tokens_per_second", "step_seconds", "tflops", "mfu", "memory_gib")

Tree = dict[str, Any]


def write_shards(folder: Path, images: int, *, seed: int | None = None, broken: Sequence[int] = ()) -> Path:
    """Random images with three regions each, whose captions differ, so that each can be asked for; some cut short."""
    rng = random.Random(seed)
    with ShardWriter(folder, samples=7) as writer:
        for i in range(images):
            pixels = np.frombuffer(rng.randbytes(SIZE * SIZE * 3), np.uint8).reshape(SIZE, SIZE, 3)
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            captions: set[str] = set()
            while len(captions) < 3:
                captions.add(words(rng))
            regions = []
            for caption in sorted(captions):
                x, y = rng.uniform(0, 0.5), rng.uniform(0, 0.5)
                regions.append(Region((x, y, x + rng.uniform(0.2, 0.5), y + rng.uniform(0.2, 0.5)), caption))
            record = Record(f"{i:06d}", SIZE, SIZE, "noise", "natural", words(rng), tuple(regions))
            writer.add(record, file.getvalue()[: 100 if i in broken else None], "png")
    return folder


def tiny_language(folder: Path, width: int = 16, **settings: Any) -> Tree:
    """A language model's section of a recipe; its tokenizer is written to a folder."""
    place = folder / "tokenizer"
    if not place.exists():
        byte_level().save_pretrained(place)
    config = {
        "model_type": "llama",
        "vocab_size": 400,
        "hidden_size": width,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        **settings,
    }
    return {"config": config, "tokenizer": str(place)}


def stage1(**settings: Any) -> Tree:
    """As the paper's first: the language model is frozen, regions are distilled."""
    return {
        "name": "first",
        "train": ["vision", "projector", "prompts"],
        "tasks": {"global_caption": 1, "bbox_to_caption": 2},
        "prompt": "mixed",
        "regions": 2,
        "steps": 4,
        "batch_size": 4,
        "learning_rate": 3e-3,
        "warmup": 1,
        "distillation": {"crops": "resize"},
        "log_every": 1,
        **settings,
    }


def stage2(**settings: Any) -> Tree:
    """As the paper's second: the tower is frozen, the language model learns to find."""
    return {
        "name": "second",
        "train": ["projector", "language"],
        "tasks": {"global_caption": 1, "caption_to_bbox": 2},
        "regions": 2,
        "steps": 4,
        "batch_size": 4,
        "learning_rate": 3e-3,
        "warmup": 1,
        "log_every": 1,
        **settings,
    }


def tree(folder: Path, *stages: Tree, **settings: Any) -> Tree:
    """A recipe; dropout in the language model's attention, so that the state of the generators shows."""
    shards, heldout = folder / "shards", folder / "heldout"
    if not shards.exists():
        write_shards(shards, 20)
        write_shards(heldout, 5)
    return {
        "name": "tiny",
        "output": str(folder / "out"),
        "seed": 3,
        "model": {
            "vision": {
                "config": {
                    "model_type": "siglip_vision_model",
                    "hidden_size": 16,
                    "intermediate_size": 24,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "patch_size": 8,
                    "image_size": SIZE,
                }
            },
            "language": tiny_language(folder, attention_dropout=0.1),
            "image_size": SIZE,
            "prompt": "mixed",
            "dtype": "float32",
        },
        "data": {
            "train": [{"shards": str(shards)}],
            "heldout": [{"shards": str(heldout)}],
            "max_length": 512,
            "workers": 0,
        },
        "stages": list(stages),
        **settings,
    }


def recipe(plain: Tree) -> Recipe:
    found = convert(plain, Recipe, "")
    assert isinstance(found, Recipe)
    return found


def train(plain: Tree, **options: Any) -> tuple[int, str]:
    """Runs in this process; the status and what the console showed."""
    said = io.StringIO()
    status = run(recipe(plain), console=Console(file=said, width=400), **options)
    return status, said.getvalue()


def write(plain: Tree, folder: Path, name: str = "recipe") -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(dump_yaml(plain), encoding="utf-8")
    return path


def environment() -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    return {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def start(path: Path, *options: str, setup: str = "") -> subprocess.Popen[str]:
    """``granvit train`` in a process (and process group) of its own, after `setup`."""
    code = f"import sys\n{setup}\nfrom granvit.cli import main\nsys.argv = ['granvit', 'train', *sys.argv[1:]]\nmain()"
    command = [sys.executable, "-c", code, str(path), *options]
    pipes: Tree = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    return subprocess.Popen(command, env=environment(), **pipes)


def metrics(out: Path | str) -> list[Tree]:
    """The lines of a run's log without what the clock decides."""
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in _CLOCK} for line in lines]


def weights(folder: Path | str) -> dict[str, Tensor]:
    """All tensors in a folder of a model or a checkpoint."""
    found: dict[str, Tensor] = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        found |= safetensors.torch.load_file(path)
    assert found, f"no weights in {folder}"
    return found


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not ours[name].equal(theirs[name])]
    assert not different, different
