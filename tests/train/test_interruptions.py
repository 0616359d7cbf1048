"""Runs that are killed, stopped or fail: what they leave, and that the same command makes the run that nothing
interrupted, bit for bit."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from granvit.train.checkpoints import COMPLETE, last_checkpoint
from granvit.train.log import RunLog
from granvit.train.trainer import StageTrainer, TrainingError
from tests.train.support import (
    Tree,
    assert_same,
    metrics,
    stage1,
    stage2,
    start,
    train,
    tree,
    weights,
    write,
)

SIZES = {"steps": 6, "save_every": 2, "log_every": 3}  # lines of the log span checkpoints


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two stages that nothing interrupted, its recipe in ``plain.yaml``."""
    folder = tmp_path_factory.mktemp("whole")
    train(two_stages(folder))
    return folder


def two_stages(folder: Path) -> Tree:
    return tree(folder, stage1(**SIZES, batch_size=4, micro_batch=2), stage2(**SIZES, eval_every=4))


def beside(whole: Path, tmp_path: Path, **changes: Any) -> Tree:
    """The same recipe on the same data into another folder."""
    return {**two_stages(whole), "output": str(tmp_path / "out"), **changes}


def assert_as(whole: Path, out: Path) -> None:
    """The log and the weights of the uninterrupted run, bit for bit."""
    assert metrics(out) == metrics(whole / "out")
    for stage in ("first", "second"):
        assert_same(weights(out / stage / "model"), weights(whole / "out" / stage / "model"))


# ---- interruptions --------------------------------------------------------------------------------------------------


def until(process: Any, out: Path, lines: int) -> None:
    """Waits until the log of a run has so many lines, or the run ends."""
    path = out / "metrics.jsonl"
    while process.poll() is None and not (path.exists() and path.read_text().count("\n") >= lines):
        time.sleep(0.02)  # so that the run has the processor; what it has written decides


def test_killed_at_a_random_moment_and_taken_up(whole: Path, tmp_path: Path) -> None:
    """Whatever was being written; twice, the second time later."""
    plain = beside(whole, tmp_path)
    path, out, draw = write(plain, tmp_path), tmp_path / "out", random.SystemRandom()
    for lines in (draw.randint(1, 3), draw.randint(3, 5)):
        process = start(path)
        until(process, out, lines)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    train(plain)
    assert_as(whole, out)


@pytest.mark.parametrize("moment", ["weights", "marked", "model", "line", "evaluated", "evaluated without any"])
def test_killed_at_a_chosen_moment(whole: Path, tmp_path: Path, moment: str) -> None:
    """What such a kill leaves is made of the whole run: parts of its last files are missing."""
    out = tmp_path / "out"
    shutil.copytree(whole / "out", out)
    plain = beside(whole, tmp_path)
    (out / "recipe.yaml").write_text((whole / "out" / "recipe.yaml").read_text().replace(str(whole / "out"), str(out)))
    shutil.rmtree(out / "second" / "model")
    last = out / "second" / "checkpoint-6"
    if moment == "model":
        (out / "second" / ".model.partial").mkdir()
    elif moment.startswith("evaluated"):  # and not saved
        for folder in [last] if moment == "evaluated" else list((out / "second").glob("checkpoint-*")):
            shutil.rmtree(folder)
    elif moment == "line":
        shutil.rmtree(last)
        log = out / "metrics.jsonl"
        log.write_bytes(log.read_bytes()[:-100])
    else:
        (last / COMPLETE).unlink()
        if moment == "weights":
            os.truncate(last / "model.safetensors", 100)
    _, said = train(plain)
    assert ("was not whole, and is deleted" in said) == (moment in ("weights", "marked"))
    if moment == "evaluated without any":
        assert "goes on" not in said
    else:
        assert f"goes on after step {6 if moment == 'model' else 4}" in said
    lines = [(line["stage"], line["step"]) for line in metrics(out) if "heldout/caption" in line]
    assert lines == [("first", 0), ("first", 6), ("second", 0), ("second", 4), ("second", 6)]
    assert_as(whole, out)
    assert_points_as_lines(out)


