"""The records folder: resume, kill and rerun, growth, several processes, and files that are not what they should be."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import gradients.checked
from gradients.__main__ import main
from gradients.cli import UserError
from gradients.fingerprint import Fingerprint
from gradients.models import KINDS
from gradients.records import Records, claimed
from gradients.rope import rope_tables


@pytest.fixture
def folder(records, tmp_path) -> Path:
    """A copy of `records` to change."""
    return Path(shutil.copytree(records.folder, tmp_path / "records"))


def windows_of(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if name.startswith("window-")}


def environment() -> dict[str, str]:
    """The environment of a subprocess that computes as this process does."""
    return os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def test_the_files_hold_what_the_design_says(records) -> None:
    names = {path.name for path in records.folder.iterdir()}
    assert names == {"manifest.json", "rope.safetensors"} | {f"window-{number:05d}.safetensors" for number in range(4)}
    manifest = json.loads((records.folder / "manifest.json").read_text())
    assert (manifest["schema"], manifest["windows"], manifest["seqlen"], manifest["seed"]) == (2, 4, 65, 0)
    assert (manifest["model_dtype"], manifest["fingerprint"]["architecture"]) == ("float32", "llama")
    assert set(manifest["versions"]) >= {"torch", "transformers"}
    with safe_open(records.path(0), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    assert set(tensors) == {
        f"layers.{layer}.{kind}.{what}"
        for layer in (0, 1)
        for kind in KINDS
        for what in ("activation", "fisher", "moment")
    }
    kinds = {"activation": ((65, 24), torch.float16), "fisher": ((65, 24), torch.bfloat16)}
    kinds["moment"] = ((2, 12, 12), torch.float32)
    for name, tensor in tensors.items():
        assert (tensor.shape, tensor.dtype) == kinds[name.rpartition(".")[2]]


def test_digest_is_of_what_decides_a_windows_content(records) -> None:
    manifest = records.manifest
    assert replace(manifest, windows=99, text="renamed.txt", model="/elsewhere").digest == manifest.digest
    other = replace(manifest.fingerprint, rope="{}")
    for change in (
        {"seed": 1},
        {"seqlen": 64},
        {"token_digest": "0"},
        {"model_dtype": "float16"},
        {"weights": "0"},
        {"bos": True},
        {"fingerprint": other},
    ):
        assert replace(manifest, **change).digest != manifest.digest, change


def test_read_layer_joins_windows_in_order(records) -> None:
    activation, fisher = records.read_layer(1, "value", skip_tokens=3)
    windows = [records.read(window, 1, "value") for window in range(4)]
    assert torch.equal(activation, torch.cat([a[3:] for a, _ in windows]))
    assert torch.equal(fisher, torch.cat([f[3:] for _, f in windows]))
    assert activation.shape == (4 * 62, 24)


def test_the_first_windows_are_those_of_a_smaller_recording(records) -> None:
    few = records.first(2)
    assert (few.folder, few.manifest.windows, few.manifest.digest) == (records.folder, 2, records.manifest.digest)
    for kind in KINDS:
        for mine, whole in zip(few.read_layer(1, kind, 3), records.read_layer(1, kind, 3), strict=True):
            assert torch.equal(mine, whole[: 2 * 62])
    assert records.manifest.windows == 4
    assert records.first(None) == records.first(4) == records


def test_rotary_tables_are_the_models(records, llama) -> None:
    cos, sin = records.read_rope()
    assert cos.shape == sin.shape == (65, 12)
    for stored, table in zip((cos, sin), rope_tables(llama, 65), strict=True):
        assert stored.dtype == torch.float32 and torch.equal(stored, table)


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "without a table", "altered"])
def test_rotary_tables_that_cannot_be_read_are_refused_and_come_back(
    damage: str, folder, record_arguments, snapshot
) -> None:
    before, path = snapshot(folder), folder / "rope.safetensors"
    if damage == "missing":
        path.unlink()
    elif damage == "without a table":
        save_file({"cos": torch.ones(65, 12)}, path)
    elif damage == "altered":
        path.write_bytes(path.read_bytes()[:-1] + b"\x3e")
    else:
        path.write_bytes(path.read_bytes()[: 0 if damage == "empty" else -1])
    with pytest.raises(UserError) as caught:
        Records.open(folder).read_rope()
    assert str(folder / "rope.safetensors") in str(caught.value)
    assert "run `python -m gradients` again: complete windows are kept" in str(caught.value)
    # the remedy is one
    assert main([*record_arguments, "--output", str(folder)])["recorded_now"] == 0
    assert snapshot(folder) == before


def test_a_rerun_leaves_complete_windows_alone(folder, record_arguments, snapshot) -> None:
    before = snapshot(folder)
    times = {path.name: path.stat().st_mtime_ns for path in folder.glob("window-*")}
    result = main([*record_arguments, "--output", str(folder)])
    assert result["recorded_now"] == 0
    assert snapshot(folder) == before
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("window-*")} == times


@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "of another run"])
def test_a_rerun_replaces_incomplete_windows_only(damage: str, folder, record_arguments, records, snapshot) -> None:
    before = snapshot(folder)
    spoilt, content = records.path(2).name, before[records.path(2).name]
    (folder / spoilt).unlink()
    if damage == "truncated":
        (folder / spoilt).write_bytes(content[:-1])
    elif damage == "empty":
        (folder / spoilt).write_bytes(b"")
    elif damage == "of another run":
        (folder / spoilt).write_bytes(content.replace(records.manifest.digest.encode(), b"0" * 16))
    times = {path.name: path.stat().st_mtime_ns for path in folder.glob("window-*") if path.name != spoilt}
    result = main([*record_arguments, "--output", str(folder)])
    assert result["recorded_now"] == 1
    assert snapshot(folder) == before
    assert {name: (folder / name).stat().st_mtime_ns for name in times} == times


def test_more_windows_keep_the_earlier_ones(folder, record_arguments, records, snapshot, tmp_path) -> None:
    arguments = [*record_arguments, "--output", str(tmp_path / "grown"), "--windows"]
    assert main([*arguments, "2"])["recorded_now"] == 2
    early = windows_of(snapshot(tmp_path / "grown"))
    assert len(early) == 2
    assert Records.open(tmp_path / "grown").manifest.windows == 2
    assert main([*arguments, "4"])["recorded_now"] == 2
    grown = snapshot(tmp_path / "grown")
    assert early.items() < windows_of(grown).items()
    assert windows_of(grown) == windows_of(snapshot(folder))
    # asking for fewer again takes nothing away
    assert main([*arguments, "1"])["recorded_now"] == 0
    assert snapshot(tmp_path / "grown") == grown


def test_kill_and_rerun_gives_the_same_bytes(record_arguments, tmp_path, snapshot) -> None:
    """SIGKILL once the first window is there; the rest comes from a second run."""
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    arguments = [*record_arguments, "--windows", "40"]
    process = subprocess.Popen(
        [sys.executable, "-m", "gradients", *arguments, "--output", str(killed)],
        cwd=REPOSITORY,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not (killed / "window-00000.safetensors").exists():
        assert process.poll() is None, "the run ended before its first window"
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = set(windows_of(snapshot(killed)))
    assert 1 <= len(done) < 40

    result = main([*arguments, "--output", str(killed)])
    assert result["recorded_now"] == 40 - len(done)
    main([*arguments, "--output", str(whole)])
    assert windows_of(snapshot(killed)) == windows_of(snapshot(whole))
    assert len(windows_of(snapshot(whole))) == 40


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (["--seed", "1"], "seed 0 there, 1 asked for"),
        (["--seqlen", "64"], "seqlen 65 there, 64 asked for"),
        (["--dtype", "bfloat16"], "model_dtype 'float32' there, 'bfloat16' asked for"),
        (["--text", "pydoc"], "asked for"),
    ],
    ids=["seed", "seqlen", "dtype", "text"],
)
def test_another_runs_folder_is_refused(change: list[str], fragment: str, folder, record_arguments, snapshot) -> None:
    before = snapshot(folder)
    with pytest.raises(UserError) as caught:
        main([*record_arguments, "--output", str(folder), *change])
    assert str(folder) in str(caught.value)
    assert fragment in str(caught.value)
    assert "give another --output or delete the folder" in str(caught.value)
    assert snapshot(folder) == before


def test_another_models_folder_is_refused(folder, record_arguments, make_model, save_model, snapshot, tmp_path) -> None:
    other = save_model(make_model("qwen2"), tmp_path / "tiny-qwen2")
    before = snapshot(folder)
    with pytest.raises(UserError, match="belongs to another run .*architecture 'llama' against 'qwen2'"):
        main([*record_arguments, "--model", str(other), "--output", str(folder)])
    assert snapshot(folder) == before


def test_a_window_in_anothers_place_is_noticed(folder) -> None:
    opened = Records.open(folder)
    shutil.copy(opened.path(0), opened.path(1))
    with pytest.raises(UserError, match="window-00001.safetensors' belongs to another run or window"):
        opened.read(1, 0, "key")


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        ("", "is damaged"),
        ("[1]", "is damaged"),
        ("{}", "is damaged"),
        ('{"schema": 1}', "is damaged"),
        ('{"schema": 1, "fingerprint": {"layers": 2}}', "is damaged"),
        ('{"schema": 2}', "is damaged"),
        ('{"schema": 3}', "have schema 3, this version reads 2; record again"),
        ("[" * 100_000, "is damaged"),
    ],
)
def test_a_manifest_of_another_form_is_refused(content: str, fragment: str, folder) -> None:
    (folder / "manifest.json").write_text(content)
    with pytest.raises(UserError) as caught:
        Records.open(folder)
    assert fragment in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_full_disk_loses_nothing(record_arguments, records, snapshot, tmp_path, monkeypatch) -> None:
    """The third window does not fit; after making room, the same command completes the folder."""
    saved = gradients.checked.save_file

    def full_at_third(tensors: Any, path: Path, **options: Any) -> None:
        if "00002" in str(path):
            Path(path).write_bytes(b"half a window")
            raise OSError(errno.ENOSPC, "No space left on device")
        saved(tensors, path, **options)

    arguments = [*record_arguments, "--output", str(tmp_path / "records")]
    with monkeypatch.context() as patched:
        patched.setattr(gradients.checked, "save_file", full_at_third)
        with pytest.raises(
            UserError, match=r"cannot write .*window-00002.safetensors: .*No space left.*earlier files are untouched"
        ):
            main(arguments)
    complete = snapshot(records.folder)
    assert snapshot(tmp_path / "records") == {
        name: complete[name]
        for name in ("manifest.json", "rope.safetensors", "window-00000.safetensors", "window-00001.safetensors")
    }
    assert main(arguments)["recorded_now"] == 2
    assert snapshot(tmp_path / "records") == complete


def as_schema_1(folder: Path) -> None:
    """Make a folder what the version before digests would have left."""
    opened = Records.open(folder)
    old = replace(opened.manifest, schema=1, weights="", bos=False, moment_windows=0)
    (folder / "manifest.json").write_text(json.dumps(old.to_json()))
    for window in range(opened.manifest.windows):
        stored = load_file(opened.path(window))
        tensors = {name: tensor for name, tensor in stored.items() if not name.endswith("moment")}
        sums = {name: gradients.checked.bytes_checksum(tensor) for name, tensor in tensors.items()}
        stamp = {"manifest": old.digest, "window": window, "checksums": sums}
        save_file(tensors, opened.path(window), metadata={"kvquant": json.dumps(stamp)})
    save_file(load_file(folder / "rope.safetensors"), folder / "rope.safetensors")


def test_a_folder_without_digests_is_read_with_a_note_and_not_mixed(folder, records, record_arguments, capsys) -> None:
    as_schema_1(folder)
    assert not {"weights", "bos", "run", "moment_windows"} & set(json.loads((folder / "manifest.json").read_text()))
    capsys.readouterr()
    old = Records.open(folder)
    assert "are of an older version" in capsys.readouterr().err
    assert all(old.is_complete(window) for window in range(4))
    assert all(torch.equal(mine, table) for mine, table in zip(old.read_rope(), records.read_rope(), strict=True))
    for mine, other in zip(old.read_layer(1, "key"), records.read_layer(1, "key"), strict=True):
        assert torch.equal(mine, other)
    with pytest.raises(UserError, match="recorded by an older version, schema 1 and not 2"):
        main([*record_arguments, "--output", str(folder)])


def test_windows_of_an_old_manifest_are_not_made_room_for_before_they_are_there(folder) -> None:
    as_schema_1(folder)
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"windows": 99_999}))
    with pytest.raises(UserError, match="window-00004.safetensors' is missing"):
        Records.open(folder).read_layer(0, "key")
    for windows in ("4", 10**9, 0, True):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"windows": windows}))
        with pytest.raises(UserError, match="manifest.json' is damaged"):
            Records.open(folder)


def test_two_commands_at_once_say_so(folder, record_arguments, snapshot) -> None:
    (folder / "window-00001.safetensors").unlink()
    before = snapshot(folder)
    arguments = [*record_arguments, "--output", str(folder)]
    with claimed(folder):
        run = subprocess.run(
            [sys.executable, "-m", "gradients", *arguments, "--windows", "9"],
            cwd=REPOSITORY,
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
    last = run.stderr.splitlines()[-1]
    assert run.returncode == 2 and last.startswith("error: ") and run.stdout == ""
    assert "is being recorded by another process; wait for it" in last and "Traceback" not in run.stderr
    assert snapshot(folder) == before
    assert main(arguments)["recorded_now"] == 1


def test_what_killed_runs_left_half_written_is_removed(folder, records, record_arguments, snapshot) -> None:
    before = snapshot(folder)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    alive = folder / f".window-00002.safetensors.{os.getppid()}.tmp"
    for name in (f".window-00001.safetensors.{ended.pid}.tmp", alive.name, f".manifest.json.{ended.pid}.tmp"):
        (folder / name).write_bytes(b"half")
    main([*record_arguments, "--output", str(folder)])
    assert snapshot(folder) == before | {alive.name: b"half"}


def test_growing_is_recorded_before_the_windows_are(folder, records) -> None:
    """An interrupted growth shows as missing windows, not as a smaller recording."""
    grown = Records.create(folder, replace(records.manifest, windows=6))
    assert Records.open(folder).manifest.windows == grown.manifest.windows == 6
    with pytest.raises(UserError, match="window-00004.safetensors' is missing"):
        grown.read_layer(0, "key")


def test_fingerprints_ignore_weights_and_see_rope(make_model) -> None:
    one, other = make_model("llama").config, make_model("llama").config
    assert Fingerprint.of(one) == Fingerprint.of(other)
    other.rope_parameters = dict(other.rope_parameters) | {"rope_theta": 500000.0}
    assert "rope" in Fingerprint.of(one).difference(Fingerprint.of(other))
    assert Fingerprint.of(one).difference(Fingerprint.of(one)) == ""


def test_windows_of_moments_only_are_recorded_again_when_their_activations_are_wanted(
    record_arguments, records, tmp_path
) -> None:
    output = ["--output", str(tmp_path / "moments")]
    fewer = [*record_arguments, *output, "--windows", "2", "--moment-windows", "4"]
    assert main(fewer)["recorded_now"] == 4
    opened = Records.open(tmp_path / "moments")
    assert (opened.manifest.windows, opened.manifest.moment_windows) == (2, 4)
    torch.testing.assert_close(opened.read_moment(1, "value"), records.read_moment(1, "value"))
    assert opened.path(3).stat().st_size < opened.path(1).stat().st_size / 2
    assert main([*record_arguments, *output])["recorded_now"] == 2
    assert torch.equal(Records.open(tmp_path / "moments").read_layer(0, "key")[0], records.read_layer(0, "key")[0])


def test_fewer_windows_have_fewer_moments(records) -> None:
    two = records.first(2)
    by_hand = sum(two.read_tensor(window, 0, "key", "moment").double() for window in range(2)) / (2 * 64)
    torch.testing.assert_close(two.read_moment(0, "key"), by_hand)
    assert not torch.allclose(two.read_moment(0, "key"), records.read_moment(0, "key"))
