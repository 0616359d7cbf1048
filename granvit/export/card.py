"""The model card of an export: what it is, how it was made, how it is used."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from granvit._recipe_reading import dump_yaml
from granvit.data.shards import INDEX, ShardError, read_index, sha256
from granvit.data.tasks import Templates
from granvit.export import _snippets as snippets
from granvit.export.source import Found
from granvit.export.verify import Difference
from granvit.model.granvit import GranViT
from granvit.recipe import DataSource, Recipe, to_yaml
from granvit.train.log import METRICS, read_metrics

_LIBRARY = {"llava": "transformers", "vision": "transformers", "region-head": "granvit"}
_PIPELINE = {"llava": "image-text-to-text", "vision": "image-feature-extraction", "region-head": "feature-extraction"}


@dataclass(frozen=True)
class Card:
    """What a card says, but for the verification.

    Attributes:
        front: of the file, as the Hugging Face hub reads it.
        body: in Markdown, a paragraph or block each.
    """

    front: dict[str, Any]
    body: tuple[str, ...]

    @classmethod
    def of(
        cls,
        found: Found,
        to: str,
        model: GranViT,
        image_size: int,
        dtype: str,
        *,
        timm: bool = False,
        licence: str | None = None,
        notes: Sequence[str] = (),
    ) -> Card:
        """The card of an export.

        Args:
            found: the model and its run.
            to: kind of the export.
            model: that was exported.
            image_size: side of the square frame in pixels.
            dtype: of the weights.
            timm: whether a folder for timm lies in the export.
            licence: identifier of the hub; None leaves it to the user.
            notes: sentences on what a user should know.

        Raises:
            UserError: the log or an index of the run is broken.
        """
        recipe = found.recipe
        front: dict[str, Any] = {"library_name": _LIBRARY[to], "pipeline_tag": _PIPELINE[to]}
        if licence is not None:
            front["license"] = licence
        bases = _hub_names(recipe, found.stage) if recipe else []
        if bases:
            front["base_model"] = bases if to == "llava" else bases[:1]
        front["tags"] = ["granvit", "regions", to, *(["timm"] if timm else [])]
        body = [f"# {recipe.name if recipe else found.model.name}", _what(found, to, model, image_size, dtype)]
        body += [f"{note}." for note in notes]
        vision = model.llava.config.vision_config
        side, width = image_size // vision.patch_size, vision.hidden_size
        code = snippets.of(to, question=_question(found), side=side, width=width)
        body += ["## Use", f"```python\n{code}```"]
        if timm:
            body += ["With timm:", f"```python\n{snippets.of('timm')}```"]
        body += ["## Boxes", _boxes(found, to, image_size)]
        if recipe is not None and found.run is not None:
            body += ["## Data", _data(recipe)]
            body += ["## Held-out figures", _figures(recipe, found.run, found.stage)]
            body += ["## Recipe", f"```yaml\n{to_yaml(recipe)}```"]
        else:
            body += ["## Training", "The run that this model is from was not at hand when it was exported."]
        stated = f"This export: {licence}." if licence else "**To be filled in** (`license:` above is missing too)."
        body += [
            "## Licence",
            f"{stated} The licences of the tower, of the language model and of the data go on applying.",
        ]
        return cls(front, tuple(body))


def write_card(card: Card, differences: Sequence[Difference], path: Path) -> None:
    """Writes the card.

    Args:
        card: to write.
        differences: that the verification found; none where there was none.
        path: of the file.

    Raises:
        OSError: as the system has it.
    """
    verified = "\n".join(f"- {one}" for one in differences) or "Not verified; `granvit export --verify` does that."
    text = f"---\n{dump_yaml(card.front)}---\n\n" + "\n\n".join([*card.body, "## Verification", verified]) + "\n"
    path.write_text(text, encoding="utf-8")


def _hub_names(recipe: Recipe, stage: str | None) -> list[str]:
    """The tower and the language model on the hub that the weights began with."""
    if recipe.start is not None:
        return []  # of another run
    language = recipe.model.language
    for one in recipe.stages:
        language = one.language or language
        if one.name == stage:
            break
    names = (recipe.model.vision.name, language.name)
    return [name for name in names if name is not None and name.count("/") == 1 and not Path(name).is_dir()]


def _what(found: Found, to: str, model: GranViT, image_size: int, dtype: str) -> str:
    vision, text = model.llava.config.vision_config, model.llava.config.text_config
    tower = f"a tower of type {vision.model_type} ({vision.num_hidden_layers} layers of {vision.hidden_size} channels)"
    kinds = {
        "llava": f"A LLaVA model of {tower} and a language model of type {text.model_type}, width {text.hidden_size}",
        "vision": f"The vision tower of a LLaVA model: {tower}",
        "region-head": "What makes a token of a box: " + ("a box embedding" if model.box_prompt else "a region pool")
        + f" with its projector, for {tower}",
    }  # fmt: skip
    trained = "" if found.stage is None else f", as it was after stage {found.stage}"
    return (
        f"{kinds[to]}. Frames are {image_size} pixels square, patches {vision.patch_size}, weights {dtype}. "
        f"Trained with granvit, an implementation of the GranViT recipe (arXiv 2510.21501){trained}."
    )


def _question(found: Found) -> str:
    stage = next((s for s in found.recipe.stages if s.name == found.stage), None) if found.recipe else None
    if stage is not None and stage.tasks.get("global_caption"):
        return Templates.global_caption[0]
    if stage is not None and stage.tasks.get("caption_to_bbox"):
        return Templates.caption_to_bbox[0].format(caption="a red apple")
    if stage is not None and stage.tasks.get("bbox_to_caption"):
        return Templates.bbox_to_caption[0].format(box="[0.100, 0.200, 0.500, 0.600]")
    return Templates.global_caption[0]


def _boxes(found: Found, to: str, image_size: int) -> str:
    styles = {
        "relative": "shares of the frame, `[0.100, 0.200, 0.500, 0.600]`",
        "thousandths": "thousandths of the frame, `[100, 200, 500, 600]`",
        "pixels": f"pixels of the frame of {image_size}",
    }
    stage = next((s for s in found.recipe.stages if s.name == found.stage), None) if found.recipe else None
    written = f" In text they are written as {styles[stage.style]}." if stage is not None and to == "llava" else ""
    return (
        "Boxes are x0, y0, x1, y1 relative to the **square frame**, 0 to 1, not to the image: an image is scaled to "
        f"fit into the middle of a black frame, with bars beside it or above and below.{written} The frame is the "
        "square around the image, so shares of one become pixels of the other by\n\n"
        f"```python\n{snippets.MAPPING}```"
    )


def _data(recipe: Recipe) -> str:
    lines = [f"- {_source(source)}" for source in recipe.data.train]
    lines += [f"- held out: {_source(source)}" for source in recipe.data.heldout]
    return "\n".join(lines)


def _source(source: DataSource) -> str:
    if source.scenes is not None:
        scenes = source.scenes
        return (
            f"{scenes.count} scenes of kind {scenes.kind} composed by granvit, split {scenes.split}, seed {scenes.seed}"
            + (f", of {len(scenes.names)} pictograms" if scenes.names else "")
        )
    if source.shards is not None:
        folder = Path(source.shards)
        try:
            shards, checksum = read_index(folder), sha256(folder / INDEX)
        except ShardError as error:
            return f"shards `{folder}`, which could not be read when this was exported ({error})"
        samples, regions = sum(s.samples for s in shards), sum(s.regions for s in shards)
        return f"shards `{folder}`: {samples} images, {regions} regions, sha256 of the index `{checksum}`"
    return f"conversations `{source.llava}`"


def _figures(recipe: Recipe, run: Path, stage: str | None) -> str:
    """The last held-out line of each stage up to the exported one."""
    path = run / METRICS
    lines = read_metrics(path) if path.is_file() else []
    found: dict[str, dict[str, float]] = {}
    for line in lines:
        own = {name.removeprefix("heldout/"): x for name, x in line.items() if name.startswith("heldout/")}
        if own:
            found[line["stage"]] = {"step": line["step"], **own}
    rows = []
    for one in recipe.stages:
        for name, value in found.get(one.name, {}).items():
            rows.append(f"| {one.name} | {name} | {json.dumps(round(value, 4))} |")
        if one.name == stage:
            break
    return "\n".join(["| stage | figure | value |", "| --- | --- | --- |", *rows]) if rows else "None in the log."
