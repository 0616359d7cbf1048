"""granvit.bench: floors against hand counts, what the report makes of a run, and one real run of tiny shapes."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks import floors, machine, workloads
from benchmarks.harness import Group, SkippedProviderError
from benchmarks.providers import Provider
from granvit import _bench_report, _bench_rows, bench
from granvit.errors import MissingDependencyError, UserError

WHOLE = {"width": (1.0, 1.0), "height": (1.0, 1.0)}  # every box is the whole image


def whole_images(**changes: Any) -> workloads.Regions:
    settings = {"name": "hand", "images": 2, "grid": (4, 4), "boxes": 3, "output": (4, 4), "channels": 16, "heads": 2}
    return workloads.Regions(**{**settings, **WHOLE, **changes})


def test_floor_of_distillation_by_hand() -> None:
    # 2 images of 16 tokens; 6 regions of 16 cells; 16 channels of 2 bytes: rows of 32 bytes.
    # A box of the whole image onto its own grid has samples at j +- 1/4: 3 taps an axis, 2 at either border.
    taps = 2 + 3 + 3 + 2
    mix = 2 * 6 * 16 * (taps * 4 + 4 * taps)
    difference = 3 * 6 * 16 * 16
    forward = floors.region_distill(whole_images(), torch.bfloat16, "forward")
    assert forward == floors.Floor(bytes=(32 + 96) * 32, flops=mix + difference)
    full = floors.region_distill(whole_images(), torch.bfloat16, "full")
    assert full == floors.Floor(bytes=(32 + 96 + 32) * 32, flops=2 * mix + difference)


def test_floor_of_roi_align_counts_each_token_once_and_only_where_seen() -> None:
    one_cell = whole_images(images=1, boxes=5, width=(0.25, 0.25), height=(0.25, 0.25), output=(1, 1))
    boxes, _ = one_cell.regions()
    seen = set()
    for x0, y0, *_ in (4 * boxes).tolist():
        # two samples a cell, at a quarter and three quarters of a box as large as a grid cell
        columns, rows = (
            {j for k in (0.25, 0.75) for j in range(4) if abs(min(max(start - 0.5 + k, 0), 3) - j) < 1}
            for start in (x0, y0)
        )
        seen |= {(row, column) for row in rows for column in columns}
    floor = floors.roi_align(one_cell, torch.float32, "forward")
    assert floor.bytes == (len(seen) + 5) * 16 * 4
    full = floors.roi_align(one_cell, torch.float32, "full")
    assert full.bytes == floor.bytes + (5 + 16) * 16 * 4


def test_floor_of_attention_by_hand() -> None:
    # 6 regions with 2 queries each, all 16 tokens covered: 12 query rows, 32 keys and as many values; rows of 64 bytes.
    forward = floors.region_attention(whole_images(queries=2), torch.float32, "forward")
    assert forward == floors.Floor(bytes=(12 + 12 + 2 * 32) * 64, flops=2 * 2 * 2 * 16 * 6 * 16)
    full = floors.region_attention(whole_images(queries=2), torch.float32, "full")
    assert full == floors.Floor(bytes=2 * forward.bytes + (12 + 2 * 32) * 64, flops=3 * forward.flops)


def test_floor_of_box_embedding_by_hand() -> None:
    hand = workloads.Boxes("hand", 5, frequencies=2, hidden=8, width=16)
    weights = (4 * 8 + 8 + 8 * 16 + 16) * 4
    boxes = 5 * 16 + 4 * 2 * 4
    rows = 5 * 16 * 4
    layers = 2 * 5 * (4 * 8 + 8 * 16)
    forward = floors.box_embedding(hand, torch.float32, "forward")
    assert forward == floors.Floor(weights + boxes + rows, layers + 2 * 5 * 4 * 2)
    full = floors.box_embedding(hand, torch.float32, "full")
    copied = 2 * 5 * 16 * 4  # the other half of the sequence, read and written
    assert full.bytes == forward.bytes + copied + rows + 8 * 16 * 4 + weights
    assert full.flops == forward.flops + 2 * 5 * (2 * 8 * 16 + 4 * 8)


def test_floor_time_is_the_slower_of_moving_and_computing() -> None:
    assert floors.Floor(bytes=100, flops=1000).seconds(bandwidth=10, rate=1000) == 10
    assert floors.Floor(bytes=100, flops=1000).seconds(bandwidth=1000, rate=10) == 100


def test_floors_of_the_paper_workload_are_those_of_its_tensors() -> None:
    paper = workloads.REGIONS["paper"]
    floor = floors.region_distill(paper, torch.bfloat16, "full")
    every = (96 * 1024 + 2 * 16 * 1024) * 1152 * 2
    assert 0.9 * every < floor.bytes <= every


def test_workloads_are_the_same_in_every_process() -> None:
    boxes, image_index = workloads.REGIONS["page"].regions()
    again, _ = workloads.REGIONS["page"].regions()
    assert torch.equal(boxes, again)
    assert image_index.tolist() == [b for b in range(8) for _ in range(64)]
    size = boxes[:, 2:] - boxes[:, :2]
    low, high = torch.tensor([0.05, 0.015]), torch.tensor([0.4, 0.05])
    assert (boxes >= 0).all()
    assert (boxes <= 1 + 1e-6).all()
    assert (size >= low - 1e-6).all()
    assert (size <= high + 1e-6).all()


@pytest.mark.parametrize("suite", sorted(workloads.SUITES))
def test_every_case_of_every_suite_has_its_workload(suite: str) -> None:
    for selection in workloads.SUITES[suite].selections:
        for name in selection.workloads:
            assert workloads.find(selection.op, name).name == name


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no /proc")
def test_peak_memory_sees_what_a_call_frees_again() -> None:
    memory = machine.PeakMemory(torch.device("cpu"))
    size = 64 << 20
    held = memory.of(lambda: torch.zeros(size, dtype=torch.uint8).fill_(1))
    assert 0.9 * size < held < 1.3 * size
    assert memory.of(lambda: None) < size // 8


def roi_align_group() -> Group:
    from benchmarks.bench_roi_align import OP

    return Group(OP, "tiny", "float32", "full", torch.device("cpu"))


def test_a_peer_with_wrong_results_does_not_match() -> None:
    group = roi_align_group()
    separable = next(p for p in group.op.peers if p.name == "separable")
    assert group.entry(separable).match
    wrong = Provider("wrong", lambda *a: 1.01 * separable.function(*a))
    assert not group.entry(wrong).match


def test_ours_is_held_to_a_tighter_budget_than_a_peer() -> None:
    group = roi_align_group()
    function = group.op.ours[0].function
    assert group.entry(group.op.ours[0]).match
    assert group.entry(Provider("slightly_off", lambda *a: function(*a) * (1 + 1e-5))).match
    assert not group.entry(Provider("ours_slightly_off", lambda *a: function(*a) * (1 + 1e-5), stock=False)).match
    nan = Provider("nan", lambda *a: function(*a) * float("nan"), stock=False)
    assert not group.entry(nan).match


def test_a_peer_that_raises_is_skipped_with_its_reason_and_ours_is_not() -> None:
    def raises(*arguments: object) -> torch.Tensor:
        raise RuntimeError("no kernel\nsecond line")

    group = roi_align_group()
    with pytest.raises(SkippedProviderError, match="^RuntimeError: no kernel$"):
        group.entry(Provider("peer", raises))
    with pytest.raises(RuntimeError, match="no kernel"):
        group.entry(Provider("granvit", raises, stock=False))


def entry(provider: str, seconds: list[float], **changes: Any) -> dict[str, Any]:
    info = {
        "op": "region_distill",
        "workload": "cpu",
        "dtype": "float32",
        "mode": "full",
        "provider": provider,
        "stock": not provider.startswith("granvit"),
        "same_result": True,
        "impl": None if provider != "granvit" else "cpu",
        "match": True,
        "error": 1e-7,
        "peak_bytes": 3 << 20,
        "floor_bytes": 10**9,
        "floor_flops": 10**9,
        "floor_seconds": 0.05,
        "graph_replay_seconds": [],
        "graph_replay_skipped": "",
        **changes,
    }
    return {"extra_info": info, "stats": {"data": seconds}}


def report(*entries: dict[str, Any], skipped: list[dict[str, str]] | None = None) -> dict[str, Any]:
    machine_info = {
        "device": "CPU",
        "threads": 2,
        "load": 0.1,
        "isa": "avx2",
        "torch": "2.14",
        "suite": "cpu",
        "copy_bytes_per_second": 2e10,
        "matmul_flops_per_second": {"float32": 1e11},
    }
    return {"benchmarks": list(entries), "skipped": skipped or [], "machine_info": {"granvit": machine_info}}


def quiet() -> Console:
    return Console(record=True, width=140, file=io.StringIO())


def printed(run: dict[str, Any]) -> tuple[str, bool]:
    console = quiet()
    failed = _bench_report.show(run, console)
    return console.export_text(), failed


def test_verdicts_on_the_gpu_targets() -> None:
    case = {"workload": "paper", "dtype": "bfloat16"}
    run = report(
        entry("granvit", [3e-4], graph_replay_seconds=[1.9e-4, 2.3e-4, 1.8e-4], peak_bytes=90 << 20, **case),
        entry("granvit_cuda", [3e-4], graph_replay_seconds=[1e-4], **case),
        entry("granvit_triton", [3e-4], graph_replay_seconds=[1.7e-4], **case),
        entry("separable_compiled", [2e-4], **case),
        entry("granvit", [3e-4], op="box_embedding", **{**case, "workload": "R96"}),
        entry("granvit", [3e-4], op="roi_align", **case),
        entry("torchvision", [33e-4], op="roi_align", **case),
    )
    run["machine_info"]["granvit"] |= {"device": "NVIDIA H100 80GB HBM3", "suite": "gpu"}
    text, _ = printed(run)
    for verdict in (
        "held   region_distill paper bfloat16 full: 0.19 ms in a graph, target on an H100 0.2",
        "missed region_distill paper bfloat16 full: 90 MiB beyond the inputs, target 80",
        "missed region_distill paper bfloat16 full: a plain call takes 0.3 ms, separable_compiled 0.2",
        "missed region_distill paper bfloat16 full: triton takes 1.70x of cuda, target 1.6x",
        "open   box_embedding R96 bfloat16 full: no replay with a green match, target 0.2 ms",
        "held   roi_align paper bfloat16 full: a plain call takes 0.3 ms, torchvision 3.3",
        "held   roi_align paper bfloat16 full: 11.0x torchvision, target 10x",
    ):
        assert verdict in text


def test_the_table_joins_passes_and_marks_the_best_stock_form() -> None:
    run = report(
        entry("granvit", [0.09, 0.11]),
        entry("torchvision", [3.1]),
        entry("einsum", [0.7]),
        entry("granvit", [0.10]),
        entry("torchvision", [3.0]),
    )
    text, failed = printed(run)
    assert not failed
    lines = {line.split()[1]: line for line in text.splitlines() if line.startswith("│")}
    # median ms, match, peak MiB, share of the copy bandwidth (1 GB in 0.1 s of 20 GB/s), floor
    assert [c.strip() for c in lines["granvit"].split("│")[2:-1]] == ["100", "", "yes", "3.0", "50", "50"]
    assert [c.strip() for c in lines["torchvision"].split("│")[2:4]] == ["3050", "30.50x"]
    assert "best stock form" in lines["einsum,"]
    assert "best stock form" not in lines["torchvision"]
    assert "held   region_distill cpu float32 full: 30.5x torchvision, target 30x" in text
    assert "held   region_distill cpu float32 full: 7.0x the best stock form (einsum), target 5x" in text


def test_no_speed_up_without_a_green_match() -> None:
    text, failed = printed(report(entry("granvit", [0.01], match=False), entry("torchvision", [3.0])))
    assert failed
    assert "x torchvision" not in text
    assert "no match: region_distill cpu float32 full granvit" in text
    assert "open   region_distill cpu float32 full against torchvision: no green match, hence no speed-up" in text
    assert "held" not in text

    text, failed = printed(report(entry("granvit", [0.1]), entry("einsum", [0.01], match=False)))
    assert not failed
    assert "open   region_distill cpu float32 full against the best stock form: no such peer ran" in text


def test_another_function_is_never_the_best_stock_form() -> None:
    cases = _bench_rows.rows(
        report(
            entry("granvit", [0.1]),
            entry("sdpa_mask", [1.0]),
            entry("roi_align_kv", [0.5], match=False, same_result=False),
        )
    )
    (group,) = _bench_rows.groups(cases).values()
    best = _bench_rows.best_stock(group)
    assert best is not None
    assert best.provider == "sdpa_mask"


def test_a_missed_target_and_a_busy_machine_are_said() -> None:
    run = report(entry("granvit", [0.2]), entry("torchvision", [3.0]), entry("einsum", [0.7]))
    run["machine_info"]["granvit"]["load"] = 3.0
    text, _ = printed(run)
    assert "missed region_distill cpu float32 full: 15.0x torchvision, target 30x" in text
    assert "missed region_distill cpu float32 full: 3.5x the best stock form (einsum), target 5x" in text
    assert "busy before the run (load 3.0)" in text


def test_skipped_peers_are_printed_with_their_reasons() -> None:
    case = {"op": "roi_align", "workload": "cpu", "provider": "torchvision", "mode": "full", "reason": "no kernel"}
    run = report(entry("granvit", [0.1]), skipped=[{**case, "dtype": "bfloat16"}, {**case, "dtype": "float16"}])
    assert "skipped torchvision of roi_align in bfloat16 full, float16 full: no kernel" in printed(run)[0]


def test_plots_are_drawn_where_there_is_a_sweep(tmp_path: Path) -> None:
    entries = [
        entry(provider, [factor * value], workload=f"{sweep}.{value}", dtype="bfloat16")
        for sweep, values in (("boxes", (1, 4, 16)), ("grid", (16, 32)))
        for value in values
        for provider, factor in (("granvit", 1e-3), ("separable", 8e-3))
    ]
    cases = _bench_rows.rows(report(*entries))
    path = tmp_path / "plot.png"
    assert _bench_report.plot("region_distill", cases, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000
    assert not _bench_report.plot("roi_align", cases, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench.NEEDED, "pytest_benchmark_that_is_not_there", "pytest-benchmark")
    with pytest.raises(MissingDependencyError, match=r"^bench: pytest-benchmark not installed; .*granvit\[bench\]"):
        bench.require()


def test_an_installed_package_has_no_suites(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    with pytest.raises(UserError, match="source checkout"):
        bench.run("smoke")


def test_a_real_run_of_tiny_shapes(tmp_path: Path) -> None:
    console = quiet()
    status = bench.run("smoke", select="test_roi_align and full", dtypes=["bfloat16"], output=tmp_path, console=console)
    text = console.export_text()
    assert status == 0, text
    (path,) = tmp_path.glob("*.json")
    run = json.loads(path.read_text())
    cases = {row.provider: row for row in _bench_rows.rows(run)}
    assert {"granvit", "torchvision_float32", "einsum", "separable"} <= set(cases)
    assert all(row.match and min(row.seconds) > 0 for row in cases.values())
    assert len(cases["granvit"].seconds) >= workloads.SUITES["smoke"].passes
    assert run["machine_info"]["granvit"]["copy_bytes_per_second"] > 1e8
    assert {skip["provider"]: bool(skip["reason"]) for skip in run["skipped"]} == {"torchvision": True}
    assert "best stock form" in text
    assert "no bfloat16 kernel" in text
    assert not list(tmp_path.glob("*.events"))


def test_listing_runs_nothing(tmp_path: Path) -> None:
    console = quiet()
    assert bench.run("smoke", select="box_embedding", output=tmp_path / "none", list_only=True, console=console) == 0
    lines = console.export_text().splitlines()
    assert "test_box_embedding[tiny-float32-forward-granvit-0]" in lines
    assert all(line.startswith("test_box_embedding[") for line in lines)
    assert not (tmp_path / "none").exists()
    with pytest.raises(UserError, match="no case matches"):
        bench.run("smoke", select="nothing_of_that_name", list_only=True, console=console)


def test_a_wrong_suite_or_device_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^bench: .*--suite: invalid choice: 'no_such'"):
        bench.run("no_such", output=tmp_path, console=quiet())
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="^bench: this needs a CUDA device, and torch sees none"):
            bench.run("smoke", device="cuda", output=tmp_path, list_only=True, console=quiet())


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_interrupting_keeps_what_had_finished(tmp_path: Path) -> None:
    code = (
        # A shell starts background jobs with SIGINT ignored, and what the tests run in may be one.
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        f"from granvit import bench; sys.exit(bench.run('smoke', output={str(tmp_path)!r}))"
    )
    environment = {**os.environ, "PYTHONPATH": str(bench.ROOT), "PYTHONUNBUFFERED": "1"}
    child = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and child.poll() is None:
        events = [json.loads(line) for file in tmp_path.glob("*.events") for line in file.read_text().splitlines()]
        if sum(event["event"] == "end" for event in events) >= 3:
            break
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    text, _ = child.communicate(timeout=60)
    assert child.returncode == 130, text
    (path,) = tmp_path.glob("*.json")
    finished = json.loads(path.read_text())["benchmarks"]
    assert finished
    assert all(entry["stats"]["data"] for entry in finished)
    assert "interrupted" in text
