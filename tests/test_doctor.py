"""`gdfast doctor`: the facts it tells, and that its self-test can fail."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import gdfast
from gdfast import backends, doctor, native, self_test
from gdfast.backends import registry
from gdfast.cli import main
from gdfast.doctor import examine

OPERATIONS = list(self_test._operations())


def test_report_tells_what_is_here() -> None:
    report = examine()
    assert report["versions"]["gdfast"] == gdfast.__version__
    assert report["versions"]["torch"] == torch.__version__
    assert report["cpu"]["threads"] == torch.get_num_threads()
    assert [each["name"] for each in report["backends"]] == [b.name for b in backends.available()]
    assert all(each["ok"] or each["reason"] for each in report["backends"])
    assert set(report["extras"]) == {"train", "export", "tensorboard", "triton"}
    assert report["seconds"] < 60


@pytest.mark.usefixtures("compiled_cpu")
def test_self_test_passes_on_our_kernels() -> None:
    report = examine()
    cpu = [check for check in report["self_test"] if check["backend"] == "cpu"]
    cpu = [check for check in cpu if "bfloat16" not in check["operation"]]
    assert [check["operation"] for check in cpu] == OPERATIONS
    for check in cpu:
        # What is chosen among numbers is exact.
        least = 0 if "max_pool2d" in check["operation"] else 1e-10
        assert check["ok"] and least <= check["error"] < 1e-6
    assert report["ok"]
    assert native.cpu is not None and report["cpu"]["in_force"] == native.cpu.isa()


@pytest.mark.usefixtures("compiled_cpu", "fresh_registry")
def test_products_of_bfloat16_are_tested_where_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    before = native.cpu.isa()
    try:
        assert native.cpu.select_isa("emulated_bf16")
        checks = {each["operation"]: each for each in examine()["self_test"]}
        for operation in OPERATIONS[:3]:
            check = checks[f"{operation} bfloat16"]
            assert check["ok"] and 1e-4 < check["error"] < 1e-2
        assert native.cpu.select_isa("baseline")
        report = examine()
        assert not [each for each in report["self_test"] if "bfloat16" in each["operation"]]
        main(["doctor"])
        assert f"widen it to float32, or are native's: {report['cpu']['why_no_bf16']}" in (
            capsys.readouterr().out
        )
    finally:
        native.cpu.select_isa(before)


def test_text_and_json_tell_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert main(["doctor"]) == status == (0 if report["ok"] else 1)
    text = capsys.readouterr().out
    for each in report["backends"]:
        assert f"{each['name']}: {'yes' if each['ok'] else 'no, ' + each['reason']}" in text
    assert text.count("self-test") == len(report["self_test"])
    assert report["paths"]["gdfast"] in text


@pytest.mark.usefixtures("fresh_registry")
@pytest.mark.parametrize("how", ["wrong", "crashes", "nan"])
def test_a_kernel_that_is_wrong_is_found(how: str, capsys: pytest.CaptureFixture[str]) -> None:
    def broken_sgd(params: Any, *rest: Any, **options: Any) -> None:
        if how == "crashes":
            raise RuntimeError("kernel fell over")
        for param in params:
            param.mul_(float("nan") if how == "nan" else 1.001)

    registry.register(registry.Backend("broken", {"sgd_": lambda *_: broken_sgd}))
    report = examine()
    checks = {c["operation"]: c for c in report["self_test"] if c["backend"] == "broken"}
    assert not report["ok"] and not checks["sgd_"]["ok"]
    # What it does not have is told, and is no failure.
    assert checks["conv2d"]["ok"] and "it has no conv2d kernel" in checks["conv2d"]["reason"]
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "broken sgd_: FAIL" in text and "a self-test failed" in text


@pytest.mark.usefixtures("fresh_registry")
def test_no_kernel_at_all_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    for name in [each.name for each in backends.available() if each.name != "reference"]:
        registry.register(registry.Backend(name, {}, missing=lambda: "it was not built"))
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "cpu: no, it was not built" in text and "no kernel of ours can be used" in text


def test_tensor_cores_are_tested_in_their_own_arithmetic() -> None:
    plan = self_test._plan(bfloat16=True, tf32x3=True)
    names = [name + arithmetic.suffix for name, _, arithmetic in plan]
    assert {"conv2d bfloat16", "conv2d_grad_weight depthwise bfloat16"} < set(names)
    assert {"batch_norm_act_backward bfloat16", "max_pool2d_grad bfloat16"} < set(names)
    assert {"conv2d tf32x3", "conv2d_grad_input tf32x3"} < set(names)
    assert len(names) == len(set(names)) and names[: len(OPERATIONS)] == OPERATIONS


@pytest.mark.parametrize("arithmetic", ["_FLOAT32", "_BFLOAT16", "_TF32X3"])
def test_an_error_of_three_roundings_is_found(arithmetic: str) -> None:
    how = getattr(self_test, arithmetic)
    exact = torch.arange(1.0, 9.0).double()

    def operation(backend: str, place: Any) -> torch.Tensor:
        return place(exact) * (1 + (3 * how.least if backend == "ours" else 0))

    wrong = self_test.check("ours", "cpu", "sum", operation, how)
    right = self_test.check("reference", "cpu", "sum", operation, how)
    assert right.ok and not wrong.ok and wrong.operation == "sum" + how.suffix


@pytest.mark.usefixtures("compiled_cpu")
def test_bfloat16_is_right_on_our_cpu_kernels() -> None:
    for name, operation, arithmetic in self_test._plan(bfloat16=True, tf32x3=False):
        if arithmetic is self_test._BFLOAT16:
            check = self_test.check("cpu", "cpu", name, operation, arithmetic)
            assert check.ok, check


def test_what_a_layout_costs() -> None:
    ratio = doctor._layout_cost("reference", "cpu", 1)
    assert 0 < ratio < 1000


def test_our_environment_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GDFAST_HOPPER", "GDFAST_POOL", "TRITON_INTERPRET"):
        monkeypatch.setenv(name, "0")
    assert {"GDFAST_HOPPER", "GDFAST_POOL", "TRITON_INTERPRET"} < set(examine()["environment"])


def test_simulated_kernels_are_not_tested_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(native, "cuda_is_simulated", False)
    on_gpu = {name: self_test.runs_on_gpu(name) for name in ("cpu", "cuda", "triton")}
    assert on_gpu == {"cpu": False, "cuda": True, "triton": False}
