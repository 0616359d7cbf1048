"""Plans: what is counted on fake tensors is what a real step takes."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedTokenizerFast

from granvit.data.record import Record
from granvit.data.shards import ShardWriter
from granvit.errors import UserError
from granvit.model.assemble import assemble, freeze
from granvit.recipe import Data, DataSource, Distillation, Model, Recipe, Scenes, Source, Stage, load
from granvit.train.devices import DEVICES, Device, measured_cpu
from granvit.train.plan import Plan, StagePlan, layout, plan, render

CPU = Device("a processor", "cpu", 1e12, None, 0.5)
RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    words = {f"word{i}": i for i in range(500)} | {"<unk>": 500, "<end>": 501}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", eos_token="<end>").save_pretrained(folder)
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "patch_size": 16,
    }
    text = {
        "model_type": "llama",
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 500,
    }
    return Model(Source(config=vision), Source(config=text, tokenizer=str(folder)), image_size=96)


def recipe(model: Model, *stages: Stage, **data: Any) -> Recipe:
    sources = (DataSource(scenes=Scenes(100)),)
    return Recipe("tiny", "out", model, Data(**{"train": sources, "max_length": 600, **data}), stages)


def stage(*train: Any, **more: Any) -> Stage:
    settings = {"tasks": {"global_caption": 1.0, "bbox_to_caption": 3.0}, "regions": 3, "steps": 5, "batch_size": 4}
    return Stage("one", train, **{**settings, **more})


def one(model: Model, stage: Stage, device: Device = CPU, **data: Any) -> StagePlan:
    return plan(recipe(model, stage, **data), device).stages[0]


def real_step(model: Model, planned: StagePlan, train: tuple[str, ...]) -> tuple[int, int, int, dict[str, float]]:
    """A step of stock LLaVA with real numbers: FLOPs ahead and back, bytes that are kept, bytes of state."""
    llava = assemble(model).llava
    shapes = planned.layout
    freeze(llava, train, frozen_dtype=getattr(torch, model.dtype))
    ids = torch.randint(0, 400, (shapes.rows * shapes.length,))
    ids[: shapes.frames * llava.config.image_seq_length] = llava.config.image_token_id
    inputs = {
        "input_ids": ids.view(shapes.rows, shapes.length),
        "pixel_values": torch.randn(shapes.frames, 3, model.image_size, model.image_size),
        "attention_mask": torch.ones(shapes.rows, 1, shapes.length, shapes.length, dtype=torch.bool).tril(),
        "logits_to_keep": shapes.supervised // shapes.rows,
        "use_cache": False,
    }
    compute = torch.autocast("cpu", getattr(torch, model.dtype), enabled=model.dtype != "float32")
    own = {p.untyped_storage().data_ptr() for p in llava.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), compute:
        graph = llava(**inputs).logits
    del graph
    with sdpa_kernel(SDPBackend.MATH):  # of the CPU's attention kernels the counter knows only this one
        with FlopCounterMode(display=False) as ahead, compute:
            logits = llava(**inputs).logits
        with FlopCounterMode(display=False) as back:
            logits.float().sum().backward()
    optimizer = torch.optim.AdamW([p for p in llava.parameters() if p.requires_grad])
    optimizer.step()
    state = {
        "weights": sum(p.nbytes for p in llava.parameters()),
        "gradients": sum(p.grad.nbytes for p in llava.parameters() if p.grad is not None),
        "optimizer": sum(x.nbytes for s in optimizer.state.values() for x in s.values() if x.ndim),
    }
    return ahead.get_total_flops(), back.get_total_flops(), sum(kept.values()), state


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "train", [("vision", "projector"), ("projector", "language"), ("vision", "projector", "language")]
)
def test_a_real_step_takes_what_was_planned(train: tuple[str, ...], dtype: Any, model: Model) -> None:
    model = replace(model, dtype=dtype)
    planned = one(model, stage(*train, batch_size=random.choice([3, 4, 6])))
    forward, backward, kept, state = real_step(model, planned, train)
    assert planned.forward == pytest.approx(forward, rel=0.1)
    # A fused attention kernel computes the scores again in its backward pass; the plain one keeps them.
    again = 2 * planned.layout.rows * planned.layout.length**2 * 128 * 3
    if "vision" in train:
        again += 2 * planned.layout.frames * 36**2 * 96 * 3
    assert planned.backward == pytest.approx(backward + again, rel=0.1)
    assert planned.kept == pytest.approx(kept, rel=0.1)
    assert {name: planned.memory[name] for name in state} == state
    assert sum(planned.trained.values()) * 4 == state["gradients"]


@pytest.mark.parametrize("prompt", ["text", "box", "region", "mixed"])
def test_parameters_are_exact(prompt: Any, model: Model) -> None:
    model = replace(model, prompt=prompt)
    parts = ("vision", "projector") if prompt == "text" else ("vision", "projector", "prompts")
    planned = one(model, stage(*parts, prompt=prompt))
    llava = assemble(model).llava
    freeze(llava, ("vision", "projector"))
    trained = sum(p.numel() for p in llava.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in llava.parameters() if not p.requires_grad)
    assert sum(planned.trained.values()) - planned.trained["prompts"] == trained
    assert sum(planned.frozen.values()) == frozen
    assert bool(planned.trained["prompts"]) == (prompt != "text")


def test_each_choice_costs_what_it_should(model: Model) -> None:
    plain = one(model, stage("vision", "projector"))
    assert plain.teacher == plain.memory["teacher"] == 0
    resized, native = (
        one(model, stage("vision", "projector", distillation=Distillation(crops=crops)))
        for crops in ("resize", "native")
    )
    contrastive = one(replace(model, prompt="region"), stage("vision", objective="contrastive", tasks={}))
    assert resized.teacher == pytest.approx(3 * contrastive.forward, rel=0.1)  # three regions an image, each a frame
    assert native.teacher < resized.teacher
    assert resized.memory["teacher"] == 4 * (plain.trained["vision"] + plain.frozen["vision"])
    assert (resized.forward, resized.backward) == (plain.forward, plain.backward)
    saving = one(model, stage("vision", "projector", gradient_checkpointing=True))
    assert saving.memory["activations"] == plain.checkpointed < plain.kept
    assert saving.backward == pytest.approx(plain.backward + plain.forward)
    small = one(model, stage("vision", "projector", micro_batch=2))
    assert small.memory["activations"] < plain.memory["activations"]
    assert small.forward == pytest.approx(plain.forward, rel=0.2)
    flex = one(replace(model, attention="flex_attention"), stage("vision", "projector"))
    assert flex.forward < plain.forward
    assert plain.seconds == pytest.approx((plain.forward + plain.backward) / 0.5e12)


def test_freezing_a_real_tower_saves_its_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    overrides = ["stages.0.steps=1", "stages.0.epochs=null", "stages.0.gradient_checkpointing=false"]
    frozen = load(RECIPES / "stage2.yaml", overrides)
    trained = load(RECIPES / "stage2.yaml", [*overrides, "stages.0.train=[vision, projector, language]"])
    with_tower, without = (plan(x, DEVICES["h100"]).stages[0] for x in (trained, frozen))
    tokens = 256 * 1024
    matmuls = 2 * 2 * tokens * without.frozen["vision"]
    attention = 5 * 2 * tokens * 1024 * 1152 * 27  # five products, in a kernel that computes the scores again
    # And the projector passes a gradient on.
    assert with_tower.backward - without.backward == pytest.approx(matmuls + attention, rel=0.02)
    assert with_tower.forward == without.forward


def test_layout_and_density_of_packed_pairs(model: Model) -> None:
    shapes = layout(recipe(model, stage("vision")).data, stage("vision"), images=5, tokens=36)
    assert shapes.pairs[:3] == ((60.0, 12.0),) * 3  # three regions
    assert shapes.pairs[3] == (20.0, 80.0)  # asked in every image: 1 to 3 is once in three regions
    assert shapes.prefix == 36 + 25
    alone = 61 + 3 * 72 + 100
    assert (shapes.rows, shapes.length) == (5, alone)  # two do not share a row of 600
    assert shapes.supervised == 5 * (3 * 12 + 80)
    wide = layout(recipe(model, stage("vision"), max_length=800).data, stage("vision"), images=5, tokens=36)
    assert (wide.rows, wide.length) == (3, 2 * alone)
    owner = torch.tensor([0] * 61 + [1] * 72 + [2] * 72 + [3] * 72 + [4] * 100)
    image = torch.ones(alone, alone).tril() * ((owner[:, None] == owner) | (owner == 0))
    assert wide.density == pytest.approx(float(5 * image.sum() / (3 * (2 * alone) ** 2)), rel=0.02)


def test_text_without_room_is_dropped_and_said(model: Model) -> None:
    tight = recipe(model, stage("vision"), max_length=219)  # of 377
    shapes = layout(tight.data, stage("vision"), images=2, tokens=36)
    assert (shapes.rows, shapes.length) == (2, 219)
    assert shapes.dropped == pytest.approx(0.5)
    assert "about 50% of the text does not fit" in render(plan(tight, CPU))
    assert layout(recipe(model, stage("vision")).data, stage("vision"), 2, 36).dropped == 0


def test_layout_of_conversations_and_tiles(model: Model) -> None:
    data = Data(train=(DataSource(llava="a.json", images="b"),), max_length=8192, tiles=4)
    shapes = layout(data, stage("language", tasks={"chat": 1.0}), images=2, tokens=36)
    assert shapes.frames == 10
    assert shapes.pairs == ((180.0, 250.0),)
    assert shapes.prefix == 5 * 36 + 25
    chat = stage("language", tasks={"chat": 1.0})
    assert layout(replace(data, tiles=1), chat, 2, 36).frames == 2  # a single tile is the overview
    scenes = replace(data, train=(DataSource(scenes=Scenes(9)),))
    assert layout(scenes, stage("vision"), 2, 36).frames == 2  # composed at the size of a frame
    tiled = plan(recipe(model, chat, train=data.train, tiles=4), CPU)
    assert tiled.stages[0].image_tokens == 4 * 5 * 36
    assert "Every image is counted with 5 frames" in render(tiled)
    assert "frames, itself" not in render(plan(recipe(model, chat, train=data.train), CPU))


def test_steps_follow_from_the_data(model: Model, tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        for i in range(3):
            writer.add(Record(f"key{i}", 8, 8, "here"), b"bytes", "jpg")
    assert json.loads((tmp_path / "index.json").read_text())
    epochs = stage("vision", steps=None, epochs=2.0)
    assert one(model, epochs).steps == 50
    sources = (DataSource(scenes=Scenes(100)), DataSource(shards=str(tmp_path)))
    assert one(model, epochs, train=sources).steps == 52  # 206 images in fours
    assert one(model, epochs, train=(DataSource(shards=str(tmp_path / "none")),)).steps is None
    said = [{"conversations": []}] * 10
    (tmp_path / "chat.json").write_text(json.dumps(said))
    chats = stage("vision", tasks={"chat": 1.0}, steps=None, epochs=2.0)
    for name, steps in (("chat.json", 5), ("none.json", None)):
        source = DataSource(llava=str(tmp_path / name), images=str(tmp_path))
        assert one(model, chats, train=(source,)).steps == steps


def test_text_of_a_plan(model: Model) -> None:
    planned = plan(recipe(model, stage("vision", "projector"), replace(stage("language"), name="two")), DEVICES["h100"])
    text = render(planned)
    for expected in (
        "tiny: one",
        "tiny: two",
        "vision",
        "a step",
        "(fits)",
        "H100",
        "written in the recipe",
        "assumed",
    ):
        assert expected in text
    warm = stage("vision", objective="contrastive", tasks={})
    assert "the language model does not run" in render(plan(recipe(replace(model, prompt="region"), warm), CPU))
    small = replace(planned.device, memory=1e6)
    assert "does not fit" in render(Plan("tiny", small, 1, plan(recipe(model, stage("vision")), small).stages, ()))


def test_a_stage_with_another_language_model(model: Model) -> None:
    wide = Source(config={**(model.language.config or {}), "hidden_size": 256}, tokenizer=model.language.tokenizer)
    planned = plan(recipe(model, stage("vision"), replace(stage("language"), name="two", language=wide)), CPU)
    assert planned.stages[1].trained["language"] > planned.stages[0].frozen["language"]
    assert (
        planned.stages[1].frozen["vision"] == planned.stages[0].trained["vision"] + planned.stages[0].frozen["vision"]
    )


def test_batches_that_cannot_be(model: Model) -> None:
    with pytest.raises(UserError, match=r"stages\.one\.batch_size: 4 images do not divide among 3 ranks"):
        plan(recipe(model, stage("vision")), CPU, world_size=3)
    with pytest.raises(UserError, match=r"stages\.one\.micro_batch: 3 does not divide the 4 images of a rank"):
        plan(recipe(model, stage("vision", micro_batch=3)), CPU)
    with pytest.raises(UserError, match=r"data\.max_length: an image alone has about 61 tokens, got 50"):
        plan(recipe(model, stage("vision"), max_length=50), CPU)


def test_ranks_share_the_work(model: Model) -> None:
    single, four = (plan(recipe(model, stage("vision")), CPU, world_size=n).stages[0] for n in (1, 4))
    assert four.seconds == pytest.approx(single.seconds / 4, rel=0.2)
    assert four.memory["activations"] < single.memory["activations"]


def test_the_processor_is_measured() -> None:
    device = measured_cpu("float32", 256)
    assert device.kind == "cpu"
    assert 1e8 < device.flops < 1e15
