"""Reading region data: an epoch of ours against what people write, on the same images and the same two processes.

Each reader hands the training process batches of letterboxed images of 512 x 512 and the boxes in them, ready for the
device; decoding, resizing and batching happen in its workers. People's code hands over float32 scaled to [-1, 1], ours
bytes, which the model scales: for the comparison of what was read, the scaling is done outside the clock.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from granvit.data.images import frame
from granvit.data.record import Record, Region
from granvit.data.scenes.photographs import PHOTOGRAPHS, package_file
from granvit.data.shards import ShardWriter
from granvit.data.stream import RegionLoader, RegionStream, Sample

SUITE = "data"
SIDE = 512  # of a frame
WORKERS = 2
BATCH = 16
PASSES = 3
REGIONS = 6

Batch = tuple[Tensor, list[Tensor]]


@dataclass(frozen=True)
class Workload:
    """Images of one size.

    Attributes:
        width: in pixels.
        height: likewise.
        images: in an epoch.
    """

    width: int
    height: int
    images: int


WORKLOADS = {
    "coco": Workload(640, 480, 768),
    "web": Workload(1024, 768, 512),
    "photo": Workload(2048, 1536, 256),
    "page": Workload(1654, 2339, 256),
}


def _jpeg(workload: Workload, i: int) -> bytes:
    """A photograph at the workload's size, with as many bits a pixel as cameras leave: enlarging alone leaves fewer."""
    rng = np.random.default_rng(i)
    photograph = PHOTOGRAPHS[i % len(PHOTOGRAPHS)]
    with Image.open(package_file(photograph.package, photograph.file)) as file:
        image = file.convert("RGB").resize((workload.width, workload.height), Image.Resampling.BICUBIC)
    noisy = np.asarray(image, dtype=np.float32) + rng.normal(0, 4, (workload.height, workload.width, 1))
    data = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(data, "JPEG", quality=90)
    return data.getvalue()


@dataclass(frozen=True)
class Corpus:
    """The same images twice: shards, and a folder of images with a JSON file beside each."""

    shards: Path
    folder: Path
    image_bytes: float
    expected: Seen


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Corpus]:
    made: dict[str, Corpus] = {}

    def corpus(name: str) -> Corpus:
        if name not in made:
            made[name] = _make(WORKLOADS[name], tmp_path_factory.mktemp(name))
        return made[name]

    return corpus


def _make(workload: Workload, root: Path) -> Corpus:
    folder, shards = root / "folder", root / "shards"
    folder.mkdir()
    total = 0
    distinct = [_jpeg(workload, i) for i in range(2 * len(PHOTOGRAPHS))]
    with ShardWriter(shards, samples=64) as writer:
        for i in range(workload.images):
            rng = np.random.default_rng(i)
            low = rng.uniform(0, 0.5, (REGIONS, 2))
            boxes = np.concatenate([low, low + rng.uniform(0.05, 0.5, (REGIONS, 2))], axis=1)
            regions = tuple(Region(tuple(box), f"region {j} of {i}") for j, box in enumerate(boxes.tolist()))
            record = Record(f"{i:06d}", workload.width, workload.height, "bench", regions=regions)
            data = distinct[i % len(distinct)]
            total += len(data)
            writer.add(record, data, "jpg")
            (folder / f"{i:06d}.jpg").write_bytes(data)
            (folder / f"{i:06d}.json").write_bytes(record.to_json())
    return Corpus(shards, folder, total / workload.images, _seen(_files(PillowFiles)(folder)))


class _Files(Dataset[tuple[Tensor, Tensor]]):
    """What a tutorial writes: a file and its JSON for every index."""

    def __init__(self, folder: Path) -> None:
        self.images = sorted(folder.glob("*.jpg"))

    def __len__(self) -> int:
        return len(self.images)

    def boxes(self, i: int, scale: tuple[float, float], offset: tuple[float, float]) -> Tensor:
        plain = json.loads(self.images[i].with_suffix(".json").read_text())
        boxes = torch.tensor([region["box"] for region in plain["regions"]])
        return boxes * torch.tensor(scale * 2) + torch.tensor(offset * 2)


