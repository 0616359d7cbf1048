"""What plain transformers needs to show a picture to a trained model."""

from __future__ import annotations

from transformers import LlavaImageProcessorPil, LlavaProcessor, PreTrainedTokenizerBase

from granvit.model.granvit import GranViT
from granvit.model.tower import patch_of, prefix_tokens


def processor_of(model: GranViT, tokenizer: PreTrainedTokenizerBase, image_size: int) -> LlavaProcessor:
    """LLaVA's stock processor with the frame, the normalisation and the number of image tokens of a model.

    A picture of the frame's size comes out as :func:`granvit.model.tower.normalise` makes it. Others are scaled to fit
    into the middle of the frame, as in training; the bars beside them have the mean colour, since LLaVA's processor
    knows no other, where granvit's are black.

    The image processor is the one on Pillow, which every installation has; what it saves, torchvision's reads too.

    Args:
        model: whose tower, normalisation and kind of features are meant.
        tokenizer: with the special tokens and the chat template.
        image_size: side of the square frame in pixels.
    """
    tower = model.llava.model.vision_tower
    frame = {"height": image_size, "width": image_size}
    image_processor = LlavaImageProcessorPil(
        do_pad=True, size=frame, crop_size=frame, image_mean=list(model.mean), image_std=list(model.std)
    )
    return LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=patch_of(tower)[0],
        vision_feature_select_strategy=model.llava.config.vision_feature_select_strategy,
        # Class and register tokens; of these LLaVA's "default" takes one away again.
        num_additional_image_tokens=prefix_tokens(tower),
        chat_template=tokenizer.chat_template,
    )
