"""The model, the batch and the optimizer of the step benchmark, and our form of the step."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)

from benchmarks import workloads
from benchmarks.peers.train_step import Done, Losses, Models, Plain, Scene, Stock, exact, wide
from granvit.data.tasks import Pair
from granvit.model._published import PUBLISHED
from granvit.model.assemble import freeze
from granvit.model.granvit import GranViT
from granvit.model.packing import Sample, pack
from granvit.model.prompts import Prompts, add_special_tokens
from granvit.model.tower import blocks_of
from granvit.recipe import Distillation, Stage
from granvit.train import objective as objective_module
from granvit.train.objective import Objective

CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NATIVE = "granvit_native"  # the form whose crops keep their size, hence with another distillation loss
# Largest errors of a match: of the answers' losses as a share of their spread (with random weights their mean hardly
# tells one model from another), and of the distillation loss as a share of itself. Right forms of narrow models as deep
# as the paper's are at 0.04 and 0.003 in bfloat16, and at 1e-6 in float32; a mask that does not keep the answers apart
# is at 0.96, boxes that are half a token off at 0.012.
TOLERANCE = {torch.float32: (1e-3, 1e-4), torch.bfloat16: (0.1, 0.01)}


@dataclass(frozen=True)
class Workload:
    """A batch and the model that it trains.

    Attributes:
        images: in the batch.
        regions: of an image; each is asked about and distilled.
        size: side of the frame in pixels.
        vision: config of the SigLIP tower; None is that of the paper.
        language: config of the Qwen2 language model; likewise.
        dtype: of the arithmetic and of frozen weights.
        spread: standard deviation of the language model's random weights.
        lengths: tokens of an answer about the image, of a question and of an answer about a region; a quarter more or
            less.
        max_length: tokens of a row, at most; rows get a multiple of 64.
    """

    images: int
    regions: int
    size: int
    vision: dict[str, Any] | None = None
    language: dict[str, Any] | None = None
    dtype: torch.dtype = torch.float32
    spread: float = 0.02
    lengths: tuple[int, int, int] = (128, 32, 12)
    max_length: int = 2048


WORKLOADS = {
    "paper": Workload(8, 6, 512, dtype=torch.bfloat16),
    "cpu": Workload(
        4,
        6,
        64,
        vision={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "patch_size": 8,
        },
        language={
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
        spread=0.1,
        lengths=(16, 20, 6),
        max_length=512,
    ),
}


@dataclass
class Clock:
    """Tells how long each part of a step took; between events on a GPU, so that nothing waits before the end."""

    device: torch.device
    marks: list[tuple[str, Any]] = field(default_factory=list)

    def done(self, name: str) -> None:
        """The part of that name ends here."""
        mark: Any = time.perf_counter()
        if self.device.type == "cuda":
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        self.marks.append((name, mark))

    def seconds(self) -> dict[str, float]:
        """Of each part; the first mark is where the step began."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        found: dict[str, float] = {}
        for (_, begin), (name, end) in zip(self.marks, self.marks[1:], strict=False):
            spent = end - begin if isinstance(end, float) else begin.elapsed_time(end) / 1e3
            found[name] = found.get(name, 0.0) + spent
        return found


class Ours:
    """The objective of a stage, as the trainer calls it."""

    def __init__(self, objective: Objective, batch: Any, crops: str) -> None:
        assert objective.distillation is not None
        self.objective = objective
        self.distillation = replace(objective.distillation, crops=crops)
        objective.distillation = self.distillation  # what micro() reads
        micro = objective.micro(batch)
        self.micro = micro.to(objective.model.llava.lm_head.weight.device)
        image = micro.batch.image.flatten()[micro.batch.supervised]  # rows hold images in another order
        self.order = torch.tensor(micro.batch.order)[image].argsort(stable=True).to(self.micro.batch.pixels.device)

    def losses(self, done: Done) -> Losses:
        self.objective.distillation = self.distillation
        with self._parts(done):
            losses = self.objective(self.micro)
        done("distillation loss")
        assert losses.output is not None
        assert losses.caption is not None
        return Losses(losses.total, losses.caption, losses.output.token_loss.detach()[self.order])

    @contextmanager
    def _parts(self, done: Done) -> Iterator[None]:
        """Where the parts end, seen from outside: as the projector and the loss are called, and the model returns."""
        model, loss = self.objective.model, objective_module.region_distill_loss

        def distill(*arguments: Any, **options: Any) -> Tensor:
            done("teacher crops")
            return loss(*arguments, **options)

        hooks = [
            model.llava.model.multi_modal_projector.register_forward_pre_hook(lambda *_: done("student forward")),
            model.register_forward_hook(lambda *_: done("LLM forward")),
        ]
        try:
            with mock.patch.object(objective_module, "region_distill_loss", distill):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def move_teacher(self) -> None:
        assert self.objective.teacher is not None
        self.objective.teacher.update(self.objective.tower)


