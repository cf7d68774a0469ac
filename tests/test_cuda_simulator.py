"""The simulator of csrc/cuda/device.h: each primitive by itself, and what it must not let pass."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
SOURCES = [
    ROOT / "tests" / "cuda_simulator_test.cpp",
    ROOT / "tests" / "cuda_hopper_test.cpp",
    ROOT / "csrc" / "cuda" / "simulator.cpp",
]
LANES = np.arange(32)

Call = Callable[..., str]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    if not SOURCES[-1].exists():
        pytest.skip("needs the sources beside the tests")
    path = tmp_path_factory.mktemp("simulator") / "test.so"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, *SOURCES, "-o", path], check=True)
    return ctypes.CDLL(str(path))


@pytest.fixture(params=["ascending", "descending"])
def call(
    request: pytest.FixtureRequest, library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> Call:
    """Calls a kernel by name, with fibers in either order; returns what went wrong."""
    monkeypatch.setenv("GDFAST_CUDA_SIMULATOR_ORDER", request.param)

    def run(name: str, *arguments: np.ndarray | int) -> str:
        function = getattr(library, name)
        function.restype = ctypes.c_char_p
        return function(
            *(ctypes.c_void_p(a.ctypes.data) if isinstance(a, np.ndarray) else a for a in arguments)
        ).decode()

    return run


def nan(*shape: int) -> np.ndarray:
    return np.full(shape, np.nan, np.float32)


def aligned(values: np.ndarray) -> np.ndarray:
    """A copy at an address that 16 divides."""
    memory = np.empty(values.nbytes + 16, np.uint8)
    start = -memory.ctypes.data % 16
    copy = memory[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
    copy[...] = values
    return copy


def test_shuffles_stay_within_a_warp(call: Call) -> None:
    values = np.random.randn(3 * 64).astype(np.float32)
    out = nan(3, 3 * 64)
    assert call("shuffles", values, 3, 5, 7, out) == ""
    warps = values.reshape(-1, 32)
    np.testing.assert_array_equal(out[0].reshape(-1, 32), warps[:, LANES ^ 5])
    down = np.where(LANES + 7 < 32, LANES + 7, LANES)
    np.testing.assert_array_equal(out[1].reshape(-1, 32), warps[:, down])
    index = np.arange(values.size).reshape(-1, 32)
    np.testing.assert_array_equal(out[2].reshape(-1, 32), np.repeat(index[:, 7:8], 32, 1))


def test_ldmatrix_gives_each_lane_a_pair_of_a_row_or_of_a_column(call: Call) -> None:
    matrices = aligned(np.arange(4 * 64, dtype=np.uint16).reshape(4, 8, 8))
    out = np.zeros((2, 32, 4), np.uint32)
    assert call("ldmatrix", matrices, out) == ""
    pairs = out.view(np.uint16).reshape(2, 32, 4, 2)
    for transposed in range(2):
        for i in range(2):
            row, column = LANES // 4, LANES % 4 * 2 + i
            if transposed:
                row, column = column, row
            np.testing.assert_array_equal(pairs[transposed, :, :, i], matrices[:, row, column].T)


def rows_and_columns(registers: int, per_register: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """PTX ISA's formulas for the fragment of A, [lane, register, element]: groupID = lane >> 2,
    threadID_in_group = lane % 4; row = groupID for the even registers, groupID + 8 for the odd;
    column = threadID_in_group (* 2 + i for half types), plus half of k from the third register on.
    """
    lane, register, i = np.ogrid[:32, :registers, :per_register]
    row = (lane >> 2) + 8 * (register % 2) + 0 * i
    column = (lane % 4) * per_register + i + np.where(register >= 2, k // 2, 0)
    return row, column


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "tf32"])
def test_mma_multiplies_fragments_as_the_ptx_isa_lays_them_out(call: Call, dtype: str) -> None:
    k, per_register = (8, 1) if dtype == "tf32" else (16, 2)
    a, b, c = (torch.randn(*size) for size in ((16, k), (k, 8), (16, 8)))
    if dtype == "tf32":
        # What is below TF32's 10 bits must not count.
        kept = [(t.view(torch.int32) & ~0x1FFF).view(torch.float32) for t in (a, b)]
        bits = [t.numpy().view(np.uint32) for t in (a, b)]
    else:
        halves = [t.to(getattr(torch, dtype)) for t in (a, b)]
        kept = [t.float() for t in halves]
        bits = [t.view(torch.int16).numpy().view(np.uint16) for t in halves]
    row, column = rows_and_columns(4, per_register, k)
    a_registers = np.ascontiguousarray(bits[0][row, column]).view(np.uint32)
    # Of the transpose of B, whose 8 columns are rows, the fragment is that of A's upper rows.
    row, column = row[:, ::2], column[:, ::2]
    b_registers = np.ascontiguousarray(bits[1].T[row, column]).view(np.uint32)
    lane, i = np.ogrid[:32, :4]
    c_row, c_column = (lane >> 2) + 8 * (i // 2), (lane % 4) * 2 + i % 2
    d = np.ascontiguousarray(c.numpy()[c_row, c_column])
    assert call(f"mma_{dtype}", a_registers, b_registers, d) == ""
    expected = kept[0].double() @ kept[1].double() + c.double()
    np.testing.assert_allclose(d, expected.numpy()[c_row, c_column], rtol=2e-7, atol=1e-6)


def test_half_types_round_as_torch_does(call: Call) -> None:
    special = torch.tensor([0.0, -0.0, 1e-40, 6e-8, 3e-8, 2.98e-8, 65504, 65519, 65520, -1e30])
    values = torch.cat([special, torch.tensor([torch.inf, torch.nan]), torch.randn(999) * 100])
    out = np.zeros(3 * values.numel(), np.uint32)
    assert call("numbers", values.numpy(), values.numel(), out) == ""
    words = torch.from_numpy(out[: 2 * values.numel()].view(np.int16).reshape(-1, 2, 2).copy())
    for column, dtype in enumerate((torch.bfloat16, torch.float16)):
        for half in range(2):  # the second was widened in between
            rounded = words[:, column, half].view(dtype)
            torch.testing.assert_close(rounded, values.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_tf32_rounds_to_nearest_and_ties_away_from_zero(call: Call) -> None:
    ulp = 2.0**-10
    values = np.array([1, 1 + ulp / 2, -1 - ulp / 2, 1 + ulp * 0.49, 1 + ulp * 0.51], np.float32)
    out = np.zeros(3 * values.size, np.uint32)
    assert call("numbers", values, values.size, out) == ""
    rounded = out[2 * values.size :].view(np.float32)
    np.testing.assert_array_equal(rounded, [1, 1 + ulp, -1 - ulp, 1, 1 + ulp])


COMPLETE, NO_WAIT, TOO_FEW_GROUPS, NO_BARRIER, PAST_THE_END = range(5)


def copied(call: Call, kind: int, valid: int = 128) -> np.ndarray:
    values = aligned(np.arange(4 * 129, dtype=np.float32))
    out = nan(128, 4)
    assert call("copies", values, valid, kind, out) == ""
    return out


def test_cp_async_brings_what_is_valid_and_zeros(call: Call) -> None:
    expected = np.arange(4 * 128, dtype=np.float32).reshape(128, 4)
    np.testing.assert_array_equal(copied(call, COMPLETE), expected)
    expected[100:] = 0
    np.testing.assert_array_equal(copied(call, COMPLETE, valid=100), expected)


def test_a_missing_wait_is_seen(call: Call) -> None:
    assert np.isnan(copied(call, NO_WAIT)).all()
    out = copied(call, TOO_FEW_GROUPS)
    assert not np.isnan(out[:64]).any()
    assert np.isnan(out[64:]).all()


def test_a_missing_barrier_is_seen(call: Call) -> None:
    missing = np.isnan(copied(call, NO_BARRIER)).any(axis=1)
    # Whose neighbour has not run yet sees what shared memory began with: in one order the even
    # threads, in the other the odd ones.
    assert missing.sum() == 64


def test_writing_past_the_end_of_shared_memory_is_an_error(call: Call) -> None:
    values, out = aligned(np.zeros(4 * 129, np.float32)), nan(128, 4)
    assert "shared memory: expected no writes past its 2048 bytes, found one at byte 2048" in call(
        "copies", values, 129, PAST_THE_END, out
    )


MISTAKES = {
    "half a block": (1, r"threads 0-31 at sync_block, 32-63 ended"),
    "half a warp": (2, r"threads 0-15 at sync_warp, 16-31 at shuffle_down, 32-63 at sync_block"),
    "another": (3, r"threads 0 at shuffle_down, 1 at shuffle_xor, 2 at shuffle_down"),
    "an early end": (4, r"threads 0-4 at shuffle_down, 5 ended, 6-31 at shuffle_down"),
    "unaligned": (5, r"thread \d+: load_16: expected an address that 16 divides"),
    "waits forever": (6, r"threads 0-31 at sync_threads_of 1, 32-63 at sync_block"),
    "writes behind": (7, r"shared memory: expected no writes past its 64 bytes"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_would_hang_or_corrupt_is_an_error(call: Call, name: str) -> None:
    mistake, words = MISTAKES[name]
    out = aligned(nan(64))
    message = call("mistakes", mistake, 64, 64, out)
    assert message.startswith("test: CUDA simulator: block (0, 0, 0): ")
    assert re.search(words, message), message
    # The next launch knows nothing of it.
    assert call("mistakes", 0, 64, 64, out) == ""
    assert (out == 1).all()


def test_launches_that_cuda_would_refuse_are_refused(call: Call) -> None:
    out = nan(64)
    assert "threads: expected whole warps, at most 1024, got 48" in call("mistakes", 0, 48, 64, out)
    assert "shared memory: expected at most 232448 bytes, got 232449" in call(
        "mistakes", 0, 64, 232449, out
    )


def test_warps_take_turns_at_named_barriers(call: Call) -> None:
    out = nan(32)
    assert call("take_turns", 5, out) == ""
    np.testing.assert_array_equal(out, 5 * (31 - LANES) + sum(range(5)))


def test_an_unknown_order_is_refused(
    library: ctypes.CDLL, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GDFAST_CUDA_SIMULATOR_ORDER", "random")
    message = call("take_turns", 1, nan(32))
    assert "GDFAST_CUDA_SIMULATOR_ORDER: expected ascending or descending, got random" in message


def bfloat16(*size: int) -> tuple[torch.Tensor, np.ndarray]:
    """Random numbers, and the same as the bits of a bfloat16 at an address that 16 divides."""
    values = torch.randn(size).bfloat16()
    return values.double(), aligned(values.view(torch.int16).numpy().view(np.uint16))


def test_a_box_arrives_with_zeros_around_and_its_chunks_in_their_places(call: Call) -> None:
    size, of_box, w, channel = (3, 5, 6, 72), (2, 4, 5), 3, 16
    image = aligned(np.random.randint(1, 1 << 15, size).astype(np.uint16))
    out = np.zeros((40, 8, 8), np.uint16)
    shapes = [np.array(shape, np.int32) for shape in (size, of_box)]
    assert call("box", image, *shapes, w, channel, 1, out) == ""
    around = np.zeros((3, 1 + 5, 6 + 9, 72 + 16), np.uint16)
    around[:, 1:, :6, :72] = image
    expected = around[:2, :4, w : w + 5, channel : channel + 64].reshape(40, 8, 8)
    row, chunk = np.ogrid[:40, :8]
    np.testing.assert_array_equal(out[row, chunk ^ row % 8], expected)
    assert call("box", image, *shapes, w, channel, 0, out) == ""
    assert (out == 0xFFFF).all(), "not waited for"


def test_a_box_is_written_inside_of_the_tensor_alone(call: Call) -> None:
    size, of_box, w, channel = (3, 5, 6, 72), (2, 4, 5), 3, 16
    image = aligned(np.zeros(size, np.uint16))
    values = np.random.randint(1, 1 << 15, (40, 8, 8)).astype(np.uint16)
    row, chunk = np.ogrid[:40, :8]
    lying = np.zeros_like(values)
    lying[row, chunk ^ row % 8] = values
    arguments = [np.array(shape, np.int32) for shape in (size, of_box)]
    assert call("store", image, *arguments, w, channel, 0, 0, lying) == ""
    assert not image.any(), "not waited for"
    assert call("store", image, *arguments, w, channel, 1, 0, lying) == ""
    expected = np.zeros(size, np.uint16)
    inside = values.reshape(2, 4, 5, 64)[:, :3, :3, :56]
    expected[:2, 2:, 3:, 16:] = inside
    np.testing.assert_array_equal(image, expected)
    message = call("store", image, *arguments, -1, channel, 1, 0, lying)
    assert "store_box: expected places from 0 on" in message
    assert "changed before" in call("store", image, *arguments, w, channel, 1, 1, lying)


@pytest.mark.parametrize("n", [64, 128])
@pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
def test_a_warpgroup_multiplies_boxes(call: Call, n: int, columns: bool) -> None:
    a, a_bits = bfloat16(64, 64)
    b, b_bits = bfloat16(64, n) if columns else bfloat16(n, 64)
    out = nan(64, n)
    assert call("product", a_bits, b_bits, n, int(columns), 0, 1, out) == ""
    expected = a @ (b if columns else b.T)
    np.testing.assert_allclose(out, expected.numpy(), rtol=1e-5, atol=1e-5)
    assert call("product", a_bits, b_bits, n, int(columns), 0, 0, out) == ""
    assert (out == -1).all(), "not waited for"


def test_a_product_begins_at_any_row_of_a_box(call: Call) -> None:
    a, a_bits = bfloat16(64, 64)
    b, b_bits = bfloat16(64 + 8, 64)
    for first in range(9):
        out = nan(64, 64)
        rows = aligned(b_bits[: first + 64])
        assert call("product", a_bits, rows, 64, 0, first, 1, out) == ""
        expected = a @ b[first : first + 64].T
        np.testing.assert_allclose(out, expected.numpy(), rtol=1e-5, atol=1e-5)


def test_stmatrix_makes_columns_rows(call: Call) -> None:
    matrices = np.arange(2 * 8 * 8, dtype=np.uint16).reshape(2, 8, 4, 2)
    # Lane 4 g + t has the pair t of row g of both.
    pairs = aligned(matrices.transpose(1, 2, 0, 3))
    out = np.zeros((2, 8, 8), np.uint16)
    assert call("stmatrix", pairs, out) == ""
    np.testing.assert_array_equal(out, matrices.reshape(2, 8, 8).transpose(0, 2, 1))


def test_stmatrix_keeps_rows(call: Call) -> None:
    matrices = np.arange(4 * 8 * 8, dtype=np.uint16).reshape(4, 8, 4, 2)
    pairs = aligned(matrices.transpose(1, 2, 0, 3))
    out = np.zeros((4 * 8, 8), np.uint16)
    assert call("stmatrix_rows", pairs, out) == ""
    np.testing.assert_array_equal(out, matrices.reshape(4 * 8, 8)[::-1])
