"""The demo at a small size: what it claims, what it writes, and how it fails."""

import io
import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import granvit
from granvit import reference

for needed in ("timm", "torchvision", "skimage", "sklearn", "matplotlib", "PIL"):
    pytest.importorskip(needed)

from PIL import Image  # noqa: E402
from torchvision.transforms.functional import pil_to_tensor  # noqa: E402

from granvit.adapters.timm import RegionEncoder  # noqa: E402
from granvit.demo import AgreementError, compare, measure, photographs, picture, recipe, run, stock  # noqa: E402

SMALL: dict[str, Any] = {"photos": 2, "image_size": 64, "repeats": 1}


def quiet() -> Console:
    return Console(file=io.StringIO(), width=100)


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    out = tmp_path_factory.mktemp("demo") / "made" / "by it"
    console = quiet()

    def refuse(*args: object) -> None:
        raise AssertionError("the demo reached for the network")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        report = run(out, console=console, **SMALL)
    return out, report, console.file.getvalue()


def test_report_file_holds_what_was_returned(small_run: Any) -> None:
    out, report, _ = small_run
    assert json.loads((out / "report.json").read_text()) == report
    assert report["photographs"] == ["astronaut", "coffee"]
    assert report["regions"] == 10
    assert report["model"]["grid"] == [4, 4]


def test_numbers_agree(small_run: Any) -> None:
    _, report, _ = small_run
    step = report["step"]
    assert step["loss"]["granvit"] == pytest.approx(step["loss"]["stock"], rel=1e-5)
    assert step["loss"]["stock"] > 0.01, "a loss of nothing proves nothing"
    assert step["parameters"] > 100, "the gradient has to reach the whole ViT"
    assert max(step["loss_difference"], step["worst_gradient_difference"]) <= step["limit"]
    assert [(row["op"], row["dtype"]) for row in report["region_part"]] == [
        ("region_distill", "float32"),
        ("region_distill", "bfloat16"),
        ("region_attention", "float32"),
        ("region_attention", "bfloat16"),
    ]
    for row in report["region_part"]:
        assert row["error"]["granvit"] <= row["limit"] < 0.2


def test_printed_text(small_run: Any) -> None:
    out, report, text = small_run
    assert "random weights" in text
    assert f"{report['step']['loss']['granvit']:.6f}" in text
    assert str(out / "regions.png") in text.replace("\n", "")
    assert ("ms" in text) == any("seconds" in row for row in report["region_part"])


