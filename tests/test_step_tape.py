"""Training steps on the CPU that are recorded and replayed: bit by bit those of ordinary steps."""

from __future__ import annotations

import copy
import threading
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from recorded_steps import (
    SETTINGS,
    SMALL,
    Batch,
    assert_bitwise,
    batches,
    first_loss,
    refusals_fail,  # noqa: F401
    sgd,
    small_model,
    small_resnet,
)
from torch import Tensor, nn

import gdfast
import gdfast.losses
from gdfast import GraphedStep, models, native, optim


@pytest.mark.parametrize("threads", [1, 2])
def test_simple_cnn(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_bitwise(models.create("cnn"), batches(6, 16, 1, 28, 28))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_fused_resnet(layout: torch.memory_format) -> None:
    model = small_resnet().to(memory_format=layout)
    assert_bitwise(model, batches(5, 2, 3, 16, 16, layout=layout))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, gdfast.nn.BatchNorm2d])
def test_layers_that_are_not_fused(norm: Any) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), norm(8), nn.SiLU(), gdfast.nn.Conv2d(8, 12, 3, groups=2), nn.GELU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(48, 10),
    )  # fmt: skip
    step = assert_bitwise(model, batches(6, *SMALL))
    norms = [m for m in step.model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert [int(m.num_batches_tracked) for m in norms] == [6]


def test_dropout_is_drawn_anew() -> None:
    assert_bitwise(small_model(nn.Dropout(0.3), nn.Dropout2d(0.2)), batches(7, *SMALL))


def test_batches_of_several_kinds() -> None:
    given = batches(5, *SMALL) + batches(5, 3, *SMALL[1:])
    given = given[::2] + given[1::2]
    assert_bitwise(small_model(), given, graphs=2)


def test_another_kind_of_batch_in_between_is_an_ordinary_step() -> None:
    given = batches(9, *SMALL)
    given[5:6] = batches(1, 3, *SMALL[1:])
    assert_bitwise(small_model(), given)


def test_batches_with_gaps_that_share_memory() -> None:
    def criterion(output: Tensor, other: Tensor) -> Tensor:
        return (output.mean() - other.mean()).square()

    given: list[Batch] = [(x[..., 1:], x[..., :-1]) for x, _ in batches(6, 4, 3, 8, 9)]
    assert_bitwise(small_model(), given, criterion=criterion)


def test_a_tensor_given_twice_may_be_two_tensors_later() -> None:
    def criterion(output: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return (output.mean() + first.mean() - 2 * second.mean()).square()

    given: list[Batch] = [(x, x, x) for x, _ in batches(4, *SMALL)]
    given += [(x, x + 1, x * 2) for x, _ in batches(3, *SMALL)]
    assert_bitwise(small_model(), given, criterion=criterion)


def test_a_batch_that_the_model_writes_to() -> None:
    class Halves(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(0.5)

    assert_bitwise(nn.Sequential(Halves(), small_model()), batches(6, *SMALL))


def test_schedules_and_assigned_rates() -> None:
    schedules: dict[int, Any] = {}

    def change(index: int, model: nn.Module, optimizer: Any) -> None:
        if index == 0:
            schedules[id(optimizer)] = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
        elif index == 7:
            optimizer.param_groups[0]["lr"] = 0.01
        else:
            schedules[id(optimizer)].step()

    given = batches(10, *SMALL)
    step = assert_bitwise(small_model(), given, change=change)
    assert isinstance(step.optimizer.param_groups[0]["lr"], Tensor)


@pytest.mark.parametrize("name", ["momentum", "lr"])
def test_other_settings_are_recorded_anew(name: str) -> None:
    def change(index: int, model: nn.Module, optimizer: Any) -> None:
        if index == 5:
            optimizer.param_groups[0][name] = 0.01

    make = {"momentum": sgd, "lr": partial(torch.optim.SGD, **SETTINGS)}[name]
    assert_bitwise(small_model(), batches(9, *SMALL), change=change, make=make)


def test_settings_assigned_anew_with_the_same_value_keep_the_record() -> None:
    model = small_model()
    step = GraphedStep(model, F.cross_entropy, sgd(model.parameters()), warmup=1)
    lengths = []
    for index, batch in enumerate(batches(5, *SMALL)):
        step.optimizer.param_groups[0]["momentum"] = float(f"0.9{0:0{index}d}")
        step(*batch)
        lengths.append(step.graphs)
    assert lengths == [0, 1, 1, 1, 1]


@pytest.mark.parametrize(
    "make",
    [
        partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        partial(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True),
        partial(torch.optim.AdamW, lr=0.01, fused=True),
        partial(torch.optim.SGD, lr=0.1, weight_decay=0.01, foreach=True),
        partial(torch.optim.RMSprop, lr=0.01, weight_decay=0.01, foreach=True),
        partial(optim.SGD, lr=0.1, momentum=0.9, in_backward=True),
        partial(optim.SGD, lr=0.1, momentum=0.9, fused_zero_grad=True),
        partial(optim.SGD, lr=0.1, dampening=0.5, momentum=0.5, maximize=True),
    ],
)
def test_optimizers(make: Any) -> None:
    assert_bitwise(small_model(), batches(6, *SMALL), make=make)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_our_loss(smoothing: float) -> None:
    criterion = partial(gdfast.losses.cross_entropy, label_smoothing=smoothing)
    given = batches(6, *SMALL)
    given[4][1][2] = -100  # ignored, in a replay
    assert_bitwise(small_model(), given, criterion=criterion)


def test_autocast() -> None:
    assert_bitwise(small_resnet(), batches(5, 2, 3, 16, 16), amp=torch.bfloat16)


@pytest.mark.parametrize("change_at", [3, 5])
@pytest.mark.parametrize(
    "what",
    [
        "eval",
        "data",
        "buffer",
        "module",
        "parameter",
        "freeze",
        "optimizer",
        "load",
        "group",
        "groups",
        "grad",
    ],
)
def test_what_changes_between_steps_is_followed(what: str, change_at: int) -> None:
    def change(index: int, model: Any, optimizer: Any) -> None:
        if index != change_at:
            return
        if what == "eval":
            model[1].eval()
        elif what == "data":
            model[0].weight.data = model[0].weight.data * 0.5
        elif what == "buffer":
            model[1].running_var = model[1].running_var * 2
        elif what == "module":
            model[2] = nn.GELU()
        elif what == "parameter":
            del optimizer.param_groups[0]["params"][3]
            model[1].bias = nn.Parameter(torch.ones(8))
        elif what == "freeze":
            model[0].weight.requires_grad_(False)
        elif what == "optimizer":
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        elif what == "load":
            model.load_state_dict({k: v * 0.9 for k, v in model.state_dict().items()})
        elif what == "groups":
            optimizer.param_groups[0] = {**optimizer.param_groups[0], "momentum": 0.5}
        elif what == "group":
            extra = nn.Parameter(torch.ones(10))
            model.register_parameter("extra", extra)
            optimizer.add_param_group({"params": [extra], "lr": 0.5})
        else:
            model[0].weight.grad = torch.ones_like(model[0].weight)

    torch.manual_seed(2)
    assert_bitwise(small_model(), batches(10, *SMALL), change=change)


def test_contexts_are_followed() -> None:
    given = batches(4, *SMALL)
    model = small_model()
    step = GraphedStep(model, F.cross_entropy, sgd(model.parameters()), warmup=1)
    for _ in range(2):
        step(*given[0])
    assert step.graphs == 1
    for _ in range(2):
        with gdfast.precision("strict"):
            step(*given[1])
    assert step.graphs == 2
    before = torch.get_num_threads()
    torch.set_num_threads(3 - before)
    for _ in range(2):
        step(*given[2])
    torch.set_num_threads(before)
    assert step.graphs == 3
    with torch.no_grad(), pytest.raises(RuntimeError, match="does not require grad"):
        step(*given[3])


def test_parameters_that_the_optimizer_leaves_alone_add_up_their_gradients() -> None:
    def make(parameters: Any) -> optim.SGD:
        return sgd(list(parameters)[2:])

    def change(index: int, model: Any, optimizer: Any) -> None:
        if index == 6:
            model.zero_grad()

    assert_bitwise(small_model(), batches(9, *SMALL), make=make, change=change)


def test_a_parameter_without_a_gradient() -> None:
    model = small_model()
    model.register_parameter("unused", nn.Parameter(torch.ones(3)))
    assert_bitwise(model, batches(6, *SMALL))


def test_more_than_one_use_of_a_weight() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = gdfast.nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x).relu()) + x

    assert_bitwise(nn.Sequential(Twice(), small_model()), batches(6, *SMALL))


def test_memory_is_used_again() -> None:
    model = nn.Sequential(*[gdfast.nn.Conv2d(8, 8, 3, padding=1) for _ in range(9)])
    step = GraphedStep(model, lambda y: y.square().mean(), sgd(model.parameters()), warmup=1)
    images = torch.randn(8, 8, 32, 32)
    for _ in range(3):
        step(images)
    (taped,) = step._recorded.values()
    # Nine outputs, four in the loss, and of the eight gradients two at a time.
    assert taped.tape.bytes < 17 * images.nbytes


def test_python_runs_only_while_recording() -> None:
    calls: list[int] = []
    model = small_model()
    model[0].register_forward_hook(lambda *_: calls.append(1))
    step = GraphedStep(model, F.cross_entropy, sgd(model.parameters()), warmup=1)
    for batch in batches(5, *SMALL):
        step(*batch)
    assert len(calls) == 2


def test_kernels_of_other_threads_are_not_recorded() -> None:
    image, weight = torch.randn(2, 3, 9, 9), torch.randn(4, 3, 3, 3)

    def criterion(scores: Tensor, labels: Tensor) -> Tensor:
        thread = threading.Thread(target=gdfast.ops.conv2d, args=(image, weight))
        thread.start()
        thread.join()
        return F.cross_entropy(scores, labels)

    quiet = assert_bitwise(small_model(), batches(5, *SMALL))
    busy = assert_bitwise(small_model(), batches(5, *SMALL), criterion=criterion)
    lengths = [len(next(iter(step._recorded.values())).tape) for step in (quiet, busy)]
    assert lengths[0] == lengths[1]


def test_a_graph_from_before_a_step_sees_that_weights_have_changed() -> None:
    model = small_model()
    step = GraphedStep(model, F.cross_entropy, sgd(model.parameters()), warmup=1)
    given = batches(4, *SMALL)
    for batch in given[:3]:
        step(*batch)
    images, labels = given[3]
    loss = F.cross_entropy(model(images.requires_grad_()), labels)
    step(*given[2])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_are_those_of_the_last_call() -> None:
    model = small_model()
    step = GraphedStep(model, F.cross_entropy, optim.SGD(model.parameters(), lr=0.0), warmup=1)
    for images, labels in batches(5, *SMALL):
        step(images, labels)
        (expected,) = torch.autograd.grad(F.cross_entropy(model(images), labels), [model[-1].bias])
        assert torch.equal(model[-1].bias.grad, expected)
        model.zero_grad()
    assert step.graphs == 1


def constant_sum(scores: Tensor, labels: Tensor) -> Tensor:
    loss = torch.tensor(0.0)
    loss += first_loss(scores, labels)
    return loss


def new_constant(scores: Tensor, labels: Tensor) -> Tensor:
    loss = scores.new_tensor(0.0)
    loss += first_loss(scores, labels)
    return loss


def constant_weights(scores: Tensor, labels: Tensor) -> Tensor:
    weights = torch.tensor([1.0] * 10)
    weights.mul_(1.5)[3] *= 2
    return F.cross_entropy(scores, labels, weight=weights) * weights[0]


def rows(scores: Tensor, labels: Tensor) -> Tensor:
    parts = torch.split_with_sizes_copy(scores, [2, 2])
    return first_loss(parts[1], labels[2:]) + torch.unbind_copy(scores)[0].mean()


@pytest.mark.parametrize("criterion", [constant_sum, new_constant, constant_weights, rows])
def test_constants_and_operators_that_give_lists(criterion: Any) -> None:
    assert_bitwise(small_model(), batches(5, *SMALL), criterion=criterion)


def test_two_threads_record_at_once() -> None:
    meet = threading.Barrier(2, timeout=60)
    lengths: list[int] = []

    def criterion(scores: Tensor, labels: Tensor) -> Tensor:
        meet.wait()
        return gdfast.losses.cross_entropy(scores, labels)

    def go(given: list[Batch]) -> None:
        model = small_model()
        step = GraphedStep(model, criterion, sgd(model.parameters()), warmup=1)
        for batch in given:
            step(*batch)
        lengths.append(len(next(iter(step._recorded.values())).tape))

    threads = [threading.Thread(target=go, args=(batches(3, *SMALL),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(lengths) == 2 and lengths[0] == lengths[1]
    assert native.recorder() is None and not native._count


def test_a_batch_on_the_memory_of_a_buffer() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("x", torch.randn(SMALL))

        def forward(self, images: Tensor) -> Tensor:
            return images + 2 * self.x

    model = nn.Sequential(Both(), small_model())
    losses: list[list[float]] = []
    for warmup in (1, 9):
        one = copy.deepcopy(model)
        step = GraphedStep(one, F.cross_entropy, sgd(one.parameters()), warmup=warmup)
        given = batches(5, *SMALL)
        images = [one[0].x, one[0].x, *(x for x, _ in given[2:])]
        pairs = zip(images, given, strict=True)
        losses.append([step(x, labels).item() for x, (_, labels) in pairs])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("what", ["dropout", "momentum", "eps", "hook", "tensor hook"])
def test_attributes_and_hooks_are_followed(what: str) -> None:
    def change(index: int, model: Any, optimizer: Any) -> None:
        if index != 4:
            return
        if what == "dropout":
            model[3].p = 0.5
        elif what == "hook":
            model[2].register_forward_hook(lambda *given: given[-1] * 2)
        elif what == "tensor hook":
            model[0].weight.register_hook(lambda grad: grad * 2)
        else:
            setattr(model[1], what, 0.5)

    assert_bitwise(small_model(nn.Dropout(0.1)), batches(8, *SMALL), change=change)


def test_parts_that_are_assigned_are_followed() -> None:
    model, other = small_model(), small_model()
    loss = nn.CrossEntropyLoss(label_smoothing=0.5)
    step = GraphedStep(model, loss, sgd([*model.parameters(), *other.parameters()]), warmup=1)
    (batch,) = batches(1, *SMALL)

    def check() -> None:
        for _ in range(3):
            expected = step.criterion(step.model(batch[0]), batch[1]).item()
            assert step(*batch).item() == pytest.approx(expected, abs=1e-5)

    check()
    loss.label_smoothing = 0.0
    check()
    step.criterion = F.multi_margin_loss
    check()
    step.model = other
    check()
    assert step.graphs == 1
