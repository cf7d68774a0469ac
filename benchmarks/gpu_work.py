"""What benchmarks/gpu_layers.py times: calls on a GPU by our backends and by native, and checks.

Each check compares with more exact arithmetic on the very inputs that are timed. In a dry run all
is tiny and on the CPU, and native runs in the place of each backend.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import gpu_rivals
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module, Parameter

import gdfast
from gdfast import ops, optim
from gdfast.bench import norm, sgd, step, suites
from gdfast.bench.cases import Conv2dCase, NormCase, SgdCase, StepCase
from gdfast.bench.workload import LAYOUTS, allowed_error, relative_error
from gdfast.tensor_cores import input_precision

_SETTINGS = {"momentum": 0.9, "weight_decay": 1e-4}
# Three products of TF32 numbers are exact to 2^-17 at worst, one is to 2^-11.
_FLOAT32_ERROR = 1e-5
_TF32_ROUNDING = 2.0**-11
_ROUNDINGS = 8  # of a whole step's gradients, where native has none by luck
_LOSSES_APART = 0.05  # after three steps
_RIVALS_ROUNDINGS = 8  # of another library's results from cuDNN's


class Where(NamedTuple):
    device: torch.device
    dry: bool = False

    def run_by(self, backend: str) -> str:
        return "reference" if self.dry else backend

    def generator(self) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(0)


@dataclass(frozen=True)
class Work:
    """The same work by native's ways and by a backend of ours.

    `wrong` runs a backend on these inputs and tells what is wrong with its results, or "".
    `differs` does so of what one of native's ways returned, as far as that could be wrong. `peak`
    names the arithmetic that bounds it. `graph` has calls timed as CUDA graphs, so that the time is
    the GPU's alone.
    """

    native: dict[str, Callable[[], Any]]
    ours: Callable[[str], Callable[[], Any]]
    wrong: Callable[[str], str]
    flops: int
    bytes: int
    peak: str
    graph: bool = True
    differs: Callable[[Any], str] = lambda result: ""


def _judged(ours: Sequence[Tensor], native: Sequence[Tensor], exact: Sequence[Tensor]) -> str:
    for index, (our, other, expected) in enumerate(zip(ours, native, exact, strict=True)):
        error = relative_error(our, expected)
        allowed = allowed_error(relative_error(other, expected), our.dtype, 1)
        if our.dtype == torch.float32:
            allowed = max(allowed, _FLOAT32_ERROR)
        if not error <= allowed:
            return f"result {index}: error {error:.1e}, allowed {allowed:.1e}"
    return ""


def _plainly() -> Any:
    """Exact results are computed once: without a search for the fastest way, without TF32."""
    return torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=False, allow_tf32=False
    )


def layer(
    where: Where, case: Conv2dCase, task: str, dtype: torch.dtype, layout: str, *,
    also_nchw: bool = False, rivals: Sequence[str] = (),
) -> Work:  # fmt: skip
    """One pass of one convolution, by the dispatcher's operations; native in NCHW too, and other
    libraries, if wanted."""
    generator, device = where.generator(), where.device
    tensors = [
        torch.randn(size, device=device, generator=generator)
        .to(dtype)
        .to(memory_format=LAYOUTS[layout])
        for size in (case.input_shape, case.weight_shape, case.output_shape)
    ]

    def call(
        backend: str, tensors: list[Tensor] = tensors, last: bool = layout == "channels_last"
    ) -> Callable[[], Tensor]:
        input, weight, grad = tensors
        arguments = case.stride, case.padding * 2, case.dilation, case.groups, backend
        run = torch.ops.gdfast
        if task == "forward":
            return lambda: run.conv2d(input, weight, None, *arguments)
        if task == "grad_input":
            return lambda: run.conv2d_grad_input(grad, weight, input.shape, last, *arguments)
        return lambda: run.conv2d_grad_weight(
            grad, input, weight.shape, last, False, *arguments
        )[0]  # fmt: skip

    native, known = call("reference"), {}
    natives = {"cuDNN": native}
    if also_nchw:
        images = [tensor.contiguous() for tensor in tensors]
        natives["cuDNN NCHW"] = call("reference", images, last=False)
    for rival in rivals:
        # What they compute on in a dry run is the CPU, which most cannot.
        natives[rival] = native if where.dry else gpu_rivals.call(rival, case, task, tensors)

    def differs(result: Tensor) -> str:
        error = relative_error(result, native().double())
        allowed = _RIVALS_ROUNDINGS * torch.finfo(dtype).eps
        return "" if error <= allowed else f"error {error:.1e}, allowed {allowed:.1e}"

    def wrong(backend: str) -> str:
        if not known:
            # Float32 is a thousand times as exact as half types are.
            exact = torch.float64 if dtype == torch.float32 else torch.float32
            with _plainly():
                known["exact"] = call("reference", [tensor.to(exact) for tensor in tensors])()
            known["native"] = native()
        ours = call(where.run_by(backend))()
        return _judged([ours], [known["native"]], [known["exact"]])

    return Work(
        natives, lambda backend: call(where.run_by(backend)), wrong, case.flops,
        case.bytes * dtype.itemsize // 4, "bfloat16" if dtype.itemsize == 2 else "3 x tf32",
        **({"differs": differs} if rivals else {}),
    )  # fmt: skip


def norm_both_ways(where: Where, case: NormCase, dtype: torch.dtype) -> Work:
    """Batch normalisation with ReLU, and a residual before that: forward and backward."""
    generator = where.generator()
    random = partial(torch.randn, device=where.device, generator=generator)
    size, C = case.size, case.size[1]
    spread, centre = 0.5 + random(C, 1, 1).abs(), random(C, 1, 1)
    images = [random(size) * spread + centre, random(size), random(size)]
    images = [x.to(dtype).to(memory_format=torch.channels_last) for x in images]
    params = [random(C).abs() + 0.5, random(C)]

    def call(function: Callable[..., Tensor], exact: bool = False) -> Callable[[], list[Tensor]]:
        input, residual, grad = (x.double() for x in images) if exact else images
        weight, bias = (x.double() for x in params) if exact else params
        leaves = [x.detach().requires_grad_() for x in (input, weight, bias)]
        leaves += [residual.detach().requires_grad_()] * case.residual
        mean, var = torch.zeros_like(weight), torch.ones_like(weight)

        def run() -> list[Tensor]:
            more = leaves[3] if case.residual else None
            output = function(*leaves[:3], mean, var, more, training=True)
            return [output.detach(), *torch.autograd.grad(output, leaves, grad)]

        return run

    def ours(backend: str) -> Callable[[], list[Tensor]]:
        return call(partial(ops.batch_norm_act, backend=where.run_by(backend)))

    eager, known = call(norm.native), {}

    def wrong(backend: str) -> str:
        if not known:
            known["exact"], known["native"] = call(norm.native, exact=True)(), eager()
        return _judged(ours(backend)(), known["native"], known["exact"])

    # Forward reads input and residual and writes output; backward reads grad_output, input and,
    # with a residual, output, and writes the gradients of input and residual.
    moved = (8 if case.residual else 5) * images[0].numel() * dtype.itemsize
    compiled = norm.native if where.dry else torch.compile(norm.native, dynamic=False)
    native = {"eager": eager, "compile": call(compiled)}
    return Work(native, ours, wrong, 24 * images[0].numel(), moved, "float32")


class Training:
    """A model in training on one batch: a call does one step."""

    def __init__(
        self, model: Module, images: Tensor, labels: Tensor, make: Any, amp: bool, *,
        lr: float = 1e-4, compiled: bool = False,
    ) -> None:  # fmt: skip
        self.model = copy.deepcopy(model)
        self.images, self.labels, self.amp = images, labels, amp
        self.optimizer = make(self.model.parameters(), lr=lr, **_SETTINGS)
        self.forward = torch.compile(self.model, dynamic=False) if compiled else self.model

    def loss(self) -> Tensor:
        self.optimizer.zero_grad()
        with torch.autocast(self.images.device.type, torch.bfloat16, enabled=self.amp):
            loss = F.cross_entropy(self.forward(self.images), self.labels)
        loss.backward()
        return loss.detach()

    def __call__(self) -> Tensor:
        loss = self.loss()
        self.optimizer.step()
        return loss

    def gradients(self) -> Tensor:
        """Those of a first step, in one tensor."""
        self.loss()
        return torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])


def _in_backward(params: Iterable[Parameter], *, watched: bool, **settings: Any) -> optim.SGD:
    """Updates in backward; a gradient that is watched must be made, and then goes by hooks."""
    params = list(params)
    if watched:
        for param in params:
            param.register_hook(lambda _: None)
    return optim.SGD(params, in_backward=True, **settings)


class GraphedTraining(Training):
    """The same with each step recorded as a CUDA graph, but the first."""

    def __init__(self, *arguments: Any, amp: bool, **settings: Any) -> None:
        super().__init__(*arguments, amp=amp, **settings)
        self.step = gdfast.GraphedStep(
            self.forward, F.cross_entropy, self.optimizer,
            autocast=torch.bfloat16 if amp else None, warmup=1,
        )  # fmt: skip

    def __call__(self) -> Tensor:
        return self.step(self.images, self.labels)


# Where our optimizer updates parameters.
UPDATES: dict[str, Callable[..., optim.SGD]] = {
    "step": optim.SGD,
    "hooks": partial(_in_backward, watched=True),
    "in backward": partial(_in_backward, watched=False),
}


def training(where: Where, case: StepCase, amp: bool, rival: str, place: str = "step") -> Work:
    """A training step of a model, channels_last; the rival is "eager" or "compile", `place` one of
    UPDATES, or "graph" for steps as CUDA graphs, of native's too.
    """
    models = suites.both_models(case)
    model, plain = (
        each.to(where.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for each in models
    )
    generator = where.generator()
    size = (case.N, case.C, case.H, case.W)
    images = torch.randn(size, device=where.device, generator=generator)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.randint(case.classes, (case.N,), device=where.device, generator=generator)
    fused = partial(torch.optim.SGD, fused=True)
    train = partial(Training, images=images, labels=labels, amp=amp)
    graphed = partial(GraphedTraining, images=images, labels=labels, amp=amp)
    kind, make = (graphed, optim.SGD) if place == "graph" else (train, UPDATES[place])

    def on(backend: str, call: Callable[[], Any]) -> Any:
        with gdfast.backend(where.run_by(backend)):
            return call()

    known: dict[str, Any] = {}

    def third_loss(train: Callable[[], Tensor]) -> Tensor:
        return [train() for _ in range(3)][-1]

    def wrong(backend: str) -> str:
        if not known:
            with _plainly():
                known["exact"] = train(plain, make=fused, amp=False).gradients()
            gradients = train(plain, make=fused).gradients()
            known["error"] = relative_error(gradients, known["exact"].double())
            known["loss"] = third_loss(train(plain, make=fused, lr=0.01)).item()
            known["exact"] = known["exact"].double()
        gradients = on(backend, train(model, make=optim.SGD).gradients)
        error = relative_error(gradients, known["exact"])
        rounding = torch.finfo(torch.bfloat16 if amp else torch.float32).eps
        if not amp and input_precision(torch.float32, strict=False) == "tf32":
            rounding = _TF32_ROUNDING  # which native may have done without
        allowed = 2 * known["error"] + _ROUNDINGS * rounding
        if not error <= allowed:
            return f"gradients: error {error:.1e}, allowed {allowed:.1e}"
        ours = kind(model, make=make, lr=0.01)
        loss = on(backend, partial(third_loss, ours)).item()
        if not abs(loss - known["loss"]) <= _LOSSES_APART * abs(known["loss"]):
            return f"loss of the third step: {loss:.4f}, native's {known['loss']:.4f}"
        return ""

    def ours(backend: str) -> Callable[[], Any]:
        return recorded(partial(on, backend, kind(model, make=make)))

    def recorded(call: Callable[[], Any]) -> Callable[[], Any]:
        if place == "graph":
            for _ in range(2):
                call()
        return call

    compiled = rival == "compile" and not where.dry
    native: dict[str, Any] = {rival: train(plain, make=fused, compiled=compiled)}
    if place == "graph":
        native["graph"] = recorded(graphed(plain, make=fused))
    peak = "bfloat16" if amp else "tf32"
    return Work(native, ours, wrong, step.flops(case, plain), 0, peak, graph=False)


def update(where: Where, case: SgdCase) -> Work:
    """One step of SGD with momentum and weight decay, in float32."""
    generator = where.generator()
    random = partial(torch.randn, device=where.device, generator=generator)
    start, gradients = ([random(size) for size in case.sizes] for _ in range(2))
    natives = sgd.native_variants(torch.float32)

    def optimizer(make: Any, dtype: torch.dtype, lr: float) -> Any:
        params = [value.to(dtype, copy=True).requires_grad_() for value in start]
        for param, gradient in zip(params, gradients, strict=True):
            param.grad = gradient.to(dtype, copy=True)
        return make(params, lr=lr, **_SETTINGS)

    def ours(backend: str, lr: float = 1e-4) -> Callable[[], Any]:
        used = optimizer(optim.SGD, torch.float32, lr)

        def run() -> Any:
            with gdfast.backend(where.run_by(backend)):
                return used.step()

        run.params = used.param_groups[0]["params"]  # type: ignore[attr-defined]
        return run

    def after_three(call: Callable[[], Any], params: list[Tensor]) -> list[Tensor]:
        for _ in range(3):
            call()
        return [torch.cat([p.detach().flatten() for p in params])]

    def natively(make: Any, dtype: torch.dtype) -> list[Tensor]:
        used = optimizer(make, dtype, 0.1)
        return after_three(used.step, used.param_groups[0]["params"])

    def wrong(backend: str) -> str:
        exact = natively(natives["loop"], torch.float64)
        run = ours(backend, lr=0.1)
        result = after_three(run, run.params)  # type: ignore[attr-defined]
        return _judged(result, natively(natives["loop"], torch.float32), exact)

    # As much memory is read, and as much written, as all of the update's traffic together.
    source = random(case.bytes // 8)
    target = torch.empty_like(source)
    native = {
        "fused": optimizer(natives["fused"], torch.float32, 1e-4).step,
        # In a graph copy_ is a node of CUDA's own, which takes half as long again.
        "copy": lambda: torch.neg(source, out=target),
    }
    flops = 6 * case.parameters
    return Work(native, ours, wrong, flops, case.bytes, "float32")


def tiny(case: Conv2dCase) -> Conv2dCase:
    """A layer of the same kind for a dry run."""
    C, K, groups = min(case.C, 8), min(case.K, 8), 1
    if case.groups > 1:
        C = K = 8
        groups = 8 if case.groups == case.C else 2
    return replace(case, N=2, C=C, K=K, H=8, W=8, groups=groups)
