"""What several kernels share: the order of tiles, activations, digits of a position, first taps."""

import triton
import triton.language as tl


@triton.jit
def grouped_tile(index, tiles_m, tiles_n, BAND: tl.constexpr):
    """Tile (m, n) number `index`, in bands of BAND rows of tiles.

    Programs that run at the same time then share rows and columns of both operands in L2.
    """
    in_band = BAND * tiles_n
    first = index // in_band * BAND
    height = tl.minimum(tiles_m - first, BAND)
    rest = index % in_band
    return first + rest % height, rest // height


@triton.jit
def activate(z, slope, ACTIVATION: tl.constexpr):
    """act(z) in float32. A NaN stays one: no comparison with it is true."""
    if ACTIVATION == "relu":
        z = tl.where(z <= 0, 0.0, z)
    elif ACTIVATION == "relu6":
        z = tl.where(z <= 0, 0.0, tl.where(z >= 6, 6.0, z))
    elif ACTIVATION == "leaky_relu":
        z = tl.where(z > 0, z, z * slope)
    elif ACTIVATION == "silu":
        z = z / (1.0 + tl.exp(-z))
    return z


@triton.jit
def activation_gradient(grad, z, slope, ACTIVATION: tl.constexpr):
    """grad * act'(z) in float32; at a kink the derivative is native's."""
    if ACTIVATION == "relu":
        grad = tl.where(z <= 0, 0.0, grad)
    elif ACTIVATION == "relu6":
        grad = tl.where((z <= 0) | (z >= 6), 0.0, grad)
    elif ACTIVATION == "leaky_relu":
        grad = tl.where(z > 0, grad, grad * slope)
    elif ACTIVATION == "silu":
        sigmoid = 1.0 / (1.0 + tl.exp(-z))
        grad = grad * sigmoid * (1.0 + z * (1.0 - sigmoid))
    return grad


@triton.jit
def inside(position, size):
    """0 <= position < size, in one comparison: a negative number is a large unsigned one."""
    return position.to(tl.uint32) < size


@triton.jit
def advance(n, p, q, step_n, step_p, step_q, P, Q):
    """(n, p, q) plus a step, as numbers with the digits p < P and q < Q: no division."""
    q += step_q
    carry = (q >= Q).to(tl.int32)
    q -= carry * Q
    p += step_p + carry
    carry = (p >= P).to(tl.int32)
    p -= carry * P
    return n + step_n + carry, p, q


@triton.jit
def first_tap(pixel, taps, stride, dilation):
    """The first tap through which an output reads `pixel`, counted from the padding's edge.

    That is the least r with (pixel - r * dilation) divisible by stride; `taps` where there is none.
    """
    first = taps
    for i in range(taps):
        r = taps - 1 - i
        first = tl.where((pixel - r * dilation) % stride == 0, r, first)
    return first
