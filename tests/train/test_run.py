"""A recipe run end to end: its stages, what each trains, where it may be written, and what a person sees."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from granvit.errors import UserError
from granvit.recipe import load
from granvit.train.run import RunError
from tests.train.support import (
    assert_same,
    environment,
    metrics,
    recipe,
    stage1,
    stage2,
    start,
    tiny_language,
    train,
    tree,
    weights,
    write,
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Two stages with checkpoints at every step of the first; the folder and what the console showed."""
    folder = tmp_path_factory.mktemp("run")
    first = stage1(steps=24, learning_rate=1e-2, save_every=1, log_every=2)
    status, said = train(tree(folder, first, stage2(steps=16, learning_rate=1e-2)))
    assert status == 0
    return folder / "out", said


def test_losses_fall_in_both_stages(trained: tuple[Path, str]) -> None:
    lines = metrics(trained[0])
    for stage in ("first", "second"):
        losses = [line["loss"] for line in lines if line["stage"] == stage and "loss" in line]
        third = len(losses) // 3
        assert sum(losses[-third:]) / third < sum(losses[:third]) / third - 0.1, losses
    heldout = [line for line in lines if "heldout/caption" in line]
    assert [line["step"] for line in heldout] == [0, 24, 0, 16]  # before and after each stage
    for before, after in (heldout[:2], heldout[2:]):
        assert after["heldout/caption"] < before["heldout/caption"]


def test_every_line_has_what_a_person_needs(trained: tuple[Path, str]) -> None:
    out, said = trained
    with_clock = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    training = [line for line in with_clock if "loss" in line]
    assert [(line["stage"], line["step"]) for line in training] == [("first", 2 * i) for i in range(1, 13)] + [
        ("second", i) for i in range(1, 17)
    ]
    for line in training:
        task = "bbox_to_caption" if line["stage"] == "first" else "caption_to_bbox"
        wanted = ["images_per_second", "tokens_per_second", "memory_gib", "learning_rate", "grad_norm", "tflops"]
        parts = ("vision", "projector", "prompts") if line["stage"] == "first" else ("projector", "language")
        wanted += [f"learning_rate/{part}" for part in parts]
        wanted += ["by/caption/global_caption", f"by/caption/{task}/large", "wrong_image/caption"]
        wanted += ["by/distillation/large", "distillation"] if line["stage"] == "first" else []
        assert not [name for name in wanted if name not in line], line
        assert line["loss"] == pytest.approx(line["caption"] + line.get("distillation", 0.0))
        assert 0 < line["memory_gib"] < 64
    assert list((out / "tensorboard").iterdir())
    assert "wrong image" in said
    assert "images/s" in said
    assert "GiB" in said
    assert said.count("the log has tflops and no mfu") == 1  # nobody knows what this processor reaches
    assert not any("mfu" in line for line in training)


def test_each_part_has_its_own_rate_in_the_log(tmp_path: Path) -> None:
    """That of the step which the line is about, warm-up and all."""
    plain = tree(tmp_path, stage1(steps=4, warmup=2, schedule="constant", rates={"vision": 1e-2}))
    train(plain)
    lines = [line for line in metrics(plain["output"]) if "loss" in line]
    for line, share in zip(lines, (0, 0.5, 1, 1), strict=True):
        rates = {name: value for name, value in line.items() if name.startswith("learning_rate/")}
        assert rates == {
            "learning_rate/vision": pytest.approx(share * 1e-2),
            "learning_rate/projector": pytest.approx(share * 3e-3),
            "learning_rate/prompts": pytest.approx(share * 3e-3),
        }


def test_the_share_of_a_known_peak_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("granvit.train.run._peak", lambda model: 5e12)
    plain = tree(tmp_path, stage2(steps=2))
    _, said = train(plain)
    assert "no mfu" not in said
    assert "MFU 0%" in said
    lines = [json.loads(line) for line in (Path(plain["output"]) / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        assert ("mfu" in line) == ("loss" in line)
        assert line.get("mfu", 0) == pytest.approx(line.get("tflops", 0) / 5)


@pytest.mark.parametrize(
    ("stage", "still"),
    [
        ("first", ("llava.model.language_model", "llava.lm_head", "llava.model.vision_tower.post_layernorm")),
        ("second", ("llava.model.vision_tower", "region_prompt")),
    ],
)
def test_what_is_frozen_keeps_its_bits_and_the_rest_moves(
    trained: tuple[Path, str], stage: str, still: tuple[str, ...]
) -> None:
    from granvit.model import checkpoint
    from granvit.model.assemble import assemble

    out, _ = trained
    after = checkpoint.load(out / stage / "model").model.state_dict()
    if stage == "first":
        found = load(out / "recipe.yaml")
        before = assemble(found.model, seed=found.seed).llava.state_dict(prefix="llava.")
    else:
        before = checkpoint.load(out / "first" / "model").model.state_dict()
    for name, value in before.items():
        # A position embedding that counts, and a key's bias, which shifts all scores of a query alike, may stand still.
        moved = not value.equal(after[name])
        assert moved != name.startswith(still) or name.endswith("k_proj.bias"), name


def test_stock_transformers_reads_what_a_stage_leaves(trained: tuple[Path, str]) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(trained[0] / "second" / "model")
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_old_checkpoints_are_deleted(trained: tuple[Path, str]) -> None:
    assert sorted(path.name for path in (trained[0] / "first").iterdir()) == ["checkpoint-23", "checkpoint-24", "model"]


def test_finished_stages_are_skipped(trained: tuple[Path, str]) -> None:
    out, _ = trained
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and "events" not in path.name}
    status, said = train(_plain(out))
    assert status == 0
    assert "first: finished before" in said
    assert "second: finished before" in said
    assert {path: path.stat().st_mtime_ns for path in before} == before


def _plain(out: Path) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(load(out / "recipe.yaml"))))


