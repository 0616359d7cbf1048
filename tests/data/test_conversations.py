"""Files of conversations: every entry as it was written, and one sentence for what is none."""

from __future__ import annotations

import io
import json
import random
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

pytest.importorskip("ijson")

from granvit.data.conversations import ConversationError, Conversations
from granvit.data.images import frames
from granvit.data.tasks import Pair
from granvit.errors import UserError

SIDE = 32


@pytest.fixture(autouse=True)
def drawn() -> None:
    random.seed(int(torch.randint(1 << 40, ())))


def turns(*said: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(said)]


def entry(*said: str, **more: Any) -> dict[str, Any]:
    return {"id": f"{random.randrange(99)}", "conversations": turns(*said), **more}


def write(folder: Path, *entries: Any, name: str = "chat.json") -> Conversations:
    path = folder / name
    lines = "\n\n".join(map(json.dumps, entries)) + "\n"
    path.write_text(lines if path.suffix == ".jsonl" else json.dumps(entries, indent=1))
    return Conversations(path, folder / "images")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images" / "coco"
    folder.mkdir(parents=True)
    for name, size in (("small.png", (20, 30)), ("large.png", (90, 70)), ("wide.jpg", (99, 30))):
        pixels = bytes(random.choices(range(256), k=size[0] * size[1] * 3))
        Image.frombytes("RGB", size, pixels).save(folder / name)
    return folder


@pytest.mark.parametrize("name", ["chat.json", "chat.jsonl"])
def test_entries_are_read_by_number_in_any_order(tmp_path: Path, images: Path, name: str) -> None:
    said = [[f"{kind} {i} é\n犬" for kind in "qaqaqa"[: 2 * random.randint(1, 3)]] for i in range(40)]
    files = [random.choice((None, "small.png", "large.png", "wide.jpg")) for _ in said]
    entries = []
    for texts, file in zip(said, files, strict=True):
        first = texts[0] if file is None else random.choice((f"<image>\n{texts[0]}", f"{texts[0]}\n<image>"))
        image = random.choice(({}, {"image": None})) if file is None else {"image": f"coco/{file}"}
        entries.append(entry(first, *texts[1:], **image))
    source = write(tmp_path, *entries, name=name)
    assert len(source) == 40
    for i in random.sample(range(40), 40):
        pair, pixels = source.read(i, SIDE, 4)
        assert pair == Pair("chat", *said[i][:2], later=tuple(zip(said[i][2::2], said[i][3::2], strict=True)))
        assert pair.said() == tuple(said[i])
        if (file := files[i]) is None:
            assert pixels.shape == (0, 3, SIDE, SIDE)
            assert pixels.dtype == torch.uint8
        else:
            assert torch.equal(pixels, frames((images / file).read_bytes(), (SIDE, SIDE), 4)[0])
            assert len(pixels) == {"small.png": 1, "large.png": 5, "wide.jpg": 5}[file]
    assert len(source.read(files.index("large.png"), SIDE, 0)[1]) == 1 if "large.png" in files else True


def test_text_stays_as_it_is_but_for_the_image(tmp_path: Path, images: Path) -> None:
    source = write(
        tmp_path,
        entry(" <image> \n  what? ", " it \n", "  and? ", "\tthis", image="coco/small.png"),
        entry(" what? \n", " it \n", "", ""),
        entry("<image>", "a caption", image="coco/small.png"),
    )
    assert source.read(0, SIDE, 0)[0].said() == ("what?", " it \n", "  and? ", "\tthis")
    assert source.read(1, SIDE, 0)[0].said() == (" what? \n", " it \n", "", "")
    assert source.read(2, SIDE, 0)[0].said() == ("", "a caption")


def test_half_a_surrogate_pair_and_nan_are_harmless(tmp_path: Path) -> None:
    (tmp_path / "chat.json").write_text(
        '[{"id": NaN, "conversations": [{"from": "human", "value": "a\\ud800b"}, {"from": "gpt", "value": "c"}]}]'
    )
    assert Conversations(tmp_path / "chat.json", tmp_path).read(0, SIDE, 0)[0].said() == ("a?b", "c")


def test_a_worker_shares_the_memory_of_the_text(tmp_path: Path) -> None:
    """And is not sent it; also where workers are not forked."""
    source = write(tmp_path, *(entry(f"question {i} " * 200, f"answer {i}") for i in range(100)))
    sent = io.BytesIO()
    ForkingPickler(sent).dump(source)
    assert len(sent.getvalue()) < 2000
    copy = ForkingPickler.loads(sent.getvalue())
    assert [copy.read(i, SIDE, 0)[0].answer for i in range(100)] == [f"answer {i}" for i in range(100)]


