"""What plain transformers needs to show a picture to a trained model."""

from __future__ import annotations

from transformers import DonutImageProcessorPil, LlavaProcessor, PreTrainedTokenizerBase
from transformers.image_utils import PILImageResampling

from granvit.model.granvit import GranViT
from granvit.model.tower import patch_of, prefix_tokens


def image_processor_of(model: GranViT, image_size: int) -> DonutImageProcessorPil:
    """A stock image processor with the frame and the normalisation of a model.

    A picture of the frame's size comes out as :func:`granvit.model.tower.normalise` makes it. Others are scaled to fit
    into the middle of a black frame, as in training, to within a pixel of the frame. Of the stock image processors
    Donut's does that: LLaVA's own leaves bars in the mean colour, half a pixel beside where training has them.

    It is the one on Pillow, which every installation has; what it saves, torchvision's reads too.

    Args:
        model: whose normalisation is meant.
        image_size: side of the square frame in pixels.
    """
    frame = {"height": image_size, "width": image_size}
    return DonutImageProcessorPil(
        do_resize=True,
        do_thumbnail=True,
        do_pad=True,
        size=frame,
        crop_size=frame,  # nothing is cropped; LlavaProcessor counts image tokens by it
        do_center_crop=False,
        resample=PILImageResampling.BICUBIC,
        image_mean=list(model.mean),
        image_std=list(model.std),
    )


def processor_of(model: GranViT, tokenizer: PreTrainedTokenizerBase, image_size: int) -> LlavaProcessor:
    """LLaVA's stock processor with the image processor and the number of image tokens of a model.

    Args:
        model: whose tower, normalisation and kind of features are meant.
        tokenizer: with the special tokens and the chat template.
        image_size: side of the square frame in pixels.
    """
    tower = model.llava.model.vision_tower
    return LlavaProcessor(
        image_processor_of(model, image_size),
        tokenizer,
        patch_size=patch_of(tower)[0],
        vision_feature_select_strategy=model.llava.config.vision_feature_select_strategy,
        # Class and register tokens; of these LLaVA's "default" takes one away again.
        num_additional_image_tokens=prefix_tokens(tower),
        chat_template=tokenizer.chat_template,
    )
