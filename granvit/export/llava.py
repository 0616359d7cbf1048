"""The whole model as a stock LLaVA folder, with the names that published LLaVA checkpoints have."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, LlavaForConditionalGeneration, PreTrainedTokenizerBase

from granvit.export.vision import published_names
from granvit.export.weights import ExportError, write_weights
from granvit.model.granvit import GranViT
from granvit.model.processor import processor_of
from granvit.model.prompts import IMAGE, Prompts

# In front of a template that takes text: messages that are lists of parts become text, with the image as in training.
# Ends with a line break, which trim_blocks takes away, so that the template itself still begins at the start of a line.
_TO_TEXT = """\
{%- set prepared = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- set said = namespace(text='') -%}
{%- if message['content'] is iterable and message['content'] is not string -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{%- set said.text = said.text + '<image>' + ('' if loop.last else '\\n') -%}
{%- elif part['type'] == 'text' -%}
{%- set said.text = said.text + part['text'] -%}
{%- endif -%}
{%- endfor -%}
{%- set prepared.messages = prepared.messages + [dict(message, content=said.text)] -%}
{%- else -%}
{%- set prepared.messages = prepared.messages + [message] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = prepared.messages %}
"""
# The other way, for a template that takes lists of parts.
_TO_PARTS = """\
{%- set prepared = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- if message['content'] is string -%}
{%- set parts = [{'type': 'text', 'text': message['content']}] -%}
{%- set prepared.messages = prepared.messages + [dict(message, content=parts)] -%}
{%- else -%}
{%- set prepared.messages = prepared.messages + [message] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = prepared.messages %}
"""


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """A template for messages of text as of lists of parts, which shows an image and a question as in training.

    The tokenizer's own where it does that already; else the same with a few lines in front of it.

    Raises:
        ExportError: no such template can be made.
    """
    own: str = tokenizer.chat_template
    ids = Prompts(tokenizer).encode_questions(["what is it"])[0]
    for template in (own, _TO_TEXT + own, _TO_PARTS + own):
        if all(_ids(tokenizer, template, content) == ids for content in _contents("what is it")):
            return template
    raise ExportError("llava: the chat template shows an image otherwise in text than in a list of parts")


def _contents(question: str) -> tuple[Any, Any]:
    return f"{IMAGE}\n{question}", [{"type": "image"}, {"type": "text", "text": question}]


def _ids(tokenizer: PreTrainedTokenizerBase, template: str, content: Any) -> list[int] | None:
    """The tokens of one message of a user; None where the template does not take it."""
    messages = [{"role": "user", "content": content}]
    try:
        text = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
    except (TemplateError, TypeError):
        return None
    bos = tokenizer.bos_token
    ids: list[int] = tokenizer(text, add_special_tokens=bos is None or not text.startswith(bos))["input_ids"]
    return ids


def llava_names(llava: LlavaForConditionalGeneration) -> dict[str, Tensor]:
    """The weights by the names of published LLaVA checkpoints, which transformers and vLLM read; a tied head is left
    out."""
    model = llava.model
    named = {f"vision_tower.{name}": value for name, value in published_names(model.vision_tower).items()}
    for part in ("multi_modal_projector", "language_model"):
        prefix = "language_model.model" if part == "language_model" else part
        named |= {f"{prefix}.{name}": value for name, value in getattr(model, part).state_dict().items()}
    if not llava.config.tie_word_embeddings:
        named |= {f"language_model.lm_head.{name}": value for name, value in llava.lm_head.state_dict().items()}
    return named


def write_llava(model: GranViT, tokenizer: PreTrainedTokenizerBase, image_size: int, dtype: str, folder: Path) -> None:
    """Writes the model, whose parameters have `dtype` already, with all that transformers needs to answer with it.

    Args:
        model: to write; of its region prompts LLaVA knows nothing.
        tokenizer: with the special tokens.
        image_size: side of the square frame in pixels.
        dtype: ``"float32"`` or ``"bfloat16"``.
        folder: that exists.

    Raises:
        ExportError: the chat template shows no image.
        OSError: as the system has it.
    """
    llava = model.llava
    prompts = Prompts(tokenizer)
    config = copy.deepcopy(llava.config)
    config.architectures, config.dtype = [type(llava).__name__], dtype
    config.vision_config.architectures = [type(llava.model.vision_tower).__name__]
    # vLLM chooses its language model by this.
    config.text_config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING[type(config.text_config)].__name__]
    config.save_pretrained(folder)
    generation = copy.deepcopy(llava.generation_config)
    # Plain generate() has to stop where the training ended a turn.
    generation.eos_token_id = sorted({prompts.end_id, tokenizer.eos_token_id} - {None})
    generation.pad_token_id = prompts.pad_id
    generation.save_pretrained(folder)
    shown = copy.deepcopy(tokenizer)
    shown.chat_template = chat_template(tokenizer)
    processor = processor_of(model, shown, image_size)
    processor.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)  # alone too, where older readers look
    write_weights(llava_names(llava), folder)


def notes_on(model: GranViT, image_size: int) -> list[str]:
    """Sentences on what a user of the LLaVA folder should know."""
    config = model.llava.config
    kind, notes = config.vision_config.model_type, []
    registers = int(getattr(config.vision_config, "num_register_tokens", 0) or 0)
    if registers:
        notes.append(
            f"Plain LLaVA shows the language model the tower's {registers} register tokens too, which training left out"
        )
    if kind not in ("siglip_vision_model", "clip_vision_model"):
        notes.append(f"vLLM's LLaVA knows CLIP, SigLIP and Pixtral towers only, so it cannot serve this {kind}")
    if model.prompt != "text":
        notes.append(
            "LLaVA has no place for <region> and <box> tokens; they are in the export --to region-head, "
            "and this one knows boxes as coordinates in text"
        )
    size = config.vision_config.image_size
    if size != image_size:
        notes.append(f"The tower interpolates its position embeddings from {size} to frames of {image_size} pixels")
    return notes
