"""The workloads: ours and native do the same work, and the check refuses what is wrong."""

from math import inf, isnan, nan

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gdfast
from gdfast.bench import cases, layers, norm, sgd, step, suites
from gdfast.bench.workload import Check, Workload, allowed_error, relative_error

SMALL = cases.Conv2dCase("small", 2, 4, 7, 6, 5, 3, 2, (2, 1), (1, 0), model="test")


def test_error_is_relative_and_a_nan_fails():
    reference = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert relative_error(torch.tensor([3.0, 4.5]), reference) == pytest.approx(0.1)
    assert isnan(relative_error(torch.zeros(3), reference))  # another shape
    assert not Check({"NCHW": nan}, {"NCHW": inf}).ok
    assert not Check({"NCHW": 1.0, "channels_last": 2.0}, dict.fromkeys(layers.LAYOUTS, 1.5)).ok
    assert Check({"NCHW": 1.0}, {"NCHW": 1.0}).ok
    allowed = allowed_error(1e-3, torch.float32, terms=10_000)
    assert allowed == pytest.approx(2e-3 + 1.19e-7, rel=1e-6)
    assert allowed_error(0.0, torch.float64, terms=100) == pytest.approx(11 * 2.22e-16, rel=1e-3)


@pytest.mark.parametrize("task", layers.PASSES)
def test_a_pass_is_what_autograd_gives(task):
    work = layers.workload(SMALL, task, torch.float64, convolve=F.conv2d)
    generator = torch.Generator().manual_seed(0)
    input, weight, grad_output = (
        torch.randn(shape, generator=generator).double()
        for shape in (SMALL.input_shape, SMALL.weight_shape, SMALL.output_shape)
    )
    input.requires_grad_()
    weight.requires_grad_()
    output = F.conv2d(input, weight, None, SMALL.stride, SMALL.padding)
    output.backward(grad_output)
    expected = {"forward": output, "grad_input": input.grad, "grad_weight": weight.grad}[task]
    for call in work.calls.values():
        torch.testing.assert_close(call(), expected.detach())
    assert work.check().ok


def test_layouts_are_real_for_one_channel():
    seen = []

    def convolve(input, weight, **geometry):
        seen.append((input.stride(), weight.stride()))
        return F.conv2d(input, weight, **geometry)

    case = cases.Conv2dCase("one channel", 2, 1, 5, 6, 3, 3, 3)
    work = layers.workload(case, "forward", convolve=convolve)
    for layout in ("NCHW", "channels_last"):
        work.ours[layout]()
    # torch calls a tensor of one channel channels_last by its strides alone.
    assert seen == [((30, 30, 6, 1), (9, 9, 3, 1)), ((30, 1, 6, 1), (9, 1, 3, 1))]


def test_no_such_pass():
    with pytest.raises(ValueError, match=r"task: expected one of .*forward.*, got 'backward'"):
        layers.workload(SMALL, "backward", convolve=F.conv2d)


def test_sgd_that_forgets_weight_decay_is_refused():
    case = cases.SgdCase("small", (100, 7))

    def forgetful(parameters, weight_decay, **settings):
        return torch.optim.SGD(parameters, **settings)

    assert not sgd.workload(case, make_optimizer=forgetful).check().ok
    assert sgd.workload(case, make_optimizer=torch.optim.SGD).check().ok


def test_sgd_s_twin_has_tensors_of_its_own():
    work = sgd.workload(cases.SgdCase("small", (5,)), make_optimizer=torch.optim.SGD)
    step_of = {name: call.__self__ for name, call in work.native.items()}
    twin = work.twin("fused").__self__
    assert twin.defaults["fused"] and step_of["fused"].defaults["fused"]
    pointers = {o.param_groups[0]["params"][0].data_ptr() for o in (*step_of.values(), twin)}
    assert len(pointers) == len(step_of) + 1


def test_fused_is_no_rival_where_it_is_wrong():
    assert set(sgd.native_variants(torch.float32)) == {"loop", "foreach", "fused"}
    assert set(sgd.native_variants(torch.bfloat16)) == {"loop", "foreach"}


class _Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.fc = nn.Linear(4 * 6 * 6, 10)

    def forward(self, x):
        return self.fc(torch.relu(self.conv(x)).flatten(1))


