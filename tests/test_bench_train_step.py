"""The suite train_step: its forms do the same step, wrong ones are found out, and its report says what it should."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

pytest.importorskip("transformers", reason="the step is one of transformers' models")

from benchmarks import bench_train_step, train_step
from benchmarks.peers import train_step as peers
from benchmarks.train_step import WORKLOADS, Bed, Clock, Workload
from granvit import _bench_pipelines, _bench_steps, bench
from granvit.errors import MissingDependencyError
from granvit.model.packing import pack
from granvit.model.prompts import Prompts, add_special_tokens
from granvit.train import objective as objective_module

CPU = torch.device("cpu")
FORMS = ("granvit", "granvit_native", "stock", "plain")
PARTS = {"student forward", "LLM forward", "teacher crops", "distillation loss", "backward", "optimizer + EMA"}
_CPU = WORKLOADS["cpu"]
TINY = replace(
    _CPU,
    images=3,
    regions=3,
    size=32,
    vision={**(_CPU.vision or {}), "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2},
    language={**(_CPU.language or {}), "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2},
    max_length=256,
)


def new_bed(workload: Workload = TINY) -> Bed:
    return Bed(workload, CPU, seed=int(torch.randint(2**31, ())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_form_has_the_losses_of_one_sequence_and_one_crop_at_a_time(dtype: torch.dtype) -> None:
    bed = new_bed(replace(TINY, dtype=dtype))
    for name in FORMS:
        held, errors = bed.match(name, bed.step(bed.form(name), Clock(CPU)))
        assert held, (name, errors)


def gradients(bed: Bed, name: str) -> dict[str, torch.Tensor]:
    form = bed.form(name)
    form.losses(lambda part: None).total.backward()
    found = {n: p.grad.clone() for n, p in bed.objective.named_parameters() if p.grad is not None}
    bed.optimizer.zero_grad(set_to_none=True)
    return found


def test_forms_of_the_same_mathematics_have_the_same_gradients() -> None:
    bed = new_bed()
    plain = gradients(bed, "plain")
    assert {name.split(".")[3] for name in plain} == {"vision_tower", "multi_modal_projector"}
    # A bias of the keys moves all scores of a query alike: its gradient is 0 but for rounding.
    largest = max(float(g.norm()) for g in plain.values())
    for name in ("granvit", "stock"):
        other = gradients(bed, name)
        assert other.keys() == plain.keys()
        for key, gradient in plain.items():
            assert float((other[key] - gradient).norm()) <= 1e-4 * float(gradient.norm()) + 1e-6 * largest, (name, key)
    native = gradients(bed, "granvit_native")
    weight = next(key for key in plain if key.endswith("layers.1.mlp.fc2.weight"))
    assert float((native[weight] - plain[weight]).norm()) > 1e-3 * float(plain[weight].norm())


def sees_other_answers(form: peers.Stock) -> None:
    form.mask = torch.ones_like(form.mask).tril()


def looks_beside_the_boxes(form: peers.Stock) -> None:
    form.rois = form.rois + torch.tensor([0, 0.5, 0.5, 0.5, 0.5])


def teaches_itself(form: peers.Stock) -> None:
    form.models = replace(form.models, teacher=form.models.tower)


def counts_positions_on(form: peers.Stock) -> None:
    form.place = torch.arange(form.place.shape[1]).expand_as(form.place)


@pytest.mark.parametrize(
    "mistake",
    [sees_other_answers, looks_beside_the_boxes, teaches_itself, counts_positions_on],
    ids=lambda m: m.__name__,
)
def test_a_form_with_a_mistake_does_not_match(mistake: Any) -> None:
    bed = new_bed()
    form = bed.form("stock")
    mistake(form)
    assert not bed.match("stock", bed.step(form, Clock(CPU)))[0]


def test_a_form_that_forgets_the_distillation_or_an_answer_does_not_match() -> None:
    bed = new_bed()
    losses = bed.step(bed.form("granvit"), Clock(CPU))
    assert bed.match("granvit", losses)[0]
    assert not bed.match("granvit", replace(losses, total=losses.caption))[0]
    assert not bed.match("granvit", replace(losses, tokens=losses.tokens[1:]))[0]
    assert not bed.match("granvit", replace(losses, tokens=losses.tokens.roll(1)))[0]
    bed.form("granvit_native")
    assert not bed.match("granvit_native", losses)[0]  # whose crops are of another size


@pytest.mark.parametrize("name", FORMS)
def test_a_step_moves_student_and_teacher_and_nothing_else_and_reset_undoes_it(name: str) -> None:
    bed = new_bed()
    form = bed.form(name)
    before = {key: value.clone() for key, value in bed.objective.state_dict().items()}
    first = bed.step(form, Clock(CPU))
    after = bed.objective.state_dict()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert any("multi_modal_projector" in key for key in moved)
    assert not any("language_model" in key or "lm_head" in key for key in moved)
    prefix = "model.llava.model.vision_tower."
    assert any(key.startswith(prefix) for key in moved)
    for key in (key for key in before if key.startswith(prefix)):
        average = key.replace(prefix, "teacher.tower.")
        expected = 0.9 * before[average].double() + 0.1 * after[key].double()
        torch.testing.assert_close(after[average].double(), expected, rtol=1e-5, atol=1e-6)
    assert all(parameter.grad is None for parameter in bed.objective.parameters())
    again = bed.step(bed.form(name), Clock(CPU))
    torch.testing.assert_close(again.tokens, first.tokens)


def test_rows_of_the_batch_hold_the_images_in_another_order() -> None:
    # Otherwise the tests above would not see answers that are attributed to the wrong image.
    assert any(new_bed().batch.order != sorted(range(TINY.images)) for _ in range(20))


@pytest.mark.parametrize("name", FORMS)
def test_the_clock_knows_every_part_of_every_form(name: str) -> None:
    bed, clock = new_bed(), Clock(CPU)
    bed.step(bed.form(name), clock)
    parts = clock.seconds()
    assert set(parts) == PARTS
    assert min(parts.values()) > 0
    assert sum(parts.values()) == pytest.approx(clock.marks[-1][1] - clock.marks[0][1])


def test_the_clock_adds_up_what_comes_twice() -> None:
    clock = Clock(CPU, marks=[("", 1.0), ("a", 1.5), ("b", 3.5), ("a", 3.75)])
    assert clock.seconds() == {"a": 0.75, "b": 2.0}


def test_layers_are_compiled_where_asked_and_only_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: setattr(self, "_compiled_call_impl", "yes"))
    bed = new_bed()

    def compiled() -> list[str]:
        modules = bed.objective.named_modules()
        return [type(m).__name__ for _, m in modules if m._compiled_call_impl is not None]

    monkeypatch.setattr(bed, "_compute_exact", lambda native: None)
    bed.form("stock_compiled")
    layers = 2
    assert sorted(compiled()) == sorted(["SiglipEncoderLayer"] * 2 * layers + ["Qwen2DecoderLayer"] * layers)
    bed.form("stock")
    assert compiled() == []


def test_native_crops_are_cut_by_boxes_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    class Reached(Exception):
        pass

    def patches(pixels: Any, boxes: Any, image_index: Any, grids: Any, patch: Any) -> None:
        assert pixels.device.type == "meta"
        assert {x.device.type for x in (boxes, image_index, grids)} == {"cpu"}
        assert torch.equal(boxes, bed.batch.boxes)
        raise Reached

    bed = new_bed()
    form = bed.form("granvit_native")
    assert isinstance(form, train_step.Ours)
    micro = form.micro.to("meta")  # as a GPU would have it
    monkeypatch.setattr(objective_module, "native_patches", patches)
    with pytest.raises(Reached):
        bed.objective.distill(micro, torch.empty(3, 16, 32, device="meta"), (4, 4))


def test_the_paper_workload_is_the_paper_s() -> None:
    paper = WORKLOADS["paper"]
    with torch.device("meta"):
        llava = train_step.LlavaForConditionalGeneration(train_step.llava_config(paper))
    tower = llava.model.vision_tower
    assert 0.41e9 < sum(p.numel() for p in tower.parameters()) < 0.42e9  # so400m without its head
    assert 1.54e9 < sum(p.numel() for p in llava.model.language_model.parameters()) < 1.55e9
    assert (tower.config.image_size, tower.config.patch_size, tower.config.num_hidden_layers) == (512, 16, 27)
    tokenizer = train_step.byte_tokenizer()
    add_special_tokens(tokenizer)
    scenes = train_step.scenes(paper, 3)
    samples = [train_step._sample(scene, paper.size) for scene in scenes]
    batch = pack(samples, Prompts(tokenizer), 1024, paper.max_length)
    assert not batch.dropped
    assert batch.input_ids.shape[0] == len(scenes) == 8
    assert len(batch.boxes) == 48
    assert len(batch.pairs) == 56


class Benchmark:
    """What the suite uses of pytest-benchmark."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}
        self.rounds = 0

    def pedantic(self, function: Any, rounds: int) -> None:
        for _ in range(rounds):
            function()
        self.rounds = rounds


