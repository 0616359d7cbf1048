"""The quickstart on a tiny recipe: what it reports, draws and prints, and that it goes on where it stopped."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from granvit import quickstart
from granvit.errors import UserError
from granvit.recipe import load
from tests.train.support import stage1, stage2, tree, write


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    folder = tmp_path_factory.mktemp("quickstart")
    warm = {
        "name": "warm",
        "objective": "contrastive",
        "train": ["vision", "projector", "prompts"],
        "prompt": "region",
        "steps": 3,
        "batch_size": 4,
        "warmup": 1,
    }
    plain = tree(folder, warm, stage1(tasks={"bbox_to_caption": 1}), stage2(tasks={"caption_to_bbox": 1}))
    path = write(plain, folder)
    said = io.StringIO()
    assert quickstart.run(recipe=path, console=Console(file=said, width=120)) == 0
    return path, folder / "out", said.getvalue()


def test_the_report_has_losses_before_and_after_and_answers(made: tuple[Path, Path, str]) -> None:
    stages = json.loads((made[1] / "report.json").read_text())["stages"]
    assert list(stages) == ["warm", "first", "second"]
    lines = [json.loads(line) for line in (made[1] / "metrics.jsonl").read_text().splitlines()]
    for stage, term in (("warm", "contrastive"), ("first", "caption"), ("second", "caption")):
        heldout = [line for line in lines if line["stage"] == stage and f"heldout/{term}" in line]
        assert [line["step"] for line in heldout] == [0, 3 if stage == "warm" else 4]
        assert stages[stage][f"{term}/before"] == heldout[0][f"heldout/{term}"]
        assert stages[stage][f"{term}/after"] == heldout[1][f"heldout/{term}"]
    for stage, task in (("first", "bbox_to_caption"), ("second", "caption_to_bbox")):
        assert 0 <= stages[stage][f"{task}/right"] <= 1
        assert stages[stage][f"{task}/asked"] > 0


def test_what_a_person_sees(made: tuple[Path, Path, str]) -> None:
    for name in ("curves.png", "predictions.png"):
        with Image.open(made[1] / name) as picture:
            picture.load()
            assert min(picture.size) > 300
        assert name in made[2].replace("\n", "")
    assert "wrong image costs" in made[2]
    assert "minutes" in made[2]


def test_a_second_call_only_reports(made: tuple[Path, Path, str]) -> None:
    before = (made[1] / "metrics.jsonl").read_bytes()
    said = io.StringIO()
    assert quickstart.run(recipe=made[0], console=Console(file=said, width=120)) == 0
    assert (made[1] / "metrics.jsonl").read_bytes() == before
    assert said.getvalue().count("finished before") == 3


def test_an_installation_without_recipes_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run this from a source checkout"):
        quickstart.run(recipe=tmp_path / "none.yaml")


def test_the_recipe_is_the_miniature() -> None:
    recipe = load(quickstart.RECIPE)
    assert [stage.name for stage in recipe.stages] == ["warm_start", "stage1", "stage2"]
    assert recipe.stages[1].tasks["bbox_to_caption"]
    assert recipe.stages[2].tasks["caption_to_bbox"]