def assert_points_as_lines(out: Path) -> None:
    """TensorBoard shows each figure of the log once, and nothing that is not in it."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for stage in ("first", "second"):
        events = EventAccumulator(str(out / "tensorboard" / stage))
        events.Reload()
        lines = [line for line in metrics(out) if line["stage"] == stage]
        for name in ("loss", "grad_norm", "heldout/caption"):
            expected = [(line["step"], line[name]) for line in lines if name in line]
            assert expected
            assert [(e.step, e.value) for e in events.Scalars(name)] == [
                (step, pytest.approx(value, rel=1e-6)) for step, value in expected
            ]


def test_sigterm_saves_and_exits_and_the_run_goes_on(whole: Path, tmp_path: Path) -> None:
    """Sent to all of its processes, the one that reads the data too, as launchers do."""
    plain = beside(whole, tmp_path)
    plain["data"] = {**plain["data"], "workers": 1}
    plain["stages"] = [{**stage, "save_every": None} for stage in plain["stages"]]
    process = start(write(plain, tmp_path), setup=_slowly())
    until(process, tmp_path / "out", 1)
    os.killpg(process.pid, signal.SIGTERM)
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 143, errors
    assert errors == ""
    assert "stopped by signal 15; the same command goes on from there" in said
    assert last_checkpoint(tmp_path / "out" / "first") is not None
    _, said = train(plain)
    assert "goes on after step" in said
    assert_as(whole, tmp_path / "out")


def _slowly() -> str:
    """Steps that a signal can come between."""
    return (
        "import time\nfrom granvit.train.trainer import StageTrainer as T\nstep = T.training_step\n"
        "T.training_step = lambda *a, **k: (time.sleep(0.1), step(*a, **k))[1]"
    )


def test_a_signal_after_the_last_step_ends_the_run_with_a_whole_stage(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = StageTrainer.evaluate

    def asked(self: StageTrainer, *args: Any, **kwargs: Any) -> dict[str, float]:
        if self.state.global_step:  # not the evaluation that a stage begins with
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self, *args, **kwargs)

    plain = beside(whole, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(StageTrainer, "evaluate", asked)
        assert train(plain)[0] == 143
    assert (tmp_path / "out" / "first" / "model").exists()
    assert not (tmp_path / "out" / "second").exists()
    assert train(plain)[0] == 0
    assert_as(whole, tmp_path / "out")


# ---- what goes wrong ------------------------------------------------------------------------------------------------


def goes_on(whole: Path, plain: Tree) -> None:
    """The last checkpoint is usable, and all that was ever marked whole is finite."""
    out = Path(plain["output"])
    for folder in out.glob(f"*/checkpoint-*/{COMPLETE}"):
        assert all(value.isfinite().all() for value in weights(folder.parent).values())
    assert train(plain)[0] == 0
    assert_as(whole, out)


def at_step(step: int, what: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls `what` with the trainer before the first forward pass of a step."""
    forward = StageTrainer.compute_loss

    def patched(self: StageTrainer, *args: Any, **kwargs: Any) -> Any:
        result = forward(self, *args, **kwargs)
        return what(self, result) if self.state.global_step + 1 == step else result

    monkeypatch.setattr(StageTrainer, "compute_loss", patched)


def exhausted(trainer: StageTrainer, loss: Tensor) -> Tensor:
    raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")


def not_a_number(trainer: StageTrainer, loss: Tensor) -> Tensor:
    return loss * float("nan")


