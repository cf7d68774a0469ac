"""The pool behind large results: what it keeps, what it gives back, and when it stays out of it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch

from gdfast import native, ops
from gdfast.backends import memory

pytestmark = pytest.mark.usefixtures("compiled_cpu")

MB = 1 << 20


@pytest.fixture(autouse=True)
def empty_pool() -> Iterator[None]:
    memory.release()
    yield
    memory.release()


def floats(megabytes: int) -> torch.Tensor:
    count = megabytes * MB // 4
    return memory.empty_strided((count,), (1,), torch.float32)


def test_a_freed_block_serves_the_next_tensor_of_its_size() -> None:
    first = floats(3)
    address = first.data_ptr()
    del first
    assert memory.use().kept >= 3 * MB
    assert floats(3).data_ptr() == address


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_sizes_strides_and_dtype_are_those_asked_for(dtype: torch.dtype) -> None:
    size, strides = (4, 32, 64, 64), (32 * 64 * 64, 1, 64 * 32, 32)
    tensor = memory.empty_strided(size, strides, dtype)
    assert (tensor.shape, tensor.stride(), tensor.dtype) == (size, strides, dtype)
    assert memory.use().taken >= tensor.numel() * dtype.itemsize
    assert tensor.data_ptr() % 64 == 0
    tensor.fill_(1)
    assert tensor.sum(dtype=torch.float64) == tensor.numel()


def test_what_is_held_stays_near_the_most_that_was_in_use() -> None:
    for megabytes in (3, 5, 8, 13, 21, 34):
        del_me = floats(megabytes)
        del del_me
        assert sum(memory.use()) <= 1.05 * megabytes * MB
    held = [floats(2) for _ in range(17)]
    assert sum(memory.use()) <= 1.05 * 34 * MB
    del held


def test_a_much_larger_block_is_not_spent_on_a_small_tensor() -> None:
    large = floats(8)
    address = large.data_ptr()
    del large
    small = floats(4)
    assert small.data_ptr() != address


def test_a_capsule_that_nobody_takes_frees_its_block() -> None:
    assert native.cpu is not None
    capsule = native.cpu.take_memory((MB,), (1,), "float32")
    assert memory.use().taken == 4 * MB
    del capsule
    assert memory.use() == (0, 4 * MB)


@pytest.mark.parametrize(
    ("size", "strides", "dtype"),
    [((2, 0), (1, 1), "float32"), ((2,), (-1,), "float32"), ((2, 2), (1,), "float32"),
     ((2,), (1,), "int7"), ((1,) * 5, (1,) * 5, "float32")],
)  # fmt: skip
def test_what_cannot_be_a_tensor_is_refused(
    size: tuple[int, ...], strides: tuple[int, ...], dtype: str
) -> None:
    assert native.cpu is not None
    with pytest.raises(ValueError, match="take_memory"):
        native.cpu.take_memory(size, strides, dtype)
    assert memory.use().taken == 0


def test_small_tensors_and_deterministic_mode_use_torchs_memory() -> None:
    memory.empty_strided((100,), (1,), torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        filled = floats(3)
    finally:
        torch.use_deterministic_algorithms(False)
    assert memory.use() == (0, 0)
    assert filled.isnan().all()


def test_threads_take_and_give_at_once() -> None:
    def work() -> None:
        for turn in range(50):
            tensor = floats(1 + turn % 3)
            tensor.fill_(turn)
            assert tensor[-1] == turn

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert memory.use().taken == 0


def test_a_training_step_leaves_nothing_in_use() -> None:
    x = torch.randn(4, 16, 64, 64, requires_grad=True)
    weight = torch.randn(16, 16, 3, 3, requires_grad=True)
    for _ in range(2):
        ops.conv2d(x, weight, padding=1).square().sum().backward()
        x.grad = weight.grad = None
    assert memory.use().taken == 0
    assert memory.use().kept > 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_has_a_pool_of_its_own() -> None:
    script = """
import os
from gdfast.backends import memory
import torch
torch.set_num_threads(1)  # the child has none of the parent's other threads
first = memory.empty_strided((1 << 20,), (1,), torch.float32).fill_(1)
child = os.fork()
if child == 0:
    first.fill_(2)
    second = memory.empty_strided((1 << 20,), (1,), torch.float32).fill_(3)
    os._exit(0 if second[0] == 3 else 1)
assert os.waitpid(child, 0)[1] == 0 and first[0] == 1
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_the_environment_switches_it_off() -> None:
    script = """
from gdfast.backends import memory
import torch
memory.empty_strided((1 << 20,), (1,), torch.float32)
assert memory.use() == (0, 0)
"""
    environment = {**os.environ, "GDFAST_POOL": "0"}
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60, env=environment)
