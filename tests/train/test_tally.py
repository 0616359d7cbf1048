"""Rates of the log, by a clock that the test turns."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from granvit.train.data import Loaded
from granvit.train.tally import Tally


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("granvit.train.tally.time.perf_counter", lambda: now[0])
    return now


def three_steps(tally: Tally, clock: list[float]) -> None:
    for _ in range(3):
        tally.add(Loaded(None, 4), 5e12)
        tally.add_skipped(1)
        clock[0] += 2
        tally.add_step()


def test_rates_of_the_time_of_training(clock: list[float]) -> None:
    tally = Tally(torch.device("cpu"), 2, 10e12)
    three_steps(tally, clock)
    with tally.pause():
        clock[0] += 1000
    found = tally.rates()
    assert found.pop("memory_gib") > 0
    assert found == {
        "images_per_second": 2 * 12 / 6,  # two ranks
        "tokens_per_second": 0.0,
        "step_seconds": 2.0,
        "tflops": 2.5,  # of one device
        "mfu": 0.25,
        "skipped": 3.0,
    }
    tally.restart()
    assert tally.steps == 1
    clock[0] += 1
    assert tally.rates()["tflops"] == 0
    assert "skipped" not in tally.rates()


def test_a_checkpoint_holds_what_was_counted(clock: list[float]) -> None:
    tally, other = (Tally(torch.device("cpu"), 1, None) for _ in range(2))
    three_steps(tally, clock)
    state = tally.state()
    clock[0] += 50  # between two processes
    other.load(state)
    three_steps(other, clock)
    found = other.rates()
    assert found["step_seconds"] == 2.0
    assert found["tflops"] == 2.5
    assert found["skipped"] == 6.0
    assert "mfu" not in found
