"""Statistics by hand count, and the page as a browser shows it."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from granvit.cli import app
from granvit.data.record import Record, Region
from granvit.data.shards import ShardWriter
from granvit.data.stats import REPORT, collect, render
from granvit.data.view import write_page
from granvit.errors import UserError
from tests.data.support import encoded

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on the PATH")
HOSTILE = '</script><b>bold</b> & <!-- "quoted" 豆'


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    small, large = (
        Region((0.0, 0.0, 0.05, 0.05), "one two three", 0.5, "a"),
        Region((0.0, 0.0, 1.0, 0.5), "", None, "b"),
    )
    with ShardWriter(folder, samples=4) as writer:
        for number in range(6):
            kind = "ocr" if number % 3 == 0 else "natural"
            regions = (small, large) if number < 4 else (small, small, Region((0.1, 0.1, 0.2, 0.2), HOSTILE, 1.0, "a"))
            record = Record(f"n{number}", 64, 48, f"source {number % 2}", kind, "whole" if number else None, regions)
            # Two images are the same file.
            writer.add(record, encoded(color=(40 * min(number, 4), 90, 20)), "jpg")
    return folder


def test_statistics_by_hand(shards: Path) -> None:
    reported: list[int] = []
    stats = collect(shards, reported.append)
    assert reported == [4, 6]
    assert (stats.samples, stats.regions) == (6, 14)
    assert stats.kinds == {"natural": 4, "ocr": 2}
    assert stats.sources == {"source 0": 3, "source 1": 3}
    assert stats.origins == {"a": 10, "b": 4}
    assert stats.sizes == {"small": 8, "medium": 2, "large": 4}
    assert stats.regions_per_image == {2: 4, 3: 2}
    assert stats.caption_words == {2: 8, 5: 2}
    assert (stats.without_caption, stats.with_global_caption) == (4, 5)
    assert (stats.same_image, stats.same_region) == (1, 2)
    assert stats.bytes == sum(path.stat().st_size for path in shards.glob("*.tar"))
    assert json.loads(json.dumps(stats.plain()))["kinds"] == {"natural": 4, "ocr": 2}


def test_drops_that_annotation_counted_are_shown(shards: Path, tmp_path: Path) -> None:
    from rich.console import Console

    for path in shards.iterdir():
        shutil.copy(path, tmp_path)
    (tmp_path / REPORT).write_text('{"dropped": {"short side": 30, "unreadable": 0}, "boxes_dropped": {"area": 12}}')
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(render(collect(tmp_path), tmp_path))
    text = console.export_text()
    assert re.search(r"dropped\s+│ image: short side\s+│\s+30 ", text)
    assert re.search(r"│ box: area\s+│\s+12 ", text)
    assert "unreadable" not in text
    assert re.search(r"images that repeat another\s+│ 1 \(16\.7 %\)", text)


def browse(page: Path, script: str = "") -> str:
    """The document after the page's scripts, and one more, have run."""
    assert BROWSER is not None
    copy = page.with_name("browsed.html")
    copy.write_text(page.read_text().replace("</body>", f"<script>{script}</script></body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    options += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    options += [f"--user-data-dir={page.parent / 'browser'}", "--virtual-time-budget=2000", "--window-size=1200,900"]
    command = [BROWSER, *options, f"--screenshot={page.with_suffix('.png')}", "--dump-dom", copy.as_uri()]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout


def shown(document: str) -> list[str]:
    return re.findall(r'<div class="key" title="[^"]*">(\w+) ', document)


@needs_browser
def test_the_page_in_a_browser(shards: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    counted: list[int] = []
    assert write_page(shards, page, title="a <title>", progress=counted.append) == 6
    assert counted == [1, 2, 3, 4, 5, 6]
    document = browse(page)
    assert sorted(shown(document)) == [f"n{i}" for i in range(6)]
    assert "6 of 6 images, 14 regions" in document
    assert document.count("<rect") == 14
    assert "&lt;/script&gt;&lt;b&gt;bold&lt;/b&gt; &amp; &lt;!--" in document
    assert "<h1>a &lt;title&gt;</h1>" in document
    picture = Image.open(page.with_suffix(".png")).convert("RGB")
    # The pictures are there: of each image's colour there are some hundred pixels.
    for red in (0, 40, 80, 120, 160):
        near = sum(n for n, c in picture.getcolors(1 << 24) if abs(c[0] - red) < 9 and abs(c[1] - 90) < 9 and c[2] < 40)
        assert near > 500, red


@needs_browser
@pytest.mark.parametrize(
    ("script", "keys", "count"),
    [
        ("at('kind').value = 'ocr'; show()", ["n0", "n3"], "2 of 6 images, 4 regions"),
        ("at('source').value = 'source 1'; show()", ["n1", "n3", "n5"], "3 of 6 images, 7 regions"),
        ("at('size').value = 'medium'; show()", ["n4", "n5"], "2 of 6 images, 2 regions"),
        ("at('text').value = 'nowhere'; show()", [], "0 of 6 images, 0 regions"),
        ("at('text').value = 'BOLD'; show()", ["n4", "n5"], "2 of 6 images, 2 regions"),
        (
            "at('size').value = 'large'; at('kind').value = 'natural'; show()",
            ["n1", "n2"],
            "2 of 6 images, 2 regions",
        ),
    ],
)
def test_filters(shards: Path, tmp_path: Path, script: str, keys: list[str], count: str) -> None:
    page = tmp_path / "page.html"
    write_page(shards, page)
    document = browse(page, script)
    assert sorted(shown(document)) == keys
    assert count in document


@pytest.fixture(scope="module")
def licensed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two scenes with drawings over photographs, one without a licence, and one with the longest of words."""
    folder = tmp_path_factory.mktemp("licensed")
    with ShardWriter(folder) as writer:
        for number in range(4):
            meta = {"licence": "CC-BY-SA-4.0", "attribution": ["by <OpenMoji>", "china.jpg by D"]} if number < 2 else {}
            regions = (Region((0.0, 0.0, 0.5, 0.5), "x" * 4096 if number == 3 else "a region", None, "a"),)
            record = Record(f"n{number}", 64, 48, "s", "natural", regions[0].caption, regions, meta)
            writer.add(record, encoded(color=(40 * number, 90, 20)), "jpg")
    return folder


@needs_browser
def test_licence_and_attribution_are_on_the_page(licensed: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    write_page(licensed, page)
    document = browse(page)
    whole = "CC-BY-SA-4.0 · by &lt;OpenMoji&gt; · china.jpg by D"
    assert re.findall(r'<footer id="licences">(.*?)</footer>', document) == [f"<p>2 images: {whole}</p>"]
    cards = re.findall(r"<article>.*?</article>", document)
    assert len(cards) == 4
    assert {card.count(" 48 · CC-BY-SA-4.0</div>") for card in cards if re.search("n[01] ", card)} == {1}
    assert not any("CC-BY-SA" in card for card in cards if re.search("n[23] ", card))
    large = browse(page, "enlarge(samples.find(s => s.key === 'n0'))")
    assert '<div class="key">by &lt;OpenMoji&gt;</div><div class="key">china.jpg by D</div>' in large


def test_the_scenes_say_whose_they_are(tmp_path: Path) -> None:
    code, _ = run("scenes", "--out", str(tmp_path / "s"), "--count", "3", "--kind", "natural", "--size", "128")
    assert code == 0
    write_page(tmp_path / "s", tmp_path / "page.html")
    data = re.search(r'type="application/json">(.*?)</script>', (tmp_path / "page.html").read_text())
    assert data is not None
    for sample in json.loads(data[1]):
        assert sample["licence"] == "CC-BY-SA-4.0"
        assert "All emojis designed by OpenMoji" in sample["attribution"][0]


@needs_browser
def test_the_longest_word_does_not_widen_the_page(licensed: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    write_page(licensed, page)
    script = """
    const boxes = [...document.querySelectorAll("html, .words")];
    document.title = `${boxes.filter(e => e.scrollWidth > e.clientWidth).length} of ${boxes.length} too wide`;
    """
    assert "0 of 5 too wide" in browse(page, script)


@needs_browser
@pytest.mark.parametrize(("width", "height"), [(600, 150), (150, 600), (300, 300)])
def test_what_is_enlarged_fits_the_window(tmp_path: Path, width: int, height: int) -> None:
    with ShardWriter(tmp_path / "s") as writer:
        regions = tuple(Region((0.0, 0.0, 0.5, 0.5), f"region {i}") for i in range(60))
        writer.add(Record("n", width, height, "s", regions=regions), encoded(width, height), "jpg")
    page = tmp_path / "page.html"
    write_page(tmp_path / "s", page)
    script = """
    enlarge(samples[0]);
    const shown = document.querySelector("dialog img").getBoundingClientRect();
    const ratio = (shown.width / shown.height).toFixed(2);
    document.title = `${shown.top >= 0 && shown.bottom <= innerHeight && shown.right <= innerWidth} ${ratio}`;
    """
    assert f"<title>true {width / height:.2f}</title>" in browse(page, script)


KEYS = """
const options = {bubbles: true, cancelable: true};
const press = key => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key, ...options}));
const there = () => document.activeElement.getAttribute("aria-label");
const stops = [...document.querySelectorAll("main [tabindex]")];
const said = [`${stops.length} stops`];
function go() {
  stops[0].focus(); said.push(there().replace(samples[0].key, "first"));
  press("Enter"); said.push(at("large").open, there().replace(samples[0].key, "first"));
  press("ArrowLeft"); said.push(there().replace(samples[0].key, "first"));
  press("ArrowRight"); said.push(there().replace(samples[1].key, "second"));
  at("large").querySelector("li").focus(); said.push(at("large").querySelectorAll("rect.lit").length);
  at("large").querySelector("figure").focus(); said.push(at("large").querySelectorAll("rect.lit").length);
  press(" "); said.push(at("large").open);
  at("large").addEventListener("close", () => {
    said.push(there().replace(samples[1].key, "second"));
    document.title = said.join("; ");
  });
}
// A window hears of no focus inside it before it has it, which on a busy machine may be after this script.
if (document.hasFocus()) go(); else addEventListener("focus", go, {once: true});
"""


@needs_browser
def test_the_keyboard_reaches_everything(shards: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    write_page(shards, page)
    title = re.search("<title>(.*?)</title>", browse(page, KEYS))
    assert title is not None
    assert title[1].split("; ") == [
        *("6 stops", "enlarge first", "true", "close first", "close first", "close second"),
        *("1", "0", "false", "enlarge second"),
    ]


def test_a_page_needs_samples_that_can_be_read(shards: Path, tmp_path: Path) -> None:
    assert write_page(shards, tmp_path / "some.html", count=3) == 3
    with ShardWriter(tmp_path / "empty"):
        pass
    with pytest.raises(UserError, match="empty: holds no samples to look at"):
        write_page(tmp_path / "empty", tmp_path / "none.html")
    with ShardWriter(tmp_path / "broken") as writer:
        writer.add(Record("bad", 4, 4, ""), b"no image", "jpg")
    with pytest.raises(UserError, match="sample bad: "):
        write_page(tmp_path / "broken", tmp_path / "none.html")
    assert not (tmp_path / "none.html").exists()


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["data", *arguments])
    return result.exit_code, result.stdout


def test_commands(shards: Path, tmp_path: Path) -> None:
    code, text = run("stats", str(shards), "--json")
    assert code == 0
    assert json.loads(text) == collect(shards).plain()
    assert "regions an image, from" in run("stats", str(shards))[1]
    page = tmp_path / "sub" / "page.html"
    assert run("view", str(shards), "--out", str(page), "--count", "2") == (0, f"wrote {page}: 2 samples\n")
    assert page.exists()
    assert run("verify", str(shards)) == (0, f"{shards}: all 2 shards are what the index says\n")
