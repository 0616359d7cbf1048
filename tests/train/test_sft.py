"""Fine-tuning on conversations: the recipe as it is published, with a model of a few thousand parameters."""

from __future__ import annotations

import io
import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

pytest.importorskip("ijson")

from granvit.data.conversations import Conversations
from granvit.data.mixing import Mixture
from granvit.data.tasks import TaskSampler
from granvit.errors import UserError
from granvit.model import checkpoint
from granvit.model.packing import pack
from granvit.model.prompts import Prompts, add_special_tokens
from granvit.recipe import Recipe, load
from granvit.train.data import Preparer, TrainingData
from granvit.train.run import run
from tests.model.support import byte_level, words
from tests.train.support import SIZE, metrics, train, tree, weights
from tests.train.test_distributed import _close, train_on_two

RECIPE = Path(__file__).parents[2] / "recipes" / "sft.yaml"
SIZES = ((32, 32), (90, 70), (20, 15), (120, 30))  # width and height; of the second and the fourth there are tiles


@pytest.fixture(autouse=True)
def drawn() -> None:
    random.seed(int(torch.randint(1 << 40, ())))


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    tokenizer = byte_level()
    add_special_tokens(tokenizer)
    return Prompts(tokenizer)


def write(folder: Path, name: str, count: int) -> Path:
    """Conversations about an image of each size, and every fifth about none."""
    images = folder / "images"
    images.mkdir(exist_ok=True)
    for i, size in enumerate(SIZES):
        Image.frombytes("RGB", size, random.randbytes(size[0] * size[1] * 3)).save(images / f"{i}.png")
    rng = random.Random(random.random())
    entries: list[dict[str, Any]] = []
    for i in range(count):
        said = [words(rng) for _ in range(2 * rng.randint(1, 3))]
        entry: dict[str, Any] = {"id": str(i)}
        if i % 5:
            entry["image"] = f"{i % 5 - 1}.png"
            said[0] = rng.choice((f"<image>\n{said[0]}", f"{said[0]}\n<image>"))
        entry["conversations"] = [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(said)]
        entries.append(entry)
    (folder / name).write_text(json.dumps(entries))
    return folder / name


def small(folder: Path, *more: str) -> Recipe:
    """The published recipe but for what makes it large: nothing else is changed."""
    plain = tree(folder)
    source = {"llava": str(write(folder, "chat.json", 20)), "images": str(folder / "images")}
    heldout = {"llava": str(write(folder, "heldout.json", 5)), "images": str(folder / "images")}
    return load(
        RECIPE,
        [
            f"output={folder / 'out'}",
            "start=null",
            f"model.vision={json.dumps(plain['model']['vision'])}",
            f"model.language={json.dumps(plain['model']['language'])}",
            f"model.image_size={SIZE}",
            f"data.train={json.dumps([source])}",
            f"data.heldout={json.dumps([heldout])}",
            "data.max_length=400",
            "data.workers=1",
            "stages.sft.batch_size=10",
            "stages.sft.micro_batch=2",
            "stages.sft.epochs=2",
            "stages.sft.log_every=1",
            *more,
        ],
    )


def test_the_recipe_runs_from_end_to_end(tmp_path: Path) -> None:
    recipe = small(tmp_path)
    assert recipe.data.tiles == 4
    assert recipe.model.dtype == "bfloat16"
    assert recipe.stages[0].gradient_checkpointing
    assert run(recipe) == 0
    lines = metrics(tmp_path / "out")
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]  # two epochs of 20 in tens
    assert all(line["by/caption/chat"] > 0 for line in steps)
    assert not any(name.startswith(("skipped", "dropped")) for line in steps for name in line)
    held = [line for line in lines if "heldout/caption/chat" in line]
    assert held[0]["step"] == 0
    assert held[-1]["step"] == 4
    assert "heldout/wrong_image/caption" in held[-1]
    loaded = checkpoint.load(tmp_path / "out" / "sft" / "model")
    source = Conversations(tmp_path / "heldout.json", tmp_path / "images")
    samples = [Preparer(TaskSampler({"bbox_to_caption": 1}), SIZE, tiles=4)(source, i, 0) for i in range(5)]
    assert [len(sample.pixels) for sample in samples] == [0, 1, 5, 1, 5]
    batch = pack(samples, Prompts(loaded.tokenizer), 16, 400)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        loss = float(loaded.model(batch).loss)
    assert loss == pytest.approx(held[-1]["heldout/caption"], rel=1e-3)


