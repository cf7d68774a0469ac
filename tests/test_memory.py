"""The pool behind large results: what it keeps, what it gives back, and when it stays out of it."""

from __future__ import annotations

import os
import random
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
PAGE = os.sysconf("SC_PAGESIZE") if hasattr(os, "sysconf") else 4096


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
        assert sum(memory.use()) <= 1.125 * megabytes * MB
    held = [floats(2) for _ in range(17)]
    assert sum(memory.use()) <= 1.125 * 34 * MB
    del held


@pytest.mark.skipif(sys.platform != "linux", reason="counts Linux's page faults")
def test_an_order_of_sizes_that_leaves_gaps_finds_its_pages_too() -> None:
    # Best fit leaves gaps of more than an eighth of what is in use between these blocks.
    script = """
import resource
from gdfast.backends import memory
import torch
def floats(mb):
    return memory.empty_strided((mb << 18,), (1,), torch.float32).fill_(1)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step():
    first, second = floats(3), floats(5)
    third, fourth = floats(4), floats(7)
    del first
    fifth = floats(4)
    most.append(memory.use())
    del third, fifth, second, fourth
most = []
for _ in range(20): step()
before = faults()
for _ in range(5): step()
assert faults() - before < 100, faults() - before
assert all(use.taken + use.kept <= 1.25 * 20 * 2**20 for use in most), most
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_a_large_block_serves_small_tensors_and_is_whole_again_afterwards() -> None:
    large = floats(8)
    address = large.data_ptr()
    del large
    small = [floats(2) for _ in range(4)]
    assert {tensor.data_ptr() - address for tensor in small} == {0, 2 * MB, 4 * MB, 6 * MB}
    del small[2], small[1]
    assert floats(4).data_ptr() == address + 2 * MB
    del small
    assert floats(8).data_ptr() == address
    assert memory.use() == (0, 8 * MB)


def test_blocks_do_not_overlap_and_nothing_is_lost() -> None:
    generator = random.Random(0)
    held: list[torch.Tensor] = []
    most = 0
    for turn in range(400):
        if held and generator.random() < 0.5:
            tensor = held.pop(generator.randrange(len(held)))
            assert (tensor == tensor[0]).all()
            del tensor
        else:
            count = generator.randrange(MB // 16, MB // 2)
            held.append(memory.empty_strided((count,), (1,), torch.float32).fill_(turn))
        taken, kept = memory.use()
        assert taken == sum(-(-4 * tensor.numel() // PAGE) * PAGE for tensor in held)
        most = max(most, taken)
        assert taken + kept <= 1.25 * most
    held.clear()
    assert memory.use().taken == 0
    memory.release()
    assert memory.use() == (0, 0)


def test_steps_of_many_sizes_find_their_pages_again() -> None:
    script = """
import resource
from gdfast.backends import memory
import torch
def step():
    held = []
    for count in (5, 3, 3, 8, 2, 2, 2, 13, 1, 1):
        for size in (count << 17, count << 16, count << 17):
            held.append(memory.empty_strided((size,), (1,), torch.float32).fill_(1))
    gradient = None
    while held:
        gradient = memory.empty_strided((held[-1].numel(),), (1,), torch.float32).fill_(1)
        held.pop()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step(); step()
before = faults()
for _ in range(5): step()
assert faults() - before < 500, faults() - before
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@pytest.mark.skipif(sys.platform != "linux", reason="asks for Linux's limit on address space")
def test_a_limit_on_address_space_is_respected() -> None:
    script = """
import resource
from gdfast.backends import memory
import torch
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (300 << 20),) * 2)
held = [memory.empty_strided((8 << 20,), (1,), torch.float32).fill_(i) for i in range(4)]
rest = torch.ones(16 << 20)
try:
    memory.empty_strided((128 << 20,), (1,), torch.float32)
    raise SystemExit("expected an error")
except (MemoryError, RuntimeError):
    pass
assert [tensor[-1].item() for tensor in held] == [0, 1, 2, 3]
del held
memory.empty_strided((20 << 20,), (1,), torch.float32).fill_(1)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")
def test_what_is_counted_is_what_is_resident() -> None:
    script = """
import resource, random
from gdfast.backends import memory
import torch
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
def floats(mb):
    return memory.empty_strided((mb << 18,), (1,), torch.float32).fill_(1)
floats(1), memory.release()
base = resident()
def check():
    found, counted = resident() - base, sum(memory.use())
    assert abs(found - counted) < 24 << 20, (found >> 20, counted >> 20)
first, second = floats(32), floats(32)
del first; memory.release(); check()
del second; check()
third = floats(32); check()
memory.release(); check()
generator, held = random.Random(0), [third]
for _ in range(300):
    if held and generator.random() < 0.5: held.pop(generator.randrange(len(held)))
    else: held.append(floats(generator.randrange(1, 16)))
    if generator.random() < 0.1: memory.release()
    check()
held.clear(); memory.release(); check()
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@pytest.mark.skipif(sys.platform != "linux", reason="asks for Linux's limit on data")
def test_requests_that_fail_reserve_nothing() -> None:
    script = """
import resource
from gdfast import native
def size():
    return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
used = int(open("/proc/self/statm").read().split()[5]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_DATA, (used + (64 << 20),) * 2)
before = size()
for _ in range(5):
    try:
        native.cpu.take_memory((200 << 18,), (1,), "float32")
        raise SystemExit("expected an error")
    except MemoryError:
        pass
assert size() - before < 64 << 20, size() - before
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


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
