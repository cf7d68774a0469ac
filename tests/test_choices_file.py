"""The file of choices: nothing is lost, and whatever lies in its place does no harm."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import stat
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gdfast import files, native
from gdfast.backends import choices, choices_file, tuning, tuning_timer
from gdfast.backends.choices import Choice
from gdfast.ops import conv2d

pytestmark = pytest.mark.usefixtures("compiled_cpu")

SOME = {"one": Choice("direct", {"direct": 1e-3, "native": 2e-3}), "two": Choice("native", {})}


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GDFAST_CACHE_DIR", str(tmp_path / "cache"))
    path = choices_file.path()
    assert path is not None
    return path


def test_what_is_added_is_read(file: Path) -> None:
    assert choices_file.read(file) == {}
    assert choices_file.add(file, SOME) == choices_file.read(file) == SOME
    more = {"three": Choice("winograd", {"winograd": 0.5})}
    assert choices_file.add(file, more) == choices_file.read(file) == {**SOME, **more}
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    choices_file.remove(file)
    choices_file.remove(file)
    assert choices_file.read(file) == {}


def test_the_first_choice_stays_but_for_replacing(file: Path) -> None:
    choices_file.add(file, SOME)
    other = {"one": Choice("native", {"native": 1.0})}
    assert choices_file.add(file, other) == SOME
    assert choices_file.add(file, other, replacing=True) == choices_file.read(file) == SOME | other


def test_the_oldest_go_first(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "MOST", 5)
    for number in range(9):
        choices_file.add(file, {f"key {number}": Choice("direct")})
    assert [*choices_file.read(file)] == [f"key {number}" for number in range(4, 9)]


def valid(**changes: Any) -> dict[str, Any]:
    document = {
        "format": "gdfast choices 1", "machine": choices_file._machine(),
        "choices": choices.to_plain(SOME),
    }  # fmt: skip
    return document | changes


def one(**changes: Any) -> dict[str, Any]:
    return valid(choices={"one": {"choice": "direct", "seconds": {"direct": 1.0}} | changes})


HOSTILE: dict[str, Any] = {
    "empty": b"",
    "junk": bytes(range(256)) * 40,
    "zeros": bytes(10_000),
    "not utf-8": b'{"format": "\xff\xfe"}',
    "deep": b"[" * 200_000,
    "deep object": b'{"a":' * 100_000,
    "a number": b"7",
    "a list": b"[]",
    "null": b"null",
    "long number": b"1" * 100_000,
    "other format": lambda: valid(format="gdfast choices 2"),
    "other machine": lambda: valid(machine={"processor": "another"}),
    "no machine": lambda: {"format": "gdfast choices 1"},
    "choices of no kind": lambda: valid(choices=[1, 2]),
    "too many": lambda: valid(choices={str(n): {} for n in range(choices.MOST + 1)}),
    "long key": lambda: valid(choices={"k" * 5000: {"choice": "direct", "seconds": {}}}),
    "no choice": lambda: valid(choices={"one": {}}),
    "more fields": lambda: one(more=1),
    "name of no kind": lambda: one(choice=7),
    "empty name": lambda: one(choice=""),
    "long name": lambda: one(choice="x" * 1000),
    "seconds of no kind": lambda: one(seconds=3.0),
    "negative": lambda: one(seconds={"direct": -1.0}),
    "nan": lambda: one(seconds={"direct": float("nan")}),
    "inf": lambda: one(seconds={"direct": float("inf")}),
    "text": lambda: one(seconds={"direct": "1.0"}),
    "bool": lambda: one(seconds={"direct": True}),
    "int": lambda: one(seconds={"direct": 10**400}),
    "many seconds": lambda: one(seconds=dict.fromkeys(map(str, range(99)), 1.0)),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_what_is_no_such_file_counts_as_nothing_and_is_replaced(content: Any, file: Path) -> None:
    if callable(content):
        content = json.dumps(content()).encode()
    file.parent.mkdir()
    file.write_bytes(content)
    assert choices_file.read(file) == {}
    assert choices_file.add(file, SOME) == choices_file.read(file) == SOME


def test_every_cut_is_nothing_or_whole(file: Path) -> None:
    choices_file.add(file, SOME)
    content = file.read_bytes()
    for length in range(len(content) - 1):
        file.write_bytes(content[:length])
        assert choices_file.read(file) in ({}, SOME)


def test_a_huge_file_is_not_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choices_file.add(file, SOME)
    with file.open("ab") as stream:
        stream.truncate(1 << 40)
    assert choices_file.read(file) == {}
    assert choices_file.add(file, SOME) == choices_file.read(file) == SOME
    assert file.stat().st_size < 10_000


def test_a_folder_in_its_place_is_an_error_to_tell(file: Path) -> None:
    file.mkdir(parents=True)
    assert choices_file.read(file) == {}
    with pytest.raises(OSError):
        choices_file.add(file, SOME)


def test_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("GDFAST_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert choices_file.folder() == tmp_path / ".cache" / "gdfast"
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    assert choices_file.folder() == tmp_path / ".cache" / "gdfast"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert choices_file.folder() == tmp_path / "xdg" / "gdfast"
    monkeypatch.setenv("GDFAST_CACHE_DIR", str(tmp_path / "own"))
    path = choices_file.path()
    assert path is not None and path.parent == tmp_path / "own"

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("GDFAST_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    assert choices_file.folder() is None and choices_file.path() is None


def test_each_machine_and_version_has_its_own(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = choices_file._machine()
    assert set(facts) >= {
        "gdfast", "kernels", "chooser", "torch", "processor", "features", "cpus",
    }  # fmt: skip
    for name in facts:
        monkeypatch.setattr(choices_file, "_machine", lambda name=name: {**facts, name: "other"})
        assert choices_file.path() != file


def test_each_build_of_the_kernels_has_its_own(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def path_for(content: bytes, name: str = "_cpu.so") -> Path | None:
        built = tmp_path / name
        built.write_bytes(content)
        monkeypatch.setattr(native, "cpu", SimpleNamespace(__file__=str(built)))
        choices_file._machine.cache_clear()
        return choices_file.path()

    try:
        choices_file.add(file, SOME)
        first = path_for(b"kernels")
        assert first not in (None, file)
        assert path_for(b"other kernels") not in (first, file)
        # The same kernels in another place, or built again, are the same.
        assert path_for(b"kernels", "_cpu_again.so") == path_for(b"kernels") == first
        assert choices_file.read(file) == {}, "what another build chose holds no more"
        assert path_for(b"") is not None
    finally:
        choices_file._machine.cache_clear()


def test_another_way_of_choosing_has_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def digest() -> str:
        return choices_file._digest_of_sources("tuning*.py")

    source = tmp_path / "tuning.py"
    monkeypatch.setattr(choices_file, "__file__", str(source))
    source.write_text("HANDICAP = 1.01")
    before = digest()
    source.write_text("HANDICAP = 1.05")
    assert digest() != before


def add_many(path: str, process: int, count: int) -> None:
    for number in range(count):
        while True:
            try:
                choices_file.add(Path(path), {f"{process} {number}": Choice("direct")})
                break
            except choices_file.Busy:
                continue


@pytest.fixture
def fork() -> Any:
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("needs fork")
    return multiprocessing.get_context("fork")


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_several_processes_lose_nothing(file: Path, fork: Any) -> None:
    processes = [fork.Process(target=add_many, args=(str(file), n, 15)) for n in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    expected = {f"{process} {number}" for process in range(4) for number in range(15)}
    assert choices_file.read(file).keys() == expected


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_kill_leaves_a_whole_file_and_no_lock(file: Path, fork: Any) -> None:
    choices_file.add(file, SOME)
    for delay in (0.01, 0.03, 0.05):
        process = fork.Process(target=add_many, args=(str(file), 0, 100_000))
        process.start()
        time.sleep(delay)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join(60)
        assert choices_file.read(file).keys() >= SOME.keys()
        choices_file.add(file, {f"after {delay}": Choice("direct")})
    assert {path.name for path in file.parent.iterdir()} == {file.name, "choices.lock"}


def test_a_lock_that_others_keep_is_not_waited_for(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl", reason="needs fcntl")
    choices_file.add(file, SOME)
    monkeypatch.setattr(choices_file, "_SECONDS_FOR_LOCK", 0.02)
    with (file.parent / "choices.lock").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(choices_file.Busy):
            choices_file.add(file, {"three": Choice("direct")})
    choices_file.add(file, {"three": Choice("direct")})


def test_a_file_that_cannot_be_written_is_told_once(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(choices_file, "write_atomic", full)
    monkeypatch.setattr(
        tuning_timer, "measure", lambda calls, *_: {name: float(len(name)) for name in calls}
    )
    monkeypatch.setattr(tuning, "_SECONDS_BETWEEN_SAVES", float("-inf"))
    monkeypatch.setattr(tuning, "_warned", False)
    weight = torch.randn(16, 16, 3, 3)
    tuning.forget()
    try:
        with tuning.autotune("auto"):
            with pytest.warns(UserWarning) as caught:
                conv2d(torch.randn(2, 16, 40, 40), weight)
            (message,) = [str(warning.message) for warning in caught]
            assert f"autotune: {file}: expected a file that can be written, got: No sp" in message
            assert "\n" not in message and "GDFAST_CACHE_DIR" in message
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                conv2d(torch.randn(3, 16, 40, 40), weight)
            assert len(tuning.choices()) == 2
    finally:
        tuning.forget()


def test_choices_of_several_processes_come_together(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuning.forget()
    choices_file.add(file, SOME)
    try:
        assert tuning.choices() == SOME
        tuning._unsaved["mine"] = tuning._made["mine"] = Choice("direct", {"direct": 1.0})
        choices_file.add(file, {"theirs": Choice("native")})
        tuning._save()
        assert tuning.choices().keys() == {*SOME, "mine", "theirs"}
        assert choices_file.read(file).keys() == {*SOME, "mine", "theirs"}
        assert not list(file.parent.glob(f"{files._TEMP_PREFIX}*"))
        tuning.forget()
        assert tuning.choices() == {} and not file.exists()
    finally:
        tuning.forget()
