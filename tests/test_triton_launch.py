"""Launches of the Triton kernels as a GPU would get them: arguments are bound, nothing is run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from triton_here import NOT_IN_INTERPRETER

from gdfast.bench import triton_code
from gdfast.bench.triton_code import LAYERS

pytestmark = NOT_IN_INTERPRETER
Launched = list[tuple[Any, tuple[Any, ...]]]


def fits(kind: Any, value: Any) -> bool:
    """Whether a driver can pass a value as an argument of the type that was compiled for."""
    if isinstance(kind, tuple):
        return isinstance(value, tuple) and len(value) == len(kind) and all(map(fits, kind, value))
    if kind == "constexpr":
        return True
    if kind.startswith("*"):
        return isinstance(value, int) or hasattr(value, "data_ptr")
    if kind.startswith("tensordesc"):
        return value.padding == "zero" and len(value.shape) == len(value.strides)
    if kind.startswith("i"):
        return isinstance(value, int) and value.bit_length() < int(kind[1:])
    return kind == "fp32" and isinstance(value, float)


@pytest.fixture
def launched() -> Iterator[Launched]:
    """For each launch the compiled arguments' types and the arguments; all launches come twice."""
    from gdfast.backends.triton import launch

    launches: Launched = []

    def launcher(source: Any, metadata: Any) -> Callable[..., None]:
        # Grid, stream, function, metadata twice and hooks come before a kernel's own arguments.
        return lambda *args: launches.append((tuple(source.signature.values()), args[9:]))

    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 227 << 10},
        load_binary=lambda name, kernel, shared, device: (0, 0, 0, 0, 1024),
    )
    run = launch.Launch._run

    def twice(self: Any, *args: Any) -> None:
        self._compiled = None
        run(self, *args)
        assert self._compiled is not None
        run(self, *args)
        self._compiled = None

    with (
        mock.patch.object(launch, "gpu", lambda device: launch.H100),
        mock.patch.object(launch.Launch, "_run", twice),
        triton_code.no_driver(90, launcher_cls=launcher, utils=utils),
    ):
        yield launches


def assert_right(launches: Launched, kernels: int) -> None:
    """What was compiled takes the arguments, and takes the same ones when launched again.

    At least as many `kernels` were launched; how many sum up splits is a choice of tiles.
    """
    assert len(launches) >= 2 * kernels and len(launches) % 2 == 0
    for (types, first), (_, again) in zip(launches[::2], launches[1::2], strict=True):
        assert len(types) == len(first) == len(again)
        for kind, one, other in zip(types, first, again, strict=True):
            assert fits(kind, one) and fits(kind, other), (kind, one, other)
            if isinstance(one, torch.Tensor):
                assert other == one.data_ptr()
            elif not hasattr(one, "block_shape"):
                assert other == one


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sgd(launched: Launched, dtype: torch.dtype) -> None:
    triton_code.launch_sgd(dtype)
    assert_right(launched, 1 if dtype == torch.float32 else 2)
    for types, arguments in launched:
        assert [t[0] for t in types if isinstance(t, tuple)] == ["i64"] * 4 + ["i32"] * 2
        assert arguments[4][0] == 2 * (1 << 40) + 3


def test_sgd_reads_scalars_of_the_gpu(launched: Launched) -> None:
    from gdfast.backends.triton import bind_sgd

    lr, scale, found_inf = (torch.empty((), device="meta") for _ in range(3))
    settings = bind_sgd.Settings(lr, 0.9, 0.0, 1e-4, True, False, False, True, scale, found_inf)
    like = torch.empty(1, dtype=torch.bfloat16, device="meta")
    somewhere = [1 << 40] * 40  # more than one launch takes
    bind_sgd.update(like, *[somewhere] * 3, [], [5] * 40, settings)
    assert_right(launched, 2)
    assert launched[0][0][:4] == ("*bf16", "*fp32", "*fp32", "*fp32")


@pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.name.split()[0])
def test_conv2d(launched: Launched, case: Any) -> None:
    triton_code.launch_conv2d(case, torch.bfloat16)
    assert_right(launched, 3)


def test_conv2d_by_descriptors(launched: Launched) -> None:
    from gdfast.backends.triton.bind_conv2d import bind_forward

    problem, (input, weight, _) = triton_code._problem(LAYERS[2], torch.bfloat16, "ieee")
    tile = next(tile for tile in problem.candidates("conv2d") if tile.box)
    bind_forward(problem, tile)(input, weight, None)
    assert_right(launched, 1)
    assert launched[0][0][0].startswith("tensordesc")


def test_norm_and_pool(launched: Launched) -> None:
    triton_code.launch_batch_norm((256, 256, 56, 56), torch.bfloat16)
    triton_code.launch_max_pool2d((256, 64, 112, 112), torch.bfloat16)
    assert_right(launched, 8)
