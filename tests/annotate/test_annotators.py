"""Detectors, captioners and OCR with real libraries; models that nothing can download are tiny, random and real."""

from __future__ import annotations

import builtins
import json
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw

from granvit.annotate import AnnotationError, Captions, captioners, detectors, ocr
from granvit.annotate.captioners import Questions, Request, TransformersCaptioner, VLLMCaptioner
from granvit.annotate.detectors import SelectiveSearchDetector, TransformersDetector
from granvit.annotate.filters import box_iou
from granvit.annotate.interfaces import batches, describe
from granvit.annotate.ocr import RapidOCRReader
from granvit.errors import MissingDependencyError
from tests.annotate.support import page

WHOLE = (0.0, 0.0, 1.0, 1.0)


def noise(*sizes: tuple[int, int]) -> list[Image.Image]:
    return [Image.effect_noise(size, 80).convert("RGB") for size in sizes]


@pytest.fixture(scope="module")
def detector_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = transformers.YolosConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=[64, 96],
        patch_size=16, num_detection_tokens=12, num_labels=5, id2label={i: f"label {i}" for i in range(5)},
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("yolos")
    model = transformers.YolosForObjectDetection(config)
    for parameter in model.class_labels_classifier.parameters():  # so that scores spread over 0 to 1
        torch.nn.init.normal_(parameter, std=3.0)
    model.save_pretrained(folder)
    size = {"shortest_edge": 64, "longest_edge": 96}
    transformers.YolosImageProcessor(size=size, pad_size={"height": 96, "width": 96}).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.6])
def test_a_detector_gives_the_models_own_boxes(detector_folder: Path, threshold: float) -> None:
    import transformers

    images = noise((120, 80), (64, 96), (90, 90))
    found = TransformersDetector(str(detector_folder), threshold).detect(images)
    processor = transformers.AutoImageProcessor.from_pretrained(detector_folder)
    model = transformers.AutoModelForObjectDetection.from_pretrained(detector_folder).eval()
    with torch.no_grad():
        outputs = model(**processor(images=images, return_tensors="pt"))
    sizes = [(image.height, image.width) for image in images]
    expected = processor.post_process_object_detection(outputs, threshold, target_sizes=sizes)
    counts = []
    for detections, result, (height, width) in zip(found, expected, sizes, strict=True):
        pixels = torch.tensor([d.box for d in detections], dtype=torch.float64).reshape(-1, 4)
        pixels = pixels * torch.tensor([width, height, width, height])
        torch.testing.assert_close(pixels, result["boxes"].double(), rtol=1e-12, atol=1e-9)
        assert [d.score for d in detections] == result["scores"].tolist()
        assert [d.label for d in detections] == [f"label {i}" for i in result["labels"].tolist()]
        assert all(d.score is not None and d.score > threshold for d in detections)
        counts.append(len(detections))
    assert sum(counts) == 36 if threshold == 0 else 0 < sum(counts) < 36


def test_equal_detectors_share_a_model_and_travel_without_it(detector_folder: Path) -> None:
    detector = TransformersDetector(str(detector_folder))
    model = detectors._detection_model(detector)
    copy = pickle.loads(pickle.dumps(detector))
    assert copy == detector
    assert detectors._detection_model(copy) is model
    assert len(pickle.dumps(detector)) < 1000


def test_a_model_that_is_not_there_is_a_sentence(tmp_path: Path, detector_folder: Path) -> None:
    with pytest.raises(AnnotationError, match=r"detector .*nothing: cannot be loaded: "):
        TransformersDetector(str(tmp_path / "nothing")).detect(noise((64, 64)))
    with pytest.raises(AnnotationError, match=r"captioner .*: cannot be loaded: "):
        TransformersCaptioner(str(detector_folder)).caption(noise((64, 64)), [[]])


def test_selective_search_finds_what_stands_out() -> None:
    pytest.importorskip("cv2.ximgproc")
    image = Image.new("RGB", (600, 450), (230, 230, 225))
    draw = ImageDraw.Draw(image)
    shapes = [(60, 60, 220, 200), (330, 90, 540, 260), (150, 280, 300, 420)]
    for shape, fill in zip(shapes, ("red", "blue", "darkgreen"), strict=True):
        draw.rectangle(shape, fill=fill)
    detector = SelectiveSearchDetector()
    (found, again) = detector.detect([image, image])
    assert found == again  # although the search draws its order by chance
    assert 3 <= len(found) <= 32
    for x0, y0, x1, y1 in shapes:
        shape_box = (x0 / 600, y0 / 450, x1 / 600, y1 / 450)
        assert max(box_iou(d.box, shape_box) for d in found) > 0.9
    assert all(box_iou(a.box, b.box) <= 0.5 for i, a in enumerate(found) for b in found[:i])
    assert SelectiveSearchDetector(boxes=2).detect([image])[0] == found[:2]
    assert len(detector.detect([Image.new("RGB", (500, 500))])[0]) <= 1  # nothing stands out


@pytest.fixture(scope="session")
def reader() -> RapidOCRReader:
    pytest.importorskip("rapidocr")
    pytest.importorskip("onnxruntime")
    return RapidOCRReader()


