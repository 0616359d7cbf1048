"""One step of stage 1: ours against stock libraries, on the same images, questions and weights.

On a CUDA device at the size of the paper, in bfloat16 and with random weights; on the CPU a small model of the same
shape, which tells that the code runs and agrees, and little of speed. Every form steps the same model and teacher with
the same optimizer. Before a form is timed, its losses are compared with those of stock libraries in float32, one
sequence and one crop at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from benchmarks.train_step import Bed  # imports transformers, which the other suites do without

SUITE = "train_step"
PASSES = 2
ROUNDS = {"cuda": 6, "cpu": 3}  # samples of a form in a pass
WARM = {"cuda": 3, "cpu": 1}
FORMS = (
    "granvit",
    "granvit_compiled",
    "granvit_native",
    "granvit_native_compiled",
    "stock",
    "stock_compiled",
    "plain",
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    asked = metafunc.config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu")
    metafunc.parametrize("workload", ["paper" if torch.device(asked).type == "cuda" else "cpu"])


@pytest.fixture(scope="session")
def bed() -> Callable[[str], Bed]:
    """The bed of a workload, made once: it is gigabytes."""
    from benchmarks.train_step import WORKLOADS, Bed

    made: dict[str, Bed] = {}

    def find(workload: str) -> Bed:
        if workload not in made:
            made[workload] = Bed(WORKLOADS[workload], torch.device("cuda" if workload == "paper" else "cpu"))
        return made[workload]

    return find


@pytest.mark.parametrize("provider", FORMS)
@pytest.mark.parametrize("turn", range(PASSES))  # forms take turns, so that a drifting machine meets them all alike
def test_train_step(
    benchmark: Any,
    bed: Callable[[str], Bed],
    leave_out: Callable[..., None],
    workload: str,
    provider: str,
    turn: int,
) -> None:
    case = {"workload": workload, "provider": provider}
    if provider.endswith("_compiled") and workload == "cpu":
        leave_out("compiled forms run on CUDA; on this model compiling tells nothing", **case)
    shared = bed(workload)
    reason = measure(benchmark, shared, workload, provider)
    if reason:
        from benchmarks.train_step import free

        free(shared.device)
        if provider.startswith("granvit"):
            pytest.fail(reason)
        leave_out(reason, **case)
    assert benchmark.extra_info["match"]


def measure(benchmark: Any, bed: Bed, workload: str, provider: str) -> str:
    """Checks and times a form; the reason where it needs more memory than there is."""
    try:
        _measure(benchmark, bed, workload, provider)
    except torch.OutOfMemoryError as error:
        # Returned, so that the caller frees memory once the error, and with it the frames and their tensors, is gone.
        return f"{bed.workload.images} images: {'. '.join(str(error).split('. ')[:2])}"
    return ""


def _measure(benchmark: Any, bed: Bed, workload: str, provider: str) -> None:
    from benchmarks.train_step import Clock

    form = bed.form(provider)
    match, errors = bed.match(provider, bed.step(form, Clock(bed.device)))
    for _ in range(WARM[bed.device.type]):
        bed.step(form, Clock(bed.device))
    parts: dict[str, list[float]] = {}

    def step() -> None:
        clock = Clock(bed.device)
        bed.step(form, clock)
        for name, seconds in clock.seconds().items():  # waits for the device
            parts.setdefault(name, []).append(seconds)

    on_gpu = bed.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(bed.device)
        torch.cuda.reset_peak_memory_stats(bed.device)
    benchmark.pedantic(step, rounds=ROUNDS[bed.device.type])
    benchmark.extra_info.update(
        pipeline=SUITE,
        workload=workload,
        provider=provider,
        stock=not provider.startswith("granvit"),
        items=bed.workload.images,
        unit="images",
        match=match,
        facts=errors,
        parts=parts,
        peak_bytes=torch.cuda.max_memory_allocated(bed.device) if on_gpu else None,
    )
