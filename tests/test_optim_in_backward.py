"""`gdfast.optim.SGD(in_backward=True)`: weights that change as soon as their gradient is there."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_optim import LR, every_setting
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Parameter
from torch.utils.checkpoint import checkpoint

import gdfast
from gdfast import optim


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Our convolutions with and without bias, normalisation, a weight that is used twice."""
    torch.manual_seed(1)
    shared = gdfast.nn.Conv2d(6, 6, 3, padding=1)
    model = nn.Sequential(
        gdfast.nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), shared,
        nn.ReLU(), shared, gdfast.nn.Conv2d(6, 5, (3, 2), (2, 1)), nn.Flatten(), nn.Linear(75, 4),
    )  # fmt: skip
    return model.to(dtype)


def batch(number: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + number)
    images = torch.randn(5, 3, 7, 6, generator=generator).to(dtype)
    return images, torch.randint(4, (5,), generator=generator)


def backward(model: nn.Module, number: int, **options: Any) -> None:
    images, labels = batch(number, next(model.parameters()).dtype)
    nn.functional.cross_entropy(model(images), labels).backward(**options)


def train(model: nn.Module, steps: int = 4, **settings: Any) -> list[Tensor]:
    """The parameters, their buffers and all that the optimizer keeps, after some steps."""
    optimizer = optim.SGD(model.parameters(), lr=LR, **settings)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    for number in range(steps):
        optimizer.zero_grad()
        backward(model, number)
        if settings.get("in_backward"):
            assert all(p.grad is None for p in model.parameters())
        optimizer.step()
        scheduler.step()
    state = [value for p in model.parameters() for value in optimizer.state[p].values()]
    return [*model.state_dict().values(), *state]


def assert_equal(ours: list[Tensor], expected: list[Tensor]) -> None:
    for mine, right in zip(ours, expected, strict=True):
        assert torch.equal(mine, right)


@every_setting
def test_weights_are_bitwise_those_of_the_ordinary_optimizer(settings: dict[str, Any]) -> None:
    expected = train(network(), **settings)
    assert_equal(train(network(), in_backward=True, **settings), expected)


@pytest.mark.parametrize("master_weights", [False, True])
def test_half_types_with_and_without_master_weights(master_weights: bool) -> None:
    settings = {"momentum": 0.9, "master_weights": master_weights}
    expected = train(network(torch.bfloat16), **settings)
    assert_equal(train(network(torch.bfloat16), in_backward=True, **settings), expected)


def live_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """The most memory that gradients of parameters had at any time of a backward pass."""
    alive: list[tuple[StorageWeakRef, int]] = []
    most = 0

    def count(grad: Tensor) -> None:
        nonlocal most
        alive.append((StorageWeakRef(grad.untyped_storage()), grad.nbytes))
        most = max(most, sum(nbytes for storage, nbytes in alive if not storage.expired()))

    handles = [p.register_hook(count) for p in model.parameters()]
    optimizer.zero_grad()
    backward(model, 0)
    for handle in handles:
        handle.remove()
    optimizer.step()
    return most


def test_no_more_than_one_layers_gradients_are_alive() -> None:
    model = network()
    every = sum(p.nbytes for p in model.parameters())
    ordinary = optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    assert live_bytes(model, ordinary) == every
    del ordinary
    largest = max(sum(p.nbytes for p in layer.parameters()) for layer in model)
    optimizer = optim.SGD(model.parameters(), lr=LR, momentum=0.9, in_backward=True)
    for _ in range(2):
        assert live_bytes(model, optimizer) <= largest < every / 2


def test_one_gradient_at_a_time_where_each_layer_has_one_parameter() -> None:
    model = nn.Sequential(*(gdfast.nn.Conv2d(3, 3, 3, padding=1, bias=False) for _ in range(4)))
    model.extend([nn.Flatten(), nn.Linear(126, 4, bias=False)])
    optimizer = optim.SGD(model.parameters(), lr=LR, in_backward=True)
    assert live_bytes(model, optimizer) == max(p.nbytes for p in model.parameters())


