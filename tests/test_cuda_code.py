"""What nvcc made of the CUDA kernels; nothing is run, and no GPU is needed."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import pytest

from gdfast import native
from gdfast.bench import cuda_code
from gdfast.bench.cuda_code import Code

# Disassembling takes a minute: once, by one process.
pytestmark = pytest.mark.xdist_group("disassembly")
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def module() -> Path:
    file = cuda_code.module()
    if file is None:
        pytest.skip(f"needs gdfast._cuda built by nvcc: {native.failure('cuda') or 'simulated'}")
    if not cuda_code.cuobjdump():
        pytest.skip("needs cuobjdump")
    return file


@cache
def codes() -> list[Code]:
    return cuda_code.kernels(module())


def convolutions() -> list[Code]:
    passes = ("conv2d_kernel", "conv2d_grad_input_kernel", "conv2d_grad_weight_kernel")
    return [code for code in codes() if code.kernel in passes]


@pytest.mark.skipif(
    "TORCH_CUDA_ARCH_LIST" in os.environ, reason="needs a build without TORCH_CUDA_ARCH_LIST"
)
def test_there_is_machine_code_for_ampere_and_hopper_and_ptx_for_others() -> None:
    assert cuda_code.architectures(module()) == ({"sm_80", "sm_90a"}, {"sm_80"})


def test_the_table_of_registers_is_of_these_kernels() -> None:
    built: dict[str, list[int]] = {}
    for (architecture, symbol), (registers, stack) in cuda_code.resources(module()).items():
        kernel, *arguments = cuda_code.names(symbol)
        row = f"{architecture} | {kernel.removesuffix('_kernel')} | {' '.join(arguments)}"
        built.setdefault(row, []).append(registers)
        assert stack == 0, row
    told: dict[str, list[int]] = {}
    for line in (RESULTS / "cuda" / "registers.md").read_text().splitlines():
        if line.startswith("| sm_"):
            *row, registers, _, _, _, _ = line.strip("| ").split(" | ")
            told.setdefault(" | ".join(row), []).append(int(registers))
    fix = "expected what `python benchmarks/cuda_registers.py` writes"
    assert built.keys() == told.keys(), fix
    for row, registers in told.items():
        pairs = zip(sorted(registers), sorted(built[row]), strict=True)
        # They are allotted eight at a time; another nvcc takes a few more or fewer.
        assert all(abs(a - b) <= 8 for a, b in pairs), f"{row}: {fix}"


def test_nothing_spills() -> None:
    assert not [code for code in codes() if code.stack_bytes or code.count("LDL|STL")]


def test_convolutions_multiply_on_the_tensor_cores() -> None:
    on_tensor_cores = [code for code in convolutions() if "TensorCores" in code.arguments]
    assert on_tensor_cores
    for code in on_tensor_cores:
        assert code.count("HMMA"), code
        three = 3 if "Tf32x3Operands" in code.arguments else 1
        # Warps of 32 x 32, 64 x 32 or 64 x 64; two instructions deep in each step. Three products
        # are there twice, so that those with care are: once a loop where warps have 64 rows.
        assert code.count("HMMA") in [2 * n * three for n in (8, 16, 32)], code
    assert all(code.count("HMMA") == 0 for code in convolutions() if "Plain" in code.arguments)


def test_groups_load_once_what_three_rows_of_a_filter_multiply() -> None:
    names = ("grouped_kernel", "grouped_grad_weight_kernel")
    kernels = [code for code in codes() if code.kernel in names]
    assert kernels
    for code in kernels:
        if code.kernel == "grouped_kernel":
            # Four pairs of rows by 16 filters; for three rows of a filter six pairs of the input.
            counts = (24, 6) if code.arguments[2] == "1" else (8, 4)
            assert code.count("HMMA") == counts[0], code
            assert code.count(r"LDSM\.16\.M88") >= counts[1], code
        elif code.arguments[1] != "0":
            # Nine taps; of the input six pairs of rows by three columns, and four of the gradient.
            assert (code.count("HMMA"), code.count("LDSM")) == (72, 22), code
        assert code.count(r"LDGSTS\.E\.(.*\.)?128"), code


def test_groups_do_so_on_hopper_from_what_its_tma_unit_copies() -> None:
    kernels = [code for code in codes() if code.kernel.startswith("grouped_hopper_")]
    hopper = [code for code in kernels if code.architecture == "sm_90a"]
    assert hopper or not any(code.architecture == "sm_90a" for code in codes())
    for code in hopper:
        counts = code.count("HMMA"), code.count("LDSM")
        if code.kernel == "grouped_hopper_kernel":
            # By 16 filters: two pairs of rows, made of three, or seven of twins, made of nine; by
            # nine taps, of which groups of 8 channels have two in a product. Those are loaded once
            # for all, by either of two instructions.
            group, twins = code.arguments[1], code.arguments[2] == "1"
            pairs, read, depth = (7, 9, 9) if twins else (2, 3, 6 if group == "8" else 9)
            steps = 2 if group == "32" else 1
            assert counts == (2 * pairs * depth * steps, (3 * read + 2 * 9) * steps), code
        else:
            # By 16 filters and nine taps; twice: for tiles some of whose positions do not exist.
            # Of the input there are nine rows of twins, or two pairs of rows for each of these.
            pairs, read = (7, 9) if code.arguments[1] == "1" else (2, 4)
            assert counts == (2 * 2 * pairs * 9, 2 * (pairs + 3 * read)), code
        assert code.count("UTMALDG"), code
    for code in kernels:
        assert code in hopper or len(code.instructions) < 20, code


def test_groups_of_small_images_load_a_row_once_for_three_rows_of_results() -> None:
    # A row is loaded for each column of a filter and 16 channels, and multiplied for the rows
    # above, in and below it that exist; warps with filters in registers load nine taps of these.
    expected = {
        "grouped_octets_kernel": ((7 * 3 - 2) * 3 * 2, 7 * 3 * 2),
        "grouped_quads_kernel": ((14 * 3 - 2) * 3 * 2, 14 * 3 + 9),
        # Of two pairs of rows: for each column two taps of each row of results, and one; filters
        # as they are or turned round.
        "grouped_walks_kernel": (2 * 3 * 2 * 2, 2 * 3 + 2 * 9),
    }
    kernels = [code for code in codes() if code.kernel in expected]
    assert {code.kernel for code in kernels} == expected.keys()
    for code in kernels:
        if code.architecture == "sm_90a":
            products, loads = expected[code.kernel]
            # Groups of 4 are loaded again where sums are made again.
            again = 2 * 3 if "4" in code.arguments else 0
            assert (code.count("HMMA|HGMMA"), code.count("LDSM")) == (products, loads + again), code
            assert code.count("UTMALDG"), code
        else:
            assert len(code.instructions) < 20, code


def test_depthwise_tensor_kernels_load_once_what_all_rows_of_a_filter_multiply() -> None:
    kernels = [code for code in codes() if code.kernel.startswith("depthwise_tensor_")]
    assert kernels
    for code in kernels:
        size = int(code.arguments[4])
        pairs = size // 2
        if code.kernel == "depthwise_tensor_kernel":
            # Of a batch of rows: groups of channels by pairs of taps of a row, and but for 3x3 of
            # two rows in the last column; what is left over are single taps.
            groups, in_pairs = (2, 0) if size == 3 else (1, pairs)
            assert code.count(r"HMMA\.16816") == groups * size * (size * pairs + in_pairs), code
            assert code.count(r"HMMA\.1688\.") == groups * size * (size - 2 * in_pairs), code
            assert code.count("LDSM") == size * (groups * pairs + 1), code
            assert code.count(r"STG\.E\.(.*\.)?128"), code
        else:
            # The last column's taps are pairs of rows, the last row's with ones.
            assert code.count("HMMA") == size * (pairs * size + pairs + 1), code
            assert code.count("LDSM") == size * (pairs + 1), code
        assert code.count(r"LDGSTS\.E\.(.*\.)?128"), code


def test_stems_multiply_on_the_tensor_cores_what_shared_memory_has() -> None:
    # Warps of 64 x 32, and of 64 x 48; one step at a time.
    products = {"conv2d_stem_kernel": 16, "conv2d_stem_grad_weight_kernel": 24}
    stems = [code for code in codes() if code.kernel in products]
    assert {code.kernel for code in stems} == products.keys()
    for code in stems:
        three = 3 if "Tf32x3Operands" in code.arguments else 1
        assert code.count("HMMA") == products[code.kernel] * three, code
        assert code.count("LDS") and not code.count(r"LD\.|ST\."), code


def test_convolutions_copy_16_bytes_past_the_registers() -> None:
    for code in convolutions():
        if code.arguments[-1] == "1":
            assert code.count(r"LDGSTS\.E\.(.*\.)?128"), code
        else:
            assert not code.count("LDGSTS"), code


def test_the_hopper_convolution_uses_what_hopper_has_and_is_empty_elsewhere() -> None:
    kernels = [code for code in codes() if code.kernel == "conv2d_hopper_kernel"]
    hopper = [code for code in kernels if code.architecture == "sm_90a"]
    assert hopper or not any(code.architecture == "sm_90a" for code in codes())
    for code in hopper:
        # 64 channels, 16 at a time, of two products; of one where it has 256 columns.
        assert code.count("HGMMA") == (4 if code.arguments[2] == "256" else 8), code
        assert code.count("UTMALDG") >= 2 and code.count("UTMASTG"), code
        assert code.count("USETMAXREG") == 2, code
        # With a trap, ptxas has no thread use more registers than a block is launched with.
        assert not code.count("BPT"), code
        # Moments are taken of results in shared memory, where a gradient needs none.
        assert (code.count(r"LDS\.128") > 0) == (code.arguments[-1] == "0"), code
    for code in kernels:
        assert code in hopper or len(code.instructions) < 20, code


def test_the_one_whose_taps_share_boxes_does_so_too() -> None:
    kernels = [code for code in codes() if code.kernel == "conv2d_halo_kernel"]
    hopper = [code for code in kernels if code.architecture == "sm_90a"]
    assert hopper or not any(code.architecture == "sm_90a" for code in codes())
    for code in hopper:
        # 64 channels, 16 at a time; the sums of eight positions are stored by one instruction, for
        # each of the three endings that forward has, and two of them with moments.
        assert code.count("HGMMA") == 4, code
        endings = 1 if code.arguments[3] == "1" else 5
        assert code.count("STSM") == endings * int(code.arguments[1]) // 8, code
        assert code.count("UTMALDG") >= 2 and code.count("UTMASTG"), code
        assert code.count("USETMAXREG") == 2, code
    for code in kernels:
        assert code in hopper or len(code.instructions) < 20, code


def test_the_one_of_planes_does_so_too() -> None:
    kernels = [code for code in codes() if code.kernel == "conv2d_planes_kernel"]
    hopper = [code for code in kernels if code.architecture == "sm_90a"]
    assert hopper or not any(code.architecture == "sm_90a" for code in codes())
    for code in hopper:
        # 64 channels, 16 at a time, of two products; two boxes of pixels, and the weights.
        assert code.count("HGMMA") == 8 and code.count("UTMALDG") == 3, code
        assert code.count("UTMASTG") and code.count("USETMAXREG") == 2, code
    for code in kernels:
        assert code in hopper or len(code.instructions) < 20, code


def test_the_gradient_in_the_weight_for_hopper_does_so_too() -> None:
    kernels = [code for code in codes() if code.kernel == "conv2d_hopper_grad_weight_kernel"]
    hopper = [code for code in kernels if code.architecture == "sm_90a"]
    assert hopper or not any(code.architecture == "sm_90a" for code in codes())
    for code in hopper:
        # 64 pixels, 16 at a time, and two products of each for 256 filters; 32 for 576 columns.
        products = {"576": 2, "128": 8 if code.arguments[1] == "256" else 4}
        assert code.count("HGMMA") == products.get(code.arguments[2], 4), code
        # Each lane of the warp that loads has a box: one instruction, once for each of them.
        assert code.count("UTMALDG") >= 1 and code.count("USETMAXREG") == 2, code
        assert not code.count("BPT"), code
    for code in kernels:
        assert code in hopper or len(code.instructions) < 20, code


def test_float32_for_hopper_is_split_in_registers() -> None:
    names = {"conv2d_hopper_float32_kernel", "conv2d_hopper_float32_grad_weight_kernel"}
    kernels = [code for code in codes() if code.kernel in names]
    assert {code.kernel for code in kernels} == names
    hopper = [code for code in kernels if code.architecture == "sm_90a"]
    assert hopper or not any(code.architecture == "sm_90a" for code in codes())
    for code in hopper:
        # Fragments of 64 channels or pixels, 16 at a time; of two products for 256 rows.
        fragments = 4 * (2 if "256" in code.arguments else 1)
        # Six products of parts; two roundings of each pair of the eight numbers.
        assert code.count("HGMMA") == 6 * fragments, code
        assert code.count(r"F2FP\.BF16") == 8 * fragments, code
        assert code.count("UTMALDG") >= 1 and code.count("USETMAXREG") == 2, code
    for code in kernels:
        assert code in hopper or len(code.instructions) < 20, code


def test_kernels_bound_by_memory_read_16_bytes_at_a_time() -> None:
    names = {
        "moments_kernel", "normalise_kernel", "sums_kernel", "gradients_kernel",
        "max_pool2d_kernel", "max_pool2d_grad_kernel",
    }  # fmt: skip
    found = [code for code in codes() if code.kernel in names]
    assert {code.kernel for code in found} == names
    for code in found:
        vector = int(next(argument for argument in code.arguments if argument.isdigit()))
        if vector > 1:
            assert code.count(r"LDG\.E\.(.*\.)?128"), code


def test_linear_layers_read_and_multiply_by_whole_instructions() -> None:
    found = [code for code in codes() if code.kernel.startswith("linear_")]
    assert {code.kernel for code in found} == {
        "linear_few_kernel", "linear_few_backward_kernel",
        "linear_wide_kernel", "linear_wide_backward_kernel",
    }  # fmt: skip
    for code in found:
        if code.kernel.startswith("linear_wide"):
            assert code.count("HMMA") and code.count("LDSM"), code
            assert code.count(r"LDG\.E\.(.*\.)?128"), code
        elif next(each for each in code.arguments if each.isdigit()) == "4":
            assert code.count(r"LDG\.E\.(.*\.)?(64|128)"), code


@pytest.mark.parametrize(
    ("symbol", "names"),
    [
        ("_ZN6gdfast4cuda12_GLOBAL__N_110sgd_kernelEPv", ["sgd_kernel"]),
        ("_ZN6gdfast4cuda10sum_kernelI6__halfdLi16ELb1EEEvNS0_4ArgsE",
         ["sum_kernel", "__half", "double", "16", "1"]),
        ("_ZN1a11conv_kernelINS0_4WarpINS0_3RowIfEELi8EEELb0EEEvi",
         ["conv_kernel", "Warp", "Row", "float", "8", "0"]),
        ("_Z4mainv", ["_Z4mainv"]),
    ],
)  # fmt: skip
def test_names_in_mangled_symbols(symbol: str, names: list[str]) -> None:
    assert cuda_code.names(symbol) == names