def test_another_recipe_is_refused(trained: tuple[Path, str]) -> None:
    changed = _plain(trained[0])
    changed["stages"][1]["learning_rate"] *= 2
    with pytest.raises(RunError, match=r"holds a run of another recipe, .*recipe\.yaml says which"):
        train(changed)


def test_overwrite_begins_anew_where_a_run_is_and_deletes_nothing_else(tmp_path: Path) -> None:
    plain = tree(tmp_path, stage2(steps=1))
    out = Path(plain["output"])
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match="holds other things than a run; it is not deleted"):
        train(plain, overwrite=True)
    assert (out / "thesis.tex").read_text() == "years of work"
    (out / "thesis.tex").unlink()
    train(plain, overwrite=True)
    (out / "left").touch()
    train({**plain, "seed": 4}, overwrite=True)
    assert not (out / "left").exists()
    assert len(metrics(out)) == 3  # held out before, a line, held out after


def test_an_output_that_is_a_file_is_one_sentence(tmp_path: Path) -> None:
    plain = tree(tmp_path, stage2(steps=1))
    Path(plain["output"]).write_text("")
    for overwrite in (False, True):
        with pytest.raises(RunError, match="out: cannot hold a run"):
            train(plain, overwrite=overwrite)


@pytest.mark.parametrize("width", [16, 24])
def test_another_language_model_from_a_stage_on(tmp_path: Path, width: int) -> None:
    language = tiny_language(tmp_path, width, num_hidden_layers=3)
    second = stage2(language=language, steps=2, save_every=1)
    plain = tree(tmp_path, stage1(steps=1), second, stage2(name="third", steps=1))
    _, said = train(plain)
    assert f"projector: {'kept' if width == 16 else 'new'}" in said
    out = Path(plain["output"])
    for stage in ("second", "third"):
        model = LlavaForConditionalGeneration.from_pretrained(out / stage / "model")
        assert len(model.model.language_model.layers) == 3
        assert model.config.text_config.hidden_size == width
    first, second_ = (weights(out / stage / "model") for stage in ("first", "second"))
    tower = {name: value for name, value in first.items() if "vision" in name or "region_prompt" in name}
    assert_same(tower, {name: second_[name] for name in tower})


def test_start_from_another_run(trained: tuple[Path, str], tmp_path: Path) -> None:
    origin = trained[0] / "first" / "model"
    plain = tree(tmp_path, stage2(steps=1, learning_rate=1e-9), start=str(origin))
    _, said = train(plain)
    assert f"weights: {origin}" in said
    before, after = weights(origin), weights(Path(plain["output"]) / "second" / "model")
    assert before.keys() == after.keys()
    for name, value in before.items():  # nothing but the rate of 1e-9 is between them
        torch.testing.assert_close(after[name], value, rtol=0, atol=1e-7)


def test_start_that_does_not_fit_is_one_sentence(trained: tuple[Path, str], tmp_path: Path) -> None:
    plain = tree(tmp_path, stage2(steps=1), start=str(tmp_path))
    with pytest.raises(UserError, match="holds no model that granvit wrote"):
        train(plain)
    plain["start"] = str(trained[0] / "first" / "model")
    plain["model"]["image_size"] = plain["model"]["vision"]["config"]["image_size"] = 40
    plain["output"] += "-other"
    with pytest.raises(RunError, match="has frames of 32 pixels, expected model.image_size, 40"):
        train(plain)


def test_batch_that_does_not_divide_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"stages.second.batch_size: expected a multiple of .*, 3, got 4"):
        train(tree(tmp_path, stage2(micro_batch=3)))


def test_a_micro_batch_of_one_says_why_there_is_no_wrong_image(tmp_path: Path) -> None:
    plain = tree(tmp_path, stage2(steps=1, batch_size=2, micro_batch=1))
    _, said = train(plain)
    assert "no loss with a wrong image, since a micro-batch of 1" in said
    assert not any("wrong_image" in name for line in metrics(plain["output"]) for name in line)


def test_the_command_writes_lines_only(tmp_path: Path) -> None:
    plain = tree(tmp_path, stage1(steps=2, save_every=1), stage2(steps=1))
    plain["data"]["workers"] = 1
    process = start(write(plain, tmp_path))
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert errors == ""
    assert "\r" not in said
    assert "\x1b" not in said
    assert next(line.split("  ")[0] for line in said.splitlines() if line.startswith("second ")) == "second 0/1"
    assert recipe(plain) == load(Path(plain["output"]) / "recipe.yaml")


def test_errors_are_one_line(tmp_path: Path) -> None:
    plain = tree(tmp_path, stage2(steps=1))
    plain["model"]["language"]["tokenizer"] = str(tmp_path / "nowhere")
    run = subprocess.run(
        [sys.executable, "-m", "granvit.cli", "train", str(write(plain, tmp_path))],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 1
    assert run.stderr.startswith("granvit: "), run.stderr
    assert run.stderr.count("\n") == 1, run.stderr
