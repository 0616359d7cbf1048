"""Recipes: what is read, what overrides change, and one sentence for everything else."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from granvit import recipe as config
from granvit.errors import UserError
from granvit.recipe import RecipeError, load

RECIPES = sorted((Path(__file__).parents[1] / "recipes").rglob("*.yaml"))


def tree() -> dict[str, Any]:
    return {
        "name": "tiny",
        "output": "out/tiny",
        "model": {
            "vision": {"config": {"model_type": "siglip_vision_model"}},
            "language": {"name": "Qwen/Qwen2.5-1.5B-Instruct"},
            "image_size": 64,
        },
        "data": {"train": [{"scenes": {"count": 10}}]},
        "stages": [
            {"name": "first", "train": ["vision", "projector"], "tasks": {"bbox_to_caption": 1}, "steps": 10},
            {"name": "second", "train": ["language"], "tasks": {"caption_to_bbox": 1}, "epochs": 1},
        ],
    }


def written(folder: Path, content: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_can_be_read_and_resolves_to_itself(path: Path, tmp_path: Path) -> None:
    recipe = load(path)
    recipe.dump(tmp_path / "resolved.yaml")
    assert load(tmp_path / "resolved.yaml") == recipe
    assert "max_grad_norm" in (tmp_path / "resolved.yaml").read_text()  # defaults are filled in


def test_the_recipes_are_there() -> None:
    assert {path.name for path in RECIPES} == {"stage1.yaml", "stage2.yaml", "sft.yaml", "cpu.yaml", "gpu.yaml"}


def test_stage1_is_the_papers() -> None:
    stage = load(next(path for path in RECIPES if path.name == "stage1.yaml")).stages[0]
    assert stage.train == ("vision", "projector")
    assert (stage.learning_rate, stage.batch_size, stage.epochs) == (1e-5, 256, 1)
    assert stage.distillation is not None
    assert (stage.distillation.weight, stage.distillation.decay, stage.distillation.crops) == (1.0, 0.9, "resize")
    assert set(stage.tasks) == {"global_caption", "bbox_to_caption"}


def test_overrides(tmp_path: Path) -> None:
    path = written(tmp_path, tree())
    rate = random.uniform(1e-6, 1e-4)
    recipe = load(
        path,
        [
            "stages.0.steps=10",
            "stages.second.epochs=0.5",
            f"stages.second.learning_rate={rate:e}",
            "stages.first.distillation.decay=0.5",  # a section that is not there yet
            "stages.second.language={name: Qwen/Qwen2.5-3B-Instruct}",
            "data.heldout=[{shards: a=b}]",
            "seed=7",
        ],
    )
    assert recipe.stages[0].steps == 10
    assert recipe.stages[1].epochs == 0.5
    assert recipe.stages[1].learning_rate == pytest.approx(rate, rel=1e-6)
    assert recipe.stages[0].distillation is not None
    assert recipe.stages[0].distillation.decay == 0.5
    assert recipe.stages[1].language is not None
    assert recipe.data.heldout[0].shards == "a=b"
    assert recipe.seed == 7


@pytest.mark.parametrize("number", ["1e-5", "1E-5", "1.5e-5", "-1e5", ".5e3", "+2e+3", "3"])
def test_numbers_as_people_write_them(number: str, tmp_path: Path) -> None:
    path = written(tmp_path, tree())
    if float(number) > 0:
        assert load(path, [f"stages.0.learning_rate={number}"]).stages[0].learning_rate == float(number)
    else:
        with pytest.raises(RecipeError, match="learning_rate: expected a finite number above 0"):
            load(path, [f"stages.0.learning_rate={number}"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.0.learning_rat=1", r"stages\.0\.learning_rat: unknown key; did you mean stages\.0\.learning_rate\?"),
        ("sead=1", r"sead: unknown key; did you mean seed\?"),
        ("qqq=1", r"qqq: unknown key; known are name, output, model"),
        ("stages.third.steps=1", r"stages\.third: expected 0 to 1 or one of first, second"),
        ("stages.7.steps=1", r"stages\.7: expected 0 to 1"),
        ("name.x=1", r"name\.x: name is a value and has no keys"),
        ("steps", r"expected an override as key=value, got 'steps'"),
        ("=3", r"expected an override as key=value"),
        ("seed=[1", r"seed: not YAML"),
        ("seed=1.5", r"seed: expected a whole number, got 1\.5"),
        ("seed=true", r"seed: expected a whole number, got True"),
        ("seed=-1", r"seed: expected a finite number of at least 0, got -1"),
        ("name=3", r"name: expected text, got 3"),
        ("stages=[]", r"stages: expected at least one"),
        ("stages=3", r"stages: expected a list, got 3"),
        ("stages.0=3", r"stages\.0: expected keys and values, got 3"),
        ("model.dtype=float16", r"model\.dtype: expected one of bfloat16, float32, got 'float16'"),
        ("model.image_size=0", r"model\.image_size: expected a finite number of at least 1"),
        ("model.vision.name=x", r"model\.vision: expected one of name, package and config, got name and config"),
        ("model.vision={}", r"model\.vision: expected one of name, package and config, got none"),
        ("model.vision.config={}", r"model\.vision\.config\.model_type: expected a model type"),
        ("model.vision.tokenizer=x", r"model\.vision\.tokenizer: expected none for a vision model"),
        ("model.language={config: {model_type: llama}}", r"model\.language\.tokenizer: expected a tokenizer"),
        ("data.train=[]", r"data\.train: expected at least one source"),
        ("data.train.0.shards=x", r"data\.train\.0: expected one of scenes, shards and llava, got scenes and shards"),
        ("data.train=[{llava: x}]", r"data\.train\.0\.images: expected the folder"),
        ("data.train=[{shards: a, weight: 1}, {shards: b}]", r"data\.train\.1\.weight: expected a weight"),
        ("data.train.0.weight=0", r"data\.train\.0\.weight: expected a finite number above 0"),
        ("data.heldout=[{shards: a, weight: 1}]", r"data\.heldout\.0\.weight: expected none"),
        ("data.train.0.scenes.count=0", r"data\.train\.0\.scenes\.count: expected a finite number of at least 1"),
        ("data.train.0.scenes={}", r"data\.train\.0\.scenes\.count: missing"),
        ("data.flip=1.5", r"data\.flip: expected a share of at most 1"),
        ("data.flip=.nan", r"data\.flip: expected a finite number"),
        ("stages.0.epochs=1", r"stages\.0\.steps: expected either steps or epochs"),
        ("stages.0.steps=null", r"stages\.0\.steps: expected either steps or epochs"),
        ("stages.0.warmup=10", r"stages\.0\.warmup: expected fewer steps than the stage has"),
        ("stages.0.train=[]", r"stages\.0\.train: expected one or more of vision"),
        ("stages.0.train=[vision, vision]", r"stages\.0\.train: expected one or more of .* each once"),
        ("stages.0.train=[visoin]", r"stages\.0\.train\.0: expected one of vision, projector, language, prompts"),
        ("stages.0.train=[prompts]", r"stages\.0\.train: prompts: model\.prompt is text"),
        ("stages.0.prompt=box", r"stages\.0\.prompt: box needs model\.prompt to be that or mixed"),
        ("stages.0.rates.language=1", r"stages\.0\.rates\.language: expected a part that trains"),
        ("stages.0.rates.vision=0", r"stages\.0\.rates\.vision: expected a finite number above 0"),
        ("stages.1.distillation={}", r"stages\.1\.distillation: expected none where the vision tower is frozen"),
        ("stages.0.distillation.decay=1", r"stages\.0\.distillation\.decay: expected at least 0 and less than 1"),
        ("stages.0.tasks={}", r"stages\.0\.tasks: expected at least one of"),
        ("stages.0.tasks.vqa=1", r"stages\.0\.tasks\.vqa: unknown task"),
        ("stages.0.tasks.chat=1", r"stages\.0\.tasks\.chat: expected no other task beside it"),
        ("stages.0.tasks={chat: 1}", r"stages\.0\.tasks: chat needs data\.train to be conversations"),
        ("stages.0.objective=contrastive", r"stages\.0\.tasks: expected none for the contrastive objective"),
        ("stages.1.name=first", r"stages\.1\.name: expected a unique name for a folder, got 'first'"),
        ("stages.1.name=a/b", r"stages\.1\.name: expected a unique name for a folder"),
    ],
)
def test_what_is_wrong_is_one_sentence_with_file_and_key(override: str, message: str, tmp_path: Path) -> None:
    path = written(tmp_path, tree())
    with pytest.raises(RecipeError, match=message) as caught:
        load(path, [override])
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text


def test_contrastive_needs_region_prompts(tmp_path: Path) -> None:
    path = written(tmp_path, tree())
    contrastive = ["stages.0.objective=contrastive", "stages.0.tasks={}"]
    with pytest.raises(RecipeError, match=r"stages\.0\.objective: contrastive needs model\.prompt"):
        load(path, contrastive)
    assert load(path, [*contrastive, "model.prompt=region"]).stages[0].objective == "contrastive"


@pytest.mark.parametrize("key", ["name", "output", "model", "data", "stages"])
def test_missing_keys(key: str, tmp_path: Path) -> None:
    content = tree()
    del content[key]
    with pytest.raises(RecipeError, match=f"{key}: missing"):
        load(written(tmp_path, content))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: 1\nb: [1, }", "not YAML in line 2"),
        ("", "expected keys and values"),
        ("- 1", "expected keys and values"),
        ("name: a\nname: b", "the section that begins in line 1 has name twice"),
    ],
)
def test_files_that_are_no_recipe(content: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        load(written(tmp_path, content))


def test_files_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nowhere\.yaml: cannot read the recipe: No such file"):
        load(tmp_path / "nowhere.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9")
    with pytest.raises(RecipeError, match="not UTF-8"):
        load(tmp_path / "latin.yaml")
    with pytest.raises(UserError, match="cannot write the recipe"):
        load(written(tmp_path, tree())).dump(tmp_path / "no" / "folder.yaml")


def test_anchors_and_merges_are_yaml(tmp_path: Path) -> None:
    text = yaml.safe_dump({k: v for k, v in tree().items() if k != "stages"}) + (
        "stages:\n  - &first {name: a, train: [vision], tasks: {bbox_to_caption: 1}, steps: 3}\n"
        "  - {<<: *first, name: b, steps: 4}\n"
    )
    stages = load(written(tmp_path, text)).stages
    assert [(stage.name, stage.steps, stage.train) for stage in stages] == [
        ("a", 3, ("vision",)),
        ("b", 4, ("vision",)),
    ]


SECTIONS = (config.Recipe, config.Model, config.Source, config.Data, config.DataSource, config.Scenes, config.Stage)


@pytest.mark.parametrize("section", [*SECTIONS, config.Distillation], ids=lambda section: section.__name__)
def test_every_key_is_documented(section: Any) -> None:
    for entry in dataclasses.fields(section):
        assert f"        {entry.name}: " in section.__doc__


def test_prompts_train_only_where_a_region_is_asked_about_by_one(tmp_path: Path) -> None:
    plain = tree()
    plain["model"]["prompt"] = "mixed"
    plain["stages"][0] |= {"train": ["vision", "prompts"], "prompt": "region"}
    load(written(tmp_path, plain))
    for wrong in ("stages.0.prompt=text", "stages.0.tasks={caption_to_bbox: 1}"):
        with pytest.raises(
            RecipeError, match=r"stages\.0\.train: expected no prompts where nothing is asked by a <box>"
        ):
            load(written(tmp_path, plain), [wrong])
