"""The command line: exit statuses, and what mistakes say."""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mnist_files import digits, write_pair

import gdfast
from gdfast.cli import main
from gdfast.train import TASKS, checkpoint
from gdfast.train.progress import Progress


@pytest.fixture
def small(tmp_path: Path) -> str:
    write_pair(tmp_path / "mnist", "t10k", *digits(60))
    return f"mnist:{tmp_path / 'mnist'}"


def run(*arguments: str) -> int:
    """The exit status, also where argparse exits by itself."""
    try:
        return main(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)


def outcome(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = run(*arguments)
    return status, *capsys.readouterr()


class TestHelp:
    def test_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert outcome(capsys, "--version") == (0, f"gdfast {gdfast.__version__}\n", "")

    @pytest.mark.parametrize("command", [[], ["train"], ["train", "cnn"], ["bench"], ["doctor"]])
    def test_of_every_command(self, command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        status, text, errors = outcome(capsys, *command, "--help")
        assert (status, errors) == (0, "") and f"usage: {' '.join(['gdfast', *command])}" in text

    def test_of_train_names_every_recipe(self, capsys: pytest.CaptureFixture[str]) -> None:
        _, text, _ = outcome(capsys, "train", "cnn", "--help")
        assert all(name in text for name in TASKS["cnn"].recipes)

    def test_imports_no_torch(self) -> None:
        code = (
            "import sys; from gdfast.cli import main\n"
            "for words in (['--help'], ['train', 'cnn', '--help'], ['doctor', '--help']):\n"
            "    try: main(words)\n"
            "    except SystemExit as stop: assert stop.code == 0\n"
            "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)

    def test_python_dash_m(self) -> None:
        command = [sys.executable, "-m", "gdfast", "--version"]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
        assert done.stdout == f"gdfast {gdfast.__version__}\n"


# Arguments, and what the one line on standard error must contain.
MISTAKES: list[tuple[str, str]] = [
    ("", "arguments are required: COMMAND"),
    ("fly", "invalid choice: 'fly'"),
    ("train", "arguments are required: TASK"),
    ("train cnm", "invalid choice: 'cnm'"),
    ("train cnn --epoch 3", "unrecognized arguments: --epoch 3"),
    ("train cnn --epochs many", "invalid int value: 'many'"),
    ("train cnn --epochs 0", "epochs: expected 1 or more, got 0"),
    ("train cnn --epochs -2", "epochs: expected 1 or more, got -2"),
    ("train cnn --lr nan", "lr: expected a finite number above 0, got nan"),
    ("train cnn --lr 1e999", "lr: expected a finite number above 0, got inf"),
    ("train cnn --lr -1", "lr: expected a finite number above 0, got -1.0"),
    ("train cnn --momentum 1", "momentum: expected a number from 0 to below 1, got 1.0"),
    ("train cnn --schedule steps", "schedule: expected constant or cosine or poly or step, got"),
    ("train cnn --warmup -1", "warmup: expected 0 or more, got -1"),
    ("train cnn --batch-size 0", "batch_size: expected 1 to 2**31 - 1, got 0"),
    ("train cnn --seed -1", "seed: expected 0 to 2**63 - 1, got -1"),
    ("train cnn --recipe secret", "recipe: expected default or article, got 'secret'"),
    ("train cnn --device abacus", "device: expected auto, cpu, or a device that is here"),
    ("train cnn --backend magic", "backend: name: expected one of auto, cpu"),
    ("train cnn --data cifar", "data: spec: expected digits, mnist:DIR or folder:DIR, got 'cifar'"),
    *(
        (f"train cnn --{name} ''", f"--{name}: expected a value, got an empty one")
        for name in ("data", "recipe", "device", "backend", "out", "resume")
    ),
    ("train cnn --resume x --data ''", "--data: expected a value, got an empty one"),
    ("train cnn --data mnist:/nowhere", "expected a folder of idx files, found no such folder"),
    ("train cnn --data mnist:/etc/hostname", "expected a folder of idx files, found a file"),
    ("train cnn --out /dev/null", "out: expected a folder, got the file /dev/null"),
    ("train cnn --out /proc/run", "out: expected a folder that can be made and written to"),
    ("train cnn --resume /nowhere", "expected a checkpoint, found no such file"),
    ("train cnn --resume /etc/hostname", "found a damaged or foreign file"),
    ("train cnn --resume x --lr 0.1", "--lr: expected no such option with --resume"),
    ("train cnn --resume x --out y", "--out: expected no such option with --resume"),
    ("train cnn --resume x --download", "--download: expected no such option with --resume"),
    ("bench --suite none", "invalid choice: 'none'"),
    ("bench --backend magic", "backend: name: expected one of auto, cpu"),
    ("doctor --yaml", "unrecognized arguments: --yaml"),
]


@pytest.mark.parametrize(("line", "message"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_mistake_takes_one_line_and_leaves_nothing(
    line: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    status, output, errors = outcome(capsys, *shlex.split(line))
    assert (status, output) == (2, "")
    assert message in errors and errors.startswith("gdfast") and errors.count("\n") == 1
    assert not list(tmp_path.iterdir())


class TestTrain:
    def test_from_start_to_end(
        self, small: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        out = tmp_path / "run"
        options = ["--recipe", "article", "--epochs", "2", "--batch-size", "16", "--seed", "4"]
        status, output, errors = outcome(
            capsys, "train", "cnn", "--data", small, *options, "--out", str(out)
        )
        assert (status, errors) == (0, "")
        metrics = json.loads((out / "metrics.json").read_text())
        chosen = {"lr": 0.01, "momentum": 0.0, "epochs": 2, "batch_size": 16, "seed": 4}
        assert {name: metrics[name] for name in chosen} == chosen
        assert f"test accuracy {metrics['test_accuracy']:.4f} on 12 images" in output
        assert output.count("test loss") == 2 and "images/s" in output and "left" in output

        status, output, errors = outcome(capsys, "train", "cnn", "--resume", str(out))
        assert (status, errors) == (0, "") and "all epochs are done" in output

        again = "train", "cnn", "--data", small, "--out", str(out)
        status, output, errors = outcome(capsys, *again)
        assert status == 2 and f"--resume {out}" in errors

    @pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
    def test_a_signal_leaves_a_checkpoint_and_its_number(
        self,
        name: str,
        small: str,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        number = signal.Signals[name]
        monkeypatch.setattr(Progress, "step", lambda *_: os.kill(os.getpid(), number))
        out = tmp_path / "run"
        before = signal.signal(number, signal.SIG_DFL)
        try:
            status, _, errors = outcome(capsys, "train", "cnn", "--data", small, "--out", str(out))
        finally:
            signal.signal(number, before)
        assert status == 128 + number and f"--resume {out}" in errors
        assert checkpoint.load(out / checkpoint.NAME)["state"]["batch"] == 1

    def test_a_closed_terminal_does_not_stop_what_nohup_started(
        self, small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Progress, "step", lambda *_: os.kill(os.getpid(), signal.SIGHUP))
        options = ["--data", small, "--epochs", "2", "--out", str(tmp_path / "run")]
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            assert run("train", "cnn", *options) == 0
        finally:
            signal.signal(signal.SIGHUP, before)

    def test_options_override_the_recipe(
        self, small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        options = [
            "--epochs",
            "1",
            "--lr",
            "0.02",
            "--momentum",
            "0.5",
            "--schedule",
            "constant",
            "--warmup",
            "0",
        ]
        assert run("train", "cnn", "--data", small, *options, "--out", str(tmp_path / "run")) == 0
        metrics = json.loads((tmp_path / "run/metrics.json").read_text())
        found = [metrics[name] for name in ("lr", "momentum", "schedule", "warmup")]
        assert found == [0.02, 0.5, "constant", 0]

    def test_a_backend_that_is_not_here_is_told(
        self, small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from gdfast import backends

        missing = [each.name for each in backends.available() if not each.ok]
        if not missing:
            pytest.skip("needs a backend that this machine cannot use")
        options = ["--data", small, "--backend", missing[0], "--out", str(tmp_path / "run")]
        status, _, errors = outcome(capsys, "train", "cnn", *options)
        assert status == 2 and f"'{missing[0]}' cannot be used here: " in errors
        assert errors.count("\n") == 1 and not (tmp_path / "run").exists()

    @pytest.mark.parametrize("package", ["safetensors", "matplotlib", "yaml", "sklearn"])
    def test_a_missing_package_names_the_extra(
        self,
        package: str,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        for name in [name for name in sys.modules if name.split(".")[0] == package]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, package, None)  # now importing it fails
        out = tmp_path / "run"
        status, _, errors = outcome(capsys, "train", "cnn", "--out", str(out))
        assert status == 2 and not out.exists() and errors.count("\n") == 1
        assert f'needs {package}, which is not installed: pip install "gdfast[train]"' in errors

    def test_a_full_disk_is_told_in_one_line(self, small: str, tmp_path: Path) -> None:
        # A limit on the size of files is the nearest thing to a full disk.
        code = (
            "import resource, signal, sys; from gdfast.cli import main\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
            "sys.exit(main(sys.argv[1:]))"
        )
        out = tmp_path / "run"
        done = subprocess.run(
            [sys.executable, "-c", code, "train", "cnn", "--data", small, "--out", str(out)],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 2
        assert done.stderr == f"gdfast: {out / checkpoint.NAME}: File too large\n"
        assert [path.name for path in out.iterdir()] == ["args.yaml"]

    def test_a_reader_that_goes_away_leaves_no_trace(self, small: str, tmp_path: Path) -> None:
        command = [sys.executable, "-m", "gdfast", "doctor"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        process.stderr.close()
        assert process.wait(timeout=60) == 141


@pytest.mark.parametrize(
    ("variable", "message"),
    [("GDFAST_CPU_ISA", "expected one that this processor runs"), ("GDFAST_BACKEND", "expected")],
)
def test_a_bad_environment_is_told_in_one_line(variable: str, message: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gdfast", "doctor"],
        env={**os.environ, variable: "nonsense"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert variable in done.stderr and message in done.stderr and "'nonsense'" in done.stderr


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class TestProgress:
    def state(self) -> Any:
        from gdfast.train.state import State

        steps = {"lr": [0.1] * 2, "images": [4.0, 2.0], "loss": [2.0, 0.5], "accuracy": [0.25, 1.0]}
        return State(batch=2, training_seconds=0.5, steps=steps)

    def test_means_weigh_each_image_alike(self) -> None:
        assert self.state().epoch_means() == {"loss": 1.5, "accuracy": 0.5}

    def test_redraws_one_line_on_a_terminal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COLUMNS", "200")
        stream = Terminal()
        progress = Progress(stream, epochs=3, batches=4)
        progress._shown = 0.0  # long ago
        progress.step(self.state())
        text = stream.getvalue()
        assert text.startswith("\repoch 1/3  batch 2/4  loss 1.5000 accuracy 0.5000  12 images/s")
        assert "left" in text and "\n" not in text
        progress.step(self.state())
        assert stream.getvalue() == text  # not again so soon
        progress.say("done")
        assert stream.getvalue().endswith("\r\x1b[Kdone\n")

    def test_fits_a_narrow_terminal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COLUMNS", "40")
        stream = Terminal()
        progress = Progress(stream, epochs=3, batches=4)
        progress._shown = 0.0
        progress.step(self.state())
        assert len(stream.getvalue()) == 40  # the carriage return and 39 columns

    def test_adds_plain_lines_elsewhere(self) -> None:
        stream = io.StringIO()
        progress = Progress(stream, epochs=3, batches=4)
        progress.step(self.state())
        assert stream.getvalue() == ""
        progress._shown = 0.0
        progress.step(self.state())
        assert stream.getvalue().count("\n") == 1 and "\r" not in stream.getvalue()
