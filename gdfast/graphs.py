"""A training step that is recorded once, then repeated as a whole.

A small model's step is bound by what Python, autograd and the driver do to launch its kernels. On a
GPU a CUDA graph launches all of them at once, on a CPU a tape of their calls is gone through.
https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from gdfast import step_tape
from gdfast.errors import mismatch
from gdfast.optim import SGD

_MOST_GRAPHS = 8  # each keeps the memory of a whole step
_MOST_TRIES = 3


class _Recorded(NamedTuple):
    graph: torch.cuda.CUDAGraph
    batch: tuple[Tensor, ...]  # what is read: each batch is copied there
    loss: Tensor
    grads: list[Tensor | None]


class GraphedStep:
    """A training step, `loss = step(images, *targets)`, that is recorded and then repeated at once.

    One call is zero_grad, `loss = criterion(model(images), *targets)`, backward and
    `optimizer.step()`, the first two under autocast to `autocast` where that dtype is given.
    Returns the loss, detached. For every kind of batch (sizes, dtypes, layouts) the first `warmup`
    calls are ordinary steps, in which algorithms are chosen and buffers come into being; the next
    one is recorded, and all that follow repeat the record. At most 8 kinds of batches are
    recorded; the rest take ordinary steps.

    On a GPU the record is a CUDA graph, on the CPU a tape of the calls of kernels and operators,
    whose results are bit by bit those of ordinary steps. Python code of the model (prints, hooks,
    branches on values, numbers that it draws or counts itself) runs only while recording. Gradients
    are those of the last call. The memory of the record is kept, for each kind of batch: about what
    a step needs at its peak, and on the CPU all results of PyTorch's own operators side by side.

    The learning rates of the optimizer become tensors on its parameters' device, so that schedulers
    and assignments to `group["lr"]` reach what was recorded; `gdfast.optim.SGD` and torch's fused
    optimizers read them there. When another setting of the optimizer changes (on the CPU the rate
    of other optimizers too), or a module goes from train to eval, what was recorded is dropped and
    recorded anew. On the CPU that also happens where modules, parameters, buffers, the optimizer's
    state or this object's `model`, `criterion`, `optimizer` and `autocast` were replaced, where
    hooks were added or removed, or where an attribute of a module or the criterion that is a
    number, a string, None, a function or a tuple of these was assigned; and the number of threads,
    precision, backend and autocast make kinds of their own. On a GPU those must stay as they are.
    What else Python code looks at must stay as it is on either: lists, classes, globals, and what a
    function closes over. Tensors there are read where they were while recording.

    What cannot be recorded: values that are read back (`.item()`, `.numpy()`, GradScaler, clipping
    that reads the norm, optimizers that count their steps in Python, on the CPU also those with
    `capturable`), as many elements as values say (`nonzero`, masks as indices), operators that are
    not PyTorch's. On a GPU that raises RuntimeError; on the CPU steps are ordinary ones from then
    on, with a warning that names the operator. Ordinary on the CPU are also steps of compiled
    modules, of parameters that are no plain tensors, of batches with gradients or with something
    else than tensors, steps that change tensors, or leave gradients on them, that belong neither to
    the modules, the optimizer nor the batch, and those while a mode of torch looks at what runs.
    Not seen are kernels that PyTorch does not know of, called by addresses, and values that a
    composite operator of PyTorch reads in C++, but for those of `tensor_split`. On the CPU a batch
    is held until the next call of its kind. While a step is recorded on a GPU, no loss that was
    computed elsewhere from the model's parameters may be alive with its graph.

    Raises TypeError for a DistributedDataParallel model, ValueError for parameters of several
    devices, and RuntimeError where a step cannot be recorded on a GPU.
    """

    def __init__(
        self,
        model: Module,
        criterion: Callable[..., Tensor],
        optimizer: Optimizer,
        *,
        autocast: torch.dtype | None = None,
        warmup: int = 3,
    ) -> None:
        if isinstance(model, DistributedDataParallel):
            expected = "a model whose gradients stay in this process"
            raise TypeError(mismatch("GraphedStep", "model", expected, type(model).__name__))
        self.model, self.criterion, self.optimizer = model, criterion, optimizer
        self.autocast, self.warmup = autocast, max(1, warmup)  # the first step makes buffers
        self._params = [p for group in optimizer.param_groups for p in group["params"]]
        devices = sorted({str(p.device) for p in self._params})
        if len(devices) != 1:
            words = ", ".join(devices) or "no parameters"
            raise ValueError(
                mismatch("GraphedStep", "optimizer", "parameters of one device", words)
            )
        self.device = self._params[0].device
        self._recorded: dict[Any, Any] = {}
        self._calls: dict[Any, int] = {}
        self._settings: Any = None
        self._rates: dict[int, Tensor] = {}
        self._last: _Recorded | None = None
        self._pool: Any = None
        self._stream: Any = None
        self._is_taped, self._tries = True, 0  # until a step refuses
        self._around: step_tape.Surroundings | None = None
        self._parts: tuple[Any, ...] = ()

    @property
    def graphs(self) -> int:
        """How many kinds of batches are recorded."""
        return len(self._recorded)

    def __call__(self, *batch: Tensor) -> Tensor:
        if self.device.type == "cuda":
            return self._on_gpu(batch)
        if self.device.type == "cpu" and self._is_taped and (kind := step_tape.kind(batch)):
            return self._on_cpu(kind, batch)
        return self._step(batch)

    def _on_gpu(self, batch: tuple[Tensor, ...]) -> Tensor:
        self._follow_settings()
        kind = tuple((x.shape, x.stride(), x.dtype) for x in batch)
        recorded: _Recorded | None = self._recorded.get(kind)
        if recorded is None:
            if self._is_warming(kind):
                with self._aside():
                    return self._step(tuple(x.to(self.device, non_blocking=True) for x in batch))
            recorded = self._recorded[kind] = self._record(batch)
        for kept, given in zip(recorded.batch, batch, strict=True):
            kept.copy_(given, non_blocking=True)
        recorded.graph.replay()
        if recorded is not self._last or self._params[0].grad is not recorded.grads[0]:
            for param, grad in zip(self._params, recorded.grads, strict=True):
                param.grad = grad
            self._last = recorded
        return recorded.loss.clone()

    def _on_cpu(self, kind: tuple[Any, ...], batch: tuple[Tensor, ...]) -> Tensor:
        parts = self.model, self.criterion, self.optimizer, self.autocast
        if self._around is not None:
            self._follow_rates()
            if not (all(map(is_, parts, self._parts)) and self._around.hold()):
                self._forget()
        taped: step_tape.TapedStep | None = self._recorded.get(kind)
        if taped is not None and taped.holds():
            try:
                return taped(batch)
            except BaseException:
                self._forget()  # what stopped half way is taken step by step first
                raise
        if self._is_warming(kind):
            return self._step(batch)
        self._follow_rates()
        self._parts = parts
        self._around = self._around or step_tape.Surroundings(parts[:2], self.optimizer)
        if reason := step_tape.why_not(self.criterion) or self._around.why_not():
            self._refuse(reason)
            return self._step(batch)
        loss, taped, reason = step_tape.record(self._step, batch, self._around)
        if taped is not None:
            self._recorded[kind], self._tries = taped, 0
        else:
            self._tries += 1
            if reason != step_tape.UNSETTLED or self._tries == _MOST_TRIES:
                self._refuse(reason)
        return loss

    def _refuse(self, reason: str) -> None:
        self._is_taped = False
        self._forget()
        words = f"the step cannot be recorded: {reason}. It takes ordinary steps"
        warnings.warn(f"GraphedStep: {words}", stacklevel=4)

    def _is_warming(self, kind: Any) -> bool:
        """Whether a batch of a kind that is not recorded is for an ordinary step."""
        calls = self._calls[kind] = self._calls.get(kind, 0) + 1
        return calls <= self.warmup or len(self._recorded) == _MOST_GRAPHS

    def _step(self, batch: tuple[Tensor, ...]) -> Tensor:
        images, *targets = batch
        self.optimizer.zero_grad(set_to_none=True)
        # A cast of the weights that autocast remembers must not outlive a record.
        with torch.autocast(
            self.device.type, self.autocast, enabled=self.autocast is not None, cache_enabled=False
        ):
            loss = self.criterion(self.model(images), *targets)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """On a stream of its own, as what will be recorded."""
        current = torch.cuda.current_stream(self.device)
        stream = self._stream = self._stream or torch.cuda.Stream(self.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            yield
        current.wait_stream(stream)
        self._last = None

    def _record(self, batch: tuple[Tensor, ...]) -> _Recorded:
        kept = tuple(torch.empty_like(x, device=self.device).copy_(x) for x in batch)
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        self.optimizer.zero_grad(set_to_none=True)
        try:
            with (
                torch.cuda.device(self.device),
                torch.cuda.graph(graph, pool=self._pool, stream=self._stream),
            ):
                loss = self._step(kept)
        except Exception as error:
            raise RuntimeError(
                f"GraphedStep: the step cannot be recorded as a CUDA graph: {error}\n"
                "Nothing in it may wait for the GPU, as .item() and printing a tensor do, and no "
                "loss of the model from elsewhere may be alive with its graph. Where that cannot "
                "be, take ordinary steps, in another process: CUDA's random numbers are broken here"
            ) from error
        self._last = None
        return _Recorded(graph, kept, loss, [p.grad for p in self._params])

    def _follow_settings(self) -> None:
        """Forgets graphs that have other settings."""
        self._follow_rates()
        settings = (
            [
                {name: _told(value) for name, value in group.items() if name != "params"}
                for group in self.optimizer.param_groups
            ],
            [module.training for module in self.model.modules()],
        )
        if settings != self._settings:
            self._forget()
            self._settings = settings

    def _follow_rates(self) -> None:
        """Puts learning rates where records read them."""
        for index, group in enumerate(self.optimizer.param_groups):
            rate = self._rates.get(index)
            if group["lr"] is rate or not self._reads_rates(group):
                continue
            if rate is None:
                # Torch's CUDA kernels read single precision; ours round as from a number.
                is_double = self.device.type == "cpu" or isinstance(self.optimizer, SGD)
                dtype = torch.float64 if is_double else torch.float32
                rate = self._rates[index] = torch.zeros((), dtype=dtype, device=self.device)
            rate.fill_(group["lr"])
            group["lr"] = rate

    def _reads_rates(self, group: dict[str, Any]) -> bool:
        """Whether the optimizer reads a rate that is a tensor in each step."""
        is_gpu = self.device.type == "cuda"
        return is_gpu or isinstance(self.optimizer, SGD) or bool(group.get("fused"))

    def _forget(self) -> None:
        self._recorded.clear()
        self._calls.clear()
        self._last = self._pool = self._around = None


def _told(value: Any) -> Any:
    """A setting as it can be compared: what a tensor holds is read by the record itself."""
    return id(value) if isinstance(value, Tensor) else value