def gradient_not_a_number(trainer: StageTrainer, loss: Tensor) -> Tensor:
    weight = trainer.objective.model.llava.model.multi_modal_projector.linear_1.weight
    weight.register_hook(lambda grad: grad * float("nan"))
    return loss


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        (exhausted, r"step 5: the device has no memory left for 2 frames and \d+ tokens; a smaller micro_batch"),
        (not_a_number, "step 5: the loss is not finite; a lower learning_rate"),
        (gradient_not_a_number, "step 5: the gradient is not finite; a lower learning_rate"),
    ],
)
def test_a_step_that_fails_is_one_sentence(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: Any, sentence: str
) -> None:
    plain = beside(whole, tmp_path)
    with monkeypatch.context() as patch:
        at_step(5, what, patch)
        with pytest.raises(TrainingError, match=f"{sentence}.* The checkpoint of step 4 is whole: the same command"):
            train(plain)
    goes_on(whole, plain)


def test_what_is_not_finite_is_never_saved_where_nobody_waits_for_the_device(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where a step is not looked at when it is taken: the weights are NaN by the time that it shows."""
    plain = beside(whole, tmp_path)
    with monkeypatch.context() as patch:

        def later(self: StageTrainer, value: Tensor, what: str) -> None:
            self._finite = self._finite & torch.isfinite(value)

        patch.setattr(StageTrainer, "_check_finite", later)
        at_step(5, not_a_number, patch)
        with pytest.raises(TrainingError, match="step 6 or shortly before: the loss or the gradient is not finite"):
            train(plain)
    goes_on(whole, plain)


def test_what_is_not_finite_reaches_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With no line of the log and no checkpoint after it."""
    monkeypatch.setattr(
        StageTrainer, "_check_finite", lambda self, value, what: self._finite.logical_and_(value.isfinite())
    )
    at_step(2, not_a_number, monkeypatch)
    plain = tree(tmp_path, stage2(steps=2, log_every=50))
    plain["data"]["heldout"] = []
    with pytest.raises(TrainingError, match=r"not finite.*There is no checkpoint of this stage yet\."):
        train(plain)
    assert not (tmp_path / "out" / "second" / "model").exists()


@pytest.fixture
def small_files() -> Iterator[Any]:
    """Sets how large a file may become: as a full disk, which fails in the middle of one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, ignored)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt"])
def test_a_full_disk_is_one_sentence(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_files: Any, file: str
) -> None:
    plain = beside(whole, tmp_path)
    limit = (whole / "out" / "first" / "checkpoint-4" / file).stat().st_size // 2
    name = "_save" if file.startswith("model") else "_save_optimizer_and_scheduler"
    with monkeypatch.context() as patch:
        save = getattr(StageTrainer, name)

        def full(self: StageTrainer, *args: Any, **kwargs: Any) -> None:
            if self.state.global_step == 4:
                small_files(limit)
            save(self, *args, **kwargs)

        patch.setattr(StageTrainer, name, full)
        with pytest.raises(
            TrainingError,
            match=r"checkpoint-4: cannot be written: .*The checkpoint of step 2 is whole: the same command",
        ):
            train(plain)
    small_files(resource.RLIM_INFINITY)
    assert not (tmp_path / "out" / "first" / "checkpoint-4").exists()
    goes_on(whole, plain)


@pytest.mark.parametrize("file", ["metrics", "tensorboard"])
def test_a_log_that_cannot_be_written_is_one_sentence(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    if file == "tensorboard":
        pytest.importorskip("tensorboard")
    plain = beside(whole, tmp_path)
    with monkeypatch.context() as patch:

        def full(*args: Any, **kwargs: Any) -> Any:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def after_step_4(self: RunLog, step: int, values: Any) -> None:
            if step > 4:
                where = "pathlib.Path.open" if file == "metrics" else "torch.utils.tensorboard.SummaryWriter.flush"
                patch.setattr(where, full)
            write_line(self, step, values)

        write_line = RunLog.write
        patch.setattr(RunLog, "write", after_step_4)
        sentence = rf"{file}.*: the disk is full\. The checkpoint of step 4 is whole: the same command goes on from it"
        with pytest.raises(TrainingError, match=sentence):
            train(plain)
    goes_on(whole, plain)
