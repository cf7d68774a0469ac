"""Plans: what several kernels do to the same tensors, in one call of gdfast._cpu.

Before a kernel runs, Python asks tensors for their addresses, makes those that it writes, and hands
all of that over: for small images that takes longer than the kernel. A plan has done it once. It
knows launches (kernels that were told everything but where their tensors are) and how to make fresh
tensors, and runs for tensors of the sizes, strides and types that it was drafted for.

Tensors are numbers here: those that are given first, then those that are made. Kernels that a plan
may have carry a `draft`: a function of a `Draft` and the numbers of the tensors that the kernel
takes, which gives the numbers of those that it returns, or None where the kernel does more than
launch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor

from gdfast import native
from gdfast.backends import cuda_stream

NONE = -1  # the number of no tensor
_ALIGNMENT = 256  # bytes, as of torch's own memory on a GPU

K = TypeVar("K", bound=Callable[..., Any])
# Called with a tuple of tensors, a momentum, threads or device, and a stream; gives a tuple, or
# None, with nothing done, where an address is not as the kernels need it.
Plan = Callable[..., "tuple[Tensor | None, ...] | None"]

# Whether plans run at all; a plain global, since backward runs on autograd's own threads.
enabled = True


@contextmanager
def disabled() -> Iterator[None]:
    """Lets Python call every kernel by itself for as long as the context lasts, on all threads."""
    global enabled
    before, enabled = enabled, False
    try:
        yield
    finally:
        enabled = before


def drafted(kernel: K, draft: Callable[..., Any], *told: Any, on_gpu: bool = False) -> K:
    """The kernel, which carries a draft from now on, and what its launch was told."""
    kernel.draft, kernel.told = draft, told  # type: ignore[attr-defined]
    kernel.on_gpu = on_gpu  # type: ignore[attr-defined]
    return kernel


def draft_of(kernel: Any) -> Callable[..., Any] | None:
    """The draft that a kernel carries, if it does."""
    return getattr(kernel, "draft", None)


def is_on_gpu(kernel: Any) -> bool:
    """Whether a kernel with a draft is launched on a GPU, or in its simulator."""
    return getattr(kernel, "on_gpu", False)


def told(kernel: Any) -> tuple[Any, ...]:
    """What the launch of a kernel was told, if `drafted` knows."""
    return getattr(kernel, "told", ())


class Draft:
    """A plan in the making, for so many tensors that are given."""

    def __init__(self, given: int) -> None:
        self._given = given
        self._fresh: list[Callable[[], Tensor]] = []
        self._launches: list[tuple[Any, tuple[int, ...]]] = []
        self._aligned: list[int] = []
        self._scratch: list[int] = []  # bytes before each, and in all

    def fresh(self, make: Callable[[], Tensor]) -> int:
        """The number of a tensor that `make` makes at each call."""
        self._fresh.append(make)
        return self._given + len(self._fresh) - 1

    def scratch(self, bytes: int) -> int:
        """The number of memory on the GPU that is needed for as long as the kernels run."""
        self._scratch.append(-(-bytes // _ALIGNMENT) * _ALIGNMENT)
        return NONE - len(self._scratch)

    def launch(self, launch: Any, *tensors: int) -> None:
        """Adds a launch on these tensors, in the order that its binding names."""
        self._launches.append((launch, tensors))

    def join(self, count: int, launch: Any) -> None:
        """Puts one launch in the place of the last `count`, on the tensors of all of them."""
        tensors = [t for _, each in self._launches[-count:] for t in each]
        self._launches[-count:] = [(launch, tuple(tensors))]

    def align(self, *tensors: int) -> None:
        """Asks for addresses of given tensors that 16 divides."""
        self._aligned += [each for each in tensors if 0 <= each < self._given]

    def plan(
        self, results: Sequence[int], written: Sequence[int] = (),
        device: torch.device | None = None,
    ) -> Plan:  # fmt: skip
        """The plan that returns these tensors, and writes to those given ones."""
        assert native.cpu is not None
        fresh, *parts = self._fresh, *accumulate(self._scratch, initial=0)
        if self._scratch:
            make = partial(torch.empty, parts.pop(), dtype=torch.uint8, device=device)
            fresh = [*fresh, make]
        else:
            parts = []
        end = self._given + len(fresh)
        launches = [
            (launch, tuple(t if t >= NONE else end + NONE - 1 - t for t in tensors))
            for launch, tensors in self._launches
        ]
        plan = native.cpu.make_plan(
            self._given, tuple(fresh), tuple(parts), tuple(launches), tuple(results),
            tuple(self._aligned), tuple(written),
        )  # fmt: skip
        return partial(native.cpu.run_plan, plan)


def place(device: torch.device, on_gpu: bool) -> Callable[[], tuple[int, int]]:
    """What gives the last two arguments of a call of a plan."""
    return partial(cuda_stream.current, device) if on_gpu else _threads


def _threads() -> tuple[int, int]:
    return torch.get_num_threads(), 0
