"""What the suites share: check a workload once, then time one of its variants."""

from collections.abc import Callable
from typing import Any

from gdfast.bench.workload import Workload

_current: tuple[Any, Workload] | None = None  # one at a time: the largest take gigabytes


def identifier(case: object) -> str:
    """A case's name without what -k cannot select by: resnet50-3x3-64-64-@56 for 64->64."""
    return str(case).replace("->", "-").replace(",", "").replace("'", "").replace(" ", "-")


def run(benchmark: Any, build: Callable[..., Workload], variant: str, *arguments: Any) -> None:
    """Time `variant` of the workload that `build(*arguments)` gives, in a group of its own.

    `variant` is the name of one of the workload's calls, or what only one of them starts with.

    All variants of a workload come one after another and share it. None is timed unless ours gives
    the right results on the same inputs.
    """
    global _current
    key = (build, *arguments)
    if _current is None or _current[0] != key:
        _current = None  # before building the next one
        workload = build(*arguments)
        check = workload.check()
        assert check.ok, f"{workload}: {check}"
        _current = key, workload
    workload = _current[1]
    benchmark.group = str(workload)
    benchmark.extra_info.update(
        backend=workload.backend, flops=workload.flops, bytes=workload.bytes
    )
    (call,) = (
        call for name, call in workload.calls.items() if f"{name} ".startswith(f"{variant} ")
    )
    benchmark(call)
