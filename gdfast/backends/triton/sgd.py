"""The SGD update of many tensors in one launch:

    d = sign * g / grad_scale + weight_decay * p
    m = momentum * m + (1 - dampening) * d      in the first step m = d
    u = d + momentum * m with nesterov, m without it, d without momentum
    p = p - lr * u

One pass over memory, in float32, rounded once. Where a parameter of a half type has a float32
master copy, p is that, and the parameter what it rounds to. The addresses come as arguments of the
launch, so that nothing is copied to the GPU first and a CUDA graph keeps them. One program updates
BLOCK elements: `starts` tells the first program of each tensor. lr, grad_scale and found_inf may
lie on the GPU, and are read there.
"""

import triton
import triton.language as tl


@triton.jit
def update(
    param, grad, buffer, master, numel, at, lr_at, grad_scale_at, found_inf_at,
    lr, momentum, undamped, weight_decay,
    MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr, DECAY: tl.constexpr,
    ZERO_GRAD: tl.constexpr, LR_AT: tl.constexpr, SCALE: tl.constexpr, FOUND_INF: tl.constexpr,
    MASTER: tl.constexpr,
    WHOLE: tl.constexpr,  # all elements of the block are there: no masks, so that loads are wide
):  # fmt: skip
    """Updates the elements `at` of one tensor."""
    exists = None if WHOLE else at < numel
    writes = exists
    if FOUND_INF:
        # Where gradients overflowed nothing is updated, though gradients are zeroed if asked for.
        writes = at < tl.where(tl.load(found_inf_at) == 0, numel, 0)
    p = tl.load(param + at, mask=exists).to(tl.float32)
    if MASTER:
        # Unless somebody has changed the parameter since, it is what its master copy rounds to.
        kept = tl.load(master + at, mask=exists)
        p = tl.where(kept.to(param.dtype.element_ty).to(tl.float32) == p, kept, p)
    g = tl.load(grad + at, mask=exists).to(tl.float32)
    if SCALE:
        g = g / tl.load(grad_scale_at)
    d = -g if MAXIMIZE else g
    if DECAY:
        d = tl.fma(p, weight_decay, d)
    u = d
    if MOMENTUM != "none":
        m = d
        if MOMENTUM == "running":
            m = tl.load(buffer + at, mask=exists).to(tl.float32)
            m = tl.fma(d, undamped, m * momentum)
        tl.store(buffer + at, m.to(buffer.dtype.element_ty), mask=writes)
        u = tl.fma(m, momentum, d) if NESTEROV else m
    if LR_AT:
        lr = tl.load(lr_at)
    p = tl.fma(u, -lr, p)
    tl.store(param + at, p.to(param.dtype.element_ty), mask=writes)
    if MASTER:
        tl.store(master + at, p, mask=writes)
    if ZERO_GRAD:
        tl.store(grad + at, tl.zeros(at.shape, dtype=grad.dtype.element_ty), mask=exists)
    elif SCALE:
        tl.store(grad + at, g.to(grad.dtype.element_ty), mask=writes)


@triton.jit
def decoded(number):
    """What `bind_sgd.encoded` was given."""
    return (number - 3) >> 1


@triton.jit
def sgd_kernel(
    element, lr_at, grad_scale_at, found_inf_at,  # of `element` only the type counts
    # Tuples with an encoded entry for each tensor. None may be called `params`: the function that
    # Triton generates to take a kernel's arguments has a variable of that name.
    parameters, grads, momenta, masters, numels, starts,
    lr, momentum, undamped, weight_decay,
    MOMENTUM: tl.constexpr,  # "none", "first" or "running"
    NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr, DECAY: tl.constexpr, ZERO_GRAD: tl.constexpr,
    LR_AT: tl.constexpr, SCALE: tl.constexpr, FOUND_INF: tl.constexpr, MASTER: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    param, grad, buffer, master = parameters[0], grads[0], momenta[0], masters[0]
    numel, start = numels[0], starts[0]
    for i in tl.static_range(1, len(parameters)):
        later = program >= decoded(starts[i])
        param = tl.where(later, parameters[i], param)
        grad = tl.where(later, grads[i], grad)
        buffer = tl.where(later, momenta[i], buffer)
        if MASTER:
            master = tl.where(later, masters[i], master)
        numel = tl.where(later, numels[i], numel)
        start = tl.where(later, starts[i], start)
    numel, start = decoded(numel), decoded(start)
    pointer = tl.pointer_type(element.dtype.element_ty)
    state = tl.pointer_type(tl.float32 if MASTER else element.dtype.element_ty)
    param, grad = decoded(param).to(pointer), decoded(grad).to(pointer)
    buffer, master = decoded(buffer).to(state), decoded(master).to(state)
    if ALIGNED:
        param, grad = tl.multiple_of(param, 16), tl.multiple_of(grad, 16)
        buffer, master = tl.multiple_of(buffer, 16), tl.multiple_of(master, 16)
    first = (program - start).to(tl.int64) * BLOCK
    at = first + tl.arange(0, BLOCK)
    if first + BLOCK <= numel:
        update(
            param, grad, buffer, master, numel, at, lr_at, grad_scale_at, found_inf_at, lr,
            momentum, undamped, weight_decay, MOMENTUM, NESTEROV, MAXIMIZE, DECAY, ZERO_GRAD, LR_AT,
            SCALE, FOUND_INF, MASTER, True,
        )  # fmt: skip
    else:
        update(
            param, grad, buffer, master, numel, at, lr_at, grad_scale_at, found_inf_at, lr,
            momentum, undamped, weight_decay, MOMENTUM, NESTEROV, MAXIMIZE, DECAY, ZERO_GRAD, LR_AT,
            SCALE, FOUND_INF, MASTER, False,
        )  # fmt: skip
