"""Stages whose layers are compiled, against the same ones that are not."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch._dynamo
from torch import nn
from torch._dynamo.utils import counters

from granvit.train.trainer import StageTrainer
from tests.train.support import Tree, metrics, stage1, stage2, train, tree, write_shards

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Graphs that there are after each step. A layer that is compiled too often fails, instead of running plainly."""
    graphs: list[int] = []
    count = StageTrainer.count_step
    monkeypatch.setattr(
        StageTrainer,
        "count_step",
        lambda self: (graphs.append(counters["stats"]["unique_graphs"]), count(self))[1],
    )
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield graphs
    torch._dynamo.reset()


def recipe(folder: Path, *stages: Tree) -> Tree:
    """One layer each, no dropout. Images with other numbers of questions and crops in every step."""
    plain = tree(folder, *stages)
    for part in (plain["model"]["vision"], plain["model"]["language"]):
        part["config"] |= {"num_hidden_layers": 1, "attention_dropout": 0.0}
    return plain


def settled(graphs: list[int]) -> bool:
    """Whether the second half of the steps added none."""
    return graphs[-1] == graphs[len(graphs) // 2]


def test_compiled_layers_give_the_same_losses(tmp_path: Path, compiler: list[int]) -> None:
    """With distillation of crops of every size, and rows of several lengths."""
    for name, compiled in (("plain", False), ("compiled", True)):
        first = stage1(steps=4, micro_batch=2, compile=compiled, learning_rate=1e-3, distillation={"crops": "native"})
        plain = recipe(tmp_path, first)
        plain["data"]["heldout"] = []
        train({**plain, "output": str(tmp_path / name)})
        assert bool(compiler[-1]) == compiled
    ours, theirs = (metrics(tmp_path / name) for name in ("compiled", "plain"))
    assert len({line["by/caption/global_caption"] for line in theirs}) == 4
    for line, other in zip(ours, theirs, strict=True):
        assert line.keys() == other.keys()
        for name in set(other) - {"stage"}:
            assert line[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), name


def test_stage_after_stage_is_compiled(tmp_path: Path, compiler: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there were before. The graphs are those of inductor, which is left out since it takes its time."""
    compile_module = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda self, **options: compile_module(self, **{**options, "backend": "aot_eager"})
    )
    # Whatever the draw, a layer meets its last new shape some time; with these images, in the first half of a stage.
    write_shards(tmp_path / "shards", 20, seed=0)
    write_shards(tmp_path / "heldout", 5, seed=1)
    many = {"steps": 8, "micro_batch": 2, "compile": True}
    train(recipe(tmp_path, stage1(**many), *(stage2(**many, train=part, name=n) for n, part in STAGES.items())))
    for i in range(3):
        assert settled(compiler[8 * i : 8 * i + 8])


STAGES = {"both": ["projector", "language"], "language": ["language"]}
