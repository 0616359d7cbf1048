"""The demo from photographs to picture, top to bottom."""

from __future__ import annotations

import copy
import importlib.util
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import Tensor

import granvit
from granvit.demo import compare, measure, photographs, picture, tables
from granvit.errors import MissingDependencyError

if TYPE_CHECKING:
    from granvit.adapters.timm import RegionEncoder

NEEDS = {
    "timm": "timm",
    "torchvision": "torchvision",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "matplotlib": "matplotlib",
    "PIL": "pillow",
}
STAGES = 7


def run(
    out: Path,
    *,
    photos: int = 4,
    image_size: int = 512,
    model: str = "vit_tiny_patch16_224",
    repeats: int = 5,
    seed: int = 0,
    console: Console | None = None,
) -> dict[str, Any]:
    """One self-distillation step and one region pooling, with stock operations and with granvit.

    Shows that losses, gradients and pooled tokens agree, what the region part costs either way, and draws what the
    pooling looks at. Nothing is downloaded, so the ViT has random weights.

    Args:
        out: folder for ``regions.png`` and ``report.json``; made where missing.
        photos: how many of the photographs to use, each with five boxes.
        image_size: side of the model's square input in pixels.
        model: name of a Vision Transformer in timm.
        repeats: runs behind every median.
        seed: of the ViT's weights.
        console: where to print; standard output by default.

    Returns:
        What ``report.json`` holds: every number that was printed.

    Raises:
        MissingDependencyError: an optional dependency is missing.
        AgreementError: granvit and stock PyTorch differ by more than rounding.
        ValueError: an argument out of range.
    """
    check_dependencies()
    if repeats < 1:
        raise ValueError(f"demo: repeats: expected at least 1, got {repeats}")
    console = console or Console()
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    implementations = {op: compare.implementation(op) for op in ("region_distill", "region_attention")}
    with progress(console) as stage:
        stage("Reading photographs")
        regions = photographs.load(photos, image_size)

        stage("Building student and teacher")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            student = build_encoder(model, image_size)
        # GranViT's teacher is a moving average of the student's weights; it starts as a copy.
        teacher = copy.deepcopy(student).requires_grad_(False)
        pixels = to_pixels(regions.images, student.model)

        stage(f"Teacher: {len(regions.labels)} crops")
        start = time.perf_counter()
        target, grid = teacher.crop_features(pixels, regions.boxes, regions.image_index)
        teacher_seconds = time.perf_counter() - start

        stage("Student: the same step, stock and granvit")
        step, tokens = compare.steps(student, pixels, target, regions, grid, repeats)

        stage("Region distillation alone")
        measured = compare.distillation(tokens, target, regions, grid, repeats)

        stage("Region pooling alone")
        vit: Any = student.model
        inputs = compare.PoolingInputs.from_tokens(tokens, regions, grid, vit.blocks[0].attn.num_heads)
        measured += compare.pooling(inputs, regions, grid, repeats)

        stage("Drawing")
        picture.draw(out / "regions.png", regions, inputs.weights(regions, grid))

    report = {
        "granvit": granvit.__version__,
        "torch": torch.__version__,
        "device": measure.describe_cpu(),
        "model": {"name": model, "weights": "random", "seed": seed, "image_size": image_size, "grid": list(grid)},
        "photographs": regions.names,
        "regions": len(regions.labels),
        "implementation": implementations,
        "step": {"teacher_seconds": teacher_seconds, **step},
        "region_part": measured,
        "seconds": time.perf_counter() - started,
        "picture": str(out / "regions.png"),
        "numbers": str(out / "report.json"),
    }
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    tables.show(console, report)
    return report


def check_dependencies() -> None:
    """Raises MissingDependencyError in one sentence where something beyond granvit's own dependencies is missing."""
    missing = [package for module, package in NEEDS.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise MissingDependencyError(f"demo needs {', '.join(missing)}: pip install 'granvit[demo]'")


@contextmanager
def progress(console: Console) -> Iterator[Callable[[str], None]]:
    """Shows stage after stage on a bar; yields the function that begins the next one."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=STAGES)
        begun = 0

        def stage(description: str) -> None:
            nonlocal begun
            bar.update(task, description=description, completed=begun)
            begun += 1

        yield stage


def build_encoder(name: str, image_size: int) -> RegionEncoder:
    """A timm Vision Transformer for square images, without a head, that looks at boxes."""
    import timm

    from granvit.adapters.timm import RegionEncoder

    if not timm.models.is_model_in_modules(name, ("vision_transformer",)):
        raise ValueError(f"demo: model: expected the name of a timm VisionTransformer, got {name!r}")
    vit = timm.create_model(name, img_size=image_size, num_classes=0)
    patch = vit.patch_embed.patch_size[0]
    if image_size % patch:
        raise ValueError(f"demo: image_size: expected a multiple of the patch size {patch}, got {image_size}")
    return RegionEncoder(vit)


def to_pixels(images: list[Any], vit: Any) -> Tensor:
    """Pictures as a batch ``(B, 3, S, S)``, normalised as the model wants it."""
    import timm.data
    from torchvision.transforms.functional import normalize, pil_to_tensor

    config = timm.data.resolve_model_data_config(vit)
    batch = torch.stack([pil_to_tensor(image) for image in images]) / 255
    return normalize(batch, config["mean"], config["std"])
