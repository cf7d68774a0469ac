"""Every operation of a backend on small tensors against float64, for `gdfast doctor`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from gdfast import native, ops
from gdfast.backends import cpu_algorithms, precision, triton_backend
from gdfast.bench.workload import relative_error
from gdfast.errors import BackendError

# Takes a backend and what puts a number's tensor where it is computed; gives one flat tensor.
Operation = Callable[[str, Callable[[Tensor], Tensor]], Tensor]

# Three products of TF32 numbers are exact to 2^-17 at worst, one is to 2^-11.
_TF32X3_ERROR = 1e-5
# Rounding a float32 sum at each of its n additions makes it stray by about 2^-24 sqrt(n); here n is
# at most 480, in grad_weight. Native's order of sums may be better, and is so by luck as well.
_FLOAT32_ERROR = 2.0**-24 * 480**0.5


class Check(NamedTuple):
    """One operation of one backend against float64: relative errors, ours and native PyTorch's."""

    backend: str
    operation: str
    error: float | None
    native_error: float | None
    ok: bool
    reason: str


class _Arithmetic(NamedTuple):
    """How an operation computes: the dtype, whether strictly, and what error is right anyway."""

    suffix: str
    dtype: torch.dtype
    precision: str
    least: float


_FLOAT32 = _Arithmetic("", torch.float32, "strict", _FLOAT32_ERROR)
_BFLOAT16 = _Arithmetic(" bfloat16", torch.bfloat16, "strict", torch.finfo(torch.bfloat16).eps)
_TF32X3 = _Arithmetic(" tf32x3", torch.float32, "fast", _TF32X3_ERROR)


def run(backend: str) -> list[Check]:
    """Test a backend: in float32, and in bfloat16 and three TF32 products where it has the like.

    An error may be twice native PyTorch's and what rounding alone explains: in float32 1.3e-6, in
    bfloat16 one rounding, in three products of TF32 numbers 1e-5.
    """
    on_gpu = runs_on_gpu(backend)
    device = "cuda" if on_gpu else "cpu"
    bfloat16 = (on_gpu and torch.cuda.is_bf16_supported()) or (
        backend == "cpu" and not cpu_algorithms.why_no_bf16()
    )
    return [check(backend, device, *each) for each in _plan(bfloat16=bfloat16, tf32x3=on_gpu)]


def runs_on_gpu(backend: str) -> bool:
    """Whether a backend that can be used has a GPU, rather than a simulator or an interpreter."""
    simulated = {"cuda": native.cuda_is_simulated, "triton": triton_backend.is_interpreted()}
    return not simulated.get(backend, True) and torch.cuda.is_available()


def _plan(*, bfloat16: bool, tf32x3: bool) -> Iterator[tuple[str, Operation, _Arithmetic]]:
    operations = _operations()
    for name, operation in operations.items():
        yield name, operation, _FLOAT32
    if bfloat16:
        for name, operation in operations.items():
            yield name, operation, _BFLOAT16
    if tf32x3:
        for name, operation in operations.items():
            if name.startswith("conv2d") and "depthwise" not in name:
                yield name, operation, _TF32X3


def check(
    backend: str, device: str, name: str, operation: Operation, arithmetic: _Arithmetic
) -> Check:
    """Compare one operation of one backend with float64, on the same rounded numbers."""
    suffix, dtype, how, least = arithmetic

    def exactly(value: Tensor) -> Tensor:
        return value.to(dtype).double()

    def rounded(value: Tensor) -> Tensor:
        return value.to(device, dtype, copy=True)

    def error_of(backend: str) -> float:
        # Float32 as it is: native takes TF32 for some sizes and not for others.
        with precision(how), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return relative_error(operation(backend, rounded).cpu(), exact)

    exact = operation("reference", exactly)
    native_error = error_of("reference")
    told = partial(Check, backend, name + suffix)
    try:
        error = error_of(backend)
    except BackendError as refusal:
        # A backend may have a forward and no backward: that is legal, and told.
        return told(None, native_error, True, str(refusal))
    except RuntimeError as failure:
        return told(None, native_error, False, str(failure))
    # Native adds the same numbers in another order.
    return told(error, native_error, error <= 2 * native_error + least, "")