class Bed:
    """What all forms of the step share: weights, teacher, optimizer and batch. They step it in turn."""

    def __init__(self, workload: Workload, device: torch.device, *, seed: int = workloads.SEED) -> None:
        self.workload, self.device = workload, device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            self._build()
        self.scenes = scenes(workload, seed)
        samples = [_sample(scene, workload.size) for scene in self.scenes]
        tokens = (workload.size // self.shared.tower.config.patch_size) ** 2
        self.batch = pack(samples, self.prompts, tokens, workload.max_length, pad_to_multiple_of=64)
        if self.batch.dropped:
            raise ValueError(f"train_step: max_length: expected room for all questions, lost {self.batch.dropped}")
        trained = [p for p in self.objective.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0, fused=device.type == "cuda")
        self._start = {name: x.detach().to("cpu", copy=True) for name, x in self._moving()}
        self._exact: dict[bool, tuple[Tensor, float]] = {}

    def _build(self) -> None:
        workload, tokenizer = self.workload, byte_tokenizer()
        config = llava_config(workload)
        with torch.device(self.device):
            llava = LlavaForConditionalGeneration(config)
        add_special_tokens(tokenizer, llava)
        with torch.no_grad():
            for layer in llava.model.language_model.layers:
                # Attention as even as that of new weights would hide a wrong mask from the losses.
                layer.self_attn.q_proj.weight.mul_(2)
                layer.self_attn.k_proj.weight.mul_(2)
        model = GranViT(llava)
        low = None if workload.dtype == torch.float32 else workload.dtype
        freeze(model, ("vision", "projector"), frozen_dtype=low)
        stage = Stage(
            name="step",
            train=("vision", "projector"),
            tasks={"global_caption": 1.0, "bbox_to_caption": 1.0},
            regions=workload.regions,
            batch_size=workload.images,
            steps=1,
            distillation=Distillation(),
        )
        self.prompts = Prompts(tokenizer)
        self.objective = Objective(model, stage).to(self.device)
        self.objective.train()
        assert self.objective.teacher is not None
        with torch.no_grad():  # a teacher that equals its student would hide which of the two saw what
            for parameter in self.objective.teacher.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1 * parameter.std(correction=0))
        self.shared = Models(llava, self.objective.teacher.tower, 0.9, tokenizer)

    def _moving(self) -> Iterator[tuple[str, Tensor]]:
        """What a step changes."""
        for name, parameter in self.objective.named_parameters():
            if parameter.requires_grad or name.startswith("teacher."):
                yield name, parameter

    @torch.no_grad()
    def reset(self) -> None:
        """Weights and teacher as they were at the start."""
        for name, parameter in self._moving():
            parameter.copy_(self._start[name])
        self.optimizer.zero_grad(set_to_none=True)

    def _compute_exact(self, native: bool) -> None:
        """What the losses should be: in float32, one sequence and one crop at a time, of the weights of the start."""
        if native not in self._exact:
            shared = Models(wide(self.shared.llava), wide(self.shared.teacher), 0.9, self.shared.tokenizer)
            tokens, distillation = exact(shared, self.scenes, native=native)
            self._exact[native] = tokens.cpu(), distillation

    def form(self, provider: str) -> Ours | Stock | Plain:
        """One form of the step, at the start, with the attention that it uses and its layers compiled or not."""
        name = provider.removesuffix("_compiled")
        self._compile(compiled=provider != name)
        language = self.shared.llava.model.language_model
        flex = name.startswith("granvit") and self.device.type == "cuda"
        language.set_attn_implementation("flex_attention" if flex else "sdpa")
        self.reset()
        self._compute_exact(native=name == NATIVE)
        if name == "stock":
            return Stock(self.shared, self.scenes)
        if name == "plain":
            return Plain(self.shared, self.scenes)
        return Ours(self.objective, self.batch, "native" if name == NATIVE else "resize")

    def _compile(self, *, compiled: bool) -> None:
        """As a stage with ``compile`` does; torch has no public way back."""
        torch._dynamo.reset()
        assert self.objective.teacher is not None
        towers = [*blocks_of(self.shared.tower), *blocks_of(self.objective.teacher.tower)]
        for block in [*towers, *self.shared.llava.model.language_model.layers]:
            block._compiled_call_impl = None
            if compiled:
                block.compile(dynamic=None)

    def step(self, form: Ours | Stock | Plain, clock: Clock) -> Losses:
        """One step, from the batch on the device to the moved teacher."""
        clock.done("")
        low = self.workload.dtype
        with torch.autocast(self.device.type, low, enabled=low != torch.float32):
            losses = form.losses(clock.done)
        losses.total.backward()
        clock.done("backward")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        form.move_teacher()
        clock.done("optimizer + EMA")
        return losses

    def match(self, provider: str, losses: Losses) -> tuple[bool, dict[str, float]]:
        """Whether the losses of the first step are the exact ones; and their errors, as `TOLERANCE` has them."""
        answers, distillation = self._exact[provider.removesuffix("_compiled") == NATIVE]
        tokens, caption = losses.tokens.float().cpu(), float(losses.caption)
        found = float(losses.total.detach()) - caption
        spread = float(answers.std())
        same = tokens.shape == answers.shape
        errors = {
            "answers error": float((tokens - answers).square().mean().sqrt()) / spread if same else float("inf"),
            "caption error": abs(caption - float(answers.mean())) / spread,
            "distillation error": abs(found - distillation) / distillation,
        }
        most, share = TOLERANCE[self.workload.dtype]
        limits = (most, most, share)
        return all(error <= limit for error, limit in zip(errors.values(), limits, strict=True)), errors


