"""A stock LLaVA from a vision tower and a language model, whole or only its shape; and which of its parts train."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from granvit.model._published import PUBLISHED
from granvit.model._sources import (
    PartError,
    config_of,
    load_language,
    load_tokenizer,
    load_vision,
    normalisation,
    place,
)
from granvit.model.prompts import IMAGE, SPECIAL, add_special_tokens, rows
from granvit.model.tower import FAMILIES, unused_parameters
from granvit.recipe import Model, Source

# isort: split
# After _sources, which says in a sentence where transformers is not installed.
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    initialization,
)
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

# The others interpolate their position embeddings, or compute them, in every call.
_FIXED_POSITIONS = ("siglip_vision_model", "clip_vision_model")


_IMAGENET = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
_CLIP = (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
# What each family's published processors subtract and divide by, for towers that come without one.
NORMALISATION = {
    "siglip_vision_model": (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD),
    "clip_vision_model": _CLIP,
    "dinov2": _IMAGENET,
    "dinov2_with_registers": _IMAGENET,
    "dinov3_vit": _IMAGENET,
    "aimv2_vision_model": _CLIP,
}


@dataclass(frozen=True)
class Assembled:
    """A model and what it needs to be fed.

    Attributes:
        llava: float32.
        tokenizer: with the image token, and those of the region prompts that the model has.
        mean: ``(3,)`` of RGB in 0 to 1, to subtract.
        std: ``(3,)``, to divide by.
        size: side of the square frame in pixels.
        notes: sentences on what was chosen or made anew, for the log.
    """

    llava: LlavaForConditionalGeneration
    tokenizer: PreTrainedTokenizerBase
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    size: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Empty:
    """A model without weights.

    Attributes:
        llava: on the meta device, or where :func:`assemble_empty` was told.
        notes: where each config came from.
    """

    llava: LlavaForConditionalGeneration
    notes: tuple[str, ...]


def assemble(model: Model, *, seed: int = 0) -> Assembled:
    """Loads the parts and joins them with a new projector.

    The result is a stock LLaVA: its projector reads the last hidden state of the tower, less a class token. Position
    embeddings of SigLIP and CLIP are interpolated to the frame by the model's own method, once. Where the embedding has
    no rows for the tokens that are added, it grows; the new rows are the mean of the others.

    Args:
        model: section of a recipe.
        seed: of weights that are new; the state of torch's generators is left alone.

    Raises:
        PartError: a part that cannot be had or does not fit, in one sentence.
        MissingDependencyError: a package that is needed and not installed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tower, mean, std, notes = assemble_tower(model.vision, model.image_size)
        language, tokenizer, more = _load_language(model.language, "model.language", model)
        llava = _join(tower, language, tokenizer, model)
    registers = getattr(tower.config, "num_register_tokens", 0)
    if registers:
        extra = f"vision: plain LLaVA shows the language model the {registers} register tokens too"
        notes += (f"{extra}; granvit leaves them out",)
    return Assembled(llava, tokenizer, mean, std, model.image_size, (*notes, *more))


class Tower(NamedTuple):
    """A vision tower and what it needs to be fed; `mean`, `std` and `notes` as in :class:`Assembled`."""

    tower: PreTrainedModel
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    notes: tuple[str, ...]


def assemble_tower(source: Source, image_size: int | None = None, key: str = "model.vision") -> Tower:
    """The vision tower alone, float32; new weights are drawn from torch's generator.

    Args:
        source: of the tower.
        image_size: side of the square frame in pixels; None is that of the tower's config.
        key: of the source in the recipe, for errors.

    Raises:
        PartError: it cannot be had, or sees no frames of this size, in one sentence.
    """
    config, origin = config_of(source, key)
    if image_size is None:  # what is no vision model has none, and is refused for that first
        image_size = int(getattr(getattr(config, "vision_config", config), "image_size", 0))
    config = _tower_config(config, source, image_size)
    mean, std, note = normalisation(source, NORMALISATION[config.model_type], key)
    tower = _at_size(load_vision(source, config, key), image_size)
    return Tower(tower, mean, std, tuple(x for x in (f"vision: {origin}", note) if x))


def assemble_empty(model: Model, *, device: str = "meta") -> Empty:
    """The same model without weights: only configs and, where it is at hand, the tokenizer are read.

    A config of a hub name comes from the local cache, else from granvit's copies of published configs, else from the
    hub; the notes say which.

    Args:
        model: section of a recipe.
        device: of the parameters, which are not initialised.

    Raises:
        PartError: as :func:`assemble`.
        MissingDependencyError: likewise.
    """
    vision, from_where = config_of(model.vision, "model.vision", download=False)
    text, from_there = config_of(model.language, "model.language", download=False)
    vision = _tower_config(vision, model.vision, model.image_size)
    text = copy.deepcopy(_text_config(text, "model.language"))
    if vision.model_type in _FIXED_POSITIONS:
        vision.image_size = model.image_size
    tokens, image_token, origin = _tokens(model, text)
    text.vocab_size = rows(text.vocab_size, tokens)
    config = _llava_config(vision, text, model, image_token)
    with initialization.no_init_weights(), torch.device(device):
        llava = LlavaForConditionalGeneration(config)
    llava.tie_weights()
    return Empty(llava, (f"vision: {from_where}", f"language: {from_there}; {origin}"))


