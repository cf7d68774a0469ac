"""The gradient in the weight on our CUDA kernels, whose last pass may be an SGD update instead.

Positions are summed in parts, which a last pass adds up. That pass, or with one part the only one,
updates the weight from float32 sums (float64 for double) that have not been rounded to its type.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from gdfast import native
from gdfast.backends import cuda_stream, plans
from gdfast.backends.cuda_operands import Copy, may_plan
from gdfast.backends.registry import Conv2dQuery
from gdfast.backends.sgd import DTYPES, SgdHyper, SgdTensors, address, split_lr


class GradWeight:
    """A kernel for one query: `copies` bring input and grad_output into the problem's layout, `way`
    is what kernels are told at each call, `parts` in how many they sum positions.

    Called with grad_output, input and whether the bias's gradient is wanted, it returns both
    gradients. `begin` takes the same and leaves the weight's for later.
    """

    on_gpu = drafts_wide = True
    ends_in_registers = True  # whether one part alone may update a weight without a workspace

    def __init__(
        self, query: Conv2dQuery, problem: Any, copies: Sequence[Copy], way: Callable[[], Any],
        parts: int,
    ) -> None:  # fmt: skip
        assert native.cuda is not None
        self.problem, self.way, self.parts = problem, way, parts
        self.copy_input, self.copy_grad = copies
        self._query = query
        self.size, self.strides = query.geometry.weight_size, query.strides[1]
        self._empty_batch = query.geometry.N == 0
        self._bytes = {
            bias: native.cuda.conv2d_grad_weight_workspace(problem, parts, bias)
            for bias in (False, True)
        }

    def __call__(
        self, grad_output: Tensor, input: Tensor, bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        grad_weight = self.empty_weight(input.dtype, input.device)
        _, grad_bias = self._run(grad_output, input, bias, grad_weight)
        return grad_weight, grad_bias

    def begin(
        self, grad_output: Tensor, input: Tensor, bias: bool
    ) -> tuple[BegunGradWeight, Tensor | None]:
        """What can be made a gradient or an update of the weight, once, and the bias's gradient."""
        if self.ends_in_registers and self.parts == 1 and not bias and not self._empty_batch:
            return Unsplit(self, grad_output, input), None
        workspace, grad_bias = self._run(grad_output, input, bias, None)
        return Parts(self, workspace, input.dtype), grad_bias

    def draft(
        self, plan: plans.Draft, grad_output: int, input: int, bias: bool, wide: bool = False
    ) -> tuple[int, int] | None:
        """The numbers of both gradients, where the images are read as they lie. With `wide` the
        weight's is float32, though rounded to the type of images, and the bias has none."""
        assert native.cuda is not None
        if not may_plan(plan, (self.copy_grad, self.copy_input), (grad_output, input)):
            return None
        grad_weight, grad_bias = self._draft_results(plan, bias, wide)
        launch = native.cuda.conv2d_grad_weight_launch(self.problem, self.way(), self.parts, wide)
        workspace = plan.scratch(self._bytes[bias])
        plan.launch(launch, grad_output, input, grad_weight, grad_bias, workspace)
        return grad_weight, grad_bias

    def _draft_results(self, plan: plans.Draft, bias: bool, wide: bool) -> tuple[int, int]:
        dtype, device = self._query.dtype, self._query.device
        of_weight = torch.float32 if wide else dtype
        grad_weight = plan.fresh(
            partial(torch.empty_strided, self.size, self.strides, dtype=of_weight, device=device)
        )
        if not bias:
            return grad_weight, plans.NONE
        return grad_weight, plan.fresh(
            partial(torch.empty, self.size[0], dtype=dtype, device=device)
        )

    def empty_weight(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for a gradient."""
        return torch.empty_strided(self.size, self.strides, dtype=dtype, device=device)

    def _run(
        self, grad_output: Tensor, input: Tensor, bias: bool, grad_weight: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the workspace, with the parts where there is no grad_weight, and grad_bias."""
        grad_bias = input.new_empty(self.size[0]) if bias else None
        grad_output, input = self.copy_grad(grad_output), self.copy_input(input)
        workspace = input.new_empty(self._bytes[bias], dtype=torch.uint8)
        self._sum(grad_output, input, grad_weight, grad_bias, workspace)
        return workspace, grad_bias

    def _sum(
        self, grad_output: Tensor, input: Tensor, grad_weight: Tensor | None,
        grad_bias: Tensor | None, workspace: Tensor,
    ) -> None:  # fmt: skip
        assert native.cuda is not None
        native.cuda.conv2d_grad_weight(
            self.problem, self.way(), grad_output.data_ptr(), input.data_ptr(),
            address(grad_weight), address(grad_bias), workspace.data_ptr(), self.parts,
            *cuda_stream.current(input.device),
        )  # fmt: skip


class BegunGradWeight(ABC):
    """The gradient in a weight before its last pass, which is run once, by either method."""

    def __init__(self, kernel: GradWeight) -> None:
        self._kernel = kernel

    @property
    def strides(self) -> tuple[int, ...]:
        """Those of the weight that it takes."""
        return self._kernel.strides

    @abstractmethod
    def gradient(self) -> Tensor:
        """The gradient, of the type of images."""

    @abstractmethod
    def _operands(self) -> tuple[int, int, int]:
        """The addresses of grad_output, input and workspace, 0 for what is not needed."""

    def update(self, tensors: SgdTensors, hyper: SgdHyper) -> None:
        """Updates one weight in place, with its momentum buffer and master copy, if any.

        All are in the memory order of a weight with `strides`, the weight of the type of images
        or, where that is a half type, float32; neither gradients nor their scale are looked at.
        """
        assert native.cuda is not None
        (weight,), _, momenta, masters = tensors
        lr, lr_tensor = split_lr(weight.device, hyper.lr)
        kernel = self._kernel
        native.cuda.conv2d_grad_weight_sgd(
            kernel.problem, kernel.way(), *self._operands(), kernel.parts, weight.data_ptr(),
            *(address(each[0]) if each else 0 for each in (momenta, masters)),
            DTYPES[weight.dtype], lr, hyper.momentum, hyper.dampening, hyper.weight_decay,
            hyper.nesterov, hyper.maximize, hyper.first_step, address(lr_tensor),
            *cuda_stream.current(weight.device),
        )  # fmt: skip
        increment_version([weight, *momenta, *masters])


class Unsplit(BegunGradWeight):
    """Nothing is summed yet: the only part goes from registers into the weight."""

    def __init__(self, kernel: GradWeight, grad_output: Tensor, input: Tensor) -> None:
        super().__init__(kernel)
        self._grad_output, self._input = grad_output, input

    def gradient(self) -> Tensor:
        return self._kernel(self._grad_output, self._input, False)[0]

    def _operands(self) -> tuple[int, int, int]:
        self._grad_output = self._kernel.copy_grad(self._grad_output)
        self._input = self._kernel.copy_input(self._input)
        return self._grad_output.data_ptr(), self._input.data_ptr(), 0


class Parts(BegunGradWeight):
    """The parts are summed, and lie in a workspace."""

    def __init__(self, kernel: GradWeight, workspace: Tensor, dtype: torch.dtype) -> None:
        super().__init__(kernel)
        self._workspace, self._dtype = workspace, dtype

    def gradient(self) -> Tensor:
        assert native.cuda is not None
        kernel, device = self._kernel, self._workspace.device
        grad_weight = kernel.empty_weight(self._dtype, device)
        native.cuda.conv2d_grad_weight(
            kernel.problem, kernel.way(), 0, 0, grad_weight.data_ptr(), 0,
            self._workspace.data_ptr(), kernel.parts, *cuda_stream.current(device),
        )  # fmt: skip
        return grad_weight

    def _operands(self) -> tuple[int, int, int]:
        return 0, 0, self._workspace.data_ptr()
