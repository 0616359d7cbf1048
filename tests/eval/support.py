"""Tiny models on disk, and images whose sides differ."""

from __future__ import annotations

import io
import random
from pathlib import Path

import numpy as np
from PIL import Image

from granvit.data.record import Record, Region
from granvit.data.shards import ShardWriter
from granvit.model import checkpoint
from tests.model.support import SIZE, byte_level, prompts_for, tiny, tiny_llava, words


def save_model(folder: Path, prompt: str = "mixed") -> Path:
    """A model with random weights that answers within any number of tokens."""
    tokenizer = byte_level()
    prompts = prompts_for(tokenizer, tiny_llava(tokenizer))
    model = tiny(prompts, prompt).float()
    checkpoint.save(model, tokenizer, SIZE, folder)
    return folder


def noise(rng: random.Random, height: int, width: int) -> bytes:
    pixels = np.frombuffer(rng.randbytes(height * width * 3), np.uint8).reshape(height, width, 3)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def random_record(rng: random.Random, key: str, height: int, width: int, regions: int = 3) -> Record:
    found = []
    for i in range(regions):
        x, y = rng.uniform(0, 0.6), rng.uniform(0, 0.6)
        found.append(Region((x, y, x + rng.uniform(0.1, 0.4), y + rng.uniform(0.1, 0.4)), f"{words(rng)} number {i}"))
    return Record(key, width, height, "noise", "natural", words(rng), tuple(found))


def write_shards(folder: Path, count: int = 7) -> Path:
    rng = random.Random()
    with ShardWriter(folder, samples=3) as writer:
        for i in range(count):
            height, width = rng.randint(16, 60), rng.randint(16, 60)
            writer.add(random_record(rng, f"{i:04d}", height, width), noise(rng, height, width), "png")
    return folder
