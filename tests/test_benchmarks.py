"""The scripts of benchmarks/, on the smallest of cases. No time matters here."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from gdfast.bench import peak

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def _script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def scaling(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, threads: None) -> ModuleType:
    module = _script("scaling")
    monkeypatch.setattr(module, "BATCHES", (2,))
    monkeypatch.setattr(module, "SIZES", (16,))
    monkeypatch.setattr(module, "_SIZE", 24)
    monkeypatch.setattr(peak, "measure", lambda: peak.Peak(100e9, 10e9))
    words = ["scaling.py", "--model", "resnet20", "--threads", "1", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", [*words, "--out", str(tmp_path)])
    return module


def test_scaling_measures_each_point_once(
    scaling: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    assert scaling.main() == 0
    (path,) = tmp_path.glob("*-scaling-resnet20.json")
    points = json.loads(path.read_text())["points"]
    assert [(p["sweep"], p["N"], p["size"]) for p in points] == [("batch", 2, 24), ("size", 8, 16)]
    for point in points:
        assert point["ratio"] == pytest.approx(point["native"] / point["ours"])
        assert point["floor"] == pytest.approx(point["flops"] / 100e9)
    first = capsys.readouterr().out
    monkeypatch.setattr(scaling, "measure", None)  # nothing is left to measure
    assert scaling.main() == 0
    assert capsys.readouterr().out == first


def test_scaling_tells_no_times_of_a_wrong_gradient(
    scaling: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = scaling.suites.both_models

    def wrong(case):
        ours, plain = both(case)
        with torch.no_grad():
            ours.fc.weight.mul_(2)
        return ours, plain

    monkeypatch.setattr(scaling.suites, "both_models", wrong)
    with pytest.raises(SystemExit, match="gradients differ by"):
        scaling.main()


def test_apart_times_every_variant_in_a_process_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    apart = _script("apart")
    monkeypatch.setattr(apart, "_VARIANTS", [("ours", "NCHW"), ("native", "channels_last")])
    words = ["apart.py", "SimpleCNN", "--seconds", "0", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    assert apart.main() == 0
    (path,) = tmp_path.glob("*-apart-*.json")
    (row,) = json.loads(path.read_text())["rows"]
    assert row["rounds"] == 1 and row["ms"].keys() == {"ours NCHW", "native channels_last"}
    assert row["ratio"] == pytest.approx(row["ms"]["native channels_last"] / row["ms"]["ours NCHW"])
    assert capsys.readouterr().out.startswith(f"SimpleCNN, batch 64: {row['ratio']:.2f}")
    monkeypatch.setattr(sys, "argv", ["apart.py", "nothing"])
    with pytest.raises(SystemExit):
        apart.main()


def test_convergence_compares_three_trainings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    pytest.importorskip("sklearn", reason='needs scikit-learn: pip install "gdfast[train]"')
    convergence = _script("convergence")
    words = ["--seeds", "1", "--steps", "2", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["convergence.py", *words])
    convergence.main()
    (path,) = tmp_path.glob("*-convergence*.json")
    runs = json.loads(path.read_text())["runs"]
    assert set(runs) == {"native NCHW", "native ch_last", "ours"}
    losses = [values["loss"] for (values,) in runs.values()]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-3)
    assert "native's range" in capsys.readouterr().out


def test_orl_compares_trainings_with_pixels(
    test_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    orl = _script("orl")
    asked = []

    def train(settings: Any, out: Path) -> SimpleNamespace:
        asked.append((settings.seed, settings.options["protocol"], settings.options.get("fold")))
        auc = 0.9 + 0.01 * settings.options.get("fold", 0)
        return SimpleNamespace(metrics={"rank1": 1, "auc": auc, "eer": 0, "tar": 1, "seconds": 2})

    monkeypatch.setattr(orl, "train", train)
    folder = str(test_data / "orl_faces")
    monkeypatch.setattr(sys, "argv", ["orl.py", folder, "--seeds", "2", "--out", str(tmp_path)])
    assert orl.main() == 0
    each = [("identify", None), *(("verify", fold) for fold in (1, 2, 3, 4))]
    assert asked == [(seed, *run) for seed in (0, 1) for run in each]
    (path,) = tmp_path.glob("*-orl.json")
    rows = json.loads(path.read_text())["rows"]
    assert rows["verify seed 1"]["auc"] == pytest.approx(0.925)
    assert [row["auc"] for row in rows["verify seed 0"]["folds"]] == pytest.approx(
        [0.91, 0.92, 0.93, 0.94]
    )
    # What anything learned has to beat.
    assert rows["pixels identify"]["rank1"] == pytest.approx(0.885)
    assert rows["pixels verify"]["auc"] == pytest.approx(0.9326, abs=1e-4)
    assert "verify seed 1         rank1 1.0000  auc 0.9250" in capsys.readouterr().out


def test_the_cost_models_choices_are_compared_and_fitted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], compiled_cpu: None
) -> None:
    module = _script("cost_model")
    algorithms = module.cpu_algorithms
    before = dict(algorithms._COSTS)
    monkeypatch.setattr(algorithms, "_COSTS", dict(before))
    some = [item for item in module.layers() if item[1].H == 14 and item[1].C <= 48]
    some = [item for item in some if item[1].N == 1]
    shapes = {(g.C, g.K, g.stride) for _, g in some}
    assert len(shapes) == len(some) > 1 and {stride for _, _, stride in shapes} == {(1, 1), (2, 2)}

    class Times:
        """A world in which the direct kernels never take half as long as Winograd's."""

        def __init__(self, calls: dict[str, Any], *_: Any, **__: Any) -> None:
            assert set(calls) == {"direct", "winograd"}

        def median(self, name: str) -> float:
            return {"direct": 1e-3, "winograd": 3e-3}[name]

    monkeypatch.setattr(module.timer, "compare", Times)
    rows = [
        row for item in some for layout in module.LAYOUTS for row in module.measure(*item, layout)
    ]
    assert len(rows) == 2 * 3 * len(some)
    wrong = [row for row in rows if row.chosen == "winograd"]
    assert all(row.excess == pytest.approx(3 if row in wrong else 1) for row in rows)
    for stride, op in before:
        module.fit(rows, stride, op)
    assert not [row for row in rows if row.chosen == "winograd"]
    text = module.summary(rows)
    assert "others, stride 1: chosen over best 1.000, 0 of" in text