def llava_config(workload: Workload) -> LlavaConfig:
    """The config of the model that a workload trains."""
    vision = workload.vision or PUBLISHED["google/siglip2-so400m-patch16-512"][0]
    language = workload.language or PUBLISHED["Qwen/Qwen2.5-1.5B-Instruct"][0]
    tower = SiglipVisionConfig(**_settings(vision) | {"image_size": workload.size})
    tower.vision_use_head = False
    return LlavaConfig(
        vision_config=tower,
        text_config=Qwen2Config(**_settings(language), initializer_range=workload.spread),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=language["tie_word_embeddings"],
        attn_implementation="sdpa",
    )


def free(device: torch.device) -> None:
    """Gives back what a form that ran out of memory has left behind."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """A token for every byte: texts of a given length, without a vocabulary to download."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, chat_template=CHAT, eos_token="<|im_end|>", pad_token="<|im_end|>"
    )


def scenes(workload: Workload, seed: int) -> list[Scene]:
    """Random pixels, letters and boxes with corners on pixels, the same ones for the same seed."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def text(length: int) -> str:
        drawn = max(1, round(length * rng.uniform(0.75, 1.25)))  # rows of a real batch differ in length
        return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=drawn))

    about_image, question, answer = workload.lengths
    found = []
    for _ in range(workload.images):
        asked = [(text(question), text(about_image))]
        asked += [(text(question), text(answer)) for _ in range(workload.regions)]
        boxes = [_box(rng, workload.size) for _ in range(workload.regions)]
        coarse = torch.rand(1, 3, 8, 8, generator=generator)  # smooth, as images are, so that crops differ
        pixels = nn.functional.interpolate(coarse, (workload.size, workload.size), mode="bilinear")[0]
        noise = torch.rand(pixels.shape, generator=generator) * 0.2
        found.append(Scene(((pixels * 0.8 + noise) * 255).to(torch.uint8), boxes, asked))
    return found


def _box(rng: random.Random, size: int) -> list[int]:
    sides = [max(1, round(rng.uniform(0.1, 0.8) * size)) for _ in range(2)]
    x, y = (rng.randint(0, size - side) for side in sides)
    return [x, y, x + sides[0], y + sides[1]]


def _sample(scene: Scene, size: int) -> Sample:
    """The same scene as the packing takes it."""
    boxes = torch.tensor(scene.boxes, dtype=torch.float32) / size
    (question, answer), *rest = scene.asked
    pairs = [Pair("global_caption", question, answer)]
    pairs += [
        Pair("bbox_to_caption", q, a, i, tuple(box))
        for i, ((q, a), box) in enumerate(zip(rest, boxes.tolist(), strict=True))
    ]
    return Sample(scene.pixels[None], pairs, boxes)


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != "model_type"}
