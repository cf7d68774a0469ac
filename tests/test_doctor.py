"""`gdfast doctor`: the facts it tells, and that its self-test can fail."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import gdfast
from gdfast import backends, native
from gdfast.backends import registry
from gdfast.cli import main
from gdfast.doctor import examine

OPERATIONS = ["conv2d", "conv2d_grad_input", "conv2d_grad_weight", "sgd_"]


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
    assert all(check["ok"] and 0 < check["error"] < 1e-6 for check in cpu)
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
