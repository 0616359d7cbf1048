"""`granvit data scenes` stopped by a kill, a full disk or its end: it goes on, and says what is there."""

from __future__ import annotations

import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from granvit.cli import app
from granvit.data.scenes import SceneComposer
from granvit.data.shards import Shard, ShardError, ShardWriter, read_index, verify
from tests.data.support import encoded, some_record

SMALL = ("--size", "128", "--kind", "ocr", "--seed", "3")
# The command with shards of five scenes, so that there is something to lose within a second.
COMMAND = """
import sys
from granvit.cli import main
from granvit.data import shards
class Writer(shards.ShardWriter):
    def __init__(self, folder, **options):
        super().__init__(folder, samples=5, **options)
        print("ready", flush=True)
shards.ShardWriter = Writer
sys.argv = ["granvit", "data", "scenes", *sys.argv[1:]]
main()
"""


def scenes(out: Path, *options: str) -> str:
    """What the command prints; its error is raised."""
    result = CliRunner().invoke(app, ["data", "scenes", "--out", str(out), *SMALL, *options])
    if result.exception:
        raise result.exception
    assert result.exit_code == 0
    return result.stdout


def command(out: Path, count: int) -> list[str]:
    return [sys.executable, "-c", COMMAND, "--out", str(out), "--count", str(count), *SMALL]


def images(folder: Path) -> dict[str, bytes]:
    verify(folder)
    return {r.key: data for info in read_index(folder) for r, data, _ in Shard(folder / info.name)}


def there(folder: Path) -> int:
    return sum(info.samples for info in read_index(folder)) if (folder / "index.json").exists() else 0


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_same_command_goes_on(tmp_path: Path) -> None:
    assert "7 scenes with" in scenes(tmp_path / "a", "--count", "7")
    before = contents(tmp_path / "a")
    assert "a: holds 7 of these scenes already; a larger --count adds to them" in scenes(tmp_path / "a", "--count", "7")
    assert contents(tmp_path / "a") == before
    assert "4 scenes with" in (text := scenes(tmp_path / "a", "--count", "11"))
    assert "after 7 that were there" in text
    scenes(tmp_path / "whole", "--count", "11")
    assert images(tmp_path / "a") == images(tmp_path / "whole")
    assert [info.samples for info in read_index(tmp_path / "a")] == [7, 4]


@pytest.mark.parametrize("change", [("--seed", "4"), ("--size", "130"), ("--kind", "natural"), ("--first", "1")])
def test_other_scenes_are_not_mixed_in_unasked(tmp_path: Path, change: tuple[str, str]) -> None:
    scenes(tmp_path, "--count", "3")
    before = contents(tmp_path)
    with pytest.raises(
        ShardError, match=r"holds 3 samples in 1 shards, and they are not the first of these scenes; ta"
    ):
        scenes(tmp_path, "--count", "6", *change)
    assert contents(tmp_path) == before
    scenes(tmp_path, "--count", "6", *change, "--append")
    assert [info.samples for info in read_index(tmp_path)] == [3, 6]


def test_shards_of_others_are_left_alone(tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        writer.add(some_record(0), encoded(), "jpg")
    with pytest.raises(ShardError, match="holds 1 samples in 1 shards, and they are not the first of these scenes"):
        scenes(tmp_path, "--count", "6")


def test_killed_at_any_moment_it_goes_on_to_the_same_shards(tmp_path: Path) -> None:
    out, count = tmp_path / "out", 300
    states = []
    for least in (0, 20, 60):
        with subprocess.Popen(command(out, count), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            deadline = time.monotonic() + 60
            while there(out) < least:
                assert time.monotonic() < deadline, "nothing is written"
                time.sleep(random.uniform(0.0, 0.01))
            process.send_signal(signal.SIGKILL)
        states.append(there(out))
        if states[-1]:
            verify(out)
    assert states == sorted(states)
    assert 0 < states[-1] < count, states
    assert all(n % 5 == 0 for n in states)
    done = subprocess.run(command(out, count), capture_output=True, text=True, timeout=120, check=True)
    assert f"{count - states[-1]} scenes with" in done.stdout
    assert f"after {states[-1]} that were there" in done.stdout
    subprocess.run(command(tmp_path / "whole", count), capture_output=True, timeout=120, check=True)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_disk_that_ends_is_one_sentence(tmp_path: Path) -> None:
    subprocess.run(command(tmp_path / "whole", 30), capture_output=True, timeout=120, check=True)
    sizes = [info.bytes for info in read_index(tmp_path / "whole")]
    limit, larger = max(sizes) - 1, sizes.index(max(sizes))  # the largest shard does not fit
    run = subprocess.run(
        command(tmp_path / "out", 30),
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert run.returncode == 1
    (error,) = (line for line in run.stderr.splitlines() if line.startswith("granvit: "))
    assert error == (
        f"granvit: {tmp_path / 'out'}: cannot be written: File too large; {5 * larger} samples in {larger} finished "
        "shards are safe; the same command goes on after them"
    )
    subprocess.run(command(tmp_path / "out", 30), capture_output=True, timeout=120, check=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_progress_is_on_stderr(tmp_path: Path) -> None:
    run = subprocess.run(command(tmp_path, 12), capture_output=True, text=True, timeout=120, check=True)
    assert "12/12" in run.stderr
    assert len(run.stdout.splitlines()) == 2  # "ready" and the sum of it


def test_a_sheet_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    result = CliRunner().invoke(
        app, ["data", "scenes-sheet", "--count", "1", "--out", str(tmp_path / "file" / "a.png")]
    )
    assert str(result.exception) == f"{tmp_path / 'file' / 'a.png'}: cannot be written: File exists"


def test_what_is_there_is_told_by_the_last_scene(tmp_path: Path) -> None:
    """A scene that another version of Pillow or resvg draws elsewhere is another scene, and is not gone on from."""
    record, _ = SceneComposer(3, size=128, kind="ocr")[0]
    moved = record.with_regions(record.regions[:-1])
    with ShardWriter(tmp_path) as writer:
        writer.add(moved, encoded(128, 128), "jpg")
    with pytest.raises(ShardError, match="they are not the first of these scenes"):
        scenes(tmp_path, "--count", "2")
