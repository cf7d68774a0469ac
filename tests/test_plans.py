"""Plans, which run several kernels in one call, and what a call rested on before."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gdfast import native
from gdfast.backends import plans
from gdfast.ops.ordinary import unwatched_facts

pytestmark = pytest.mark.usefixtures("compiled_cpu")

SIZE, STRIDES = (2, 3, 5, 4), (60, 20, 4, 1)


def pointwise() -> Any:
    """A launch that multiplies 3 channels by a matrix [3, 3]."""
    problem = native.cpu.Conv2dProblem(
        (2, 3, 5, 4, 3, 1, 1, 5, 4), (1, 1), (0, 0), (1, 1), 1, "float32", STRIDES, (3, 1, 1, 1),
        STRIDES,
    )  # fmt: skip
    return native.cpu.conv2d_launch(problem)


def fresh() -> Tensor:
    return torch.empty(SIZE)


def test_launches_run_one_after_another() -> None:
    draft = plans.Draft(2)
    between, output = draft.fresh(fresh), draft.fresh(fresh)
    draft.launch(pointwise(), 0, 1, plans.NONE, between)
    draft.launch(pointwise(), between, 1, plans.NONE, output)
    plan = draft.plan((output, plans.NONE, 0, between))
    image, weight = torch.randn(SIZE), torch.randn(3, 3, 1, 1)
    result, none, given, first = plan((image, weight), 0.0, 1, 0)
    once = F.conv2d(image, weight)
    assert none is None and given is image
    torch.testing.assert_close(first, once)
    torch.testing.assert_close(result, F.conv2d(once, weight))


def test_a_fresh_tensor_lives_as_long_as_launches_need_it() -> None:
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []  # when another one is made

    def noted() -> Tensor:
        alive.append(sum(ref() is not None for ref in made))
        tensor = fresh()
        made.append(weakref.ref(tensor))
        return tensor

    draft = plans.Draft(2)
    one, two, three, four, unused = (draft.fresh(noted) for _ in range(5))
    for source, target in ((0, one), (one, two), (two, three), (three, four)):
        draft.launch(pointwise(), source, 1, plans.NONE, target)
    plan = draft.plan((four, two, unused))
    image, weight = torch.randn(SIZE), torch.randn(3, 3, 1, 1)
    last, second, _ = plan((image, weight), 0.0, 1, 0)
    # The first is gone when the third is made; the second is a result.
    assert alive == [0, 1, 1, 2, 3]
    twice = F.conv2d(F.conv2d(image, weight), weight)
    torch.testing.assert_close(second, twice)
    torch.testing.assert_close(last, F.conv2d(F.conv2d(twice, weight), weight))


def test_scratch_is_memory_of_its_own() -> None:
    draft = plans.Draft(2)
    one, output = draft.scratch(2 * 3 * 5 * 4 * 4), draft.fresh(fresh)
    two = draft.scratch(2 * 3 * 5 * 4 * 4)
    draft.launch(pointwise(), 0, 1, plans.NONE, one)
    draft.launch(pointwise(), one, 1, plans.NONE, two)
    draft.launch(pointwise(), two, 1, plans.NONE, output)
    plan = draft.plan((output,), device=torch.device("cpu"))
    image, weight = torch.randn(SIZE), torch.randn(3, 3, 1, 1)
    expected = image
    for _ in range(3):
        expected = F.conv2d(expected, weight)
    torch.testing.assert_close(plan((image, weight), 0.0, 1, 0)[0], expected)


def test_addresses_that_do_not_fit_leave_all_as_it_is() -> None:
    draft = plans.Draft(1)
    draft.align(0)
    plan = draft.plan((0,), (0,))
    numbers = torch.zeros(9)
    version = numbers._version
    assert plan((numbers[1:],), 0.0, 1, 0) is None
    assert numbers._version == version
    assert plan((numbers,), 0.0, 1, 0) == (numbers,)
    assert numbers._version == version + 1


def test_other_tensors_are_refused() -> None:
    plan = plans.Draft(2).plan((0,))
    with pytest.raises(ValueError, match="as many as the plan has"):
        plan((torch.zeros(1),), 0.0, 1, 0)
    with pytest.raises(TypeError, match="memory of its own"):
        plan((torch.zeros(1), 3), 0.0, 1, 0)
    with pytest.raises(TypeError, match="a tuple"):
        plan([torch.zeros(1), None], 0.0, 1, 0)
    with pytest.raises(ValueError, match="numbers of tensors"):
        plans.Draft(2).plan((2,))


def test_what_makes_a_tensor_may_fail() -> None:
    def fails() -> Tensor:
        raise MemoryError("none left")

    draft = plans.Draft(0)
    draft.fresh(fresh)
    draft.fresh(fails)
    with pytest.raises(MemoryError, match="none left"):
        draft.plan((0,))((), 0.0, 1, 0)


class Recalled:
    """A memo of a call on an image that is given and a weight in a dict."""

    def __init__(self) -> None:
        self.image, self.answer, self.mode = torch.zeros(2, 3), 4, "one"
        self.own: dict[str, Any] = {"size": object(), "hooks": {}, "weight": torch.ones(3)}
        weak = weakref.ref(self)
        kept = (self.own, "size", self.own["size"]), (self.own, "hooks", ...), (weak, "mode", "one")
        absent = (self.own, "forward", NotImplemented)
        asked = ((lambda: weak().answer, 4),)
        facts = unwatched_facts(self.image, self.own["weight"], None)
        sources = 0, (weak, "own", "weight"), 1
        self.memo = native.cpu.make_memo((*kept, absent), asked, sources, facts, (False, False))

    def __call__(self) -> Any:
        return native.cpu.recall(self.memo, self.image, None)


def test_a_call_is_recalled() -> None:
    recalled = Recalled()
    image, weight, none = recalled()
    assert image is recalled.image and weight is recalled.own["weight"] and none is None
    recalled.own["weight"] = torch.zeros(3)  # another one of its kind
    assert recalled()[1] is recalled.own["weight"]


def test_a_memo_does_not_keep_what_it_is_about() -> None:
    recalled = Recalled()
    memo, image, weak = recalled.memo, recalled.image, weakref.ref(recalled)
    del recalled
    assert weak() is None
    assert native.cpu.recall(memo, image, None) is None


def test_what_a_memo_may_not_be_about() -> None:
    for kept, sources in ((((1, "size", 2),), (0,)), ((), (({}, "own", "weight"),))):
        with pytest.raises(TypeError, match="weak references"):
            native.cpu.make_memo(kept, (), sources, b"", ())


@pytest.mark.parametrize(
    "change",
    [
        lambda call: call.own.update(size=object()),
        lambda call: call.own.pop("size"),
        lambda call: call.own["hooks"].update(a=1),
        lambda call: call.own.update(forward=None),
        lambda call: setattr(call, "answer", 5),
        lambda call: setattr(call, "mode", "two"),
        lambda call: delattr(call, "mode"),
        lambda call: call.own.update(weight=torch.ones(4)),
        lambda call: call.own.update(weight=None),
        lambda call: call.own.pop("weight"),
        lambda call: setattr(call, "own", []),
        lambda call: delattr(call, "own"),
        lambda call: call.own["weight"].requires_grad_(),
        lambda call: setattr(call, "image", torch.zeros(3, 2).t()),
        lambda call: setattr(call, "image", torch.zeros(2, 3, dtype=torch.float64)),
        lambda call: setattr(call, "image", torch.zeros(2, 3).to_sparse()),
        lambda call: setattr(call, "image", torch.zeros(2, 3, device="meta")),
        lambda call: setattr(call, "image", torch.zeros(2, 3, dtype=torch.cfloat).conj().imag),
    ],
)
def test_another_call_is_not(change: Any) -> None:
    recalled = Recalled()
    change(recalled)
    assert recalled() is None


def test_nothing_is_recalled_while_somebody_looks() -> None:
    class Looks(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    recalled = Recalled()
    with Looks():
        assert recalled() is None
    with torch.autograd.forward_ad.dual_level():
        assert recalled() is None
    assert recalled() is not None


def test_what_a_question_raises_goes_on() -> None:
    facts = unwatched_facts(torch.zeros(1))
    memo = native.cpu.make_memo((), ((lambda: 1 / 0, 1),), (0,), facts, ())
    with pytest.raises(ZeroDivisionError):
        native.cpu.recall(memo, torch.zeros(1))