def swap_language(
    assembled: Assembled, source: Source, model: Model, *, seed: int = 0, key: str = "language"
) -> Assembled:
    """The same tower with another language model.

    The projector is kept where the new model has the width of the old one. Else it is new: both layers of LLaVA's
    projector have the language model's width. The notes say which. A box prompt has that width too; make it anew.

    Args:
        assembled: is not to be used afterwards; its tower, and its projector where that is kept, are moved.
        source: of the new language model.
        model: section of a recipe that `assembled` was made from.
        seed: of a new projector.
        key: of the source in the recipe, for errors.

    Raises:
        PartError: as :func:`assemble`.
        MissingDependencyError: likewise.
    """
    tower = assembled.llava.model.vision_tower
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        language, tokenizer, notes = _load_language(source, key, model)
        llava = _join(tower, language, tokenizer, model)
    old, new = (x.config.text_config.hidden_size for x in (assembled.llava, llava))
    if old == new:
        llava.model.multi_modal_projector = assembled.llava.model.multi_modal_projector
        kept = f"projector: kept, the width is still {new}"
    else:
        kept = f"projector: new, because the width is {new} and was {old}"
    return replace(assembled, llava=llava, tokenizer=tokenizer, notes=("vision: kept", kept, *notes))


def _load_language(
    source: Source, key: str, model: Model
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[str]]:
    config, origin = config_of(source, key)
    config = _text_config(config, key)
    tokenizer = load_tokenizer(source, key, config)
    language = load_language(source, config, key)
    head = language.get_output_embeddings()
    if head is None or head.bias is not None:
        raise PartError(f"{key}: {config.model_type}: expected a linear head without bias, which LLaVA has")
    notes, old = [f"language: {origin}"], language.get_input_embeddings().num_embeddings
    add_special_tokens(tokenizer, language)
    new = language.get_input_embeddings().num_embeddings
    if new > old:
        notes.append(f"language: the embedding grew from {old} to {new} rows for {', '.join(SPECIAL)}")
    return language, tokenizer, notes


def _tokens(model: Model, text: PretrainedConfig) -> tuple[int, int, str]:
    """How many tokens the tokenizer will have, the image token, and where that is known from."""
    source = model.language
    try:
        tokenizer = load_tokenizer(source, "model.language", text, download=False)
    except PartError:
        name = place(source, "model.language") if source.config is None else None
        if source.tokenizer is None and name in PUBLISHED:
            known = PUBLISHED[name][1]
            assert known is not None
            return known + len(SPECIAL), known, "its number of tokens likewise"
        tokenizer = load_tokenizer(source, "model.language", text)
    add_special_tokens(tokenizer)
    return len(tokenizer), tokenizer.convert_tokens_to_ids(IMAGE), "tokenizer read"


def _text_config(config: PretrainedConfig, key: str) -> PretrainedConfig:
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise PartError(f"{key}: expected a causal language model, got one of type {config.model_type}")
    if hasattr(config, "text_config"):
        raise PartError(f"{key}: expected a language model alone, got {config.model_type}, which has other parts")
    return config


def _tower_config(config: PretrainedConfig, source: Source, size: int) -> PretrainedConfig:
    config = copy.deepcopy(getattr(config, "vision_config", config))
    kind, key = config.model_type, "model.vision"
    if kind not in FAMILIES:
        raise PartError(f"{key}: expected a vision model of type {', '.join(FAMILIES)}, got one of type {kind}")
    patch = config.patch_size
    if size % patch:
        raise PartError(f"model.image_size: expected a multiple of the patch of {patch} pixels, got {size}")
    if source.config is not None:
        if source.config.get("image_size", size) != size:
            raise PartError(f"{key}.config.image_size: expected that of model.image_size, {size}, or none")
        config.image_size = size
    if kind == "siglip_vision_model":
        config.vision_use_head = False
    if kind == "aimv2_vision_model":
        config.use_head = False
        if not config.is_native and size != config.image_size:
            raise PartError(f"model.image_size: this AIMv2 sees {config.image_size} pixels only, got {size}")
    return config


