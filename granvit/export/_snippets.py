"""The code in model cards; a test runs it."""

from __future__ import annotations

MAPPING = """\
def to_image(box, width, height):
    side = max(width, height)
    left, top = (side - width) / 2, (side - height) / 2
    x0, y0, x1, y1 = (share * side for share in box)
    return x0 - left, y0 - top, x1 - left, y1 - top
"""

_LLAVA = """\
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

folder = "."  # this folder, or its name on the hub
processor = AutoProcessor.from_pretrained(folder)
model = LlavaForConditionalGeneration.from_pretrained(folder, dtype="auto")

image = Image.open("photo.jpg")
question = {question!r}
message = {{"role": "user", "content": [{{"type": "image", "image": image}}, {{"type": "text", "text": question}}]}}
inputs = processor.apply_chat_template(
    [message], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
).to(model.dtype)
made = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""

_VISION = """\
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

folder = "."  # this folder, or its name on the hub
processor = AutoImageProcessor.from_pretrained(folder)
tower = AutoModel.from_pretrained(folder, dtype="auto")

pixels = processor(Image.open("photo.jpg"), return_tensors="pt").pixel_values.to(tower.dtype)
with torch.no_grad():
    made = tower(pixels, output_hidden_states=True)
# What was trained: the last layer before the final norm, with class and register tokens, where there are any, in front.
tokens = made.hidden_states[-1]
print(tokens.shape)
"""

_TIMM = """\
import timm
import torch
from PIL import Image

tower = timm.create_model("local-dir:./timm", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(tower))
with torch.no_grad():  # square images; timm's bars beside others have the mean colour
    pixels = transform(Image.open("photo.jpg").convert("RGB"))[None]
    [tokens] = tower.forward_intermediates(pixels, indices=1, norm=False, output_fmt="NLC", intermediates_only=True)
print(tokens.shape)
"""

_REGION = """\
import torch

from granvit.export import load_region_head

head = load_region_head(".")  # this folder
side, width = {side}, {width}
tokens = torch.randn(1, side * side, width, dtype=head.projector.linear_1.weight.dtype)  # patch tokens of the tower
boxes = torch.tensor([[0.1, 0.2, 0.5, 0.6]])  # relative to the frame
with torch.no_grad():
    print(head(tokens, boxes, image_index=torch.tensor([0])).shape)
"""


def of(to: str, *, question: str = "", side: int = 0, width: int = 0) -> str:
    """The code that loads an export of a kind.

    Args:
        to: the kind, or ``"timm"``.
        question: to ask a LLaVA.
        side: patches in a row of the frame, for a region head.
        width: channels of the tower, likewise.
    """
    code = {"llava": _LLAVA, "vision": _VISION, "timm": _TIMM, "region-head": _REGION}[to]
    if to in ("vision", "timm"):
        return code
    return code.format(question=question, side=side, width=width)
