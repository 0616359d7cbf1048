"""An export is compared with its model in plain libraries, and one that is not the model is never left."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from granvit.export import ExportError, llava, vision
from granvit.export.run import export
from granvit.export.verify import difference
from tests.export.support import run_folder, saved


def test_the_command_verifies_without_granvit(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", tmp_path / "shards")
    command = [sys.executable, "-m", "granvit.cli", "export", str(run), "--to", "llava"]
    command += ["--output", str(tmp_path / "out"), "--verify"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert f"exporting {run}/second/model, the model of stage second to llava in bfloat16" in ran.stdout
    [largest] = re.findall(r"verified in bfloat16: logits: largest difference (\S+) of values", ran.stdout)
    assert float(largest) < 0.1
    assert "logits: largest difference" in (tmp_path / "out" / "README.md").read_text()


def nudged(names: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    def changed(*args: object) -> dict[str, Tensor]:
        found = names(*args)
        name = next(name for name in found if name.endswith("layers.1.mlp.fc2.weight"))
        found[name] = found[name] * 1.01
        return found

    return changed


@pytest.mark.parametrize("to", ["llava", "vision"])
def test_an_export_that_is_not_the_model_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    saved(tmp_path / "model")
    module = llava if to == "llava" else vision
    monkeypatch.setattr(module, "published_names", nudged(vision.published_names))
    with pytest.raises(ExportError, match=r"not written, since the export is not the model: (logits|tokens): largest"):
        export(tmp_path / "model", to, verify=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_missing_weight_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "model")

    def fewer(*args: object) -> dict[str, Tensor]:
        found = names(*args)
        return {name: value for name, value in found.items() if not name.endswith("layers.1.mlp.fc2.weight")}

    names = vision.published_names
    monkeypatch.setattr(vision, "published_names", fewer)
    with pytest.raises(ExportError, match="verify: the export lacks weights, or has others"):
        export(tmp_path / "model", "vision", verify=True)


def test_what_is_not_finite_is_no_rounding() -> None:
    ones = torch.ones(3)
    assert difference("x", ones, ones + 1e-6, 1e-5).within
    assert not difference("x", ones, ones + 1e-4, 1e-5).within
    assert not difference("x", ones, torch.tensor([1.0, float("nan"), 1.0]), 1e-5).within
    assert not difference("x", torch.tensor([float("inf"), 1.0, 1.0]), ones, 1e-5).within
    with pytest.raises(ExportError, match=r"expected shape \(3,\), got \(2,\)"):
        difference("x", ones, ones[:2], 1e-5)
