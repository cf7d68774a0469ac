"""Which tensors our kernels are called on without the dispatcher."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from gdfast import ops
from gdfast.ops.ordinary import are_ordinary


class _Subclass(torch.Tensor):
    pass


def _left_over(transform: Callable[..., Callable[..., Tensor]]) -> Tensor:
    """A tensor of functorch's that outlives its transform."""
    left: list[Tensor] = []

    def function(x: Tensor) -> Tensor:
        left.append(x * 2)
        return x.sum()

    transform(function)(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    return left[0]


def test_tensors_with_memory_of_their_own_are() -> None:
    tensor = torch.randn(2, 2)
    assert are_ordinary(tensor, None, torch.nn.Parameter(tensor), tensor.t(), tensor[1:])


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(2, 2).to_sparse(),
        lambda: torch.randn(2, 2).to_sparse_csr(),
        lambda: torch.empty(2, device="meta"),
        lambda: torch.nn.Parameter(torch.empty(2, device="meta")),
        lambda: torch.nn.Parameter(torch.randn(2, dtype=torch.complex64).conj().imag),
        lambda: torch.nn.Parameter(torch._efficientzerotensor(2)),
        lambda: torch._to_functional_tensor(torch.randn(2)),
        lambda: torch.randn(2, dtype=torch.complex64).conj().imag,
        lambda: torch._efficientzerotensor(2),
        lambda: torch.randn(2).as_subclass(_Subclass),
        lambda: FakeTensorMode().from_tensor(torch.randn(2)),
        lambda: _left_over(torch.func.grad),
        lambda: _left_over(torch.vmap),
    ],
    ids=[
        "sparse",
        "sparse rows",
        "meta",
        "meta parameter",
        "negated parameter",
        "zero parameter",
        "functional",
        "negated",
        "zero",
        "subclass",
        "fake",
        "grad's",
        "vmap's",
    ],
)
def test_others_are_not(make: Callable[[], Tensor]) -> None:
    assert not are_ordinary(torch.randn(2), make())


def test_a_negated_parameter_convolves_as_with_native() -> None:
    filters = torch.randn(4, 3, 3, 3, dtype=torch.complex64)
    weight, input = torch.nn.Parameter(filters.conj().imag), torch.randn(2, 3, 8, 8)
    assert weight.is_neg()
    ours = ops.conv2d(input, weight, backend="cpu")
    torch.testing.assert_close(ours, F.conv2d(input, weight), rtol=1e-4, atol=1e-4)


def test_none_is_where_a_mode_looks_on() -> None:
    with FakeTensorMode():
        assert not are_ordinary(torch.nn.Parameter(torch.randn(2)))


def test_what_a_transform_leaves_behind_convolves_as_with_native() -> None:
    input, weight = _left_over(torch.func.grad), torch.randn(4, 3, 3, 3, requires_grad=True)
    ours = ops.conv2d(input, weight, backend="cpu")
    torch.testing.assert_close(ours, F.conv2d(input, weight), rtol=1e-4, atol=1e-4)
    (grad,) = torch.autograd.grad(ours.sum(), weight)
    (expected,) = torch.autograd.grad(F.conv2d(input, weight).sum(), weight)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-4)
