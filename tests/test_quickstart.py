"""The quickstart on a tiny recipe: what it leaves and prints, and that it goes on where it stopped."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
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


def test_models_before_and_after_answer_the_same_questions(made: tuple[Path, Path, str]) -> None:
    place = made[1] / "evaluation"
    names = ["before", "first", "second", "second-wrong-image"]
    assert sorted(path.name for path in place.iterdir() if path.is_dir()) == names
    asked = []
    for name in names:
        report = json.loads((place / name / "evaluation.json").read_text())
        assert set(report["metrics"]) == {"bbox_to_caption", "caption_to_bbox"}
        assert report["config"]["wrong_image"] is (name == "second-wrong-image")
        answers = [json.loads(line) for line in (place / name / "answers.jsonl").read_text().splitlines()]
        asked.append([answer["question"] for answer in answers if "question" in answer])
    assert asked[0]
    assert all(questions == asked[0] for questions in asked)
    checkpoints = [json.loads((place / name / "evaluation.json").read_text())["checkpoint"] for name in names]
    assert len({checkpoint["sha256"] for checkpoint in checkpoints}) == 3
    assert not (made[1] / "before").exists()


def test_towers_are_probed_before_and_after(made: tuple[Path, Path, str]) -> None:
    towers = json.loads((made[1] / "evaluation" / "probes.json").read_text())["towers"]
    assert [tower["name"] for tower in towers] == ["before", "warm", "first"]
    assert len({tower["sha256"] for tower in towers}) == 3


def test_the_page_lacks_nothing(made: tuple[Path, Path, str]) -> None:
    page = (made[1] / "report.html").read_text()
    assert "Not there" not in page
    for section in ("metrics", "losses", "probes", "cases", "attention"):
        assert f'id="{section}"' in page


def test_the_export_is_the_last_stage_in_plain_transformers(made: tuple[Path, Path, str]) -> None:
    from transformers import LlavaForConditionalGeneration

    from granvit.model import checkpoint

    exported = LlavaForConditionalGeneration.from_pretrained(made[1] / "llava").state_dict()
    trained = checkpoint.load(made[1] / "second" / "model").model.llava.state_dict()
    assert exported.keys() == trained.keys()
    for name, value in exported.items():
        torch.testing.assert_close(value, trained[name].to(value.dtype), rtol=0, atol=0)


def test_what_a_person_sees(made: tuple[Path, Path, str]) -> None:
    said = made[2].replace("\n", "")
    for text in ("ROUGE-L", "second, wrong image", "linear, accuracy", "verified", "report.html", "minutes"):
        assert text in said


def test_a_second_call_only_reports(made: tuple[Path, Path, str]) -> None:
    kept = [made[1] / "metrics.jsonl", *sorted((made[1] / "evaluation").glob("*/answers.jsonl"))]
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in kept]
    said = io.StringIO()
    assert quickstart.run(recipe=made[0], console=Console(file=said, width=120)) == 0
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in kept] == before
    assert said.getvalue().count("finished before") == 3


def test_an_installation_without_recipes_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run this from a source checkout"):
        quickstart.run(recipe=tmp_path / "none.yaml")


def test_the_recipe_is_the_miniature() -> None:
    recipe = load(quickstart.RECIPE)
    assert [stage.name for stage in recipe.stages] == ["warm_start", "stage1", "stage2"]
    assert recipe.stages[1].tasks["bbox_to_caption"]
    assert recipe.stages[2].tasks["caption_to_bbox"]
