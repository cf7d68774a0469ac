"""How windows step through images, as numbers that kernels count with: convolution and pooling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, gcd, prod

from gdfast.geometry import Conv2dGeometry, MaxPool2dGeometry

MOST = 2**31 - 1  # that an offset may be
_MOST_PHASES = 65535  # a grid's second and third axis


@dataclass(frozen=True)
class Windows:
    """The steps of one geometry."""

    geometry: Conv2dGeometry | MaxPool2dGeometry

    @property
    def stride(self) -> tuple[int, int]:
        # A step over nothing may be larger than what kernels count with: they get 1 in its place.
        g = self.geometry
        return g.stride[0] if g.P > 1 else 1, g.stride[1] if g.Q > 1 else 1

    @property
    def dilation(self) -> tuple[int, int]:
        g = self.geometry
        return g.dilation[0] if g.R > 1 else 1, g.dilation[1] if g.S > 1 else 1

    @property
    def phases(self) -> tuple[int, int]:
        """Phases of the stride that have pixels."""
        return min(self.stride[0], self.geometry.H), min(self.stride[1], self.geometry.W)

    @property
    def pixels(self) -> int:
        """Pixels of one phase of one image, those past its end included."""
        return ceil(self.geometry.H / self.stride[0]) * ceil(self.geometry.W / self.stride[1])

    @property
    def numbers(self) -> tuple[int, ...]:
        """stride, padding and dilation, as kernels take them."""
        return (*self.stride, *self.geometry.padding[:2], *self.dilation)

    @property
    def phase_numbers(self) -> tuple[int, ...]:
        """The numbers of phases, and the steps of taps and of outputs within one."""
        pairs = tuple(zip(self.stride, self.dilation, strict=True))
        taps = tuple(stride // gcd(stride, dilation) for stride, dilation in pairs)
        outputs = tuple(dilation // gcd(stride, dilation) for stride, dilation in pairs)
        return *self.phases, *taps, *outputs

    def digits(self, step: int) -> tuple[int, int, int]:
        """A step of output positions as images, rows and columns."""
        P, Q = self.geometry.P, self.geometry.Q
        return step // (P * Q), step // Q % P, step % Q

    def images(self, input: Sequence[int], *outputs: Sequence[int]) -> int:
        """The most images that offsets reach in tensors of these strides; 0 if not even one."""
        g = self.geometry
        top, left, *others = g.padding
        below, right = others or (top, left)
        padded = g.N, g.C, g.H + top + below, g.W + left + right
        most = MOST // max(g.P * g.Q, self.pixels)
        for size, strides in ((padded, input), *((g.output_size, each) for each in outputs)):
            rest = sum((n - 1) * s for n, s in zip(size[1:], strides[1:], strict=True))
            if rest > MOST:
                return 0
            most = min(most, (MOST - rest) // max(1, strides[0]) + 1)
        return most

    def why_not(self, groups: int = 1) -> str:
        """Why kernels do not count the phases of these windows, or ""."""
        if prod(self.phases) * groups > _MOST_PHASES:
            return f"it takes at most {_MOST_PHASES} groups times phases of the stride"
        return ""
