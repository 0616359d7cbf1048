"""The log of a run: what a kill left is forgotten, and a person's line has the figures that matter."""

from __future__ import annotations

import errno
import io
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from granvit.errors import UserError
from granvit.train.log import METRICS, RunLog, render


def log_of(folder: Path, **options: Any) -> tuple[RunLog, io.StringIO]:
    screen = io.StringIO()
    return RunLog(folder, Console(file=screen, width=60), **options), screen


def entries(folder: Path) -> list[tuple[str, int, dict[str, float]]]:
    found = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    return [(e.pop("stage"), e.pop("step"), {k: v for k, v in e.items() if k != "time"}) for e in found]


def test_lines_hold_every_figure(tmp_path: Path) -> None:
    log, _ = log_of(tmp_path)
    log.start("stage1", 50, 0)
    log.write(10, {"heldout/caption": 1 / 3, "by/caption/bbox_to_caption/small": 2.0})
    log.write(20, {"heldout/caption": 0.25})
    log.start("stage2", 5, 0)
    log.write(1, {"heldout/caption": 0.125})
    assert entries(tmp_path) == [
        ("stage1", 10, {"heldout/caption": 1 / 3, "by/caption/bbox_to_caption/small": 2.0}),
        ("stage1", 20, {"heldout/caption": 0.25}),
        ("stage2", 1, {"heldout/caption": 0.125}),
    ]