class _HalfGradient(_Small):
    def forward(self, x):
        features = self.conv(x)
        return self.fc(torch.relu((features + features.detach()) / 2).flatten(1))


STEP = cases.StepCase("small", "none", 4, 1, 8, 8, 10)


def _step(ours):
    torch.manual_seed(0)
    native = _Small()
    ours.load_state_dict(native.state_dict())
    return step.workload(STEP, ours=ours, native=native, make_optimizer=torch.optim.SGD)


def test_step_by_a_wrong_gradient_is_refused():
    assert not _step(_HalfGradient()).check().ok


def test_step_by_equal_models():
    work = _step(_Small())
    assert work.check().ok
    assert set(work.ours) == {"NCHW", "channels_last"}
    assert {name.split()[0] for name in work.native} == set(work.ours)
    (update,) = {name.split()[1] for name in work.native}
    assert update in ("loop", "foreach", "fused")
    # Each variant trains a model of its own: the first losses agree however often others ran.
    first = [call().item() for call in work.calls.values()]
    assert first == pytest.approx([first[0]] * len(first), rel=1e-5)
    assert work.twin(f"NCHW {update}")().item() == pytest.approx(first[0], rel=1e-5)
    # forward and grad_weight of the convolution, all three products of the linear layer
    assert work.flops == 2 * (4 * 6 * 6 * 4 * 9) * 2 + 3 * 2 * (4 * 144 * 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("task", layers.PASSES)
def test_our_layers_pass_their_check(task, dtype):
    case = cases.SIMPLE_CNN[0].with_batch(2)
    work = suites.layer_workload(case, task, dtype)
    assert isinstance(work, Workload) and work.backend
    assert work.check().ok


def test_norm_check_does_not_hang_on_a_sign_that_rounding_decides():
    work = suites.norm_workload(cases.NormCase((8, 64, 56, 56), True), "backward", torch.float32)
    check = work.check()
    assert check.ok
    # One value of native's on the other side of zero would allow a thousand times as much.
    assert max(check.allowed.values()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("task", norm.PASSES)
@pytest.mark.parametrize("residual", [False, True])
def test_our_norm_passes_its_check(residual, task, dtype):
    work = suites.norm_workload(cases.NormCase((2, 20, 9, 9), residual), task, dtype)
    assert work.backend
    assert work.check().ok


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_our_sgd_passes_its_check(dtype):
    work = suites.sgd_workload(cases.SGD_CASES[1], dtype)
    assert work.backend
    assert work.check().ok


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_our_step_passes_its_check_against_plain_layers(dtype):
    work = suites.step_workload(cases.STEPS[0], dtype)
    assert work.backend
    assert work.check().ok


def test_recorded_steps_pass_their_check():
    work = suites.step_workload(cases.STEPS[0], torch.float32, recorded=True)
    assert set(work.ours) == {"NCHW recorded", "channels_last recorded"}
    losses = [[call().item() for _ in range(6)] for call in work.ours.values()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert work.check().ok


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_the_table_names_the_backend_asked_for(backend):
    with gdfast.backend(backend):
        work = [
            suites.layer_workload(cases.SIMPLE_CNN[0].with_batch(1), "forward", torch.float32),
            suites.sgd_workload(cases.SGD_CASES[0], torch.float32),
            suites.step_workload(cases.STEPS[0], torch.float32),
        ]
    assert {item.backend for item in work} == {"reference"}


def test_native_side_of_a_step_has_none_of_our_layers(monkeypatch):
    seen = {}

    def workload(case, dtype, *, ours, native, **_):
        seen.update(ours=ours, native=native)

    monkeypatch.setattr(suites.step, "workload", workload)
    suites.step_workload(cases.STEPS[0], torch.float32)
    classes = {side: {type(m) for m in model.modules()} for side, model in seen.items()}
    assert gdfast.nn.Conv2d in classes["ours"] and nn.Conv2d not in classes["ours"]
    assert nn.Conv2d in classes["native"] and gdfast.nn.Conv2d not in classes["native"]
    for ours, native in zip(*(seen[side].parameters() for side in ("ours", "native")), strict=True):
        assert torch.equal(ours, native)
