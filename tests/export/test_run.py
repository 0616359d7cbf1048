"""The command: which model it takes, what it refuses, what the card says, and that a wrong export is never left."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from granvit.cli import app
from granvit.data.record import Record
from granvit.data.shards import ShardWriter, sha256
from granvit.errors import UserError
from granvit.export import ExportError, load_region_head, region_head, weights
from granvit.export.run import export
from granvit.export.source import find
from granvit.geometry import BoxTransform
from tests.export.support import run_folder, saved
from tests.export.test_llava import run_card


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("runs")
    with ShardWriter(place / "shards") as writer:
        writer.add(Record("a", 4, 4, "made here", caption="a square"), b"no image at all", "png")
    return run_folder(place / "run", place / "shards")


def test_a_run_means_the_model_of_its_last_finished_stage(run: Path, tmp_path: Path) -> None:
    found = find(run)
    assert (found.model, found.run, found.stage, found.dtype) == (run / "second" / "model", run, "second", "bfloat16")
    found = find(run / "first" / "model")
    assert (found.model, found.run, found.stage) == (run / "first" / "model", run.resolve(), "first")
    saved(tmp_path / "alone")
    found = find(tmp_path / "alone")
    assert (found.run, found.recipe, found.stage, found.dtype) == (None, None, None, "float32")


def test_what_is_no_model_is_one_sentence(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="nothing: neither a model that granvit wrote nor the folder of a run"):
        find(tmp_path / "nothing")
    (tmp_path / "recipe.yaml").write_text((run / "recipe.yaml").read_text())
    with pytest.raises(ExportError, match="no stage of this run is finished"):
        find(tmp_path)
    (tmp_path / "recipe.yaml").write_text("name: [")
    with pytest.raises(UserError, match="recipe.yaml"):
        find(tmp_path)


def test_the_card_says_where_the_model_is_from(run: Path, tmp_path: Path) -> None:
    card = (export(run, "llava", output=tmp_path / "out", licence="apache-2.0") / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front == {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "license": "apache-2.0",
        "base_model": ["someone/a-tower", "someone/a-language-model"],
        "tags": ["granvit", "regions", "llava"],
    }
    assert "after stage second" in card
    assert "700 scenes of kind natural composed by granvit, split train, seed 31" in card
    assert f"1 images, 0 regions, sha256 of the index `{sha256(run.parent / 'shards' / 'index.json')}`" in card
    assert "| first | caption | 4.25 |" in card
    assert "| second | wrong_image/caption | 1.75 |" in card
    assert "9.5" not in card  # what the first stage began with
    assert "7.875" not in card  # of a later stage
    assert "thousandths of the frame" in card
    recipe = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", card, re.S)[0])
    assert recipe["stages"][1]["learning_rate"] == 1e-5  # defaults are filled in
    assert "Not verified" in card
    other = (export(run / "first" / "model", "vision", output=tmp_path / "tower") / "README.md").read_text()
    assert "license:" not in other.split("---\n")[1]
    assert "To be filled in" in other


def test_the_cards_mapping_is_that_of_the_letterbox(tmp_path: Path) -> None:
    saved(tmp_path / "model")
    card = (export(tmp_path / "model", "llava") / "README.md").read_text()
    scope: dict[str, Callable[..., tuple[float, ...]]] = {}
    exec(next(x for x in re.findall(r"```python\n(.*?)```", card, re.S) if "def to_image" in x), scope)
    width, height = 640, 427
    box = torch.rand(4).sort().values
    expected = BoxTransform.letterbox((height, width), (512, 512)).inverse().boxes(box) * torch.tensor(
        [width, height, width, height]
    )
    found = torch.tensor(scope["to_image"](box.tolist(), width, height))
    assert (found - expected).abs().max() <= 640 / 512  # a pixel of the frame


@pytest.mark.parametrize("prompt", ["region", "box", "mixed"])
def test_a_region_head_is_that_of_the_model(tmp_path: Path, prompt: str) -> None:
    model = saved(tmp_path / "model", prompt=prompt)
    folder = export(tmp_path / "model", "region-head", verify=True)
    assert (folder / "README.md").read_text().count("largest difference 0 of") == 1
    head = load_region_head(folder)
    boxes = torch.tensor([[0.1, 0.2, 0.7, 0.9], [0.5, 0.5, 0.5, 0.5], [0.0, 0.0, 1.0, 1.0]])
    tokens, index = torch.randn(2, 9, 16), torch.tensor([1, 0, 1])
    with torch.no_grad():
        found = head(tokens, boxes, index)
        if prompt == "box":
            expected = model.box_prompt(boxes)
        else:
            pooled = model.region_prompt(tokens, boxes, index, (3, 3))[:, 0]
            expected = model.llava.model.multi_modal_projector(pooled)
        assert torch.equal(found, expected)
        assert torch.equal(head.projector(tokens), model.llava.model.multi_modal_projector(tokens))
    if prompt == "mixed":
        ran = run_card(folder)
        assert (ran.returncode, ran.stdout) == (0, "torch.Size([1, 16])\n"), ran.stderr


def test_no_region_head_is_one_sentence(tmp_path: Path) -> None:
    saved(tmp_path / "model")
    with pytest.raises(ExportError, match="made with prompt: text, so there is no head to export"):
        export(tmp_path / "model", "region-head")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    with pytest.raises(ExportError, match="holds no region head that granvit wrote"):
        load_region_head(tmp_path)
    saved(tmp_path / "model", prompt="region")
    folder = export(tmp_path / "model", "region-head")
    path = folder / region_head.CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": "granvit region head 9"}))
    with pytest.raises(ExportError, match="expected format 'granvit region head 1'"):
        load_region_head(folder)


def test_wrong_options_are_one_sentence_each(run: Path, tmp_path: Path) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"to": "gguf"}, "--to: expected one of llava, vision, region-head, got 'gguf'"),
        ({"to": "llava", "timm": True}, "--timm: goes with --to vision"),
        ({"to": "llava", "dtype": "int8"}, "--dtype: expected one of float32, bfloat16, got 'int8'"),
    ]
    for options, text in wrong:
        with pytest.raises(ExportError, match=text):
            export(run, output=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_there_is_replaced_only_when_told(tmp_path: Path) -> None:
    saved(tmp_path / "model")
    folder = export(tmp_path / "model", "vision")
    (folder / "old").touch()
    with pytest.raises(ExportError, match="vision: exists; choose another --output, or --overwrite"):
        export(tmp_path / "model", "vision")
    assert (folder / "old").exists()
    export(tmp_path / "model", "vision", overwrite=True)
    assert not (folder / "old").exists()
    with pytest.raises(ExportError, match="holds other things than an export; it is not deleted"):
        export(tmp_path / "model", "vision", output=tmp_path / "model", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "vision"]


@pytest.mark.parametrize("place", ["weights", "card"])
def test_a_full_disk_is_one_sentence_and_leaves_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    saved(tmp_path / "model")
    folder = export(tmp_path / "model", "llava")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(*{"weights": (weights, "save_file"), "card": ("granvit.export.run.write_card",)}[place], full)
        with pytest.raises(ExportError, match=f"^{folder}: the disk is full$"):
            export(tmp_path / "model", "llava", overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llava", "model"]


def test_the_help_names_every_option() -> None:
    shown = CliRunner().invoke(app, ["export", "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output.casefold()
    for word in ("checkpoint", "--to", "--output", "--dtype", "--timm", "--license", "--verify", "--overwrite"):
        assert word in shown