def test_rapidocr_reads_a_page(reader: RapidOCRReader) -> None:
    texts = ["Invoice number 48213", "Total amount: 1,250.00 EUR", "Thank you for your order"]
    image, ink = page(texts)
    empty = Image.new("RGB", (500, 500), "white")
    lines, nothing = reader.read([image, empty])
    assert [line.text for line in lines] == texts
    assert nothing == []
    for line, (x0, y0, x1, y1) in zip(lines, ink, strict=True):
        assert line.score is not None
        assert 0.9 < line.score <= 1
        bx0, by0, bx1, by1 = (v * s for v, s in zip(line.box, image.size * 2, strict=True))
        assert bx0 <= x0 + 4 <= x1 - 4 <= bx1
        assert by0 <= y0 + 4 <= y1 - 4 <= by1
        assert box_iou((bx0, by0, bx1, by1), (x0, y0, x1, y1)) > 0.7


def test_a_turned_line_has_an_upright_box(reader: RapidOCRReader) -> None:
    image, _ = page(["One line of text that rises"], size=(700, 700), height=40)
    turned = image.rotate(10, fillcolor="white", center=(350, 60))
    (line,) = reader.read([turned])[0]
    assert line.text == "One line of text that rises"
    x0, y0, x1, y1 = line.box
    assert (y1 - y0) * 700 > 100  # of 500 pixels of text at 10 degrees
    assert 0 <= x0 < x1 <= 1


def test_rapidocr_takes_its_settings(reader: RapidOCRReader) -> None:
    engine = ocr._engine(reader)
    assert ocr._engine(RapidOCRReader()) is engine  # loaded once
    assert engine.cfg.Global.text_score == 0.0
    assert engine.cfg.EngineConfig.onnxruntime.intra_op_num_threads == 1
    assert describe(RapidOCRReader(threads=4)) == describe(reader)  # as it changes no result
    assert describe(RapidOCRReader(max_side=1000)) != describe(reader)


BOXES = [[(0.25, 0.5, 0.75, 1.0), (0.0, 0.0, 0.101, 0.001)], [], [WHOLE]]


def test_questions_crop_the_box() -> None:
    images = [Image.linear_gradient("L").convert("RGB") for _ in BOXES]  # 256 x 256, as dark as its row
    requests = Questions().ask(images, BOXES)
    assert [request.image.size for request in requests] == [
        (256, 256),
        (128, 128),
        (26, 1),
        (256, 256),
        (256, 256),
        (256, 256),
    ]
    assert requests[1].image.getpixel((0, 0)) == (128, 128, 128)
    assert [request.max_tokens for request in requests] == [256, 32, 32, 256, 256, 32]
    assert requests[0].prompt == "Describe in detail what is shown in the image in one paragraph"
    assert "no more than 10 words" in requests[1].prompt


def test_questions_draw_the_box() -> None:
    image = Image.new("RGB", (300, 300), "white")
    _, request, _ = Questions("draw").ask([image], [[(0.2, 0.4, 0.6, 0.8), WHOLE]])
    assert "red rectangle" in request.prompt
    assert request.image.size == image.size
    red = [(x, y) for x in range(300) for y in range(300) if request.image.getpixel((x, y)) == (255, 0, 0)]
    assert (min(x for x, _ in red), min(y for _, y in red)) == (60, 120)
    assert (max(x for x, _ in red), max(y for _, y in red)) == (179, 239)
    assert image.getpixel((60, 120)) == (255, 255, 255)


def test_answers_go_where_they_belong() -> None:
    images = noise((32, 32), (32, 32), (32, 32))
    long = "one two three four five six seven eight nine ten eleven"
    answers = ["first\n image", " a  box ", long, "second", "third", "all of it"]
    assert len(Questions().ask(images, BOXES)) == len(answers)
    assert Questions().sort(answers, BOXES) == [
        Captions("first image", ("a box", long[:-7])),
        Captions("second", ()),
        Captions("third", ("all of it",)),
    ]
    silent = Questions(whole_prompt="")
    assert len(silent.ask(images, BOXES)) == 3
    assert silent.sort(["a", "b", "c"], BOXES)[0] == Captions("", ("a", "b"))
    with pytest.raises(ValueError, match="more answers than questions"):
        Questions().sort([*answers, "x"], BOXES)
    with pytest.raises(AnnotationError, match="captioner: show: expected one of crop, draw, got 'blur'"):
        Questions("blur")