def _operations() -> dict[str, Operation]:
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator)
    # Channels that fill no vector, and such that do: kernels read them in other ways.
    odd = draw(5, 34, 17, 13), draw(36, 17, 3, 2), draw(36)
    even = draw(2, 32, 9, 8), draw(48, 32, 3, 3), draw(48)
    depthwise = draw(3, 16, 9, 11), draw(16, 1, 3, 3), draw(16)
    normalised = draw(4, 16, 7, 5), draw(16).abs() + 0.5, draw(16), draw(4, 16, 7, 5)
    # All values differ, in half types too: of equal ones a gradient may go to another.
    image = torch.randperm(2 * 9 * 6 * 2, generator=generator).view(2, 9, 6, 2).float()
    update = draw(1001), draw(1001), draw(1001)

    def conv2d(backend: str, input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.conv2d(
            input, weight, bias, stride=(2, 1), padding=(1, 0), dilation=(2, 1), groups=2,
            backend=backend,
        )  # fmt: skip

    def plain_conv2d(backend: str, input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.conv2d(input, weight, bias, padding=1, backend=backend)

    def depthwise_conv2d(backend: str, input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.conv2d(input, weight, bias, padding=1, groups=16, backend=backend)

    def batch_norm_act(
        backend: str, input: Tensor, weight: Tensor, bias: Tensor, residual: Tensor
    ) -> Tensor:
        return ops.batch_norm_act(
            input, weight, bias, None, None, residual, training=True, backend=backend
        )

    def max_pool2d(backend: str, input: Tensor) -> Tensor:
        return ops.max_pool2d(input, 3, 2, 1, backend=backend)

    def sgd_(backend: str, place: Callable[[Tensor], Tensor]) -> Tensor:
        weight, grad, momentum = (place(value) for value in update)
        ops.sgd_(
            weight, grad, momentum, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True,
            backend=backend,
        )  # fmt: skip
        return weight

    convolutions = (
        ("", conv2d, odd),
        (" of 32 channels", plain_conv2d, even),
        (" depthwise", depthwise_conv2d, depthwise),
    )
    passes: tuple[tuple[str, tuple[int, ...]], ...]
    passes = ("conv2d", ()), ("conv2d_grad_input", (0,)), ("conv2d_grad_weight", (1, 2))
    return {
        op + kind: partial(_differentiated, function, values, wanted)
        for kind, function, values in convolutions
        for op, wanted in passes
    } | {
        "batch_norm_act": partial(_differentiated, batch_norm_act, normalised, ()),
        "batch_norm_act_backward": partial(
            _differentiated, batch_norm_act, normalised, (0, 1, 2, 3)
        ),
        "max_pool2d": partial(_differentiated, max_pool2d, (image,), ()),
        "max_pool2d_grad": partial(_differentiated, max_pool2d, (image,), (0,)),
        "sgd_": sgd_,
    }


def _differentiated(
    function: Callable[..., Tensor], values: Sequence[Tensor], wanted: Sequence[int],
    backend: str, place: Callable[[Tensor], Tensor],
) -> Tensor:  # fmt: skip
    """What a function returns, or where some are wanted the gradients of its arguments."""
    tensors = [place(value) for value in values]
    for index in wanted:
        tensors[index].requires_grad_()
    output = function(backend, *tensors)
    if not wanted:
        return output.flatten()
    grad = torch.linspace(-1, 1, output.numel()).view(output.shape)
    grads = torch.autograd.grad(output, [tensors[index] for index in wanted], place(grad))
    return torch.cat([grad.flatten() for grad in grads])
