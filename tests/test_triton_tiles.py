"""The choice of tiles, the split of sums and cached launches: what needs no kernel to run."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import replace
from math import prod
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton_here import NEEDS_TRITON

from gdfast.backends import (
    Conv2dQuery,
    registry,
    triton_backend,
    tuning,
    tuning_check,
    tuning_timer,
)
from gdfast.bench.cases import MOBILENET, RESNET50, Conv2dCase
from gdfast.geometry import Conv2dGeometry, dense_strides

triton = pytest.importorskip("triton", reason="needs triton: pip install 'gdfast[triton]'")

from gdfast.backends.triton import bind_conv2d, launch, tiles  # noqa: E402
from gdfast.backends.triton.bind_conv2d import Problem  # noqa: E402
from gdfast.backends.triton.boxes import Images  # noqa: E402
from gdfast.backends.triton.launch import A100, H100, Box, Launch  # noqa: E402
from gdfast.backends.triton.tiles import Product, Tile  # noqa: E402
from gdfast.tensor_cores import input_precision  # noqa: E402

pytestmark = NEEDS_TRITON
PASSES = ("conv2d", "conv2d_grad_input", "conv2d_grad_weight")


def query_of(case: Conv2dCase, dtype: torch.dtype = torch.bfloat16) -> Conv2dQuery:
    geometry = Conv2dGeometry.of(
        "conv2d", case.input_shape, case.weight_shape, case.stride, case.padding * 2, case.dilation,
        case.groups,
    )  # fmt: skip
    sizes = geometry.input_size, geometry.weight_size, geometry.output_size
    strides = tuple(dense_strides(size, True) for size in sizes)
    return Conv2dQuery(torch.device("cuda"), dtype, geometry=geometry, strides=strides)


def problem_of(case: Conv2dCase, dtype: torch.dtype = torch.bfloat16) -> Problem:
    query = query_of(case, dtype)
    return Problem(query.geometry, query.strides, dtype, query.device, "tf32")


@pytest.mark.parametrize("gpu", [A100, H100], ids=["A100", "H100"])
@pytest.mark.parametrize("op", PASSES)
def test_every_layer_has_a_few_tiles_that_fit(
    op: str, gpu: launch.Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "gpu", lambda device: gpu)
    for case in (*RESNET50, *MOBILENET):
        for dtype in (torch.bfloat16, torch.float32):
            found = problem_of(case.with_batch(256), dtype).candidates(op)
            assert (len(found) == 0) == (case.groups > 1)
            assert len(found) <= 6
            for tile in found:
                bytes_ = tile.stages * (tile.m + tile.n) * tile.k * dtype.itemsize
                assert tile.stages >= 2 and bytes_ <= gpu.shared_bytes
                assert Tile.named(str(tile)) == tile and len(str(tile)) <= 40


def test_large_layers_get_large_tiles_and_small_ones_many() -> None:
    large, *_ = tiles.candidates(Product(1, 256 * 28 * 28, 256, 9, 256), 2, H100)
    small, *_ = tiles.candidates(Product(1, 49, 64, 9, 64), 2, H100)
    assert large.m * large.n >= 128 * 128
    assert small.m * small.n <= 64 * 64


@pytest.mark.parametrize("gpu", [A100, H100], ids=["A100", "H100"])
def test_every_product_has_a_tile(gpu: launch.Gpu) -> None:
    for rows, columns, depth in itertools.product((1, 40, 1000), (1, 40, 1000), (1, 20, 3000)):
        for itemsize, passes in ((2, 1), (4, 1), (4, 3), (4, 16)):
            for folded in ("", "rows", "columns"):
                product = Product(1, rows, columns, 1, depth, folded != "", folded)
                assert tiles.candidates(product, itemsize, gpu, passes)


def boxed(case: Conv2dCase, op: str, dtype: torch.dtype = torch.bfloat16) -> list[Tile]:
    return [tile for tile in problem_of(case, dtype).candidates(op) if tile.box]


def test_boxes_are_offered_to_what_has_them_last(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Conv2dCase("", 32, 64, 28, 28, 64, 3, 3, padding=(1, 1))
    monkeypatch.setattr(launch, "gpu", lambda device: A100)
    assert not boxed(case, "conv2d")
    monkeypatch.setattr(launch, "gpu", lambda device: H100)
    assert not boxed(case, "conv2d_grad_weight")
    for op in ("conv2d", "conv2d_grad_input"):
        found = problem_of(case).candidates(op)
        assert [bool(tile.box) for tile in found] == [False] * 4 + [True] * 2
        assert all(prod(tile.box) == tile.m for tile in found[4:])
        assert str(found[4]).startswith("tma-")
    assert boxed(case, "conv2d", torch.float32)
    assert not boxed(case, "conv2d_grad_input", torch.float32)


@pytest.mark.parametrize(
    "change",
    [{"C": 68}, {"K": 60}, {"C": 8}, {"stride": (2, 1)}, {"groups": 2}, {"N": 0}],
    ids=str,
)  # fmt: skip
def test_what_descriptors_do_not_fit_has_no_boxes(
    change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "gpu", lambda device: H100)
    case = Conv2dCase("", 2, 64, 28, 28, 64, 3, 3, padding=(1, 1))
    assert boxed(case, "conv2d")
    assert not boxed(replace(case, **change), "conv2d")


def test_capability_9_has_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    for major, expected in ((8, False), (9, True)):
        properties = SimpleNamespace(major=major, multi_processor_count=100)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, p=properties: p)
        launch.gpu.cache_clear()
        assert launch.gpu(torch.device("cuda")).tma is expected
    monkeypatch.setattr(launch, "TensorDescriptor", None)
    launch.gpu.cache_clear()
    assert not launch.gpu(torch.device("cuda")).tma
    launch.gpu.cache_clear()


def test_boxes_waste_little_and_read_little() -> None:
    large = Images(8, 80, 80, 2, 2)
    assert large.count((1, 8, 16)) == 8 * 10 * 5
    assert large.box(128) == (1, 8, 16)  # nothing is wasted: the least border
    assert Images(8, 80, 80, 0, 0).box(128)[0] == 1  # without a border: within one image
    assert Images(1, 80, 80, 20, 0).box(64) == (1, 16, 4)  # taps far apart in rows
    # Of an image of 7 x 7 alone a quarter is wasted, of several an eighth.
    assert Images(1, 7, 7, 2, 2).box(64) == (1, 8, 8)
    assert Images(16, 7, 7, 2, 2).box(64) == (8, 1, 8)
    for images in itertools.product((1, 5, 256), (1, 7, 56), (1, 14, 225), (0, 2), (0, 6)):
        for pixels in (64, 128, 256):
            assert prod(Images(*images).box(pixels)) == pixels


def test_sums_are_split_where_tiles_are_few() -> None:
    tile = Tile(64, 64, 64, 4, 4)
    few = Product(9, 64, 64, 1, 256 * 56 * 56, split=True)
    many = Product(9, 512, 512, 1, 256 * 7 * 7, split=True)
    short = Product(1, 64, 64, 1, 64 * 9, split=True)
    assert 9 * tiles.splits(few, tile, H100) == pytest.approx(2 * H100.multiprocessors, rel=0.1)
    assert tiles.splits(many, tile, H100) == 1
    assert tiles.splits(short, tile, H100) == 1  # of nine steps each part would have few


class Kernel:
    """Notes how it is launched, as Triton's kernels and what they compile to are."""

    __name__ = "kernel"

    def __init__(self, name: str, calls: list[Any]) -> None:
        self.name, self.calls = name, calls

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            self.calls.append((self.name, grid, arguments, options))
            return Kernel("compiled", self.calls)

        return run


