"""Steps that cannot be recorded, or not any more, are ordinary ones, or raise as those do."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from recorded_steps import (
    SMALL,
    Batch,
    assert_bitwise,
    batches,
    first_loss,
    refusals_fail,  # noqa: F401
    sgd,
    small_model,
)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from gdfast import GraphedStep, models, native
from gdfast.losses import YoloLoss
from gdfast.tape import Recorder


def reads_item(scores: Tensor, labels: Tensor) -> Tensor:
    loss = first_loss(scores, labels)
    assert loss.item() > 0
    return loss


def reads_numpy(scores: Tensor, labels: Tensor) -> Tensor:
    return first_loss(scores, labels) + float(np.asarray(labels).mean())


def reads_list(scores: Tensor, labels: Tensor) -> Tensor:
    return first_loss(scores, labels) * sum(labels.tolist())


def selects(scores: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(scores[labels > 4], labels[labels > 4], reduction="sum")


REFUSED = {
    reads_item: "aten::_local_scalar_dense reads a value",
    reads_numpy: "Tensor.__array__ reads values",
    reads_list: "Tensor.tolist reads values",
    selects: "aten::index.Tensor gives as many elements as values say",
}


@pytest.mark.parametrize("criterion", REFUSED, ids=lambda x: x.__name__)
def test_what_cannot_be_recorded_takes_ordinary_steps(criterion: Any) -> None:
    with pytest.warns(UserWarning, match=f"cannot be recorded: {REFUSED[criterion]}") as warned:
        assert_bitwise(small_model(), batches(6, *SMALL), graphs=0, criterion=criterion)
    assert len(warned) == 1


def test_an_optimizer_that_counts_takes_ordinary_steps() -> None:
    class Counting(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            for p in self.param_groups[0]["params"]:
                self.state[p]["count"] = self.state[p].get("count", 0) + 0.5
            return super().step(closure)

    make = partial(Counting, lr=0.1)
    with pytest.warns(UserWarning, match="state is another one after each step"):
        assert_bitwise(small_model(), batches(9, *SMALL), graphs=0, make=make)


def test_compiled_modules_take_ordinary_steps() -> None:
    def change(index: int, model: Any, optimizer: Any) -> None:
        if index == 0:
            model[0].compile(backend="eager")

    with pytest.warns(UserWarning, match="a module is compiled"):
        assert_bitwise(small_model(), batches(5, *SMALL), graphs=0, change=change)


def test_yolo_loss_takes_ordinary_steps() -> None:
    model = models.create("yolo_lite", num_classes=3)
    loss = YoloLoss()

    def criterion(maps: Any, boxes: Tensor, classes: Tensor) -> Tensor:
        return loss(maps, boxes, classes)["loss"]

    boxes = torch.tensor([[[4.0, 4.0, 40.0, 50.0], [10.0, 20.0, 60.0, 60.0]]] * 2)
    given: list[Batch] = [(x, boxes, torch.tensor([[0, 1], [2, -1]]))
                          for x, _ in batches(4, 2, 3, 64, 64)]  # fmt: skip
    with pytest.warns(UserWarning, match="aten::_local_scalar_dense reads a value"):
        assert_bitwise(model, given, graphs=0, criterion=criterion)


def test_an_error_while_recording_leaves_all_usable() -> None:
    fails = [False]

    def criterion(scores: Tensor, labels: Tensor) -> Tensor:
        if fails[0]:
            raise KeyError("labels")
        return F.cross_entropy(scores, labels)

    model = small_model()
    step = GraphedStep(model, criterion, sgd(model.parameters()), warmup=1)
    given = batches(4, *SMALL)
    step(*given[0])
    fails[0] = True
    with pytest.raises(KeyError):
        step(*given[1])
    assert native.recorder() is None and not torch._C._len_torch_dispatch_stack()
    fails[0] = False
    for batch in given:
        step(*batch)
    assert step.graphs == 1


def test_who_looks_at_operators_sees_an_ordinary_step() -> None:
    model = small_model()
    step = GraphedStep(model, F.cross_entropy, sgd(model.parameters()), warmup=1)
    (batch,) = batches(1, *SMALL)
    for _ in range(3):
        step(*batch)
    with FlopCounterMode(display=False) as counter:
        step(*batch)
    assert counter.get_total_flops() > 0


def test_what_python_holds_elsewhere_takes_ordinary_steps() -> None:
    total = torch.zeros(())
    scale = torch.ones((), requires_grad=True)

    def counts(scores: Tensor, labels: Tensor) -> Tensor:
        total.add_(1)
        return first_loss(scores, labels)

    def scaled(scores: Tensor, labels: Tensor) -> Tensor:
        scale.grad = None
        return first_loss(scores * scale, labels)

    def splits(scores: Tensor, labels: Tensor) -> Tensor:
        return first_loss(scores, labels) + scores.tensor_split(labels[:1], dim=1)[0].sum()

    def lists(scores: Tensor, labels: Tensor) -> Tensor:
        return first_loss(scores, labels) + torch.tensor([labels[0], 1]).sum()

    for criterion, words in (
        (counts, "writes to a tensor that comes from outside"),
        (scaled, "outside the model and the optimizer gets a gradient"),
        (splits, "tensor_split reads"),
        (lists, "tensor reads"),
    ):
        with pytest.warns(UserWarning, match=words):
            assert_bitwise(small_model(), batches(4, *SMALL), graphs=0, criterion=criterion)


def test_something_else_than_tensors_takes_an_ordinary_step() -> None:
    model = small_model()

    def criterion(scores: Tensor, labels: Tensor, _: Any) -> Tensor:
        return first_loss(scores, labels)

    step = GraphedStep(model, criterion, sgd(model.parameters()), warmup=1)
    for batch in batches(3, *SMALL):
        step(*batch, None)
    assert step.graphs == 0


def test_an_error_in_a_replay_leaves_what_one_in_a_step_does() -> None:
    model = small_model()
    step = GraphedStep(model, F.cross_entropy, sgd(model.parameters()), warmup=1)
    given = batches(4, *SMALL)
    for batch in given[:3]:
        step(*batch)
    assert step.graphs == 1
    version, before = model[0].weight._version, model[0].weight.detach().clone()
    images, labels = given[3]
    with pytest.raises(IndexError):
        step(images, labels + 10)
    assert all(p.grad is None for p in model.parameters())
    assert model[0].weight._version > version
    assert torch.equal(model[0].weight, before)
    for batch in given:
        step(*batch)
    assert step.graphs == 1


def test_a_kernel_that_gives_something_else_than_before_stops_a_replay() -> None:
    images = torch.zeros(3)
    recorder, gives = Recorder((images,), ()), [True]
    with recorder.running():
        recorder.call(lambda number: gives[0], (1,))
    recorder.tape.replay()
    gives[0] = False
    with pytest.raises(RuntimeError, match="expected True as recorded, got False"):
        recorder.tape.replay()


@pytest.mark.parametrize("nested", [True, False])
def test_a_kernel_that_takes_the_batch_where_it_cannot_be_replaced(nested: bool) -> None:
    images = torch.zeros(3)
    recorder = Recorder((images,), ())
    address = images.data_ptr()
    with recorder.running():
        if nested:
            recorder.call(lambda numbers: None, ([address],))
        else:
            recorder.call(partial(lambda number: None, number=address), ())
    assert "takes the batch in a list" in recorder.why_not