def test_groups_frozen_parameters_and_groups_added_later() -> None:
    results = []
    for in_backward in (False, True):
        model = network()
        first, last = model[0], model[-1]
        last.requires_grad_(False)
        groups = [
            {"params": first.parameters(), "lr": 0.5},
            {"params": [*model[3].parameters(), *last.parameters()], "momentum": 0.9},
        ]
        optimizer = optim.SGD(groups, lr=LR, in_backward=in_backward)
        for number in range(4):
            if number == 1:
                optimizer.add_param_group({"params": model[6].parameters(), "weight_decay": 0.1})
            if number == 2:
                last.requires_grad_(True)
            model.zero_grad()
            backward(model, number)
            optimizer.step()
        results.append(list(model.state_dict().values()))
    assert_equal(*results)
    assert last.weight.grad is None  # it had thawed, so that backward updates it too


def test_a_gradient_that_is_set_by_hand_is_used_by_step() -> None:
    results = []
    for in_backward in (False, True):
        p = Parameter(torch.ones(3))
        optimizer = optim.SGD([p], lr=LR, momentum=0.9, in_backward=in_backward)
        for _ in range(2):
            p.grad = torch.full((3,), 2.0)
            optimizer.step()
            optimizer.zero_grad()
        (p * 3).sum().backward()
        optimizer.step()
        results.append([p.detach()])
    assert_equal(*results)


def test_hooks_that_change_a_gradient_work() -> None:
    p = Parameter(torch.ones(3))
    optimizer = optim.SGD([p], lr=1.0, in_backward=True)
    p.register_hook(lambda grad: grad.clamp(max=0.5))
    (p * 7).sum().backward()
    optimizer.step()
    assert (p == 0.5).all()


def test_checkpointing_and_a_closure() -> None:
    results = []
    for in_backward in (False, True):
        torch.manual_seed(1)
        layers = nn.ModuleList(gdfast.nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        optimizer = optim.SGD(layers.parameters(), lr=LR, in_backward=in_backward)

        def closure(layers: nn.ModuleList = layers, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            x = batch(0)[0]
            for layer in (*layers, layers[0]):
                x = checkpoint(layer, x, use_reentrant=False)
            x.square().mean().backward()
            return x

        for _ in range(3):
            optimizer.step(closure)
        results.append([p.detach() for p in layers.parameters()])
    assert_equal(*results)


def model_and_optimizer(**settings: Any) -> tuple[nn.Module, optim.SGD]:
    model = network()
    return model, optim.SGD(model.parameters(), lr=LR, in_backward=True, **settings)


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def test_a_second_backward_before_step_is_refused_before_it_changes_anything() -> None:
    model, optimizer = model_and_optimizer()
    backward(model, 0)
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"expected one backward before each step\(\), got a se"):
        backward(model, 1)
    assert_equal(weights(model), before)
    model.zero_grad()
    optimizer.step()
    backward(model, 2)
    assert not any(map(torch.equal, weights(model), before))


def test_zero_grad_between_backward_and_step_is_refused() -> None:
    model, optimizer = model_and_optimizer()
    backward(model, 0)
    with pytest.raises(RuntimeError, match=r"zero_grad: expected step\(\) after each backward"):
        optimizer.zero_grad()


def test_a_graph_of_the_gradients_is_refused() -> None:
    model, _ = model_and_optimizer()
    before = weights(model)
    with pytest.warns(UserWarning, match="create_graph"), pytest.raises(RuntimeError) as error:
        backward(model, 0, create_graph=True)
    assert "expected create_graph=False" in str(error.value)
    assert_equal(weights(model), before)


def test_a_parameter_that_is_needed_again_is_seen_by_autograd() -> None:
    p = Parameter(torch.ones(3))
    x = torch.ones(3, requires_grad=True)
    optim.SGD([p], lr=LR).step()
    optimizer = optim.SGD([p], lr=LR, in_backward=True)
    late = (x * p.detach()).sum()
    (p * 2).sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        late.backward()
    optimizer.step()


def test_a_grad_scaler_is_refused() -> None:
    for unscale_first in (False, True):
        model, optimizer = model_and_optimizer()
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        images, labels = batch(0)
        scaler.scale(nn.functional.cross_entropy(model(images), labels)).backward()
        if unscale_first:
            scaler.unscale_(optimizer)
        with pytest.raises(RuntimeError, match="expected gradients without a scale"):
            scaler.step(optimizer)


def test_other_hooks_after_accumulation_are_refused() -> None:
    p = Parameter(torch.ones(3))
    handle = p.register_post_accumulate_grad_hook(lambda _: None)
    words = r"expected parameters without other post-accumulate-grad hooks, got .* shape \[3\]"
    with pytest.raises(RuntimeError, match=words):
        optim.SGD([p], lr=LR, in_backward=True)
    handle.remove()
    optimizer = optim.SGD([p], lr=LR, in_backward=True)
    with pytest.raises(RuntimeError, match=words):
        optim.SGD([p], lr=LR, in_backward=True)
    p.register_post_accumulate_grad_hook(lambda _: None)
    with pytest.raises(RuntimeError, match=words):
        (p * 2).sum().backward()
    assert (p == 1).all()
    del optimizer


def test_an_optimizer_that_is_gone_updates_nothing() -> None:
    p = Parameter(torch.ones(3))
    optimizer = optim.SGD([p], lr=LR, in_backward=True)
    del optimizer
    gc.collect()
    (p * 2).sum().backward()
    assert (p == 1).all() and (p.grad == 2).all()
    p.grad = None
    optimizer = optim.SGD([p], lr=0.5, in_backward=True)  # which nobody disputes
    (p * 2).sum().backward()
    optimizer.step()
    assert (p == 0).all()


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_that_is_listed_twice_is_refused() -> None:
    p = Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="expected each parameter once, got one twice"):
        optim.SGD([p, p], lr=LR, in_backward=True)