class LeftOut(Exception):
    pass


def test_measuring_leaves_facts_and_out_of_memory_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    bed, benchmark = new_bed(), Benchmark()
    assert bench_train_step.measure(benchmark, bed, "cpu", "granvit") == ""
    facts = benchmark.extra_info
    assert facts["match"]
    assert (facts["items"], facts["stock"], facts["peak_bytes"]) == (3, False, None)
    assert {name: len(seconds) for name, seconds in facts["parts"].items()} == dict.fromkeys(PARTS, benchmark.rounds)

    def exhausted(self: peers.Plain, done: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB. GPU 0 has a total capacity")

    monkeypatch.setattr(peers.Plain, "losses", exhausted)
    reason = bench_train_step.measure(Benchmark(), bed, "cpu", "plain")
    assert reason == "3 images: CUDA out of memory. Tried to allocate 9.00 GiB"

    def leave_out(reason: str, **case: str) -> None:
        raise LeftOut(reason, case)

    monkeypatch.setattr(bench_train_step, "measure", lambda *a: reason)
    arguments = (Benchmark(), lambda workload: bed, leave_out, "cpu")
    with pytest.raises(LeftOut, match="3 images: CUDA out of memory") as left:
        bench_train_step.test_train_step(*arguments, "plain", 0)
    assert left.value.args[1] == {"workload": "cpu", "provider": "plain"}
    with pytest.raises(pytest.fail.Exception, match="3 images: CUDA out of memory"):  # ours has to fit
        bench_train_step.test_train_step(*arguments, "granvit", 0)


GIB = 1 << 30


def entry(provider: str, seconds: list[float], **changes: Any) -> dict[str, Any]:
    info = {
        "pipeline": "train_step",
        "workload": "paper",
        "provider": provider,
        "stock": not provider.startswith("granvit"),
        "items": 8,
        "unit": "images",
        "match": True,
        "parts": {"student forward": [0.04, 0.02, 0.03], "backward": [0.1]},
        "peak_bytes": 29 * GIB,
        **changes,
    }
    return {"extra_info": info, "stats": {"data": seconds}}


def printed(entries: list[dict[str, Any]], skipped: list[dict[str, str]] | None = None) -> tuple[str, bool]:
    machine = {"device": "NVIDIA H100 80GB HBM3", "torch": "2.14"}
    report = {"benchmarks": entries, "machine_info": {"granvit": machine}, "skipped": skipped or []}
    console = Console(record=True, width=140, file=io.StringIO())
    failed = _bench_pipelines.show(report, console)
    return console.export_text(), failed


def test_the_report_divides_rates_and_gives_verdicts() -> None:
    skip = {"workload": "paper", "provider": "plain", "reason": "8 images: CUDA out of memory"}
    again = {**skip, "reason": "8 images: CUDA out of memory. Tried to allocate another size"}
    text, failed = printed(
        [
            entry("granvit", [0.4]),
            entry("granvit_compiled", [0.2, 0.3]),
            entry("granvit_compiled", [0.25], peak_bytes=31 * GIB),
            entry("granvit_native", [0.25], peak_bytes=27 * GIB),
            entry("stock", [0.5], peak_bytes=36 * GIB),
        ],
        [skip, again],
    )
    assert not failed
    lines = {line.split()[1]: [c.strip() for c in line.split("│")[2:-1]] for line in text.splitlines() if "│" in line}
    first = next(line for line in text.splitlines() if "granvit_compiled" in line)
    # median, lowest and highest of 8 / 0.2, 8 / 0.3 and 8 / 0.25; over 16 a second; the most of both passes
    assert [c.strip() for c in first.split("│")[2:-1]] == ["32.0", "26.7", "40.0", "2.00x", "31.0", "yes"]
    assert lines["stock"] == ["30.0", "100.0"]  # its parts, the median of three
    assert "held   the same mathematics (granvit_compiled): 32.0 images/s, target on an H100 28" in text
    assert "missed the same mathematics (granvit_compiled): 31.0 GiB, target 30" in text
    assert "missed native-resolution teacher crops (granvit_native): 32.0 images/s, target on an H100 40" in text
    assert "held   native-resolution teacher crops (granvit_native): 27.0 GiB, target 28" in text
    assert text.count("skipped plain of paper: 8 images: CUDA out of memory") == 1


def test_no_ratio_and_no_verdict_without_a_match() -> None:
    text, failed = printed([entry("granvit", [0.1], match=False), entry("stock", [0.5])])
    assert failed
    assert "5.00x" not in text
    assert "open   the same mathematics: no form with a green match" in text
    assert "held" not in text
    text, failed = printed([entry("granvit", [0.1]), entry("stock", [0.5], match=False)])
    assert not failed
    assert "5.00x" not in text
    assert "target on an H100" not in printed([entry("granvit", [0.1], workload="cpu")])[0]


def test_the_bars_are_as_long_as_the_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **o: (drawn.append(self), save(self, *a, **o))[1])
    report = {
        "benchmarks": [entry("granvit", [0.1]), entry("stock", [0.5], parts={"backward": [0.4]})],
        "machine_info": {"granvit": {"device": "CPU"}},
    }
    (path,) = _bench_pipelines.plot(report, tmp_path / "run")
    assert path == tmp_path / "run-paper.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    (panel,) = drawn[0].axes
    bars = sorted((round(bar.get_y()), bar.get_x(), bar.get_width()) for bar in panel.patches)
    expected = [(0, 0, 0), (0, 0, 400), (1, 0, 30), (1, 30, 100)]  # stock below, ours on top; ms
    assert len(bars) == len(expected)
    for bar, wanted in zip(bars, expected, strict=True):
        assert bar == pytest.approx(wanted)


