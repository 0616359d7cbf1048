"""From a checkpoint to a folder that others can use."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from granvit.export.card import Card, write_card
from granvit.export.llava import notes_on, write_llava
from granvit.export.region_head import write_region_head
from granvit.export.source import find
from granvit.export.timm import write_timm
from granvit.export.verify import Difference, verify_llava, verify_region_head, verify_timm, verify_vision
from granvit.export.vision import write_vision
from granvit.export.weights import DTYPES, ExportError, cast_parameters, refuse_existing, whole_folder
from granvit.model.checkpoint import load

TARGETS = ("llava", "vision", "region-head")
TIMM = "timm"


def export(
    checkpoint: str | Path,
    to: str,
    *,
    output: str | Path | None = None,
    dtype: str | None = None,
    timm: bool = False,
    licence: str | None = None,
    verify: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> Path:
    """Writes a trained model in a form that needs no granvit, or its region head alone, with a model card.

    Args:
        checkpoint: folder of a model, or of a run, whose last finished stage is then meant.
        to: one of :data:`TARGETS`.
        output: folder to write; by default named after `to`, beside the model.
        dtype: of the weights, ``"float32"`` or ``"bfloat16"``; by default that of the run's arithmetic, or float32.
        timm: for ``"vision"``, also what timm loads, in the folder ``timm`` of the output.
        licence: identifier of the Hugging Face hub, for the card.
        verify: compare the export with the model before the folder gets its name.
        overwrite: replace an earlier export.
        console: for lines on what is done; by default standard output.

    Returns:
        The folder.

    Raises:
        UserError: what cannot be found, exported or written, or is not the same afterwards; then nothing is left.
    """
    console = console or Console(width=None)
    if to not in TARGETS:
        raise ExportError(f"--to: expected one of {', '.join(TARGETS)}, got {to!r}")
    if timm and to != "vision":
        raise ExportError(f"--timm: goes with --to vision, not with --to {to}")
    found = find(checkpoint)
    dtype = dtype or found.dtype
    if dtype not in DTYPES:
        raise ExportError(f"--dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    folder = Path(output) if output is not None else found.model.resolve().parent / to
    refuse_existing(folder, overwrite)
    where = f"{found.model}" + (f", the model of stage {found.stage}" if found.stage else "")
    console.print(f"exporting {where} to {to} in {dtype}", highlight=False, markup=False, soft_wrap=True)
    loaded = load(found.model)
    model, tokenizer, size = loaded.model.eval(), loaded.tokenizer, loaded.image_size
    cast_parameters(model, DTYPES[dtype])
    notes = notes_on(model, size) if to == "llava" else []
    for note in notes:
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    card = Card.of(found, to, model, size, dtype, timm=timm, licence=licence, notes=notes)
    with whole_folder(folder) as partial:
        if to == "llava":
            write_llava(model, tokenizer, size, dtype, partial)
        elif to == "vision":
            write_vision(model, size, dtype, partial)
            if timm:
                (partial / TIMM).mkdir()
                write_timm(model, size, partial / TIMM)
        else:
            write_region_head(model, size, dtype, partial)
        differences: list[Difference] = []
        if verify:
            if to == "llava":
                differences = verify_llava(model, tokenizer, size, dtype, partial)
            elif to == "vision":
                differences = verify_vision(model, size, dtype, partial)
                if timm:
                    differences += verify_timm(model, size, partial / TIMM)
            else:
                differences = verify_region_head(model, size, dtype, partial)
            for one in differences:
                console.print(f"verified in {dtype}: {one}", highlight=False, soft_wrap=True)
                if not one.within:
                    raise ExportError(f"{folder}: not written, since the export is not the model: {one}")
        write_card(card, differences, partial / "README.md")
    console.print(f"wrote {folder}", highlight=False, markup=False, soft_wrap=True)
    return folder
