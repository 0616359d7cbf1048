"""The teacher is what its formula says, also after many small steps, and never trains."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from granvit.train.teacher import Teacher


class Tower(nn.Module):
    """Matrices, vectors, dropout, and buffers of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach() for name, t in (*module.named_parameters(), *module.named_buffers())}


def move(student: nn.Module) -> None:
    """Anything that an optimizer and a forward pass may do to it."""
    for tensor in tensors(student).values():
        if tensor.is_floating_point():
            tensor.add_(torch.randn_like(tensor) * 0.1)
        else:
            tensor.add_(torch.randint(1, 9, ()))


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.9999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_after_many_steps_it_is_the_formula_in_float64(decay: float, dtype: torch.dtype) -> None:
    student = Tower().to(dtype)
    teacher = Teacher(student, decay)
    start = {name: tensor.double().clone() for name, tensor in tensors(student).items()}
    exact = dict(start)
    steps = 200
    for _ in range(steps):
        move(student)
        teacher.update(student)
        exact = {
            name: decay * exact[name] + (1 - decay) * now.double() if now.is_floating_point() else now.double()
            for name, now in tensors(student).items()
        }
    for name, tensor in tensors(teacher.tower).items():
        # A rounding of float32 a step, at most; of bfloat16 it would be 65536 times as much.
        bound = steps * torch.finfo(torch.float32).eps * float(exact[name].abs().max())
        torch.testing.assert_close(tensor.double(), exact[name], rtol=0, atol=bound)
        assert float((exact[name] - start[name]).abs().max()) > 20 * bound, name  # so it did move


def test_it_starts_as_a_copy_in_float32() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        student = Tower().to(dtype)
        move(student)
        teacher = Teacher(student, 0.9)
        before = copy.deepcopy(tensors(teacher.tower))
        for name, tensor in tensors(student).items():
            copied = tensors(teacher.tower)[name]
            assert torch.equal(copied, tensor.to(copied.dtype))
            assert copied.dtype == (torch.float32 if tensor.is_floating_point() else tensor.dtype)
        move(student)  # which must not move the teacher
        assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(teacher.tower).items())


def test_the_student_is_left_as_it_is() -> None:
    student = Tower().bfloat16()
    before = copy.deepcopy(student.state_dict())
    teacher = Teacher(student, 0.5)
    teacher.update(student)
    assert student.training
    assert all(parameter.requires_grad and parameter.dtype == torch.bfloat16 for parameter in student.parameters())
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_it_has_no_gradients_and_stays_in_evaluation_mode() -> None:
    student = Tower()
    holder = nn.ModuleDict({"student": student, "teacher": Teacher(student, 0.9)})
    teacher = holder["teacher"]
    assert isinstance(teacher, Teacher)
    for module in (holder, teacher):
        module.train()
        assert student.training
        assert not any(m.training for m in teacher.modules())
    x = torch.randn(4, 7)
    assert torch.equal(teacher.tower(x), teacher.tower(x))  # no dropout
    (student(x) - teacher.tower(x)).square().sum().backward()
    teacher.update(student)
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(p.grad_fn is None for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())


def test_it_is_saved_with_what_holds_it() -> None:
    student = Tower()
    one, other = (nn.ModuleDict({"teacher": Teacher(Tower(), 0.9)}) for _ in range(2))
    for _ in range(3):
        move(student)
        teacher = one["teacher"]
        assert isinstance(teacher, Teacher)
        teacher.update(student)
    other.load_state_dict(one.state_dict())
    expected = tensors(one)
    assert len(expected) == 8
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors(other).items())


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5, float("nan")])
def test_a_decay_that_is_none_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=r"Teacher: decay: expected at least 0 and less than 1, got"):
        Teacher(Tower(), decay)


def test_another_tower_is_refused() -> None:
    with pytest.raises(ValueError, match="shorter|longer"):
        Teacher(Tower(), 0.9).update(nn.Linear(3, 3))