def _letterbox(width: int, height: int) -> tuple[int, int, int, int]:
    """Width and height inside the frame, and where they begin."""
    zoom = min(SIDE / width, SIDE / height)
    inner = max(1, round(width * zoom)), max(1, round(height * zoom))
    return (*inner, (SIDE - inner[0]) // 2, (SIDE - inner[1]) // 2)


class PillowFiles(_Files):
    """Pillow for decoding and resizing, torchvision's usual pair of transforms behind it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        from torchvision import transforms

        self.to_tensor = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)])

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        with Image.open(self.images[i]) as file:
            image = file.convert("RGB")
        width, height, left, top = _letterbox(*image.size)
        canvas = Image.new("RGB", (SIDE, SIDE))
        canvas.paste(image.resize((width, height), Image.Resampling.BICUBIC), (left, top))
        return self.to_tensor(canvas), self.boxes(i, (width / SIDE, height / SIDE), (left / SIDE, top / SIDE))


class TorchvisionFiles(_Files):
    """Tensors from the decoder on, which is torchvision's advice for speed."""

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        from torchvision.io import ImageReadMode, decode_jpeg, read_file
        from torchvision.transforms.v2 import functional

        image = decode_jpeg(read_file(str(self.images[i])), ImageReadMode.RGB)
        width, height, left, top = _letterbox(image.shape[2], image.shape[1])
        small = functional.resize(image, [height, width], functional.InterpolationMode.BICUBIC, antialias=True)
        canvas = functional.pad(small, [left, top, SIDE - width - left, SIDE - height - top])
        pixels = functional.normalize(functional.to_dtype(canvas, torch.float32, scale=True), [0.5] * 3, [0.5] * 3)
        return pixels, self.boxes(i, (width / SIDE, height / SIDE), (left / SIDE, top / SIDE))


def _collate(samples: Sequence[tuple[Tensor, Tensor]]) -> Batch:
    return default_collate([pixels for pixels, _ in samples]), [boxes for _, boxes in samples]


def _prepare(sample: Sample) -> tuple[Tensor, Tensor]:
    pixels, transform = frame(sample.image, (SIDE, SIDE))
    return pixels, transform.boxes(torch.tensor([region.box for region in sample.record.regions]))


def _granvit(shards: Path) -> Iterator[Batch]:
    loader = RegionLoader(RegionStream(shards, BATCH, prepare=_prepare, collate=_collate), WORKERS)
    return (batch.samples for batch in loader)


def _files(kind: type[_Files]) -> Callable[[Path], Iterator[Batch]]:
    def read(folder: Path) -> Iterator[Batch]:
        return iter(DataLoader(kind(folder), BATCH, shuffle=True, num_workers=WORKERS, collate_fn=_collate))

    return read


READERS = {"granvit": _granvit, "pillow": _files(PillowFiles), "torchvision": _files(TorchvisionFiles)}


@dataclass(frozen=True)
class Seen:
    """What an epoch held, whatever its order: all images, all pixels and all boxes, each where it belongs."""

    images: int
    pixels: float
    boxes: float

    def agrees(self, other: Seen) -> bool:
        return (
            self.images == other.images
            and math.isclose(self.boxes, other.boxes, rel_tol=1e-5)
            and math.isclose(self.pixels, other.pixels, abs_tol=1e-3 * self.images)  # one eighth of a step of 255
        )


def _seen(batches: Iterator[Batch]) -> Seen:
    images, total, places = 0, 0.0, 0.0
    for pixels, boxes in batches:
        assert pixels.shape[1:] == (3, SIDE, SIDE)
        images += len(pixels)
        scaled = pixels.float() * (2 / 255) - 1 if pixels.dtype == torch.uint8 else pixels
        total += float(scaled.mean()) * len(pixels)
        places += float(torch.cat(boxes).double().sum())
    return Seen(images, total, places)


def _drain(batches: Iterator[Batch]) -> int:
    return sum(len(pixels) for pixels, _ in batches)


@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize("turn", range(PASSES))  # readers take turns, so that a drifting machine meets them all alike
@pytest.mark.parametrize("reader", READERS)
def test_data(benchmark: Any, corpora: Callable[[str], Corpus], workload: str, reader: str, turn: int) -> None:
    corpus = corpora(workload)
    folder = corpus.shards if reader == "granvit" else corpus.folder
    match = corpus.expected.agrees(_seen(READERS[reader](folder)))  # and the files are in memory for every reader
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two workers on two cores: more threads would only wait for each other
    try:
        images = benchmark.pedantic(lambda: _drain(READERS[reader](folder)), rounds=1)
    finally:
        torch.set_num_threads(threads)
    benchmark.extra_info.update(
        pipeline=SUITE,
        workload=workload,
        provider=reader,
        stock=reader != "granvit",
        items=images,
        unit="images",
        match=match,
        facts={"mean image bytes": corpus.image_bytes},
    )
    assert match