IMAGE = {"image": "coco/small.png"}
WRONG: dict[str, tuple[Any, str]] = {
    "no object": (["a"], "expected an object with conversations"),
    "no conversation": ({"id": "a"}, "expected an object with conversations"),
    "no list": ({"conversations": "a"}, "conversations: expected a list"),
    "no turn": (entry(), "conversations: expected questions with answers, got 0 turns"),
    "no answer": (entry("a"), "conversations: expected questions with answers, got 1 turns"),
    "no last answer": (entry("a", "b", "c"), "conversations: expected questions with answers, got 3 turns"),
    "a turn of text": ({"conversations": ["a", "b"]}, r"conversations\[0\]: expected an object with from, got a"),
    "no value": ({"conversations": [{"from": "human"}]}, r"conversations\[0\]: expected an object with value"),
    "a number": ({"conversations": [{"from": "human", "value": 1}]}, r"conversations\[0\]: value: expected text"),
    "unknown role": (
        {"conversations": [{"from": "system", "value": "a"}]},
        r"conversations\[0\]: from: expected human or gpt, got 'system'",
    ),
    "same role": (
        {"conversations": [*turns("a", "b"), *turns("c")[:1], *turns("c")]},
        r"conversations\[3\]: from: expected gpt, since turns alternate, got human",
    ),
    "begins with an answer": (
        {"conversations": turns("a", "b", "c")[1:]},
        r"conversations\[0\]: from: expected human, since turns alternate, got gpt",
    ),
    "no <image>": (entry("a", "b", **IMAGE), r"conversations\[0\]: expected <image> once, at the start or the end"),
    "two": (entry("<image><image> a", "b", **IMAGE), r"conversations\[0\]: expected <image> once, at the start"),
    "both ends": (entry("<image> a <image>", "b", **IMAGE), r"conversations\[0\]: expected <image> once, at the start"),
    "in the middle": (entry("a <image> b", "c", **IMAGE), r"conversations\[0\]: expected <image> once, at the start"),
    "again later": (
        entry("<image> a", "b", "<image> c", "d", **IMAGE),
        r"conversations\[2\]: <image>: expected it once, in the first turn",
    ),
    "in an answer": (entry("<image> a", "<image>", **IMAGE), r"conversations\[1\]: <image>: expected it once"),
    "without an image": (entry("<image> a", "b"), r"conversations\[0\]: <image>: expected an image for it, got"),
    "two images": (entry("<image> a", "b", image=["a", "b"]), "image: expected text, got"),
    "no file": (entry("<image> a", "b", image="coco/none.png"), r"images/coco/none\.png: No such file or directory"),
    "a folder": (entry("<image> a", "b", image="coco"), "images/coco: Is a directory"),
    "no path": (entry("<image> a", "b", image="a\0b"), "null byte"),
    "a broken image": (entry("<image> a", "b", image="coco/broken.png"), r"images/coco/broken\.png: no image"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_an_entry_is_one_sentence_with_its_place(tmp_path: Path, images: Path, case: str) -> None:
    (images / "broken.png").write_bytes(b"not at all")
    wrong, message = WRONG[case]
    source = write(tmp_path, entry("a", "b"), wrong, entry("<image>a", "b", **IMAGE))
    with pytest.raises(UserError, match=rf"chat\.json: \[1\]: (/.*)?{message}") as raised:
        source.read(1, SIDE, 2)
    assert "\n" not in str(raised.value)
    for i in (0, 2):
        source.read(i, SIDE, 2)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "[]", "expected at least one conversation, got none"),
        ("a.jsonl", "\n", "expected at least one conversation, got none"),
        ("a.json", "{}", r"expected JSON that is a list, but it begins with '\{'"),
        ("a.json", '[{"conversations": []}, {', "no JSON after 1 elements of the list"),
        ("a.jsonl", '{"a": 1}\n{"a"', "line 2: no JSON"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_sentence(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=rf"{name}: {message}"):
        Conversations(tmp_path / name, tmp_path)
    with pytest.raises(UserError, match=r"none\.json: No such file"):
        Conversations(tmp_path / "none.json", tmp_path)


def test_reading_a_file_through_shows_how_far_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, entry("a", "b"))
    assert capsys.readouterr().err == ""
    Conversations(tmp_path / "chat.json", tmp_path, progress=True)
    assert "reading chat.json" in capsys.readouterr().err


def test_errors_are_of_one_kind() -> None:
    assert issubclass(ConversationError, UserError)