def test_frames_of_a_step_are_those_of_its_images(tmp_path: Path, prompts: Prompts) -> None:
    source = Conversations(write(tmp_path, "chat.json", 20), tmp_path / "images")
    options: dict[str, Any] = {"tokens_per_frame": 16, "max_length": 400, "micro_batch": 20}
    for tiles, frames in ((4, {0: 4, 1: 8, 5: 8}), (0, {0: 4, 1: 16})):
        prepare = Preparer(TaskSampler({"bbox_to_caption": 1}), SIZE, flip=1.0, tiles=tiles)
        for workers in (0, 2):
            data = TrainingData([source], None, prepare, prompts, length=20, **options)
            (loaded,) = data.loader(workers)
            assert loaded.batch is not None
            assert {n: loaded.batch.frames.count(n) for n in set(loaded.batch.frames)} == frames
            assert len(loaded.batch.pairs) == 20
            expected = torch.cat([source.read(i, SIZE, tiles)[1] for i in range(20)])  # and none is mirrored
            assert sorted(loaded.batch.pixels.flatten(1).tolist()) == sorted(expected.flatten(1).tolist())


def test_a_broken_entry_is_named_and_left_out_or_ends_the_run(tmp_path: Path) -> None:
    recipe = small(tmp_path)
    path = tmp_path / "chat.json"
    entries = json.loads(path.read_text())
    entries[7]["conversations"][1]["from"] = "system"
    path.write_text(json.dumps(entries))
    sentence = r"chat\.json: \[7\]: conversations\[1\]: from: expected human or gpt, got 'system'"
    said = io.StringIO()
    assert run(recipe, console=Console(file=said, width=400)) == 0
    assert len(re.findall(f"left out: .*{sentence}", said.getvalue())) == 1  # of two epochs
    assert sum(line.get("skipped", 0) for line in metrics(tmp_path / "out")) == 2
    strict = replace(recipe, data=replace(recipe.data, max_broken=0.0), output=str(tmp_path / "strict"))
    with pytest.raises(UserError, match=rf"data: 1 of [12]0 samples cannot be read, .*{sentence}"):
        run(strict)


def test_settings_that_cannot_be_are_refused_before_anything_is_trained(tmp_path: Path) -> None:
    prefix = r"data\.max_length: expected at least \d+, for an image with 4 tiles beside the overview, got 80"
    shards = json.dumps([{"shards": str(tmp_path / "heldout")}])
    for more, message in (
        ("data.max_length=80", prefix),
        (f"data.heldout={shards}", r"data\.heldout: expected conversations \(llava\) only"),
    ):
        with pytest.raises(UserError, match=message):
            run(small(tmp_path, more), overwrite=True)
        assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_steps_of_text_alone_are_no_sign_of_a_part_that_does_not_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the order, the tower is judged when it has seen an image; where it never does, that is said."""
    recipe = small(tmp_path, "stages.sft.batch_size=1", "stages.sft.micro_batch=1", "data.workers=0", "data.heldout=[]")
    assert "vision" in recipe.stages[0].train
    path = tmp_path / "chat.json"
    entries = json.loads(path.read_text())
    alone = [entry for entry in entries if "image" not in entry]
    path.write_text(json.dumps(alone + entries[1:2]))
    monkeypatch.setattr(Mixture, "positions", in_order)
    assert run(recipe) == 0
    lines = metrics(tmp_path / "out")
    assert len(lines) == 2 * (len(alone) + 1)
    path.write_text(json.dumps(alone))
    sentence = (
        f"vision, projector should train in stage sft, and in {2 * len(alone)} steps the data held nothing to learn"
    )
    with pytest.raises(UserError, match=sentence):
        run(recipe, overwrite=True)


def in_order(self: Mixture, epoch: int, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """Of one source, the samples as they are numbered."""
    return np.zeros(end - begin, np.int64), np.arange(begin, end)


def test_two_processes_with_text_alone_train_as_one(tmp_path: Path) -> None:
    """Micro-batches of one, of which some have no frame: every rank still has a gradient for all that trains."""
    stage = {
        "name": "chat",
        "train": ["vision", "projector", "language"],
        "tasks": {"chat": 1},
        "steps": 3,
        "batch_size": 4,
        "micro_batch": 1,
        "learning_rate": 1e-3,
        "warmup": 1,
        "log_every": 1,
    }
    plain = tree(tmp_path, stage)
    source = {"llava": str(write(tmp_path, "chat.json", 10)), "images": str(tmp_path / "images")}
    plain["model"]["prompt"] = "text"
    plain["model"]["language"]["config"]["attention_dropout"] = 0.0
    heldout = {"llava": str(write(tmp_path, "heldout.json", 3)), "images": str(tmp_path / "images")}
    plain["data"] |= {"train": [source], "heldout": [heldout], "tiles": 4}
    assert train(plain)[0] == 0
    plain["output"] = str(tmp_path / "two")
    train_on_two(plain)
    one, two = ([line for line in metrics(tmp_path / name) if "loss" in line] for name in ("out", "two"))
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=2e-5)
    _close(weights(tmp_path / "two" / "chat" / "model"), weights(tmp_path / "out" / "chat" / "model"))
