"""The sections of a run's report, each HTML, or "" where there is nothing for it."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from html import escape
from typing import Any

from granvit.data.shards import read_index
from granvit.errors import UserError
from granvit.eval.attention_picture import draw_looks, look
from granvit.eval.cases import LEADING, OUTCOMES, best_typical_worst, dealt, intervals, outcomes
from granvit.eval.features import Tower
from granvit.eval.opening import of_recipe, open_tower
from granvit.eval.report_charts import run_charts
from granvit.eval.report_html import case, explained, number, section, shown_pixels, smaller, table
from granvit.eval.report_run import BEFORE, Evaluated, Run, sources_of
from granvit.eval.scores import HEADINGS, score
from granvit.recipe import DataSource, Stage, to_yaml
from granvit.train.checkpoints import RESOLVED

TASK_NAMES = {
    "global_caption": "global captions",
    "bbox_to_caption": "Bbox2Caption: say what is in a box",
    "caption_to_bbox": "Caption2Bbox: find what a caption says",
    "question": "questions",
}
_MEANINGS = {
    "rouge_l": "words in common with the reference in their order, F-measure; 1 is all",
    "exact_match": "share of answers that are a reference but for case and punctuation at the end",
    "accuracy_50": "share of boxes that overlap with the true one by half or more",
    "accuracy_75": "the same by three quarters",
    "mean_iou": "mean overlap of found and true box, area in common over area of both; no box counts as 0",
    "no_box": "parse failures: share of answers in which no box can be read; lower is better",
    "anls": "likeness of letters to the best reference, 0 below one half",
    "vqa_accuracy": "share of people who agree, 3 of them being enough",
}
_CHARTS = {
    "loss": "Each term as it is optimised; points are held out.",
    "loss by task": "Mean loss of an answer's tokens.",
    "loss by task and box size": "Small is below 32, medium below 96 pixels of a square's side, in an image of 512.",
    "distillation by box size": "Distance between the region of the map and what the teacher sees in its crop.",
    "what the wrong image costs": "Loss with the images exchanged less the loss. At 0 the image is not used at all.",
    "learning rate": "The peak is the recipe's.",
    "throughput": "Images a second of training, evaluation left out.",
}
_GROUPS = {
    "size": "box size",
    "kind": "kind of image",
    "regions": "regions in the image",
    "covered": "share of the box under another box",
    "prompt": "how the question names the region",
}
# Of groups that are no names.
_ORDER = ("small", "medium", "large", "1", "2-4", "5-9", "10+", "none", "below half", "half or more")
_SHOWN = 4  # cases of each sort
_POINTS = 3  # regions that attention is shown of


def stages(run: Run) -> str:
    """What each stage did, a sentence each."""
    said = "".join(f"<li><b>{escape(stage.name)}</b>: {escape(sentence(stage))}</li>" for stage in run.recipe.stages)
    return section("stages", "What was trained", f'<ol class="stages">{said}</ol>')


def sentence(stage: Stage) -> str:
    """What a stage does."""
    how_long = f"{stage.steps} steps" if stage.steps is not None else f"{stage.epochs:g} epochs"
    parts = _listed(["region prompts" if part == "prompts" else part for part in stage.train])
    if stage.objective == "contrastive":
        what = "region features learn to match the words of their captions and no others"
    else:
        names = {"global_caption": "describe images", "bbox_to_caption": "say what is in a box",
                 "caption_to_bbox": "find what a caption says", "chat": "answer in conversations"}  # fmt: skip
        what = f"the model learns to {_listed([names[task] for task, weight in stage.tasks.items() if weight])}"
    if stage.distillation is not None:
        what += ", and each region's features learn from a close look at its crop"
    return f"{what}; {parts} {'train' if len(stage.train) > 1 else 'trains'}, {how_long} of {stage.batch_size} images."


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def losses(run: Run) -> str:
    """Held-out loss before and after each stage, beside the loss with the wrong image."""
    rows = []
    for stage in run.recipe.stages:
        lines = [x for x in run.metrics if x["stage"] == stage.name and any(name.startswith("heldout/") for name in x)]
        if not lines:
            continue
        term = "contrastive" if stage.objective == "contrastive" else "caption"
        before, after = (line.get(f"heldout/{term}") for line in (lines[0], lines[-1]))
        gap = lines[-1].get(f"heldout/wrong_image/{term}")
        wrong = None if gap is None or after is None else after + gap
        rows.append([explained(stage.name, f"{term} loss"), number(before), number(after), number(wrong), _signed(gap)])
    if not rows:
        return ""
    columns = ("stage", "before", "after", "with the wrong image", "the image is worth")
    about = (
        "Mean loss of held-out answers; of captions in nats a token. A model that ignores the image scores the same "
        "with the wrong one, which is chance level here."
    )
    return section("losses", "Held-out loss", table("before and after each stage", columns, rows), about=about)


def _signed(value: float | None) -> str:
    return number(None) if value is None else f"{value:+.3f}"


def metrics(run: Run) -> str:
    """Every metric before training and after each stage, beside chance."""
    parts = []
    for task in _tasks(run):
        having = [one for one in run.evaluations if task in one.report["metrics"]]
        chance = dealt(having[-1].of(task))
        control = next((run.controls[x.name] for x in reversed(having) if x.name in run.controls), None)
        ranges = {one.name: intervals(one.of(task)) for one in having}
        known = [name for name in HEADINGS if any(name in one.report["metrics"][task]["all"] for one in having)]
        rows = []
        for name in known:
            cells = [number(chance.get(name))]
            if control is not None:
                cells.append(number(control.report["metrics"].get(task, {}).get("all", {}).get(name)))
            for one in having:
                cells.append(number(one.report["metrics"][task]["all"].get(name), ranges[one.name].get(name)))
            rows.append([explained(HEADINGS[name], _MEANINGS[name]), *cells])
        counts = ["" for _ in range(1 + (control is not None))]
        counts += [f"{one.report['metrics'][task]['all']['count']:,}" for one in having]
        rows.append(["answers", *counts])
        columns = ["metric", "by chance", *(["wrong image"] if control is not None else []), *map(_title, having)]
        parts.append(table(TASK_NAMES.get(task, task), columns, rows))
    about = (
        "By chance: the answers of the last column, each given to a question about another image. Below each value its "
        "95 % interval: of shares by Wilson's formula, of other means by drawing images anew."
    )
    return section("metrics", "Metrics", *parts, about=about)


def _tasks(run: Run) -> list[str]:
    return list(dict.fromkeys(task for one in run.evaluations for task in one.report["metrics"]))


def _title(one: Evaluated) -> str:
    return "before training" if one.name == BEFORE else f"after {one.name}"


def curves(run: Run) -> str:
    """The charts of the log."""
    found = run_charts(run.metrics, [stage.name for stage in run.recipe.stages])
    parts = [
        f'<h3>{escape(subject.capitalize())}</h3><p class="about">{escape(_CHARTS[subject])}</p>'
        f'<div class="grid">{"".join(charts)}</div>'
        for subject, charts in found.items()
    ]
    return section("curves", "Curves", *parts)


def breakdown(run: Run) -> str:
    """The leading metric by what the questions are about."""
    parts = []
    for task in _tasks(run):
        having = [one for one in run.evaluations if task in one.report["metrics"]]
        by = having[-1].report["metrics"][task]["by"]
        metric = "accuracy_50" if task == "caption_to_bbox" else LEADING.get(task, "exact_match")
        for dimension, groups in by.items():
            if len(groups) < 2:
                continue
            rows = []
            for group in sorted(groups, key=lambda x: (_ORDER.index(x) if x in _ORDER else len(_ORDER), x)):
                each = [one.report["metrics"][task]["by"].get(dimension, {}).get(group, {}) for one in having]
                rows.append([escape(group), f"{groups[group]['count']:,}", *(number(x.get(metric)) for x in each)])
            named = _GROUPS.get(dimension, dimension)
            caption = f"{TASK_NAMES.get(task, task).partition(':')[0]}, {HEADINGS[metric]} by {named}"
            parts.append(table(caption, [named, "answers", *map(_title, having)], rows))
    return section("breakdown", "By size, kind and crowding", *parts)


def probes(run: Run) -> str:
    """What the features of the towers are good for without a language model."""
    if run.probes is None:
        return ""
    towers = run.probes["towers"]
    rows = []
    for pool in towers[0]["probes"]["regions"]:
        for kind, name, level, label in (
            ("retrieval", "recall_at_1", "chance", "share of regions whose nearest one in another image has its name"),
            ("retrieval", "map", "", "mean average precision of that search"),
            (
                "linear",
                "accuracy",
                "majority",
                "share of regions that a linear classifier names; chance: the commonest",
            ),
        ):
            each = [tower["probes"]["regions"].get(pool, {}).get(kind, {}) for tower in towers]
            title = f"{pool.replace('_', ' ')}: {name.replace('_', ' ')}"
            rows.append([explained(title, label), number(each[0].get(level)), *(_probed(x, name) for x in each)])
    each = [tower["probes"]["images"] for tower in towers]
    whole = explained("whole image: recall at 1", "share of changed views whose nearest image is their own")
    rows.append([whole, number(each[0].get("chance")), *(_probed(x, "recall_at_1") for x in each)])
    columns = ["probe", "by chance", *(tower["name"] for tower in towers)]
    about = "Towers compared without a language model: do their features tell regions apart, and whole images?"
    return section("probes", "Probes", table("probes of features", columns, rows), about=about)


def _probed(values: dict[str, float], name: str) -> str:
    has = "low" in values and name != "map"
    return number(values.get(name), (values["low"], values["high"]) if has else None)


def failures(run: Run) -> str:
    """How many answers failed in which way."""
    parts = []
    for task, kinds in OUTCOMES.items():
        having = [one for one in run.evaluations if one.of(task)]
        if not having:
            continue
        counts = [Counter(outcomes(one.of(task))) for one in having]
        rows = [
            [explained(kind, meaning), *(f"{c[kind]:,}<small>{c[kind] / c.total():.0%}</small>" for c in counts)]
            for kind, meaning in kinds.items()
        ]
        parts.append(table(TASK_NAMES[task], ["outcome", *map(_title, having)], rows))
    return section("failures", "How answers fail", *parts, about="The first outcome from above that holds is counted.")


def cases(run: Run) -> str:
    """Best, typical and worst answers with their images."""
    parts = []
    for task in _tasks(run):
        last = next(one for one in reversed(run.evaluations) if one.of(task))
        answers, sources = last.of(task), sources_of(last.report)
        scores = [score(answer)[LEADING[task]] for answer in answers]
        for sort, numbers in best_typical_worst(scores, _SHOWN).items():
            shown = []
            for i in numbers:
                source = sources.get(answers[i].source)
                shown.append(case(answers[i], None if source is None else source.read(answers[i].image, 512)))
            if shown:
                title = f"{TASK_NAMES[task].partition(':')[0]}, {sort}, {_title(last)}"
                parts.append(f'<h3>{escape(title)}</h3><div class="cases">{"".join(shown)}</div>')
    about = (
        "The true box is dashed, the found one solid. Best, median and worst by ROUGE-L, IoU or ANLS; equals are drawn."
    )
    return section("cases", "Cases", *parts, about=about)


def attention(run: Run, layer: int = -1) -> str:
    """Where the towers look, before training and after each stage that trained them."""
    towers = _towers(run)
    if not towers or not run.recipe.data.heldout:
        return ""
    source = of_recipe(run.recipe)[0]
    parts = []
    for i in range(min(2, len(source))):
        shown = source.read(i, run.recipe.model.image_size)
        pixels = shown_pixels(shown, max(shown.transform.target))
        regions = sorted(shown.record.regions, key=lambda region: -region.area())[:_POINTS]
        points = [((r.box[0] + r.box[2]) / 2, (r.box[1] + r.box[3]) / 2) for r in regions] or [(0.5, 0.5)]
        names = ", ".join(f"{n}: {region.caption}" for n, region in enumerate(regions, 1)) or "1: the middle"
        for similar, what in ((False, "Attention"), (True, "Similarity of features")):
            looks = [look(x, pixels, points, title=x.name, layers=(layer,), similarity=similar) for x in towers]
            file = io.BytesIO()
            draw_looks(pixels, looks, file)
            picture = smaller(file.getvalue())
            text = f"{what} of the tokens in the middle of {names}; rows: {', '.join(x.name for x in towers)}"
            parts.append(
                f'<figure class="look"><figcaption>{escape(text)}</figcaption>'
                f'<img src="{picture}" alt="{escape(text)}"></figure>'
            )
    about = (
        "Maps of the last layer, heads averaged, on one scale. Attention alone says little in towers that keep notes "
        "in arbitrary tokens; similarity of features shows what they take for the same thing."
    )
    return section("attention", "Attention before and after", *parts, about=about)


def _towers(run: Run) -> list[Tower]:
    from dataclasses import replace

    trained = [x.name for x in run.recipe.stages if "vision" in x.train and run.model(x.name).exists()]
    if not trained:
        return []
    before = replace(open_tower(str(run.folder / RESOLVED)), name="before")
    return [before, *(replace(open_tower(str(run.model(name))), name=f"after {name}") for name in trained)]


def data(run: Run) -> str:
    """What was read."""
    rows = []
    for role, sources in (("training", run.recipe.data.train), ("held out", run.recipe.data.heldout)):
        rows += [[role, *_described(source)] for source in sources]
    return section("data", "Data", table("sources", ["used for", "source", "images", "more"], rows))


def _described(source: DataSource) -> tuple[str, str, str]:
    if source.scenes is not None:
        scenes = source.scenes
        names = f", {len(scenes.names)} names" if scenes.names else ""
        kind = f"{scenes.kind}, split {scenes.split}, seed {scenes.seed}{names}"
        return "scenes composed while training", f"{scenes.count:,}", escape(kind)
    if source.shards is not None:
        try:
            count = f"{sum(info.samples for info in read_index(source.shards)):,}"
        except UserError:
            return escape(source.shards), number(None), "not there any more"
        return escape(source.shards), count, "shards"
    return escape(str(source.llava)), number(None), "conversations"


def recipe(run: Run) -> str:
    """The resolved recipe, folded."""
    text = escape(to_yaml(run.recipe))
    return section("recipe", "Recipe", f"<details><summary>every setting</summary><pre>{text}</pre></details>")


def facts(run: Run, counts: dict[str, int]) -> list[tuple[str, str]]:
    """The headline's names and values."""
    made: dict[str, Any] = run.evaluations[-1].report if run.evaluations else run.probes or {}
    total = sum(counts.values())
    by_part = ", ".join(f"{part} {count / 1e6:,.2f} M" for part, count in counts.items())
    return [
        ("recipe", f"{run.recipe.name}, {len(run.recipe.stages)} stages"),
        ("parameters", f"{total / 1e6:,.2f} M ({by_part})" if total else "not known: no stage is finished"),
        ("evaluated", made.get("date", "not yet")),
        ("machine", made.get("device") or "not recorded"),
        ("commit", _short(made.get("commit")) or "not recorded"),
        (
            "versions",
            ", ".join(f"{x} {made[x]}" for x in ("granvit", "torch", "transformers") if made.get(x)) or "not recorded",
        ),
    ]


def _short(commit: str | None) -> str:
    name, dash, dirty = (commit or "").partition("-")
    return name[:12] + dash + dirty
