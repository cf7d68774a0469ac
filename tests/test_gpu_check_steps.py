"""The steps of benchmarks/gpu_check.sh on a machine with a GPU, with stubs for what it calls."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
STUBS = {
    "python": """
echo "$*, hopper=${GDFAST_HOPPER:-}, commit=$GPU_CHECK_COMMIT, modules=${GDFAST_NATIVE_DIR##*/}" \
  >> "$CALLS"
case "$*" in
  -) cat > /dev/null; echo "gpu a stub" >&2; echo 9.0a ;;
  -c*) echo /nowhere ;;
  *test_cuda_hopper.py*) exit "$HOPPER" ;;
  *test_cuda_hopper_grad_weight.py*) exit "${HOPPER_GRAD_WEIGHT:-0}" ;;
  *--warm*) sleep 60 ;;
  *gpu_layers.py*) echo "{}" > "$2/results.json"; echo "| what | against" > "$2/results.txt" ;;
esac
""",
    "cmake": '[[ $1 == --build ]] && touch "$2/_cuda.so" || mkdir -p "$4"',
    "compute-sanitizer": 'echo "$2" >> "$CALLS"; shift 6; exec "$@"',
    "nvcc": "",
    "ninja": "",
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A working tree with that script and what it looks for, and the stubs beside it."""
    if shutil.which("bash") is None or shutil.which("timeout") is None:
        pytest.skip("needs bash and timeout")
    (tmp_path / "benchmarks").mkdir()
    shutil.copy(BENCHMARKS / "gpu_check.sh", tmp_path / "benchmarks")
    (tmp_path / "tests").mkdir()
    for name in ("cuda_conv2d", "cuda_hopper", "cuda_hopper_halo", "gpu", "triton_gpu"):
        (tmp_path / f"tests/test_{name}.py").write_text("pytest.mark.gpu\n")
    (tmp_path / "stubs").mkdir()
    for name, text in STUBS.items():
        path = tmp_path / "stubs" / name
        path.write_text(f"#!/usr/bin/env bash\n{text}\n")
        path.chmod(0o755)
    return tmp_path


def run(tree: Path, hopper: int, **more: str) -> tuple[int, str, list[str]]:
    """The exit status, the summary, and the calls in the order of starting."""
    environment = {
        **os.environ, "PATH": f"{tree / 'stubs'}:{os.environ['PATH']}", "HOPPER": str(hopper),
        "PYTHON": str(tree / "stubs/python"), "CALLS": str(tree / "calls"),
        "GPU_CHECK_COMMIT": "c0ffee", **more,
    }  # fmt: skip
    result = subprocess.run(
        ["bash", tree / "benchmarks/gpu_check.sh", tree / "out"], capture_output=True, text=True,
        timeout=100, env=environment,
    )  # fmt: skip
    assert len(list((tree / "out").iterdir())) <= 8
    summary = (tree / "out/summary.txt").read_text()
    return result.returncode, summary, (tree / "calls").read_text().splitlines()


def only(calls: list[str], part: str) -> str:
    (call,) = (call for call in calls if part in call)
    return call


def test_hoppers_kernel_is_a_candidate_where_its_tests_passed(tree: Path) -> None:
    status, summary, calls = run(tree, hopper=0)
    assert status == 0, summary
    assert "hopper: its kernels are candidates" in summary and "commit c0ffee" in summary
    assert "hopper=," in only(calls, "test_cuda_hopper.py")
    names = "cuda_conv2d", "cuda_hopper_halo", "gpu"
    tests = [only(calls, f"-m gpu tests/test_{name}.py,") for name in names]
    measured = only(calls, "--seconds 4")
    for call in (*tests, measured):
        assert "hopper=, commit=c0ffee, modules=native" in call
        assert calls.index(only(calls, "test_cuda_hopper.py")) < calls.index(call)
    assert sum("-m gpu" in call for call in calls) == 3
    # Triton's tests, by part; the last one has all that no other has.
    parts = [c.split(" -k ")[1].split(" tests/")[0] for c in calls if "test_triton_gpu.py" in c]
    rest = max(parts, key=len)
    assert len(parts) == 7 and rest.startswith("not (")
    assert all(f"({part})" in rest for part in parts if part != rest)
    # While kernels are compiled, none of ours can be used; then each runs under every tool.
    assert "modules=none" in only(calls, "--warm 0/4")
    assert sum("gpu_kernels.py" in call for call in calls) == 4
    assert {"memcheck", "racecheck", "initcheck", "synccheck"} < set(calls)
    assert calls.index(measured) > max(map(calls.index, tests)) and "gpu_profile.py" in calls[-1]


def test_hoppers_kernel_is_left_out_where_its_tests_failed(tree: Path) -> None:
    status, summary, calls = run(tree, hopper=1)
    assert status == 1 and "hopper: its kernels are left out" in summary
    assert "hopper=0," in only(calls, "tests/test_gpu.py")
    assert "hopper=0," in only(calls, "--seconds 4")


def test_hoppers_gradient_in_the_weight_is_left_out_alone(tree: Path) -> None:
    status, summary, calls = run(tree, hopper=0, HOPPER_GRAD_WEIGHT="1")
    assert status == 1 and "hopper: its kernels are candidates" in summary
    assert "hopper: that of the gradient in the weight is left out" in summary
    assert "hopper=no_grad_weight," in only(calls, "--seconds 4")


def test_chosen_rows_are_measured_without_tests(tree: Path) -> None:
    status, summary, calls = run(tree, hopper=0, GPU_CHECK_ROWS="SGD")
    assert status == 0, summary
    assert "--only SGD" in only(calls, "--seconds 5")
    assert not any("test_triton" in c or "-m gpu" in c or "gpu_profile" in c for c in calls)
    assert not any("gpu_kernels.py" in call for call in calls)
