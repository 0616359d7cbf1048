"""``granvit eval`` and ``granvit probe`` as they are typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from granvit.cli import app
from granvit.data.sources import Questions, Scenes, Shards
from granvit.errors import UserError
from granvit.eval.opening import find_model, open_sources, open_tower
from granvit.model.assemble import assemble
from granvit.recipe import load
from tests.eval.support import save_model, write_shards
from tests.model.support import SIZE
from tests.train.support import stage1, stage2, train, tree, write
from tests.train.support import write_shards as train_shards


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two stages, the folder with its recipe and its shards."""
    folder = tmp_path_factory.mktemp("run")
    plain = tree(folder, stage1(steps=2), stage2(steps=2, style="thousandths"))
    plain["data"]["tiles"] = 3
    write(plain, folder)
    assert train(plain)[0] == 0
    return folder


def granvit(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(x) for x in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_eval_of_a_run(run: Path, tmp_path: Path) -> None:
    said = granvit("eval", run / "out", "--out", tmp_path / "a", "--images", 3, "--max-new-tokens", 3)
    for word in ("bbox_to_caption", "caption_to_bbox", "ROUGE-L", "IoU", "wrote", "evaluation.json"):
        assert word in said
    plain = json.loads((tmp_path / "a" / "evaluation.json").read_text())
    assert plain["config"]["asking"]["style"] == "thousandths"  # of the stage that made the model
    assert plain["config"]["tiles"] == 3  # of its recipe
    assert plain["checkpoint"]["path"].endswith("second/model")
    first = granvit(
        "eval", run / "out" / "first" / "model", "--out", tmp_path / "b", "--data", run / "shards", "--images", 2,
        "--tasks", "global_caption", "--prompt", "text", "--wrong-image", "--max-new-tokens", 3, "--tiles", 0, "--json",
    )  # fmt: skip
    plain = json.loads(first)
    assert list(plain["metrics"]) == ["global_caption"]
    assert plain["metrics"]["global_caption"]["all"]["count"] == 2
    assert plain["config"]["wrong_image"] is True
    assert plain["config"]["tiles"] == 0
    assert plain["config"]["sources"][0]["shards"].endswith("shards")
    assert json.loads(first) == json.loads((tmp_path / "b" / "evaluation.json").read_text())


def test_probe_before_and_after(run: Path, tmp_path: Path) -> None:
    said = granvit(
        "probe", run / "recipe.yaml", run / "out", "--train", run / "shards", "--heldout", run / "heldout",
        "--images", 5, "--train-images", 6, "--out", tmp_path,
    )  # fmt: skip
    for word in ("region_attention", "roi_align", "same image, recall@1", "probes.json"):
        assert word in said
    plain = json.loads((tmp_path / "probes.json").read_text())
    before, after = plain["towers"]
    assert before["sha256"] != after["sha256"]
    assert before["probes"]["images"]["queries"] == 5
    recipe = load(run / "recipe.yaml")
    assembled = assemble(recipe.model, seed=recipe.seed).llava.model.vision_tower.state_dict()
    mine = open_tower(str(run / "recipe.yaml")).module.state_dict()
    assert mine.keys() == assembled.keys()
    assert all(mine[name].equal(assembled[name]) for name in mine)


def test_probe_leaves_broken_images_out(run: Path, tmp_path: Path) -> None:
    broken = train_shards(tmp_path / "broken", 6, broken=(2,))
    places = ("--train", str(run / "shards"), "--heldout", str(broken), "--out", str(tmp_path))
    typed = ["probe", str(run / "recipe.yaml"), str(run / "out"), *places]
    result = CliRunner().invoke(app, typed, catch_exceptions=False)
    assert result.stderr.count("left out: ") == 1  # for both towers
    assert "not read: 1 images" in result.stdout
    assert [tower["not read"] for tower in json.loads((tmp_path / "probes.json").read_text())["towers"]] == [1, 1]
    refused = CliRunner().invoke(app, [*typed, "--max-broken", "0"])
    assert "1 of 26 samples cannot be read, and max_broken allows 0 " in str(refused.exception)


def test_probe_of_scenes_knows_their_names(run: Path, tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    said = granvit(
        "probe", run / "recipe.yaml", "--train", "scenes:natural:40", "--heldout", "scenes:natural:20",
        "--scene-size", 128, "--out", tmp_path / "a", "--json",
    )  # fmt: skip
    found = json.loads(said)["towers"][0]["probes"]["regions"]["roi_align"]
    assert found["linear"]["classes"] > 10
    assert found["retrieval"]["queries"] > 2
    assert torch.random.get_rng_state().equal(state)


def test_what_texts_mean(run: Path, tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", 2)
    questions = tmp_path / "q.jsonl"
    questions.write_text('{"question_id": 1, "image": "a", "text": "b", "answers": ["c"]}')
    found = open_sources([str(shards), "scenes:ocr:7", str(questions), str(run / "recipe.yaml")])
    assert [type(source) for source in found] == [Shards, Scenes, Questions, Shards]
    assert [len(source) for source in found] == [2, 7, 1, 5]
    assert [source.name for source in found] == ["shards", "scenes-ocr-heldout", "q", "heldout"]
    assert [source.name for source in open_sources([str(run / "recipe.yaml")], split="train")] == ["shards"]
    for text in ("scenes:birds", "scenes:ocr:0", "scenes:ocr:x", str(tmp_path), "nothing"):
        with pytest.raises(UserError, match="expected"):
            open_sources([text])


def test_models_that_are_not_there(run: Path, tmp_path: Path) -> None:
    assert find_model(run / "out").folder == run / "out" / "second" / "model"
    alone = find_model(save_model(tmp_path / "model"))
    assert (alone.recipe, alone.stage) == (None, None)
    result = CliRunner().invoke(app, ["eval", str(tmp_path / "model")])
    assert "says nothing of a run; expected --data" in str(result.exception)
    with pytest.raises(UserError, match="expected a model or a run that granvit wrote"):
        find_model(tmp_path)
    (tmp_path / "recipe.yaml").write_text((run / "recipe.yaml").read_text())
    with pytest.raises(UserError, match="no stage of this run is finished yet"):
        find_model(tmp_path)
    with pytest.raises(UserError, match="tower"):
        open_tower(str(tmp_path / "none" / "there"))


def test_towers_of_transformers(tmp_path: Path) -> None:
    from transformers import Dinov2Config, Dinov2Model

    model = Dinov2Model(Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28))
    model.save_pretrained(tmp_path / "dino")
    found = open_tower(str(tmp_path / "dino"))
    assert found.size == 28
    assert found.mean == pytest.approx((0.485, 0.456, 0.406))
    assert open_tower(str(tmp_path / "dino"), 56).size == 56
    trained = open_tower(str(save_model(tmp_path / "model")))
    assert (trained.size, trained.layer) == (SIZE, -1)
