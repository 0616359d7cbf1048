"""An evaluation whose process is killed."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

from typer.testing import CliRunner

from granvit.cli import app
from granvit.eval.answers import read_answers
from tests.eval.support import save_model, write_shards
from tests.train.support import environment


def test_a_killed_command_goes_on(tmp_path: Path) -> None:
    model, shards = save_model(tmp_path / "model"), write_shards(tmp_path / "shards")
    slow = (
        "import sys, time\nfrom granvit.model.granvit import GranViT\ngenerate = GranViT.generate\n"
        "def slowly(*a, **k):\n    time.sleep(0.4)\n    return generate(*a, **k)\n"
        "GranViT.generate = slowly\nfrom granvit.cli import main\nsys.argv = ['granvit', *sys.argv[1:]]\nmain()"
    )
    options = ["--data", str(shards), "--batch-size", "4", "--max-new-tokens", "4", "--device", "cpu"]
    command = ["eval", str(model), *options, "--out", str(tmp_path / "cut")]
    process = subprocess.Popen(
        [sys.executable, "-c", slow, *command], env=environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    path = tmp_path / "cut" / "answers.jsonl"
    deadline = time.monotonic() + 60
    while not (path.exists() and path.read_bytes().count(b"\n") > 8):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.communicate()
    assert not (tmp_path / "cut" / "evaluation.json").exists()
    for folder in ("cut", "whole"):
        arguments = ["eval", str(model), *options, "--out", str(tmp_path / folder)]
        assert CliRunner().invoke(app, arguments, catch_exceptions=False).exit_code == 0
    assert read_answers(tmp_path / "cut") == read_answers(tmp_path / "whole")
    assert len(read_answers(tmp_path / "cut")) > 20