def test_later_launches_pass_addresses_to_what_was_compiled() -> None:
    calls: list[Any] = []
    made = Launch(Kernel("kernel", calls), (3, 2), torch.device("cpu"), (7, 0.5), {"B": 64}, 8, 3)
    a, b = torch.zeros(64), torch.zeros(64)
    unaligned = torch.zeros(65)[1:]
    made(a, b, changing=(1,))
    made(b, a, changing=(2,))
    made(a, unaligned, changing=(3,))
    made(a, b, changing=(4,))
    options = {"num_warps": 8, "num_stages": 3}
    assert calls == [
        ("kernel", (3, 2, 1), (a, b, 1, 7, 0.5, 64), options),
        ("compiled", (3, 2, 1), (b.data_ptr(), a.data_ptr(), 2, 7, 0.5, 64), {}),
        ("kernel", (3, 2, 1), (a, unaligned, 3, 7, 0.5, 64), options),
        ("compiled", (3, 2, 1), (a.data_ptr(), b.data_ptr(), 4, 7, 0.5, 64), {}),
    ]


@pytest.mark.skipif(launch.TensorDescriptor is None, reason="needs Triton's TensorDescriptor")
def test_descriptors_are_made_anew_for_each_launch() -> None:
    calls: list[Any] = []
    box = Box([4, 16], [16, 1], [2, 16])
    made = Launch(Kernel("kernel", calls), (1,), torch.device("cpu"), (7,), {}, boxes=(box,))
    a, b, c = torch.zeros(4, 16), torch.zeros(4, 16), torch.zeros(8)
    made(a, c)
    made(b, c)
    expected = [launch.TensorDescriptor(tensor, *box) for tensor in (a, b)]
    for call, tensor, descriptor in zip(calls, (a, b), expected, strict=True):
        passed = call[2][0]
        assert type(passed) is launch.TensorDescriptor and passed.base is tensor
        for field in dataclasses.fields(descriptor)[1:]:
            assert getattr(passed, field.name) == getattr(descriptor, field.name)
    assert [call[0] for call in calls] == ["kernel", "compiled"]
    assert calls[1][2][1:] == (c.data_ptr(), 7)
    with pytest.raises(RuntimeError, match="16"):  # the bytes that an address has to divide by
        made(torch.zeros(65)[1:].view(4, 16), c)


