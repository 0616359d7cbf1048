"""JSON that Python wrote with NaN in it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from granvit.data.importers.base import json_items
from granvit.data.importers.finite_json import finite


def nulled(value: Any) -> Any:
    """What a parser must find: null for every number that is not finite."""
    return json.loads(json.dumps(value), parse_constant=lambda _: None)


def some_value(rng: random.Random, depth: int = 0) -> Any:
    texts = ('say "NaN"', "a\\", '\\"NaN', ": NaN, ", "[-Infinity]", "", "x" * 50, "豆")
    kind = rng.randrange(6 if depth < 4 else 4)
    if kind == 0:
        return rng.choice((float("nan"), float("inf"), float("-inf")))
    if kind == 1:
        return rng.choice(texts)
    if kind == 2:
        return rng.randrange(1000)
    if kind == 3:
        return None
    if kind == 4:
        return [some_value(rng, depth + 1) for _ in range(rng.randrange(6))]
    return {f"{rng.choice(texts)}{i}": some_value(rng, depth + 1) for i in range(rng.randrange(6))}


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1 << 16])
def test_at_any_size_of_blocks_only_numbers_change(tmp_path: Path, size: int) -> None:
    rng = random.Random()
    for _ in range(60):
        value = [float("nan"), [some_value(rng) for _ in range(4)]]
        path = tmp_path / "a.json"
        path.write_text(json.dumps(value, ensure_ascii=rng.random() < 0.5), encoding="utf-8")
        with path.open("rb") as file:
            reader = finite(file)
            read = b"".join(iter(lambda reader=reader: reader.read(size), b""))
        assert b"NaN" in path.read_bytes()
        assert json.loads(read, parse_constant=pytest.fail) == nulled(value)


def test_a_file_without_them_is_read_as_it_is(tmp_path: Path) -> None:
    for text in ("[1, 2]", ""):
        path = tmp_path / "a.json"
        path.write_text(text)
        with path.open("rb") as file:
            assert finite(file) is file
            assert file.read() == text.encode()


def test_items_have_null_in_their_place(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"bbox": [1.5, float("nan")], "name": "NaN"}]))
    assert list(json_items(path, "item")) == [{"bbox": [1.5, None], "name": "NaN"}]
    path.write_text('{"a": [], "b": NaN}')
    assert list(json_items(path, "a.item")) == []
