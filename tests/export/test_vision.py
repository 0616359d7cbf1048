"""The tower alone, in transformers and in timm: the tokens that the projector read."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

from granvit.export import ExportError
from granvit.export import timm as twin
from granvit.export.run import export
from granvit.model.tower import normalise, prefix_tokens, vision_tokens
from tests.export.support import MEAN, SIZE, STD, TOWERS, saved
from tests.export.test_llava import run_card


@pytest.mark.parametrize("tower", TOWERS)
def test_transformers_and_timm_give_the_same_tokens(tmp_path: Path, tower: str) -> None:
    model = saved(tmp_path / "model", tower).llava.model.vision_tower
    known = not tower.startswith("dinov3")
    folder = export(tmp_path / "model", "vision", timm=known)
    pixels = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        expected = vision_tokens(model, pixels)
        last = model(pixels).last_hidden_state
        found, info = AutoModel.from_pretrained(folder, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert type(found) is type(model)
        made = found.eval()(pixels, output_hidden_states=True)
        assert torch.equal(made.hidden_states[-1][:, prefix_tokens(model) :], expected)
        assert torch.equal(made.last_hidden_state, last)
        if not known:
            return
        theirs = timm.create_model(f"local-dir:{folder / 'timm'}", pretrained=True).eval()
        [tokens] = theirs.forward_intermediates(
            pixels, indices=1, norm=False, output_fmt="NLC", intermediates_only=True
        )
        torch.testing.assert_close(tokens, expected, rtol=1e-5, atol=1e-5)
        if tower != "clip":  # whose last hidden state in transformers is the one before the norm
            torch.testing.assert_close(theirs.forward_features(pixels), last, rtol=1e-5, atol=1e-5)
    assert theirs.pretrained_cfg["input_size"] == (3, SIZE, SIZE)
    assert tuple(theirs.pretrained_cfg["mean"]) == MEAN


def test_the_image_processor_makes_the_pixels_of_training(tmp_path: Path) -> None:
    saved(tmp_path / "model")
    processor = AutoImageProcessor.from_pretrained(export(tmp_path / "model", "vision"))
    image = torch.randint(0, 256, (1, 3, SIZE, SIZE), dtype=torch.uint8)
    found = processor(Image.fromarray(image[0].permute(1, 2, 0).numpy()), return_tensors="pt").pixel_values
    torch.testing.assert_close(found, normalise(image, MEAN, STD, torch.float32), rtol=1e-6, atol=1e-6)


def test_the_code_of_the_card_runs(tmp_path: Path) -> None:
    saved(tmp_path / "model")
    ran = run_card(export(tmp_path / "model", "vision", timm=True))
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == ["torch.Size([1, 9, 16])"] * 2


def changed(tower: str, **values: object) -> object:
    config = copy.deepcopy(TOWERS[tower])
    for name, value in values.items():
        setattr(config, name, value)
    return config


@pytest.mark.parametrize(
    ("tower", "text"),
    [
        (TOWERS["dinov3"], "no twin in timm is known for a tower of type dinov3_vit"),
        (changed("siglip", layer_norm_eps=1e-3), "epsilon of 1e-06, which its config.json cannot change"),
        (changed("siglip", hidden_act="gelu_10"), "timm has no activation 'gelu_10'"),
        (changed("aimv2", mlp_bias=True), "have no bias, which this tower's have"),
    ],
)
def test_what_timm_cannot_hold_is_one_sentence(tmp_path: Path, tower: object, text: str) -> None:
    saved(tmp_path / "model", tower)
    with pytest.raises(ExportError, match=f"^--timm: .*{text}"):
        export(tmp_path / "model", "vision", timm=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_every_width_is_what_timm_makes_of_its_ratio() -> None:
    for width in (16, 192, 384, 768, 1152, 1536):
        for hidden in range(width // 2, 5 * width, 7):
            assert int(width * twin._ratio(hidden, width)) == hidden