def test_float32_is_multiplied_as_native_is_allowed_to() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        assert input_precision(dtype, strict=False) == "ieee"
    for allowed, strict, expected in (
        (True, False, "tf32"), (True, True, "tf32"), (False, False, "tf32x3"),
        (False, True, "ieee"),
    ):  # fmt: skip
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=allowed):
            assert input_precision(torch.float32, strict) == expected


def test_entries_of_a_tuple_never_make_triton_compile_anew() -> None:
    from gdfast.backends.triton.bind_sgd import _NEVER, _NOWHERE, _PIECE, encoded

    for number in (0, 1, 15, 16, 31, _PIECE, _NEVER):
        assert encoded(number) % 16 and 1 < encoded(number) < 2**31
    assert 2**31 < encoded(_NOWHERE) < 2**63 and encoded(2**47) > 2**31


class Failing:
    """A kernel that cannot be launched, at first or once it was compiled."""

    __name__, __module__ = "conv2d_kernel", "gdfast.backends.triton.conv2d"

    def __init__(self, error: Exception, calls: int) -> None:
        self.error, self.calls = error, calls

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            self.calls -= 1
            if self.calls < 0:
                raise self.error
            return self

        return run


@pytest.mark.parametrize("calls", [0, 1])
@pytest.mark.parametrize(
    "error",
    [
        triton.runtime.errors.OutOfResources(300_000, 232_448, "shared memory"),
        RuntimeError("Triton Error [CUDA]: invalid argument"),
        FileNotFoundError("gcc"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_launch_that_fails_tells_of_what(error: Exception, calls: int) -> None:
    made = Launch(Failing(error, calls), (7, 2), torch.device("cpu"), (), {})
    tensors = torch.zeros(4, 3), torch.zeros(5, dtype=torch.bfloat16)
    for _ in range(calls):
        made(*tensors)
    with pytest.raises(RuntimeError) as told:
        made(*tensors)
    assert str(told.value) == (
        f"conv2d: Triton: conv2d_kernel of [4, 3] float32, [5] bfloat16, grid [7, 2, 1]: {error}"
    )
    assert told.value.__cause__ is error


def test_torch_s_lack_of_memory_stays_what_it_is() -> None:
    made = Launch(Failing(torch.OutOfMemoryError("64 GiB"), 0), (1,), torch.device("cpu"), (), {})
    with pytest.raises(torch.OutOfMemoryError, match=r"^64 GiB$"):
        made(torch.zeros(1))


class TestChoosing:
    """The tuner with kernels that are not run: what is timed, remembered and found again."""

    @pytest.fixture(autouse=True)
    def on_a_gpu(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
        monkeypatch.setenv("GDFAST_CACHE_DIR", str(tmp_path))
        monkeypatch.setattr(launch, "gpu", lambda device: H100)
        monkeypatch.setattr(triton_backend, "is_interpreted", lambda: False)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(tuning, "resolve", self.resolve)
        tuning.forget()
        self.timed: list[list[str]] = []
        self.seconds: dict[str, float] = {}
        monkeypatch.setattr(tuning_timer, "measure", self.measure)
        monkeypatch.setattr(tuning_check, "agreeing", self.agreeing)
        self.wrong: list[str] = []
        yield
        tuning.forget()

    def resolve(self, op: str, query: Any, requested: str = "auto") -> Any:
        return triton_backend.BACKEND if requested != "reference" else registry._backends[requested]

    def measure(self, calls: dict[str, Any], visit: Any) -> dict[str, float]:
        assert isinstance(visit, tuning_timer.OnGpu)
        self.timed.append(list(calls))
        return {name: self.seconds.get(name, 1.0) for name in calls}

    def agreeing(self, op: str, calls: dict[str, Any], *_: Any) -> list[str]:
        return [name for name in calls if name not in self.wrong]

    def test_tiles_and_native_are_timed_once_for_each_query(self) -> None:
        query = query_of(RESNET50[1].with_batch(256))
        names = triton_backend.candidates("conv2d", query)
        self.seconds = {names[2]: 0.5}
        with tuning.autotune("auto"):
            for _ in range(2):
                with tuning.recorded({}) as uses:
                    tuning.bind("conv2d", query, "auto", (None, None, None))
                assert uses[0].choice.name == names[2]
        assert self.timed == [[*names, "native"]]
        (key,) = tuning.choices()
        assert "a GPU" in key and len(key) < 1000

    def test_gpus_of_one_name_share_what_was_chosen(self, monkeypatch: pytest.MonkeyPatch) -> None:
        query = query_of(RESNET50[1].with_batch(256))
        ranks = [replace(query, device=torch.device("cuda", rank)) for rank in range(2)]
        with tuning.autotune("auto"):
            for rank in ranks:
                tuning.bind("conv2d", rank, "auto", (None, None, None))
            assert len(self.timed) == 1
            names = {0: "a GPU", 1: "another"}
            monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[device.index])
            for rank in ranks:
                tuning.bind("conv2d", rank, "auto", (None, None, None))
            assert len(self.timed) == 2

    def test_a_tile_that_was_chosen_under_tf32_is_kept_where_it_fits_alone(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bound: list[Tile] = []

        def bind(problem: Problem, tile: Tile, *ending: Any) -> Any:
            bound.append(tile)
            return lambda *tensors: None

        monkeypatch.setattr(bind_conv2d, "bind_forward", bind)
        query = query_of(RESNET50[1].with_batch(256), torch.float32)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            three = triton_backend.candidates("conv2d", query)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
            one = triton_backend.candidates("conv2d", query)
            kernels = {name: triton_backend.conv2d(query, name) for name in one}
        assert set(one) - set(three) and set(one) & set(three)  # or this would show nothing
        for name, kernel in kernels.items():
            bound.clear()
            for allowed in (True, False):
                with torch.backends.cudnn.flags(enabled=True, allow_tf32=allowed):
                    kernel()
            assert [*map(str, bound)] == [name, name if name in three else three[0]]

    def test_what_does_not_give_natives_result_is_not_timed(self) -> None:
        query = query_of(RESNET50[1].with_batch(256))
        names = triton_backend.candidates("conv2d", query)
        self.wrong = [names[0]]
        with tuning.autotune("auto"):
            tuning.bind("conv2d", query, "auto", (None, None, None))
        assert self.timed == [[*names[1:], "native"]]

    def test_by_name_native_is_no_candidate(self) -> None:
        query = query_of(RESNET50[1].with_batch(256))
        with tuning.autotune("auto"):
            tuning.bind("conv2d", query, "triton", (None, None, None))
        assert len(self.timed) == 1 and "native" not in self.timed[0]

    def test_nothing_is_timed_while_a_graph_is_recorded(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        query = query_of(RESNET50[1].with_batch(256))
        with tuning.autotune("auto"), tuning.recorded({}) as uses:
            tuning.bind("conv2d", query, "auto", (None, None, None))
        assert not self.timed and uses[0].choice.name == "native"
        with tuning.autotune("auto"), tuning.recorded({}) as uses:
            tuning.bind("conv2d", query, "triton", (None, None, None))
        assert not self.timed
        assert uses[0].choice.name == triton_backend.algorithm("conv2d", query)