def test_picture_is_not_blank(small_run: Any) -> None:
    out, _, _ = small_run
    pixels = torch.frombuffer(bytearray(Image.open(out / "regions.png").convert("RGB").tobytes()), dtype=torch.uint8)
    pixels = pixels.view(-1, 3).int()
    assert pixels.float().std() > 40
    for colour in picture.COLOURS:
        rgb = torch.tensor([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
        assert ((pixels - rgb).abs().amax(1) <= 3).sum() > 500, f"boxes in {colour} are not seen"


def test_same_seed_same_loss_and_global_generator_untouched(small_run: Any, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    again = run(tmp_path, console=quiet(), **SMALL)
    assert torch.equal(torch.get_rng_state(), before)
    assert again["step"]["loss"]["granvit"] == small_run[1]["step"]["loss"]["granvit"]


def test_a_wrong_gradient_of_the_step_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = RegionEncoder.distill_loss

    def wrong(self: RegionEncoder, images: torch.Tensor, *args: Any) -> torch.Tensor:
        loss = right(self, images, *args)
        return loss.detach() + 1.001 * (loss - loss.detach())  # the value is right

    monkeypatch.setattr(RegionEncoder, "distill_loss", wrong)
    with pytest.raises(AgreementError, match=r"demo: gradient of the ViT's \S+: granvit is off by 1\.0e-03"):
        run(tmp_path, console=quiet(), **SMALL)


@pytest.mark.parametrize("op", ["region_distill_loss", "region_attention"])
def test_a_wrong_op_is_found(op: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(compare, op)
    monkeypatch.setattr(compare, op, lambda *args, **kwargs: 1.0001 * right(*args, **kwargs))
    with pytest.raises(AgreementError, match=op.removesuffix("_loss") + " in float32"):
        run(tmp_path, console=quiet(), **SMALL)
    assert not (tmp_path / "report.json").exists()


def test_without_kernels_it_says_so_and_claims_no_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(granvit.ops._dispatch, "DEFAULT_IMPL", "reference")
    console = quiet()
    report = run(tmp_path, console=console, **SMALL)
    text = console.file.getvalue()
    assert set(report["implementation"].values()) == {"reference"}
    assert "no speed is claimed" in " ".join(text.split())
    assert "faster" not in text
    assert not any("seconds" in row for row in [report["step"], *report["region_part"]])


def test_missing_dependency(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = recipe.importlib.util.find_spec
    monkeypatch.setattr(
        recipe.importlib.util, "find_spec", lambda name: None if name in ("timm", "skimage") else found(name)
    )
    with pytest.raises(ImportError, match=r"needs timm, scikit-image: pip install 'granvit\[demo\]'"):
        run(tmp_path, console=quiet())


def test_import_loads_no_optional_dependency() -> None:
    program = (
        "import sys, granvit.demo;"
        "print(*{'timm', 'torchvision', 'matplotlib', 'skimage', 'sklearn'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"photos": 0}, "demo: photos: expected 1 to 6, got 0"),
        ({"photos": 7}, "demo: photos: expected 1 to 6, got 7"),
        ({"repeats": 0}, "demo: repeats: expected at least 1, got 0"),
        ({"image_size": 65}, "demo: image_size: expected a multiple of the patch size 16, got 65"),
        ({"model": "resnet18"}, "demo: model: expected the name of a timm VisionTransformer, got 'resnet18'"),
        ({"model": "vit_of_dreams"}, "demo: model: expected the name of a timm VisionTransformer, got 'vit_of_"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        run(tmp_path, console=quiet(), **{**SMALL, **change})
    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize("photograph", photographs.PHOTOGRAPHS, ids=lambda p: p.name)
def test_boxes_lie_in_their_photograph(photograph: photographs.Photograph) -> None:
    assert photograph.path().is_file()
    assert len(photograph.boxes) == photographs.BOXES_PER_PHOTOGRAPH
    for x0, y0, x1, y1 in photograph.boxes.values():
        assert 0 <= x0 < x1 <= 1
        assert 0 <= y0 < y1 <= 1


@pytest.mark.parametrize("size", [64, 224])
def test_regions_lie_within_the_fitted_photographs(size: int) -> None:
    regions = photographs.load(len(photographs.PHOTOGRAPHS), size)
    frames = torch.tensor(regions.sizes)[regions.image_index] / size
    assert len(regions.labels) == len(regions.boxes) == len(regions.image_index)
    assert (regions.boxes >= 0).all()
    assert (regions.boxes[:, 2:] <= frames + 1e-6).all()
    assert all(image.size == (size, size) for image in regions.images)
    assert all(max(frame) == size for frame in regions.sizes)


def test_boxes_move_with_the_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A black photograph that is red under the box: what is under the moved box has to be red, and nothing else.
    package = tmp_path / "painted_photographs"
    package.mkdir()
    (package / "__init__.py").touch()
    painted = Image.new("RGB", (400, 200))
    painted.paste((255, 0, 0), (100, 50, 300, 100))
    painted.save(package / "red.png")
    monkeypatch.syspath_prepend(tmp_path)
    box = (0.25, 0.25, 0.75, 0.5)
    photograph = photographs.Photograph("red", package.name, "red.png", {str(i): box for i in range(5)})
    monkeypatch.setattr(photographs, "PHOTOGRAPHS", (photograph,))
    regions = photographs.load(1, 128)
    x0, y0, x1, y1 = (regions.boxes[0] * 128).round().int().tolist()
    red, green, _ = pil_to_tensor(regions.images[0]).int()
    expected = torch.zeros(128, 128, dtype=torch.bool)
    expected[y0:y1, x0:x1] = True
    assert torch.equal((red > 128) & (green < 64), expected)


def test_missing_photograph() -> None:
    with pytest.raises(FileNotFoundError, match=r"demo: this version of torch ships no no-such-file\.png"):
        photographs.Photograph("none", "torch", "no-such-file.png", {}).path()
    with pytest.raises(ImportError, match="demo: the photograph none is part of no_such_package"):
        photographs.Photograph("none", "no_such_package", "a.png", {}).path()


def ragged_regions(count: int) -> torch.Tensor:
    corners = torch.rand(count, 2, 2).sort(1).values
    return corners.flatten(1)


@pytest.mark.parametrize("queries", [1, 3])
def test_stock_pooling_is_the_specification(queries: int) -> None:
    boxes, index = ragged_regions(6), torch.arange(2).repeat_interleave(3)
    query = torch.randn(6, queries, 2, 8, dtype=torch.float64)
    key, value = torch.randn(2, 2, 5 * 7, 2, 8, dtype=torch.float64)
    expected = reference.region_attention(query, key, value, boxes, index, (5, 7), scale=0.7)
    torch.testing.assert_close(stock.attention_pool(query, key, value, boxes, (5, 7), 0.7), expected)


def test_stock_loss_is_the_specification() -> None:
    boxes, index = ragged_regions(6), torch.tensor([1, 0, 0, 1, 1, 0])
    student, teacher = torch.randn(2, 35, 8, dtype=torch.float64), torch.randn(6, 35, 8, dtype=torch.float64)
    expected = reference.region_distill_loss(student, teacher, boxes, index, (5, 7), (5, 7))
    torch.testing.assert_close(stock.distill_loss(student, teacher, boxes, index, (5, 7)), expected)


def test_the_picture_shows_the_weights_of_the_op() -> None:
    boxes, index = ragged_regions(4), torch.tensor([0, 0, 1, 1])
    query = torch.randn(4, 1, 2, 8)
    key, value = torch.randn(2, 2, 6 * 6, 2, 8)
    pooled = granvit.ops.region_attention(query, key, value, boxes, index, (6, 6), scale=2.0)
    for region, image in enumerate(index.tolist()):
        weights = picture.attention_weights(query[region], key[image], boxes[region], (6, 6), 2.0)
        expected = torch.einsum("qhn,nhd->qhd", weights.flatten(2), value[image])
        torch.testing.assert_close(pooled[region], expected)


def test_relative_difference() -> None:
    three, four = torch.tensor([3.0, 0.0]), torch.tensor([3.0, 4.0])
    assert measure.relative_difference(three, four) == pytest.approx(4 / 5)
    assert measure.relative_difference(torch.zeros(2), torch.zeros(2)) == 0
    assert measure.relative_difference(four, torch.zeros(2)) == float("inf")
    for bad in (float("nan"), float("inf")):
        with pytest.raises(AgreementError, match="something"):
            measure.check_agreement("something", measure.relative_difference(four * bad, four), 1e9)


def test_peak_memory_sees_what_is_gone_again() -> None:
    def fill() -> None:
        torch.ones(32 * 2**18).add_(1)

    grown = measure.peak_memory(fill)
    if grown is None:
        pytest.skip("this system does not tell a process its peak")
    assert grown == pytest.approx(32, abs=4)


def test_median_times_takes_turns() -> None:
    order: list[str] = []
    times = measure.median_times({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
    assert order == ["a", "b"] * 3
    assert all(seconds >= 0 for seconds in times.values())