def test_it_does_not_go_with_differentiable() -> None:
    with pytest.raises(RuntimeError, match="`in_backward` does not support `differentiable`"):
        optim.SGD([Parameter(torch.ones(3))], in_backward=True, differentiable=True)


def test_sparse_gradients_are_refused() -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = optim.SGD(embedding.parameters(), lr=LR, in_backward=True)
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        embedding(torch.tensor([1, 2])).sum().backward()
    del optimizer


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_deepcopy_and_pickle(duplicate: Callable[[Any], Any]) -> None:
    p = Parameter(torch.ones(3))
    optimizer = optim.SGD([p], lr=LR, momentum=0.9, in_backward=True)
    (p * 2).sum().backward()
    optimizer.step()
    twin = duplicate(optimizer)
    (its,) = twin.param_groups[0]["params"]
    for each, its_optimizer in ((p, optimizer), (its, twin)):
        (each * 3).sum().backward()
        assert each.grad is None
        its_optimizer.step()
    assert torch.equal(p, its) and (p != 1).all()


@every_setting
def test_a_resumed_run_is_bitwise_the_same(settings: dict[str, Any]) -> None:
    expected = train(network(), **settings)
    model = network()
    optimizer = optim.SGD(model.parameters(), lr=LR, in_backward=True, **settings)
    for number in range(4):
        if number == 2:
            state = copy.deepcopy(optimizer.state_dict())
            state["param_groups"][0]["lr"] = LR / 10  # as the scheduler there does
            del optimizer
            optimizer = optim.SGD(model.parameters(), lr=7.0, in_backward=True)
            optimizer.load_state_dict(state)
        backward(model, number)
        optimizer.step()
    assert_equal([*model.state_dict().values()], expected[: len(model.state_dict())])


@pytest.fixture
def process_group() -> Iterator[None]:
    if not dist.is_available():
        pytest.skip("needs torch.distributed")
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def test_distributed_data_parallel_is_refused(process_group: None) -> None:
    for settings in ({}, {"gradient_as_bucket_view": True}):
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        parallel = nn.parallel.DistributedDataParallel(model, **settings)
        optimizer = optim.SGD(parallel.parameters(), lr=LR, in_backward=True)
        parallel(torch.ones(2, 3)).sum().backward()
        with pytest.raises(RuntimeError, match="as DistributedDataParallel puts it there"):
            optimizer.step()


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    p = Parameter(torch.ones(3))
    optimizer = optim.SGD([p], lr=LR, in_backward=True)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    for use in (
        lambda: (p * 2).sum().backward(),
        lambda: optim.SGD([Parameter(torch.ones(3))], lr=LR, in_backward=True),
    ):
        with pytest.raises(RuntimeError, match="processes: expected one process, because"):
            use()
    assert (p == 1).all()
    del optimizer
