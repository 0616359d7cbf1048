"""Evaluations end to end with tiny models: what is asked and kept, and that a stopped run goes on."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.ops import box_iou

from granvit.data.images import frames
from granvit.data.importers.driver import import_dataset
from granvit.data.sources import Questions, Scenes, Shards
from granvit.errors import MissingDependencyError, UserError
from granvit.eval.answers import AnswerError, AnswerFile, read_answers, read_evaluation
from granvit.eval.metrics import rouge_scorer
from granvit.eval.questions import Asking, SettingsError
from granvit.eval.runner import Settings, evaluate
from granvit.eval.scores import Answer, score, summary
from granvit.eval.sources import of_identity
from granvit.geometry import format_box
from granvit.model.checkpoint import CheckpointError
from granvit.model.granvit import GranViT
from tests.eval.support import noise, save_model, write_shards
from tests.model.support import SIZE

SHORT = Settings(batch_size=8, max_new_tokens=4)
Generate = Callable[..., list[list[str]]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "shards")


def oracle(monkeypatch: pytest.MonkeyPatch, answer: Callable[[str, Any, torch.Tensor], str]) -> None:
    """Has the model answer by a function of a question, its box in the frame, and the frame."""

    def generate(self: GranViT, prompts: Any, pixels: Any, questions: Any, boxes: Any, **options: Any) -> Any:
        return [
            [answer(text, box, own) for text, box in zip(texts, of_image, strict=True)]
            for texts, of_image, own in zip(questions, boxes, pixels, strict=True)
        ]

    monkeypatch.setattr(GranViT, "generate", generate)


def test_right_answers_of_images_of_any_shape_count_as_right(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Shards(write_shards(tmp_path / "shards", 30))
    captions = {}
    for i in range(len(source)):
        shown = source.read(i, SIZE)
        framed = shown.transform.boxes(torch.tensor([r.box for r in shown.record.regions], dtype=torch.float64))
        for region, box in zip(shown.record.regions, framed.tolist(), strict=True):
            captions[tuple(round(x, 6) for x in box)] = region.caption

    def right(question: str, box: Any, frame: torch.Tensor) -> str:
        if question.startswith("Please"):
            return f"It is at {format_box(box)}."
        return captions[tuple(round(x, 6) for x in box)].upper() + "."

    oracle(monkeypatch, right)
    report = evaluate(model, [source], SHORT, tmp_path / "out")
    answers = read_answers(tmp_path / "out")
    found = [answer for answer in answers if answer.task == "caption_to_bbox"]
    metrics = report["metrics"]
    assert metrics["bbox_to_caption"]["all"]["exact_match"] == 1.0
    assert metrics["bbox_to_caption"]["all"]["count"] == 90
    assert metrics["caption_to_bbox"]["all"]["accuracy_75"] == 1.0
    # Thousandths of the frame are up to four thousandths of an image that fills a quarter of it.
    true, said = (torch.tensor([getattr(answer, name) for answer in found]) for name in ("box", "found"))
    assert (true - said).abs().max() < 2.5e-3
    assert metrics["caption_to_bbox"]["all"]["mean_iou"] == pytest.approx(
        float(box_iou(true.double(), said.double()).diagonal().mean())
    )
    assert report["counts"] == {
        "images": 30,
        "not read": 0,
        "answers": 90 + len(found),
        "not asked": report["counts"]["not asked"],
    }
    groups = metrics["caption_to_bbox"]["by"]
    assert set(groups) == {"source", "kind", "size", "regions", "covered"}
    for of_dimension in groups.values():
        assert sum(group["count"] for group in of_dimension.values()) == len(found)


def test_a_stopped_evaluation_goes_on_to_the_same_answers(
    model: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, settings = Shards(shards), Settings(Asking(prompt="mixed"), batch_size=8, max_new_tokens=4)
    whole = evaluate(model, [source], settings, tmp_path / "whole")
    told: list[tuple[int, int]] = []

    def killed(done: int, total: int) -> None:
        told.append((done, total))
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(model, [source], settings, tmp_path / "cut", progress=killed)
    assert told == [(2, 7), (4, 7)]
    path = tmp_path / "cut" / "answers.jsonl"
    path.write_bytes(path.read_bytes()[:-30])  # as a kill cuts it
    calls = []
    generate = GranViT.generate
    monkeypatch.setattr(GranViT, "generate", lambda *a, **k: calls.append(1) or generate(*a, **k))
    again = evaluate(model, [source], settings, tmp_path / "cut")
    assert len(calls) == 3  # the first chunk of four was whole
    assert read_answers(tmp_path / "cut") == read_answers(tmp_path / "whole")
    assert again["metrics"] == whole["metrics"]
    assert again["counts"] == whole["counts"]
    assert evaluate(model, [source], settings, tmp_path / "cut") == again == read_evaluation(tmp_path / "cut")
    assert len(calls) == 3
    for other in (Settings(Asking(prompt="mixed"), batch_size=8, max_new_tokens=5), SHORT):
        with pytest.raises(AnswerError, match="holds another evaluation .*max_new_tokens|prompt") as refused:
            evaluate(model, [source], other, tmp_path / "cut")
        assert "\n" not in str(refused.value)
    evaluate(model, [source], SHORT, tmp_path / "cut", overwrite=True)
    assert len(read_answers(tmp_path / "cut")) == len(read_answers(tmp_path / "whole"))


def test_answers_are_those_of_the_model_itself(model: Path, shards: Path, tmp_path: Path) -> None:
    from granvit.model import checkpoint
    from granvit.model.prompts import Prompts

    evaluate(model, [Shards(shards)], Settings(Asking(prompt="region"), max_new_tokens=6), tmp_path / "out")
    loaded = checkpoint.load(model)
    for answer in random.sample(read_answers(tmp_path / "out"), 6):
        shown = Shards(shards).read(answer.image, SIZE)
        assert shown.record.key == answer.key
        box = shown.transform.boxes(torch.tensor(answer.box, dtype=torch.float64)).tolist()
        (said,) = loaded.model.eval().generate(
            Prompts(loaded.tokenizer), shown.pixels[None], [[answer.question]], [[box]], max_new_tokens=6
        )
        assert said == [answer.answer]


def test_the_wrong_image_is_another_of_the_same_source(
    model: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = {int(Shards(shards).read(i, SIZE).pixels.sum()): f"{i:04d}" for i in range(7)}
    assert len(frames) == 7
    oracle(monkeypatch, lambda question, box, frame: frames[int(frame.sum())])
    settings = Settings(batch_size=8, wrong_image=True, images=5)
    evaluate(model, [Shards(shards)], settings, tmp_path / "wrong")
    answers = read_answers(tmp_path / "wrong")
    keys = list(dict.fromkeys(answer.key for answer in answers))
    assert len(keys) == 5
    following = dict(zip(keys, [*keys[1:], keys[0]], strict=True))
    for answer in answers:
        assert answer.answer == answer.wrong_image == following[answer.key]
    evaluate(model, [Shards(shards)], SHORT, tmp_path / "right")
    assert all(x.answer == x.key and x.wrong_image is None for x in read_answers(tmp_path / "right"))


@pytest.mark.parametrize("wrong_image", [False, True])
def test_an_image_that_cannot_be_read_is_left_out_said_and_counted(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong_image: bool
) -> None:
    path = write_questions(tmp_path / "files", 7)
    for i in (1, 2, 3, 6):  # all of a chunk of two, and what is behind others
        (path.parent / f"{i}.png").write_bytes(b"no image")
    source = Questions(path, path.parent)
    said: list[str] = []
    shown = {source.read(i, SIZE).pixels.numpy().tobytes(): str(i) for i in (0, 4, 5)}
    oracle(monkeypatch, lambda question, box, frame: shown[frame.numpy().tobytes()])
    settings = Settings(batch_size=2, wrong_image=wrong_image)
    report = evaluate(model, [source], settings, tmp_path / "out", note=said.append)
    following = {"0": "4", "4": "5", "5": "0"} if wrong_image else {"0": "0", "4": "4", "5": "5"}
    assert {answer.number: answer.answer for answer in read_answers(tmp_path / "out")} == following
    assert (report["counts"]["images"], report["counts"]["not read"]) == (3, 4)
    assert len(said) == 4
    assert all(
        f"question {i}: " in text and f"{i}.png: no image" in text for i, text in zip((1, 2, 3, 6), said, strict=True)
    )
    with pytest.raises(UserError, match="3 of 4 samples cannot be read, and max_broken allows 0.002"):
        evaluate(model, [source], settings, tmp_path / "strict", max_broken=0.002)


def test_an_image_is_not_the_wrong_one_of_itself(model: Path, tmp_path: Path) -> None:
    path = write_questions(tmp_path / "files", 4)
    for i in (0, 2, 3):
        (path.parent / f"{i}.png").write_bytes(b"no image")
    settings = Settings(batch_size=2, wrong_image=True)
    with pytest.raises(UserError, match="expected two images that can be read, to show the wrong one of, got one"):
        evaluate(model, [Questions(path, path.parent)], settings, tmp_path / "out")


def test_images_are_shown_with_their_tiles(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_questions(tmp_path / "files", 3)
    for i, size in enumerate(((SIZE, SIZE), (2 * SIZE, SIZE), (2 * SIZE, 2 * SIZE))):
        (path.parent / f"{i}.png").write_bytes(noise(random.Random(), *size))
    seen: list[Any] = []
    generate = GranViT.generate

    def spied(self: GranViT, prompts: Any, pixels: Any, *args: Any, **options: Any) -> Any:
        seen.append((pixels, list(options["frames"])))
        return generate(self, prompts, pixels, *args, **options)

    monkeypatch.setattr(GranViT, "generate", spied)
    evaluate(model, [Questions(path, path.parent)], Settings(tiles=4, max_new_tokens=2), tmp_path / "out")
    ((pixels, counts),) = seen
    assert counts == [1, 3, 5]
    expected = [frames((path.parent / f"{i}.png").read_bytes(), (SIZE, SIZE), 4)[0] for i in range(3)]
    assert pixels.equal(torch.cat(expected))
    with pytest.raises(SettingsError, match="tiles: expected at least 0"):
        Settings(tiles=-1)


def test_refcoco_from_its_published_files(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "one.png").write_bytes(noise(random.Random(), 50, 100))
    boxes = {1: [10, 5, 40, 30], 2: [60, 5, 30, 40]}  # x y width height
    told = {1: ("left man", "man in red"), 2: ("Man in red", "right man")}
    refs = [
        {"ann_id": i, "split": "testA" if i < 3 else "train", "sentences": [{"sent": text} for text in texts]}
        for i, texts in {**told, 3: ("a dog",)}.items()
    ]
    annotations = [{"id": i, "image_id": 7, "bbox": box} for i, box in {**boxes, 3: [0, 0, 9, 9]}.items()]
    images = [{"id": 7, "height": 50, "width": 100, "file_name": "one.png"}]
    (tmp_path / "refs.json").write_text(json.dumps(refs))
    (tmp_path / "instances.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    import_dataset(
        "refcoco",
        out=tmp_path / "shards",
        refs=tmp_path / "refs.json",
        instances=tmp_path / "instances.json",
        images=tmp_path / "images",
        split="testA",
        source="refcoco",
    )
    # In the frame of 24 pixels the image is 24 by 12, from y = 6 on: the left man.
    oracle(monkeypatch, lambda question, box, frame: "[0.1, 0.3, 0.5, 0.6]")
    asking = Asking(("caption_to_bbox",), ambiguous=True)
    report = evaluate(model, [Shards(tmp_path / "shards")], Settings(asking), tmp_path / "out")
    answers = read_answers(tmp_path / "out")
    assert sorted(answer.question.rpartition(": ")[2] for answer in answers) == sorted(sum(told.values(), ()))
    assert {answer.groups["split"] for answer in answers} == {"testA"}
    assert report["metrics"]["caption_to_bbox"]["all"]["accuracy_50"] == 0.5
    assert max(score(answer)["mean_iou"] for answer in answers) == pytest.approx(1.0)
    plain = evaluate(model, [Shards(tmp_path / "shards")], Settings(), tmp_path / "plain")
    assert plain["counts"]["not asked"] == {"ambiguous caption": 2}
    assert plain["metrics"]["bbox_to_caption"]["all"]["count"] == 2  # each box once


def write_questions(folder: Path, count: int = 5) -> Path:
    folder.mkdir()
    rng, lines = random.Random(), []
    for i in range(count):
        (folder / f"{i}.png").write_bytes(noise(rng, 20 + i, 40))
        text = {"text": f"<image>\nwhat is {i}?"} if i % 2 else {"question": f"what is {i}?"}
        answers = ["a kite"] * (10 if i == 0 else 1)
        lines.append(json.dumps({"question_id": i, "image": f"{i}.png", "answers": answers, **text}))
    path = folder / "questions.jsonl"
    path.write_text("\n".join(lines) + "\n\n")
    return path


def test_questions_of_a_file(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_questions(tmp_path / "files")
    oracle(monkeypatch, lambda question, box, frame: "The kite." if question == "what is 0?" else "a kit")
    report = evaluate(model, [Questions(path, path.parent)], SHORT, tmp_path / "out")
    answers = read_answers(tmp_path / "out")
    assert [answer.question for answer in answers] == [f"what is {i}?" for i in range(5)]
    assert [answer.number for answer in answers] == ["0", "1", "2", "3", "4"]
    found = report["metrics"]["question"]["all"]
    # "the kite." against "a kite" is 4 edits of 9; "a kit" is one of 6.
    assert found["anls"] == pytest.approx((5 / 9 + 4 * 5 / 6) / 5)
    assert (found["vqa_accuracy"], found["vqa_count"], found["count"]) == (1.0, 1, 5)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("{", "line 2: expected JSON"),
        ("[]", "expected an object"),
        ('{"question_id": 1.5, "image": "a", "text": "b", "answers": ["c"]}', "question_id"),
        ('{"question_id": 0, "image": "a", "text": "b", "answers": ["c"]}', "question_id: 0 is there already"),
        ('{"question_id": 1, "text": "b", "answers": ["c"]}', "image"),
        ('{"question_id": 1, "image": "a", "text": " ", "answers": ["c"]}', "text"),
        ('{"question_id": 1, "image": "a", "text": "b", "answers": []}', "answers"),
        ('{"question_id": 1, "image": "a", "text": "b", "answers": "c"}', "answers"),
    ],
)
def test_broken_questions_are_one_sentence(tmp_path: Path, line: str, named: str) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text('{"question_id": 0, "image": "a.png", "text": "b", "answers": ["c"]}\n' + line)
    with pytest.raises(UserError, match=named) as refused:
        Questions(path, tmp_path)
    assert "\n" not in str(refused.value)


def test_missing_files_are_one_sentence(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        Questions(tmp_path / "none.jsonl", tmp_path)
    path = write_questions(tmp_path / "files")
    (path.parent / "3.png").unlink()
    with pytest.raises(UserError, match=r"1 of 5 samples .*questions.jsonl: question 3: .*3\.png: No such file or dir"):
        evaluate(model, [Questions(path, path.parent)], SHORT, tmp_path / "out", max_broken=0.0)
    with pytest.raises(CheckpointError, match="holds no model"):
        evaluate(tmp_path, [Scenes(1)], SHORT, tmp_path / "out")


def test_what_cannot_be_evaluated_is_refused(model: Path, shards: Path, tmp_path: Path) -> None:
    for name in ("images", "batch_size", "max_new_tokens"):
        with pytest.raises(SettingsError, match=f"{name}: expected at least 1, got 0"):
            Settings(**{name: 0})
    with pytest.raises(SettingsError, match="dtype"):
        Settings(dtype="int8")
    out, source = tmp_path / "out", Shards(shards)
    with pytest.raises(SettingsError, match="expected at least one source"):
        evaluate(model, [], SHORT, out)
    with pytest.raises(SettingsError, match="got shards twice"):
        evaluate(model, [source, source], SHORT, out)
    with pytest.raises(SettingsError, match="expected two images, to show the wrong one of, got 1"):
        evaluate(model, [source], Settings(images=1, wrong_image=True), out)
    with pytest.raises(SettingsError, match="prompt: box needs a model that was trained with it, got one of mixed"):
        evaluate(model, [source], Settings(Asking(prompt="box")), out)
    with pytest.raises(UserError, match="nothing could be asked"):
        evaluate(model, [Shards(write_shards_without_captions(tmp_path))], SHORT, tmp_path / "empty")


def test_what_is_missing_is_known_before_anything_is_answered(
    model: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rouge_scorer.cache_clear()
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(MissingDependencyError, match=r"granvit\[eval\]"):
        evaluate(model, [Shards(shards)], SHORT, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    evaluate(model, [Shards(shards)], Settings(Asking(("caption_to_bbox",)), max_new_tokens=2), tmp_path / "out")
    rouge_scorer.cache_clear()


def write_shards_without_captions(folder: Path) -> Path:
    from granvit.data.record import Record, Region
    from granvit.data.shards import ShardWriter

    with ShardWriter(folder / "bare") as writer:
        record = Record("a", 20, 20, "noise", regions=(Region((0.0, 0.0, 1.0, 1.0)),))
        writer.add(record, noise(random.Random(), 20, 20), "png")
    return folder / "bare"


def test_sources_can_be_opened_again(shards: Path, tmp_path: Path) -> None:
    path = write_questions(tmp_path / "files")
    scenes = Scenes(3, kind="natural", seed=4, size=128, names=("lemon", "fox"), unique=False)
    for source in (Shards(shards), scenes, Questions(path, path.parent)):
        plain = json.loads(json.dumps(source.identity()))
        again = of_identity(plain)
        assert (again.name, len(again), again.asks) == (source.name, len(source), source.asks)
        ours, theirs = source.read(2, SIZE), again.read(2, SIZE)
        assert ours.record == theirs.record
        assert ours.question == theirs.question
        assert ours.pixels.equal(theirs.pixels)
        assert json.loads(json.dumps(again.identity())) == plain
    with pytest.raises(ValueError, match="of_identity"):
        of_identity({"birds": 1})


def test_two_evaluations_do_not_write_one_folder(tmp_path: Path) -> None:
    with AnswerFile(tmp_path, {"a": 1}), pytest.raises(AnswerError, match="another evaluation is writing it"):
        AnswerFile(tmp_path, {"a": 1})
    (tmp_path / "answers.jsonl").write_text("{}\n")
    with pytest.raises(AnswerError, match="line 1: no answer"):
        AnswerFile(tmp_path, {"a": 1})
    (tmp_path / "config.json").unlink()
    with pytest.raises(AnswerError, match=r"has answers and no config\.json"):
        AnswerFile(tmp_path, {"a": 1})
    with AnswerFile(tmp_path, {"a": 2}, overwrite=True) as file:
        assert file.read() == []


def test_the_report_says_what_made_it(model: Path, shards: Path, tmp_path: Path) -> None:
    settings = Settings(dtype="bfloat16", max_new_tokens=2, images=2)
    report = evaluate(model, [Shards(shards)], settings, tmp_path / "out")
    assert report == json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert len(report["checkpoint"]["sha256"]) == 64
    assert report["config"]["asking"]["tasks"] == ["bbox_to_caption", "caption_to_bbox"]
    assert report["torch"] == torch.__version__
    assert report["counts"]["images"] == 2
    other = save_model(tmp_path / "other")
    with pytest.raises(AnswerError, match=r"holds another evaluation \(model: "):
        evaluate(other, [Shards(shards)], settings, tmp_path / "out")


def test_means_by_hand() -> None:
    def box(found: Any, size: str) -> Answer:
        truth = (0.0, 0.0, 0.5, 0.5)
        return Answer(0, "s", 0, "k", "caption_to_bbox", "q", ("r",), "a", 0, truth, found, {"size": size})

    answers = [
        box((0.0, 0.0, 0.5, 0.5), "small"),
        box((0.0, 0.0, 0.5, 0.3), "small"),  # IoU 0.6
        box((0.5, 0.5, 0.9, 0.9), "large"),
        box(None, "large"),
    ]
    found = summary(answers)["caption_to_bbox"]
    assert found["all"] == pytest.approx(
        {"count": 4, "accuracy_50": 0.5, "accuracy_75": 0.25, "mean_iou": 0.4, "no_box": 0.25}
    )
    assert list(found["by"]["size"]) == ["small", "large"]
    assert found["by"]["size"]["small"]["mean_iou"] == pytest.approx(0.8)
    text = Answer(0, "s", 0, "k", "bbox_to_caption", "q", ("two dogs", "cat"), "Two dog", 0)
    assert score(text) == {"rouge_l": 1.0, "exact_match": 0.0}
    assert Answer.of(json.loads(json.dumps(answers[1].plain()))) == answers[1]
    assert summary([]) == {}