def killed(folder: Path) -> list[str]:
    """What a run wrote that was killed in its second stage after step 45, in the middle of a line."""
    first, _ = log_of(folder)
    for stage, steps in (("one", (10, 20, 30, 40, 50)), ("two", (10, 20, 30, 40))):
        first.start(stage, 50, 0)
        for step in steps:
            first.write(step, {"heldout/caption": step / 7})
    whole = (folder / METRICS).read_text().splitlines(keepends=True)
    with (folder / METRICS).open("a") as file:
        file.write(whole[-1][: len(whole[-1]) // 2])
    return whole


@pytest.mark.parametrize(("checkpoint", "left"), [(0, 0), (20, 2), (25, 2), (39, 3), (40, 4), (50, 4)])
def test_lines_beyond_the_checkpoint_and_a_half_line_are_forgotten(tmp_path: Path, checkpoint: int, left: int) -> None:
    whole = killed(tmp_path)
    again, _ = log_of(tmp_path)
    again.start("two", 50, checkpoint)
    assert (tmp_path / METRICS).read_text() == "".join(whole[: 5 + left])
    again.write(checkpoint + 1, {"heldout/caption": 0.5})
    assert entries(tmp_path)[-1] == ("two", checkpoint + 1, {"heldout/caption": 0.5})
    assert sorted(path.name for path in tmp_path.iterdir()) == [METRICS]


def test_a_line_that_lacks_only_its_end_is_forgotten(tmp_path: Path) -> None:
    """Whole or not, the next line must not be written behind it."""
    whole = killed(tmp_path)
    (tmp_path / METRICS).write_text("".join(whole).rstrip("\n"))
    again, _ = log_of(tmp_path)
    again.start("two", 50, 40)
    again.write(50, {"heldout/caption": 0.5})
    assert entries(tmp_path)[-1] == ("two", 50, {"heldout/caption": 0.5})


def test_another_rank_writes_and_deletes_nothing(tmp_path: Path) -> None:
    killed(tmp_path)
    before = (tmp_path / METRICS).read_bytes()
    log = RunLog(tmp_path, None, tensorboard=True)
    log.start("two", 50, 0)
    log.write(1, {"heldout/caption": 0.5})
    log.note("a sentence")
    assert (tmp_path / METRICS).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [METRICS]


def training(**more: float) -> dict[str, float]:
    line = {"loss": 3.0625, "caption": 2.0, "distillation": 1.0625, "learning_rate": 1e-5, "grad_norm": 0.5}
    return line | {"images_per_second": 123.456, "tokens_per_second": 7890.4, "step_seconds": 1.0} | more


def test_a_line_for_a_person() -> None:
    assert render(training()) == "loss 3.062 (caption 2.000, distillation 1.062)  123.5 images/s, 7890 tokens/s"
    assert render(training(**{"wrong_image/caption": 0.25, "memory_gib": 7.75, "by/caption/chat": 9.0})) == (
        "loss 3.062 (caption 2.000, distillation 1.062)  wrong image +0.250  123.5 images/s, 7890 tokens/s  7.8 GiB"
    )
    contrastive = {"loss": 0.5, "contrastive": 0.5, "images_per_second": 1.0, "tokens_per_second": 2.0}
    assert render(contrastive) == "loss 0.500 (contrastive 0.500)  1.0 images/s, 2 tokens/s"
    contrastive |= {"contrastive/accuracy": 0.4567, "mfu": 0.416}
    assert render(contrastive) == "loss 0.500 (contrastive 0.500)  accuracy 45.7%  1.0 images/s, 2 tokens/s  MFU 42%"
    assert render({"train_runtime": 3.0}) == ""


def test_a_line_of_the_evaluation_for_a_person() -> None:
    values = {
        "heldout/caption": 1.5,
        "heldout/caption/bbox_to_caption": 1.25,
        "heldout/caption/bbox_to_caption/small": 9.0,
        "heldout/wrong_image/caption": -0.125,
        "heldout/wrong_image/caption/bbox_to_caption": 9.0,
    }
    assert render(values) == "held out: caption 1.500, bbox_to_caption 1.250, wrong image -0.125"
    contrastive = {"heldout/contrastive": 0.75, "heldout/contrastive/accuracy": 0.5}
    assert render(contrastive) == "held out: contrastive 0.750, accuracy 0.500"


def test_the_console_shows_the_stage_the_step_and_the_line(tmp_path: Path) -> None:
    log, screen = log_of(tmp_path)
    log.start("warm [up]", 900, 0)
    log.write(30, training())
    log.write(31, {"train_runtime": 3.0})  # nothing for a person
    log.note("left out sample 3: no [image]")
    assert screen.getvalue().splitlines() == [
        f"warm [up] 30/900  {render(training())}",
        "left out sample 3: no [image]",
    ]


def points(folder: Path, stage: str, name: str) -> list[tuple[int, float]]:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard" / stage))
    events.Reload()
    return [(e.step, e.value) for e in events.Scalars(name)]


def test_tensorboard_has_the_same_figures(tmp_path: Path) -> None:
    log, _ = log_of(tmp_path, tensorboard=True)
    for stage, scale in (("one", 8), ("two", 16)):
        log.start(stage, 9, 0)
        for step in (3, 6):
            log.write(step, {"loss": step / scale, "images_per_second": 1.0, "tokens_per_second": 1.0})
    assert points(tmp_path, "one", "loss") == [(3, 0.375), (6, 0.75)]
    assert points(tmp_path, "two", "loss") == [(3, 0.1875), (6, 0.375)]


@pytest.mark.parametrize(("checkpoint", "left"), [(0, []), (20, [10, 20]), (25, [10, 20]), (40, [10, 20, 30, 40])])
def test_points_beyond_the_checkpoint_are_forgotten(tmp_path: Path, checkpoint: int, left: list[int]) -> None:
    """Of the stage that goes on; the one before it had more steps."""
    log, _ = log_of(tmp_path, tensorboard=True)
    for stage, steps in (("one", (10, 20, 30, 40, 50)), ("two", (0, 10, 20, 30, 40))):
        log.start(stage, 50, 0)
        for step in steps:
            log.write(step, {"heldout/caption": step / 8})
    time.sleep(1)  # event files are read in the order of their names, which count seconds
    again, _ = log_of(tmp_path, tensorboard=True)
    again.start("two", 50, checkpoint)
    again.write(checkpoint + 1, {"heldout/caption": 0.5})
    expected = [(step, step / 8) for step in ([0] if checkpoint else []) + left] + [(checkpoint + 1, 0.5)]
    assert points(tmp_path, "two", "heldout/caption") == expected
    assert [step for step, _ in points(tmp_path, "one", "heldout/caption")] == [10, 20, 30, 40, 50]


def full(*args: Any, **kwargs: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = killed(tmp_path)
    log, _ = log_of(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        with pytest.raises(UserError, match=r"metrics\.jsonl: the disk is full$"):
            log.start("two", 50, 20)
    assert (tmp_path / METRICS).read_text().startswith("".join(whole))  # still there
    log.start("two", 50, 20)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", full)
        with pytest.raises(UserError, match=r"metrics\.jsonl: the disk is full$"):
            log.write(30, training())