def test_the_suite_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench.NEEDED_BY, "train_step", {"transformers_that_are_not_there": "transformers"})
    with pytest.raises(MissingDependencyError, match=r"^bench: transformers not installed; .*granvit\[bench,train\]"):
        bench.require("train_step")
    assert bench.require("cpu").name == "benchmarks"


def test_a_real_run_on_the_cpu(tmp_path: Path) -> None:
    console = Console(record=True, width=140, file=io.StringIO())
    select = "0 and (granvit or stock)"
    status = bench.run("train_step", select=select, device="cpu", output=tmp_path, console=console)
    text = console.export_text()
    assert status == 0, text
    (path,) = tmp_path.glob("*.json")
    run = json.loads(path.read_text())
    found = _bench_steps.forms(run["benchmarks"])
    assert set(found) == {"granvit", "granvit_native", "stock"}
    for form in found.values():
        assert form.match
        assert set(form.parts) == PARTS
    for timed in run["benchmarks"]:  # the parts lie within the step
        for whole, *parts in zip(timed["stats"]["data"], *timed["extra_info"]["parts"].values(), strict=True):
            assert 0 < sum(parts) <= whole
    assert {skip["provider"] for skip in run["skipped"]} == {
        "granvit_compiled",
        "granvit_native_compiled",
        "stock_compiled",
    }
    assert "skipped stock_compiled of cpu: compiled forms run on CUDA" in text
    (drawn,) = tmp_path.glob("*.png")
    assert f"wrote {drawn}" in text.replace("\n", "")
