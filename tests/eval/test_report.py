"""The page about a run: from a run that was trained, evaluated and probed here, read as HTML and in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner

from granvit.cli import app
from granvit.errors import UserError
from granvit.eval.cases import OUTCOMES
from granvit.eval.report import write_report
from granvit.eval.report_charts import Series, chart
from granvit.eval.report_run import parameters, read_run
from granvit.eval.scores import HEADINGS
from granvit.model import checkpoint
from tests.train.support import stage1, stage2, train, tree, write

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on the PATH")
VOID = {"meta", "img", "br", "link", "input", "hr"}


def granvit(*arguments: object) -> None:
    result = CliRunner().invoke(app, [str(x) for x in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run: two stages, evaluations of each, a control with the wrong image, and probes."""
    folder = tmp_path_factory.mktemp("run")
    plain = tree(folder, stage1(steps=3), stage2(steps=2), name='tiny <b> & "co"')
    recipe = write(plain, folder)
    assert train(plain)[0] == 0
    out = folder / "out"
    few = ("--images", 3, "--max-new-tokens", 4, "--prompt", "text")
    for name in ("first", "second"):
        granvit("eval", out / name / "model", "--out", out / "evaluation" / name, *few)
    granvit("eval", out / "second/model", "--out", out / "evaluation/second-wrong", *few, "--wrong-image")
    granvit(
        "probe", recipe, out, "--train", folder / "shards", "--heldout", folder / "heldout",
        "--train-images", 6, "--images", 4, "--out", out / "evaluation",
    )  # fmt: skip
    return out


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return write_report(run).read_text(encoding="utf-8")


