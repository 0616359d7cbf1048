"""A model on disk: the same bits when it comes back, stock transformers reads it, and nothing by halves."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from granvit.data import images
from granvit.model import checkpoint
from granvit.model.checkpoint import CheckpointError, load, save
from granvit.model.granvit import GranViT
from granvit.model.packing import PackedBatch, pack
from granvit.model.processor import processor_of
from granvit.model.prompts import Prompts, add_special_tokens
from granvit.model.tower import normalise
from tests.model.support import SIZE, N, byte_level, random_sample, stock_pixels, tiny

MEAN, STD = (0.1, 0.25, 0.375), (0.3, 0.2, 0.7)
TOKENS = {"text": "", "box": "<box>", "region": "<region>", "mixed": "<region>"}


@pytest.fixture
def prompts() -> Prompts:
    tokenizer = byte_level()
    add_special_tokens(tokenizer)
    return Prompts(tokenizer)


def made(prompts: Prompts, prompt: str = "text", **options: Any) -> GranViT:
    model = tiny(prompts, prompt, **{"dtype": torch.float32, **options}).eval()
    model.mean, model.std = MEAN, STD
    return model


def batch_of(prompts: Prompts, prompt: str) -> PackedBatch:
    rng = random.Random(int(torch.randint(1 << 40, ())))
    return pack([random_sample(rng, pairs=4, token=TOKENS[prompt]) for _ in range(3)], prompts, N, 400)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.mark.parametrize("text", ["llama", "qwen2"])  # with an output layer of its own, and a tied one
@pytest.mark.parametrize("prompt", ["text", "box", "region", "mixed"])
def test_what_was_saved_comes_back_with_the_same_bits(prompts: Prompts, tmp_path: Path, prompt: str, text: str) -> None:
    model = made(prompts, prompt, text=text)
    batch = batch_of(prompts, prompt)
    save(model, prompts.tokenizer, SIZE, tmp_path / "model")
    found = load(tmp_path / "model")
    assert found.image_size == SIZE
    assert (found.model.prompt, found.model.mean, found.model.std) == (prompt, MEAN, STD)
    ours, theirs = found.model.eval().state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    again = Prompts(found.tokenizer)
    pairs = [("what is <region> in [0.25, 0.5]", "a red kite é")]
    assert again.encode(pairs) == prompts.encode(pairs)
    assert (again.image_id, again.box_id, again.region_id, again.pad_id) == (
        prompts.image_id,
        prompts.box_id,
        prompts.region_id,
        prompts.pad_id,
    )
    with torch.no_grad():
        one, other = found.model(batch), model(batch)
    assert torch.equal(one.token_loss, other.token_loss)
    assert torch.equal(one.tokens, other.tokens)
    save(found.model, found.tokenizer, found.image_size, tmp_path / "again")
    written, rewritten = contents(tmp_path / "model"), contents(tmp_path / "again")
    assert written.keys() == rewritten.keys()
    assert all(rewritten[name] == written[name] for name in ("model.safetensors", "granvit.safetensors"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "model"]


def test_frozen_weights_in_bfloat16_come_back_exact_in_float32(prompts: Prompts, tmp_path: Path) -> None:
    model = made(prompts, "region")
    model.llava.model.language_model.bfloat16()
    model.llava.lm_head.bfloat16()
    save(model, prompts.tokenizer, SIZE, tmp_path / "model")
    found = load(tmp_path / "model").model
    assert {p.dtype for p in found.parameters()} == {torch.float32}
    for name, value in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], value.float()), name


@pytest.mark.parametrize("text", ["llama", "qwen2"])
def test_stock_transformers_gives_the_same_logits(prompts: Prompts, tmp_path: Path, text: str) -> None:
    model = made(prompts, text=text)
    save(model, prompts.tokenizer, SIZE, tmp_path / "model")
    stock, info = LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "model", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    message = [{"role": "user", "content": "<image>\nWhat is in [0.250, 0.500, 0.750, 1.000]?"}]
    shown = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(shown.replace("<image>", "<image>" * N), return_tensors="pt").input_ids
    pixels = stock_pixels(torch.randint(0, 256, (1, 3, SIZE, SIZE), dtype=torch.uint8)).float()
    with torch.no_grad():
        ours = model.llava(input_ids=ids, pixel_values=pixels).logits
        theirs = stock.eval()(input_ids=ids, pixel_values=pixels).logits
        other = stock(input_ids=ids, pixel_values=-pixels).logits
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, other)  # the image is looked at


@pytest.mark.parametrize("text", ["llama", "qwen2"])
def test_stock_transformers_prepares_pictures_as_the_training_did(prompts: Prompts, tmp_path: Path, text: str) -> None:
    model = made(prompts, text=text)
    save(model, prompts.tokenizer, SIZE, tmp_path / "model")
    question = "What is in [0.250, 0.500, 0.750, 1.000]?"
    message = [{"role": "user", "content": f"<image>\n{question}"}]
    pixels = torch.randint(0, 256, (1, 3, SIZE, SIZE), dtype=torch.uint8)
    shown = Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
    for kind in (LlavaProcessor, AutoProcessor):
        processor = kind.from_pretrained(tmp_path / "model")
        assert isinstance(processor, LlavaProcessor)
        rendered = processor.apply_chat_template(message, add_generation_prompt=True)
        inputs = processor(images=shown, text=rendered, return_tensors="pt")
        expected = normalise(pixels, MEAN, STD, torch.float32)
        torch.testing.assert_close(inputs.pixel_values, expected, rtol=1e-6, atol=1e-6)
        [ours] = prompts.encode_questions([question])
        place = ours.index(prompts.image_id)
        assert inputs.input_ids.tolist() == [ours[:place] + [prompts.image_id] * N + ours[place + 1 :]]
        with torch.no_grad():  # which counts image tokens against image features
            assert LlavaForConditionalGeneration.from_pretrained(tmp_path / "model")(**inputs).logits.isfinite().all()
    alone = AutoImageProcessor.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(alone(shown, return_tensors="pt").pixel_values, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["siglip", "clip", "dinov2-registers"])
def test_the_processor_makes_as_many_image_tokens_as_the_tower_makes_features(prompts: Prompts, kind: str) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 24, "patch_size": 8}
    vision: dict[str, Any] = {
        "siglip": {"model_type": "siglip_vision_model", "intermediate_size": 24},
        "clip": {"model_type": "clip_vision_model", "intermediate_size": 24},
        "dinov2-registers": {"model_type": "dinov2_with_registers", "num_register_tokens": 3},
    }[kind]
    language = tiny(prompts).llava.config.text_config
    select = "full" if kind == "siglip" else "default"
    config = LlavaConfig(
        vision_config=sizes | vision, text_config=language, vision_feature_layer=-1,
        vision_feature_select_strategy=select, image_token_index=prompts.image_id,
    )  # fmt: skip
    llava = LlavaForConditionalGeneration(config)
    processor = processor_of(GranViT(llava), prompts.tokenizer, 24)
    shown = Image.fromarray(torch.randint(0, 256, (24, 24, 3), dtype=torch.uint8).numpy())
    inputs = processor(images=shown, text="<image> what", return_tensors="pt")
    features = llava.model.get_image_features(inputs.pixel_values).pooler_output[0]
    assert int((inputs.input_ids == prompts.image_id).sum()) == len(features)


def test_the_processor_keeps_the_aspect_ratio_as_the_training_does(prompts: Prompts) -> None:
    model = made(prompts)
    y, x = torch.meshgrid(torch.arange(16), torch.arange(24), indexing="ij")
    wide = torch.stack([100 + 5 * x, 100 + 8 * y, 200 - 3 * (x + y)], -1).to(torch.uint8)  # smooth: it is scaled twice
    file = BytesIO()
    Image.fromarray(wide.numpy()).save(file, "PNG")
    frame, _ = images.frame(file.getvalue(), (SIZE, SIZE))
    processor = processor_of(model, prompts.tokenizer, SIZE)
    found = processor(images=Image.fromarray(wide.numpy()), text="<image>", return_tensors="pt").pixel_values
    expected = normalise(frame[None], MEAN, STD, torch.float32)
    bars = [*range(4), *range(20, 24)]
    torch.testing.assert_close(found[:, :, bars], expected[:, :, bars], rtol=1e-6, atol=1e-6)  # black, as in training
    levels = (found - expected)[0].abs() * torch.tensor(STD)[:, None, None] * 255
    assert levels.max() < 4


def test_a_folder_that_was_there_is_replaced(prompts: Prompts, tmp_path: Path) -> None:
    first, second = made(prompts, "region"), made(prompts)
    folder = tmp_path / "runs" / "model"
    save(first, prompts.tokenizer, SIZE, folder)
    (folder / "model-00001-of-00009.safetensors").write_bytes(b"of an older model")
    save(second, prompts.tokenizer, SIZE, folder)
    assert not (folder / "model-00001-of-00009.safetensors").exists()
    found = load(folder).model.state_dict()
    assert found.keys() == second.state_dict().keys()
    assert all(torch.equal(value, found[name]) for name, value in second.state_dict().items())
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


# ---- what is no checkpoint ------------------------------------------------------------------------------------------

FILES = ["config.json", "model.safetensors", "tokenizer.json", "granvit.json", "granvit.safetensors"]


@pytest.fixture
def folder(prompts: Prompts, tmp_path: Path) -> Path:
    save(made(prompts, "region"), prompts.tokenizer, SIZE, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("left", ["nothing", "a third", "all but a byte"])
@pytest.mark.parametrize("name", FILES)
def test_a_folder_that_is_not_whole_is_refused(folder: Path, name: str, left: str) -> None:
    load(folder)
    data = (folder / name).read_bytes()
    if left == "nothing":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(data[: len(data) // 3] if left == "a third" else data[:-1])
        if name.endswith(".json") and data.endswith(b"}\n") and left == "all but a byte":
            (folder / name).write_bytes(data[:-2])  # a line break is no loss
    with pytest.raises(CheckpointError, match=f"^{folder}.*: holds no model that granvit wrote: ") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="none: holds no model that granvit wrote"):
        load(tmp_path / "none")


def harmed(folder: Path, file: str, change: Any) -> None:
    path = folder / file
    if path.suffix == ".json":
        plain = json.loads(path.read_text())
        changed = change(plain)
        path.write_text(json.dumps(plain if changed is None else changed))
        return
    weights = safetensors.torch.load_file(path)
    change(weights)
    safetensors.torch.save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("file", "change", "text"),
    [
        ("granvit.json", lambda plain: plain.pop("prompt") and plain, "prompt"),
        ("granvit.json", lambda plain: [1, 2], "list"),
        ("granvit.json", lambda plain: plain.update(prompt="boxes"), "expected one of text, box, region, mixed"),
        ("granvit.safetensors", lambda w: w.pop(next(iter(w))), r"granvit\.safetensors: lacks \['region_prompt\."),
        ("granvit.safetensors", lambda w: w.update(more=torch.ones(1)), r"has unknown \['more'\]"),
        (
            "granvit.safetensors",
            lambda w: w.update({name: value[..., :-1].clone() for name, value in w.items()}),
            "size mismatch",
        ),
        (
            "model.safetensors",
            lambda w: w.pop(next(name for name in w if "encoder.layers.1" in name)),
            r"model\.safetensors: lacks \['model\.vision_tower\.encoder\.layers\.1",
        ),
        ("model.safetensors", lambda w: w.pop(next(name for name in w if "lm_head" in name)), "lacks .'lm_head.weight"),
        ("model.safetensors", lambda w: w.update(more=torch.ones(1)), r"has unknown \['more'\]"),
    ],
)
def test_weights_and_settings_of_another_model_are_refused(folder: Path, file: str, change: Any, text: str) -> None:
    harmed(folder, file, change)
    with pytest.raises(CheckpointError, match=text) as caught:
        load(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- a full disk ----------------------------------------------------------------------------------------------------


def full(*args: Any, **kwargs: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("place", ["save_pretrained", "tokenizer", "heads", "settings", "rename"])
def test_a_full_disk_is_one_sentence_and_leaves_the_old_folder(
    prompts: Prompts, folder: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    before = contents(folder)
    model = made(prompts, "region")
    owner, name = {
        "save_pretrained": (model.llava, "save_pretrained"),
        "tokenizer": (prompts.tokenizer, "save_pretrained"),
        "heads": (checkpoint.safetensors.torch, "save_file"),
        "settings": (Path, "write_text"),
        "rename": (Path, "replace"),
    }[place]
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, full)
        with pytest.raises(CheckpointError, match=f"^{folder}: the disk is full$"):
            save(model, prompts.tokenizer, SIZE, folder)
    assert contents(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    save(model, prompts.tokenizer, SIZE, folder)
    assert contents(folder) != before


LIMITED = """
import resource, signal, sys
from pathlib import Path
from granvit.model.checkpoint import CheckpointError, load, save
old = load(Path(sys.argv[1]))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for limit in map(int, sys.argv[2:]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        save(old.model, old.tokenizer, old.image_size, sys.argv[1])
    except CheckpointError as error:
        print(limit, error)
"""


def test_a_file_that_cannot_grow_is_one_sentence_wherever_that_happens(folder: Path) -> None:
    """The system itself refuses, to each library in its own way."""
    sizes = sorted({path.stat().st_size for path in folder.iterdir()})
    limits = [str(size // 2) for size in sizes] + [str(size - 1) for size in sizes]
    before = contents(folder)
    command = [sys.executable, "-c", LIMITED, str(folder), *limits]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    said = [line.split(" ", 1) for line in ran.stdout.splitlines()]
    assert [limit for limit, _ in said] == limits
    assert all(text.startswith(f"{folder}: ") for _, text in said)
    assert contents(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
