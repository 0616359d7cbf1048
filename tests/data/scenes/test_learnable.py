"""What scenes teach holds on other photographs: a small network names objects that it is shown by their boxes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor

from granvit.data.scenes import SceneComposer, material

NAMES = [pictogram.name for pictogram in material("train").pictograms[20:740:45]]


def crops(seed: int, split: str, scenes: int) -> tuple[Tensor, Tensor]:
    """Every region of the scenes at 32 x 32 pixels, and its class."""
    composer = SceneComposer(seed, split, size=160, kind="natural", names=NAMES)
    classes = {pictogram.code: NAMES.index(pictogram.name) for pictogram in material(split).pictograms
               if pictogram.name in NAMES}  # fmt: skip
    images, labels = [], []
    for index in range(scenes):
        record, image = composer[index]
        for region, code in zip(record.regions, record.meta["pictograms"], strict=True):
            box = tuple(160 * x for x in region.box)
            images.append(pil_to_tensor(image.resize((32, 32), box=box)))
            labels.append(classes[code])
    return torch.stack(images).float() / 127.5 - 1, torch.tensor(labels)


def test_a_small_network_names_objects_over_photographs_that_it_never_saw() -> None:
    assert len(NAMES) == 16
    images, labels = crops(1, "train", 350)
    unseen, truth = crops(2, "heldout", 100)
    layers: list[nn.Module] = []
    for a, b in ((3, 24), (24, 48), (48, 96)):
        layers += [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)]
    network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(96 * 16, 16))
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    for _ in range(5):
        for rows in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images[rows]), labels[rows]).backward()
            optimizer.step()
    network.eval()
    with torch.no_grad():
        right = (network(unseen).argmax(1) == truth).float().mean().item()
    # The classes are about equally frequent: chance is a sixteenth.
    assert truth.bincount(minlength=16).max() < 0.15 * len(truth)
    print(f"right: {right:.3f} of {len(truth)} unseen regions")
    assert right > 0.9