TEMPLATE = (
    "{% for m in messages %}{{ m.role }} : {% for c in m.content %}"
    "{% if c.type == 'image' %}<image> {% else %}{{ c.text }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


@pytest.fixture(scope="module")
def captioner_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA of two small layers with a tokenizer of whole words."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<unk>", "</s>", "<image>", "user", "assistant", ":", *(f"word{i}" for i in range(40))]
    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", unk_token="<unk>", eos_token="</s>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    vision = transformers.SiglipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16,
        vision_use_head=False,
    )  # fmt: skip
    text = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, eos_token_id=2, bos_token_id=None,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=3, vision_feature_layer=-1,
        vision_feature_select_strategy="full", image_seq_length=4,
    )  # fmt: skip
    torch.manual_seed(3)
    model = transformers.LlavaForConditionalGeneration(config)
    for parameter in model.parameters():  # so large that the next word depends on the image
        torch.nn.init.normal_(parameter, std=0.6)
    folder = tmp_path_factory.mktemp("llava")
    model.save_pretrained(folder)
    transformers.LlavaProcessor(
        transformers.SiglipImageProcessor(size={"height": 32, "width": 32}), tokenizer, patch_size=16,
        vision_feature_select_strategy="full", chat_template=TEMPLATE,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def answer_alone(folder: Path, request: Request) -> str:
    """One question at a time, without our batches: the reference."""
    import transformers

    processor = transformers.AutoProcessor.from_pretrained(folder)
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    question = f"user : <image> {request.prompt} assistant : "
    inputs = processor(images=request.image, text=question, return_tensors="pt")
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=request.max_tokens)
    return processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("batch", [1, 4])
def test_a_captioner_answers_in_batches_what_it_answers_alone(captioner_folder: Path, batch: int) -> None:
    images = noise((40, 60), (50, 50), (33, 90))
    questions = Questions(
        whole_prompt="word1 word2 word3 word4", region_prompt="word5", whole_tokens=12, region_tokens=6
    )
    captioner = TransformersCaptioner(str(captioner_folder), questions, dtype="float32", batch=batch)
    found = captioner.caption(images, BOXES)
    alone = [answer_alone(captioner_folder, request) for request in questions.ask(images, BOXES)]
    assert found == questions.sort(alone, BOXES)
    assert len({caption.whole for caption in found}) > 1  # the image is looked at
    assert all(len(caption.whole.split()) <= 12 for caption in found)


def test_a_captioner_without_a_chat_template_is_refused(captioner_folder: Path, tmp_path: Path) -> None:
    for path in captioner_folder.iterdir():
        if path.name != "chat_template.jinja":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    config = tmp_path / "processor_config.json"
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "chat_template"}))
    with pytest.raises(AnnotationError, match="its processor has no chat template"):
        TransformersCaptioner(str(tmp_path)).caption(noise((40, 40)), [[]])


def test_vllm_is_asked_the_same_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in for vLLM's LLM and SamplingParams; vLLM itself needs a GPU."""
    calls: list[Any] = []

    class LLM:
        def __init__(self, **options: Any) -> None:
            calls.append(options)

        def chat(self, messages: list[Any], sampling: list[Any], use_tqdm: bool) -> list[Any]:
            calls.append((messages, sampling))
            texts = [f"{len(messages[i])} turn, answer {i}" for i in range(len(messages))]
            return [types.SimpleNamespace(outputs=[types.SimpleNamespace(text=text)]) for text in texts]

    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, lambda **options: options
    monkeypatch.setitem(sys.modules, "vllm", module)
    captioners._vllm.cache_clear()
    images = noise((40, 60), (50, 50), (33, 90))
    captioner = VLLMCaptioner("some/model", max_model_len=4096)
    found = captioner.caption(images, BOXES)
    captioners._vllm.cache_clear()
    assert found[2] == Captions("1 turn, answer 4", ("1 turn, answer 5",))
    options, (messages, sampling) = calls
    assert options["model"] == "some/model"
    assert options["limit_mm_per_prompt"] == {"image": 1}
    assert sampling[:2] == [{"temperature": 0.0, "max_tokens": 256}, {"temperature": 0.0, "max_tokens": 32}]
    (turn,) = messages[0]
    assert turn["role"] == "user"
    assert turn["content"][0] == {"type": "image_pil", "image_pil": images[0]}
    assert turn["content"][1] == {"type": "text", "text": captioners.WHOLE_PROMPT}


@pytest.mark.parametrize(
    ("package", "use", "text"),
    [
        ("vllm", lambda: VLLMCaptioner("m").caption(noise((9, 9)), [[]]), r"needs vLLM: pip install 'granvit\[vllm\]'"),
        ("rapidocr", lambda: RapidOCRReader(max_side=77).read(noise((9, 9))), r"pip install 'granvit\[annotate\]'"),
        ("cv2", lambda: SelectiveSearchDetector().detect(noise((99, 99))), r"'granvit\[selective-search\]'"),
        ("transformers", lambda: TransformersDetector("m").detect(noise((9, 9))), r"pip install 'granvit\[train\]'"),
        ("transformers", lambda: TransformersCaptioner("m").caption(noise((9, 9)), [[]]), r"'granvit\[train\]'"),
    ],
)
def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, package: str, use: Any, text: str) -> None:
    original = builtins.__import__

    def without(name: str, *rest: Any, **options: Any) -> Any:
        if name.partition(".")[0] == package:
            raise ImportError(name)
        return original(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependencyError, match=text):
        use()


def test_batches_cover_everything_once() -> None:
    assert batches([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4], [5]]
    assert batches([], 2) == []
    with pytest.raises(ValueError, match="size: expected at least 1, got 0"):
        batches([1], 0)