def _at_size(tower: PreTrainedModel, size: int) -> PreTrainedModel:
    """The tower with position embeddings for frames of this size, where it has them fixed in its config."""
    kind = tower.config.model_type
    if kind not in _FIXED_POSITIONS or tower.config.image_size == size:
        return tower
    config = copy.deepcopy(tower.config)
    config.image_size = size
    count = (size // config.patch_size) ** 2 + FAMILIES[kind].class_tokens
    with torch.no_grad():
        tokens = torch.zeros(1, count, config.hidden_size)
        positions = tower.embeddings.interpolate_pos_encoding(tokens, size, size)[0]
    resized = type(tower)(config)
    resized.load_state_dict({**tower.state_dict(), "embeddings.position_embedding.weight": positions})
    return resized


def _llava_config(vision: PretrainedConfig, text: PretrainedConfig, model: Model, image_token: int) -> LlavaConfig:
    patches = (model.image_size // vision.patch_size) ** 2
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token,
        image_seq_length=patches + getattr(vision, "num_register_tokens", 0),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default" if FAMILIES[vision.model_type].class_tokens else "full",
        tie_word_embeddings=text.tie_word_embeddings,
    )


def _join(
    tower: PreTrainedModel, language: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, model: Model
) -> LlavaForConditionalGeneration:
    token = tokenizer.convert_tokens_to_ids(IMAGE)
    config = _llava_config(tower.config, language.config, model, token)
    with initialization.no_init_weights(), torch.device("meta"):
        llava = LlavaForConditionalGeneration(config)
    if type(llava.model.language_model) is not type(language.base_model):
        raise PartError(f"language: {language.config.model_type}: LLaVA cannot hold {type(language).__name__}")
    llava.model.vision_tower, llava.model.language_model = tower, language.base_model
    llava.model.multi_modal_projector = LlavaMultiModalProjector(config)  # started as LLaVA's, by nn.Linear itself
    llava.lm_head = language.get_output_embeddings()
    llava.generation_config = language.generation_config
    llava.model.language_model.set_attn_implementation(attention_of(model))
    return llava


def attention_of(model: Model) -> str:
    """The attention of the language model here, as transformers names it."""
    flex = model.attention == "flex_attention" or (model.attention == "auto" and torch.cuda.is_available())
    return "flex_attention" if flex else "sdpa"


def part_parameters(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """The parameters of each part by their names in `model`; each parameter once.

    Args:
        model: a GranViT or its LLaVA. The prompts are those of a GranViT.
    """
    llava: Any = getattr(model, "llava", model)
    parts: dict[str, list[nn.Module | None]] = {
        "vision": [llava.model.vision_tower],
        "projector": [llava.model.multi_modal_projector],
        # With the head, also where it has weights of its own.
        "language": [llava.model.language_model, llava.lm_head],
        "prompts": [getattr(model, "region_prompt", None), getattr(model, "box_prompt", None)],
    }
    owner = {id(p): part for part, modules in parts.items() for m in modules if m is not None for p in m.parameters()}
    found: dict[str, dict[str, nn.Parameter]] = {part: {} for part in parts}
    for name, parameter in model.named_parameters():
        if id(parameter) in owner:
            found[owner[id(parameter)]][name] = parameter
    return found


def freeze(
    model: nn.Module, train: Collection[str], *, frozen_dtype: torch.dtype | None = None
) -> dict[str, list[nn.Parameter]]:
    """Sets which parameters train. Trained ones are made float32.

    What the projector does not read of the tower (the final norm, a pooling head) never trains. The head of the
    language model goes with it, tied or not.

    Args:
        model: a GranViT or its LLaVA.
        train: parts of :data:`granvit.recipe.PARTS`.
        frozen_dtype: of the parts that do not train; None leaves it. A part that trains in a later stage has by then
            been rounded to it.

    Returns:
        The parameters that train, by part.

    Raises:
        ValueError: a part that is unknown or that the model does not have.
    """
    parts = part_parameters(model)
    for part in train:
        if not parts.get(part):
            has = ", ".join(name for name, parameters in parts.items() if parameters)
            raise ValueError(f"freeze: train: expected parts that the model has ({has}), got {part!r}")
    llava: Any = getattr(model, "llava", model)
    tower = llava.model.vision_tower
    unread = unused_parameters(tower, llava.config.vision_feature_layer)
    unused = {id(tower.get_parameter(name)) for name in unread}
    trained: dict[str, list[nn.Parameter]] = {}
    for part, parameters in parts.items():
        for parameter in parameters.values():
            parameter.requires_grad_(part in train and id(parameter) not in unused)
            dtype = torch.float32 if part in train else frozen_dtype
            if dtype is not None:
                parameter.data = parameter.data.to(dtype)
            if not parameter.requires_grad:
                parameter.grad = None
        if part in train:
            trained[part] = [parameter for parameter in parameters.values() if parameter.requires_grad]
    return trained
