"""Runs an export in an interpreter of its own, where granvit cannot be imported: argv is kind, folder, inputs, outputs.

Started as text (``python -c``), never imported, so that nothing of granvit is loaded on the way.
"""

import importlib.abc
import sys
from typing import Any


class _Refusing(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        if fullname.partition(".")[0] == "granvit":
            raise ModuleNotFoundError("granvit: is kept out of the verification of an export", name=fullname)


sys.meta_path.insert(0, _Refusing())

import torch  # noqa: E402
from PIL import Image  # noqa: E402


def _pictures(given: dict[str, Any]) -> list[Image.Image]:
    return [Image.fromarray(pixels.permute(1, 2, 0).numpy()) for pixels in given["images"]]


def _llava(folder: str, given: dict[str, Any]) -> dict[str, Any]:
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    processor = AutoProcessor.from_pretrained(folder)
    model, info = LlavaForConditionalGeneration.from_pretrained(folder, dtype="auto", output_loading_info=True)
    found: dict[str, Any] = {"ids": [], "pixels": [], "logits": []}
    for i, (picture, question) in enumerate(zip(_pictures(given), given["questions"], strict=True)):
        message = {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": question}]}
        inputs = processor.apply_chat_template(
            [message], tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
        pixels = given["pixels"][i : i + 1].to(model.dtype)
        found["ids"].append(inputs["input_ids"][0])
        found["pixels"].append(inputs["pixel_values"][0].float())
        found["logits"].append(model.eval()(input_ids=inputs["input_ids"], pixel_values=pixels).logits[0])
    return {**found, "loading": _problems(info), "dtype": str(model.dtype)}


def _vision(folder: str, given: dict[str, Any]) -> dict[str, Any]:
    from transformers import AutoImageProcessor, AutoModel

    processor = AutoImageProcessor.from_pretrained(folder)
    model, info = AutoModel.from_pretrained(folder, dtype="auto", output_loading_info=True)
    made = model.eval()(given["pixels"].to(model.dtype), output_hidden_states=True)
    return {
        "pixels": list(processor(_pictures(given), return_tensors="pt").pixel_values.float()),
        "tokens": made.hidden_states[-1],
        "normed": made.last_hidden_state,
        "loading": _problems(info),
        "dtype": str(model.dtype),
    }


def _timm(folder: str, given: dict[str, Any]) -> dict[str, Any]:
    import timm

    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    [tokens] = model.forward_intermediates(
        given["pixels"], indices=1, norm=False, output_fmt="NLC", intermediates_only=True
    )
    return {"tokens": tokens}


def _problems(info: dict[str, Any]) -> list[str]:
    """Weights that the folder lacks, or has beside those of the model."""
    return sorted(str(key) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info[kind])


def _main(kind: str, folder: str, source: str, target: str) -> None:
    given = torch.load(source, weights_only=True)
    torch.set_num_threads(given["threads"])
    with torch.no_grad():
        found = {"llava": _llava, "vision": _vision, "timm": _timm}[kind](folder, given)
    assert not any(name.partition(".")[0] == "granvit" for name in sys.modules)
    torch.save(found, target)


if __name__ == "__main__":
    _main(*sys.argv[1:])
