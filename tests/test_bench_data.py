"""The data suite: its readers hand over the same images and boxes, and its report divides what it should."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks import bench_data
from granvit import _bench_pipelines

pytest.importorskip("skimage", reason="the suite's photographs come with scikit-image")


def test_every_reader_hands_over_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_data, "SIDE", 96)
    corpus = bench_data._make(bench_data.Workload(140, 100, 37), tmp_path)
    assert corpus.expected.images == 37
    for name, reader in bench_data.READERS.items():
        seen = bench_data._seen(reader(corpus.shards if name == "granvit" else corpus.folder))
        assert corpus.expected.agrees(seen), name
    fewer = bench_data.Seen(36, corpus.expected.pixels, corpus.expected.boxes)
    moved = bench_data.Seen(37, corpus.expected.pixels, corpus.expected.boxes + 0.1)
    assert not corpus.expected.agrees(fewer)
    assert not corpus.expected.agrees(moved)


def entry(provider: str, seconds: list[float], match: bool = True) -> dict[str, Any]:
    facts = {"pipeline": "data", "workload": "web", "provider": provider, "stock": provider != "granvit"}
    return {"extra_info": {**facts, "items": 100, "unit": "images", "match": match}, "stats": {"data": seconds}}


@pytest.mark.parametrize("match", [True, False])
def test_the_report_divides_rates(match: bool) -> None:
    runs = [entry("granvit", [0.5]), entry("pillow", [2.0]), entry("granvit", [0.4], match), entry("pillow", [1.6])]
    report = {"benchmarks": runs, "machine_info": {"granvit": {"device": "CPU", "torch": "2.14"}}}
    assert _bench_pipelines.is_pipeline(report)
    printed = io.StringIO()
    assert _bench_pipelines.show(report, Console(file=printed, width=120)) is not match
    text = printed.getvalue()
    assert "225" in text  # 100 / 0.5 and 100 / 0.4: their median
    assert ("4.00x" in text) is match  # 225 over (50 + 62.5) / 2; no ratio without a match
