"""Two processes on half the batch each, by DDP and FSDP2, against one process with all of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from granvit.train.checkpoints import last_checkpoint
from tests.ranks import PATIENCE, needs_gloo, on_two
from tests.train.support import environment, metrics, stage1, stage2, train, tree, weights, write

pytestmark = needs_gloo


def worker(rank: int, port: int, plain: dict[str, Any], stop_after: int, shard_on_cpu: bool) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    if shard_on_cpu:
        _shard_on_cpu()
    if stop_after and rank == 1:
        _ask_to_stop(stop_after)
    status, _ = train(plain)
    assert status == (143 if stop_after else 0)
    if dist.is_initialized():
        dist.destroy_process_group()


def _ask_to_stop(step: int) -> None:
    """SIGTERM for this rank alone, before it takes a step."""
    import signal

    from granvit.train.trainer import StageTrainer

    batches = StageTrainer.get_batch_samples

    def asked(self: StageTrainer, *arguments: Any) -> Any:
        if self.state.global_step + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return batches(self, *arguments)

    StageTrainer.get_batch_samples = asked  # type: ignore[method-assign]


def _shard_on_cpu() -> None:
    """accelerate shards on accelerators only; FSDP2 itself and everything that calls it run on the CPU too."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    begin = AcceleratorState.__init__

    def sharded(self: Any, *args: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        begin(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)

    AcceleratorState.__init__ = sharded


def train_on_two(plain: dict[str, Any], stop_after: int = 0, *, shard_on_cpu: bool = True) -> None:
    on_two(worker, plain, stop_after, shard_on_cpu)


def recipe(folder: Path, crops: str, **settings: Any) -> dict[str, Any]:
    """Without dropout, which differs by rank; images of a batch are counted unequally, held-out ones too."""
    first = stage1(steps=3, save_every=1, distillation={"crops": crops}, micro_batch=2)
    plain = tree(folder, first, stage2(steps=2, batch_size=4), **settings)
    plain["model"]["language"]["config"]["attention_dropout"] = 0.0
    return plain


def compare(one: Path, two: Path) -> None:
    left, right = metrics(one), metrics(two)
    assert [(line["stage"], line["step"]) for line in left] == [(line["stage"], line["step"]) for line in right]
    for ours, theirs in zip(right, left, strict=True):
        # The gap and the distillation by size are those of the last micro-batch, which is another one.
        names = [n for n in theirs if n != "stage" and not n.startswith(("wrong_image", "by/distillation"))]
        names = [n for n in names if not n.startswith("heldout/wrong_image")]
        for name in names:
            assert ours[name] == pytest.approx(theirs[name], rel=2e-5, abs=1e-6), (name, ours, theirs)
    for stage in ("first", "second"):
        _close(weights(two / stage / "model"), weights(one / stage / "model"))


def _close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if not name.endswith("k_proj.bias"):  # its gradient is 0 but for rounding, which AdamW makes steps of
            torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}")


def checkpoint(stage: Path) -> dict[str, torch.Tensor]:
    """Everything that the last checkpoint of a stage holds, the teacher with it."""
    folder = last_checkpoint(stage)
    assert folder is not None
    if not (folder / "pytorch_model_fsdp_0").exists():
        return weights(folder)
    dcp_to_torch_save(folder / "pytorch_model_fsdp_0", folder / "joined.pt")
    joined: dict[str, torch.Tensor] = torch.load(folder / "joined.pt", weights_only=True)["model"]
    return joined


@pytest.mark.parametrize(
    ("parallel", "crops", "micro_batch", "stop_after"),
    [("ddp", "native", 1, 0), ("ddp", "resize", 1, 2), ("fsdp2", "native", 1, 0), ("fsdp2", "resize", 2, 2)],
    ids=["ddp", "ddp-stopped", "fsdp2", "fsdp2-stopped"],
)
def test_two_processes_train_as_one(
    tmp_path: Path, parallel: str, crops: str, micro_batch: int, stop_after: int
) -> None:
    """With gradients accumulated too; and stopped on the word of one rank, and taken up again."""
    plain = recipe(tmp_path, crops, parallel=parallel)
    train(plain)
    plain["output"] = str(tmp_path / "two")
    plain["stages"][0]["micro_batch"] = micro_batch
    first = tmp_path / "two" / "first"
    if stop_after:
        train_on_two(plain, stop_after)
        assert last_checkpoint(first) == first / f"checkpoint-{stop_after}"
    train_on_two(plain)
    compare(tmp_path / "out", tmp_path / "two")
    assert (first / "checkpoint-3" / "pytorch_model_fsdp_0").exists() == (parallel == "fsdp2")
    ours, theirs = checkpoint(first), checkpoint(tmp_path / "out" / "first")
    assert any(name.startswith("teacher.") for name in theirs)
    _close(ours, theirs)


def test_two_shards_in_bfloat16_train_as_one(tmp_path: Path) -> None:
    """Each value of a step is rounded to 8 bits, here and there in other places: sharded weights are gathered in
    bfloat16, where autocast leaves embeddings and norms in float32. Such roundings have either sign, so means over
    hundreds of tokens are apart by less than one of them, 2^-8."""
    plain = recipe(tmp_path, "resize", parallel="fsdp2")
    plain["model"]["dtype"] = "bfloat16"
    plain["stages"] = plain["stages"][:1]
    train(plain)
    plain["output"] = str(tmp_path / "two")
    plain["stages"][0]["micro_batch"] = 1
    train_on_two(plain)
    one, two = metrics(tmp_path / "out"), metrics(tmp_path / "two")
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for ours, theirs in zip(two, one, strict=True):
        for name in ("loss", "caption", "distillation", "heldout/caption"):
            assert ours.get(name, 0.0) == pytest.approx(theirs.get(name, 0.0), rel=2**-8), (name, ours, theirs)
    ours, theirs = weights(tmp_path / "two" / "first" / "model"), weights(tmp_path / "out" / "first" / "model")
    assert {value.dtype for value in theirs.values()} == {torch.float32}
    # Adam's first steps go by the sign of a gradient more than by its size: each moves a weight by about the rate.
    rates = sum(line["learning_rate"] for line in one if "loss" in line)
    for name, value in theirs.items():
        assert (ours[name] - value).abs().max() <= 2.5 * rates, name


def test_sharding_where_accelerate_does_none_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="parallel: fsdp2 needs GPUs, since accelerate does not shard on the CPU"):
        train_on_two(recipe(tmp_path, "resize", parallel="fsdp2"), shard_on_cpu=False)


ENTRY = """
import atexit
from pathlib import Path

def count():
    names = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
    print("gloo's threads at the end:", sum("gloo" in name for name in names), flush=True)

atexit.register(count)
from granvit.cli import main
main()
"""


def test_torchrun(tmp_path: Path) -> None:
    """The command of the README, from the start of its processes to their end."""
    path = write(recipe(tmp_path, "resize"), tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    entry = tmp_path / "entry.py"
    entry.write_text(ENTRY)
    run = subprocess.run(
        [*command, entry, "train", path], capture_output=True, text=True, env=environment(), timeout=PATIENCE
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert (tmp_path / "out" / "second" / "model").exists()
    assert run.stdout.count("gloo's threads at the end: 0") == 2
    assert run.stdout.count("first 3/3  loss") == 1  # by the first rank alone