class Reader(HTMLParser):
    """Checks that elements are closed as they were opened, and keeps them."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert not reader.open
    return reader


def section(page: str, name: str) -> str:
    found = re.search(rf'<section id="{name}">.*?</section>', page, re.DOTALL)
    assert found is not None, name
    return found[0]


def test_the_page_is_whole_and_asks_nobody(page: str) -> None:
    reader = read(page)
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)
    assert not re.search(r"url\((?!#)", page)
    assert "<script" not in page
    names = [attributes["id"] for _, attributes in reader.found if "id" in attributes]
    assert len(set(names)) == len(names)
    targets = {x["href"][1:] for x in reader.all("a")}
    assert targets == {x["id"] for x in reader.all("section")}
    assert len(targets) == 11
    assert all(re.fullmatch("#.+", x.get("xlink:href") or "#x")[0][1:] in {*names, "x"} for x in reader.all("use"))
    assert "<h1>tiny &lt;b&gt; &amp; &quot;co&quot;</h1>" in page


def test_who_cannot_see_can_read_it(page: str) -> None:
    reader = read(page)
    assert all(x.get("alt") for x in reader.all("img"))
    assert reader.all("img")
    assert all(x.get("aria-label") or x.get("aria-hidden") for x in reader.all("svg"))
    assert all(x.get("scope") in ("row", "col") for x in reader.all("th"))
    assert len(reader.all("caption")) == len(reader.all("table")) >= 8
    levels = [int(tag[1]) for tag, _ in reader.found if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_its_numbers_are_those_of_the_files(run: Path, page: str) -> None:
    report = json.loads((run / "evaluation/second/evaluation.json").read_text())
    control = json.loads((run / "evaluation/second-wrong/evaluation.json").read_text())
    shown = section(page, "metrics")
    for task, metrics in report["metrics"].items():
        for name, heading in HEADINGS.items():
            if name in metrics["all"]:
                row = re.search(
                    rf'<th scope="row">{re.escape(heading)}<small>.*?</tr>', shown[shown.index(task_name(task)) :]
                )
                cells = re.findall(r"<td>(\d\.\d+)", row[0])
                assert len(cells) == 4  # by chance, with the wrong image, after each stage
                assert cells[1] == f"{control['metrics'][task]['all'][name]:.3f}"
                assert cells[3] == f"{metrics['all'][name]:.3f}"
    probed = json.loads((run / "evaluation/probes.json").read_text())
    for tower in probed["towers"]:
        assert f"{tower['probes']['images']['recall_at_1']:.3f}" in section(page, "probes")
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    assert f"{last['heldout/caption']:.3f}" in section(page, "losses")
    assert f"{last['heldout/wrong_image/caption']:+.3f}" in section(page, "losses")
    total = sum(p.numel() for p in checkpoint.load(run / "second/model").model.parameters())
    assert sum(parameters(read_run(run)).values()) == total
    assert "3 steps of 4 images" in section(page, "stages")
    assert "no evaluation before training" in page


def task_name(task: str) -> str:
    return {"bbox_to_caption": "Bbox2Caption", "caption_to_bbox": "Caption2Bbox"}[task]


def test_every_failure_is_counted_once(run: Path, page: str) -> None:
    shown = section(page, "failures")
    tables = re.findall(r"<table>.*?</table>", shown)
    assert len(tables) == 2
    for task, text in zip(("bbox_to_caption", "caption_to_bbox"), tables, strict=True):
        counts = [int(x) for x in re.findall(r"<td>(\d+)<small>", text)]
        assert len(counts) == 2 * len(OUTCOMES[task])
        wanted = json.loads((run / "evaluation/second/evaluation.json").read_text())["metrics"][task]["all"]["count"]
        assert sum(counts[1::2]) == wanted


def test_there_are_pictures_of_cases_curves_and_attention(page: str) -> None:
    assert section(page, "cases").count('<img src="data:image/jpeg') >= 6
    assert 'class="true"' in section(page, "cases")
    assert section(page, "attention").count('<img src="data:image/webp') == 4
    curves = section(page, "curves")
    for title in ("first: loss", "second: loss", "first: distillation by box size", "first: learning rate"):
        assert f"<figcaption>{title}</figcaption>" in curves
    assert "currentColor" in curves
    assert "#010203" not in curves


def test_a_run_that_has_little_to_tell(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "bare", ignore=shutil.ignore_patterns("evaluation", "metrics.jsonl", "model"))
    page = write_report(tmp_path / "bare", tmp_path / "new" / "page.html").read_text()
    read(page)
    for said in ("no metrics.jsonl", "stage first is not finished", "no evaluation after stage second", "no probes"):
        assert said in page
    assert {x["id"] for x in read(page).all("section")} == {"stages", "data", "recipe"}


def test_images_that_are_gone_are_said_to_be(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run/evaluation/second/evaluation.json"
    plain = json.loads(path.read_text())
    plain["config"]["sources"][0]["shards"] = str(tmp_path / "nowhere")
    path.write_text(json.dumps(plain))
    page = write_report(tmp_path / "run", attention=False).read_text()
    assert "the image is not there any more" in section(page, "cases")
    assert 'id="attention"' not in page


def test_what_is_no_run(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected the folder of a run; it has no recipe.yaml"):
        write_report(tmp_path)
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run/evaluation/probes.json").write_text("{")
    with pytest.raises(UserError, match=r"probes\.json: cannot be read"):
        write_report(tmp_path / "run")
    (tmp_path / "run/metrics.jsonl").write_text("no line\n")
    with pytest.raises(UserError, match="is no log of a run"):
        write_report(tmp_path / "run")


def test_a_chart() -> None:
    drawn = chart("x", "a <title>", [Series("one", [(0, 1.0), (5, 300.0)]), Series("none", [])], y="y", log=True)
    assert 'aria-label="a &lt;title&gt;: one from 1 to 300"' in drawn
    assert chart("x", "t", [Series("none", [])], y="y") == ""
    assert drawn == chart("x", "a <title>", [Series("one", [(0, 1.0), (5, 300.0)])], y="y", log=True)


@needs_browser
def test_in_a_browser(page: str, tmp_path: Path) -> None:
    """No message on the console, every picture is one, and no line of a narrow screen is wider than it."""
    assert BROWSER is not None
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    # Chromium's own windows are 500 pixels wide at least.
    outer = """<iframe src="page.html" width="400" height="800" style="border:0"></iframe><script>
    onload = () => { const d = frames[0].document;
      const broken = [...d.images].filter(i => !i.naturalWidth).length;
      const wide = `${d.documentElement.scrollWidth} of ${frames[0].innerWidth}`;
      document.title = `${wide}, ${d.images.length && broken} broken`; };</script>"""
    (tmp_path / "outer.html").write_text(outer)
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    options += ["--disable-component-update", "--disable-sync", "--allow-file-access-from-files", "--hide-scrollbars"]
    options += [f"--user-data-dir={tmp_path / 'browser'}", "--virtual-time-budget=4000", "--enable-logging=stderr"]
    command = [
        BROWSER,
        *options,
        f"--screenshot={tmp_path / 'page.png'}",
        "--dump-dom",
        (tmp_path / "outer.html").as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "<title>400 of 400, 0 broken</title>" in done.stdout
    assert "CONSOLE" not in done.stderr
    assert (tmp_path / "page.png").stat().st_size > 10_000
