"""The records folder: resume, kill and rerun, growth, several processes, and files that are not what they should be."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
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
from gradients.records import Manifest, Records, claimed
from gradients.rope import rope_tables

Snapshot = Callable[[Path], dict[str, bytes]]


@pytest.fixture
def folder(records: Records, tmp_path: Path) -> Path:
    """A copy of `records` to change."""
    return Path(shutil.copytree(records.folder, tmp_path / "records"))


def windows_of(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if name.startswith("window-")}


def environment() -> dict[str, str]:
    """The environment of a subprocess that computes as this process does."""
    return os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def test_the_files_hold_what_the_design_says(records: Records) -> None:
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


def test_manifest_json_round_trip(records: Records) -> None:
    content = json.loads(json.dumps(records.manifest.to_json()))
    assert Manifest.from_json(content) == records.manifest
    assert content["run"] == records.manifest.digest


def test_digest_is_of_what_decides_a_windows_content(records: Records) -> None:
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


def test_read_layer_joins_windows_in_order(records: Records) -> None:
    activation, fisher = records.read_layer(1, "value", skip_tokens=3)
    windows = [records.read(window, 1, "value") for window in range(4)]
    assert torch.equal(activation, torch.cat([a[3:] for a, _ in windows]))
    assert torch.equal(fisher, torch.cat([f[3:] for _, f in windows]))
    assert activation.shape == (4 * 62, 24)


def test_the_first_windows_are_those_of_a_smaller_recording(records: Records) -> None:
    few = records.first(2)
    assert (few.folder, few.manifest.windows, few.manifest.digest) == (records.folder, 2, records.manifest.digest)
    for kind in KINDS:
        for mine, whole in zip(few.read_layer(1, kind, 3), records.read_layer(1, kind, 3), strict=True):
            assert torch.equal(mine, whole[: 2 * 62])
    assert records.manifest.windows == 4
    assert records.first(None) == records.first(4) == records


def test_more_windows_than_there_are_are_refused(records: Records) -> None:
    with pytest.raises(UserError) as caught:
        records.first(5)
    assert "5 calibration windows" in str(caught.value) and str(records.folder) in str(caught.value)
    assert "hold 4; record more, or ask for fewer" in str(caught.value)


def test_rotary_tables_are_the_models(records: Records, llama: Any) -> None:
    cos, sin = records.read_rope()
    assert cos.shape == sin.shape == (65, 12)
    for stored, table in zip((cos, sin), rope_tables(llama, 65), strict=True):
        assert stored.dtype == torch.float32 and torch.equal(stored, table)


def test_rotary_tables_are_written_alike(records: Records, folder: Path) -> None:
    written = (folder / "rope.safetensors").read_bytes()
    Records.open(folder).write_rope(*(table.T.contiguous().T for table in records.read_rope()))
    assert (folder / "rope.safetensors").read_bytes() == written


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "without a table", "altered"])
def test_rotary_tables_that_cannot_be_read_are_refused_and_come_back(
    damage: str, folder: Path, record_arguments: list[str], snapshot: Snapshot
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


def test_a_rerun_leaves_complete_windows_alone(folder: Path, record_arguments: list[str], snapshot: Snapshot) -> None:
    before = snapshot(folder)
    times = {path.name: path.stat().st_mtime_ns for path in folder.glob("window-*")}
    result = main([*record_arguments, "--output", str(folder)])
    assert result["recorded_now"] == 0
    assert snapshot(folder) == before
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("window-*")} == times


@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "of another run"])
def test_a_rerun_replaces_incomplete_windows_only(
    damage: str, folder: Path, record_arguments: list[str], records: Records, snapshot: Snapshot
) -> None:
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


def test_more_windows_keep_the_earlier_ones(
    folder: Path, record_arguments: list[str], records: Records, snapshot: Snapshot, tmp_path: Path
) -> None:
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


def test_kill_and_rerun_gives_the_same_bytes(record_arguments: list[str], tmp_path: Path, snapshot: Snapshot) -> None:
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
def test_another_runs_folder_is_refused(
    change: list[str], fragment: str, folder: Path, record_arguments: list[str], snapshot: Snapshot
) -> None:
    before = snapshot(folder)
    with pytest.raises(UserError) as caught:
        main([*record_arguments, "--output", str(folder), *change])
    assert str(folder) in str(caught.value)
    assert fragment in str(caught.value)
    assert "give another --output or delete the folder" in str(caught.value)
    assert snapshot(folder) == before


def test_another_models_folder_is_refused(
    folder: Path,
    record_arguments: list[str],
    make_model: Callable[[str], Any],
    save_model: Callable[[Any, Path], Path],
    snapshot: Snapshot,
    tmp_path: Path,
) -> None:
    other = save_model(make_model("qwen2"), tmp_path / "tiny-qwen2")
    before = snapshot(folder)
    with pytest.raises(UserError, match="belongs to another run .*architecture 'llama' against 'qwen2'"):
        main([*record_arguments, "--model", str(other), "--output", str(folder)])
    assert snapshot(folder) == before


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_window_is_noticed(keep: int, folder: Path, records: Records) -> None:
    opened = Records.open(folder)
    opened.path(3).write_bytes(records.path(3).read_bytes()[:keep])
    assert [opened.is_complete(window) for window in range(4)] == [True, True, True, False]
    with pytest.raises(UserError) as caught:
        opened.read(3, 0, "key")
    assert "window-00003.safetensors' is not a complete safetensors file" in str(caught.value)
    assert f"delete it and run `python -m gradients --output {folder}` again" in str(caught.value)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["activation", "fisher"])
def test_one_flipped_bit_is_noticed(what: str, kind: str, layer: int, folder: Path) -> None:
    opened = Records.open(folder)
    name = f"layers.{layer}.{kind}.{what}"
    content = bytearray(opened.path(1).read_bytes())
    header = int.from_bytes(content[:8], "little")
    start, end = json.loads(content[8 : 8 + header])[name]["data_offsets"]
    content[8 + header + (start + end) // 2] ^= 1
    opened.path(1).write_bytes(content)
    with pytest.raises(
        UserError, match=rf"window-00001.safetensors' was altered .*tensor {name} is another; delete it and run"
    ):
        opened.read_layer(layer, kind)
    other = "value" if kind == "key" else "key"
    opened.read_layer(layer, other)


def test_a_window_in_anothers_place_is_noticed(folder: Path) -> None:
    opened = Records.open(folder)
    shutil.copy(opened.path(0), opened.path(1))
    with pytest.raises(UserError, match="window-00001.safetensors' belongs to another run or window"):
        opened.read(1, 0, "key")


def test_a_window_of_another_run_is_noticed(folder: Path) -> None:
    opened = Records.open(folder)
    foreign = Records(folder, replace(opened.manifest, seed=1))
    assert not foreign.is_complete(0)
    with pytest.raises(UserError, match="window-00000.safetensors' belongs to another run"):
        foreign.read(0, 0, "key")


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
def test_a_manifest_of_another_form_is_refused(content: str, fragment: str, folder: Path) -> None:
    (folder / "manifest.json").write_text(content)
    with pytest.raises(UserError) as caught:
        Records.open(folder)
    assert fragment in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no manifest.json .*run `python -m gradients --output .*none` first"):
        Records.open(tmp_path / "none")


def test_a_full_disk_loses_nothing(
    record_arguments: list[str], records: Records, snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
        with pytest.raises(UserError, match=r"cannot write .*window-00002.safetensors: .*No space left"):
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


def test_a_folder_without_digests_is_read_with_a_note_and_not_mixed(
    folder: Path, records: Records, record_arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
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


def test_a_folder_of_other_weights_is_refused(folder: Path, records: Records, snapshot: Snapshot) -> None:
    before = snapshot(folder)
    assert len(records.manifest.weights) == 16
    with pytest.raises(UserError, match=f"other weights: digest {records.manifest.weights} there, 0123 of the model"):
        Records.create(folder, replace(records.manifest, weights="0123"))
    assert snapshot(folder) == before


@pytest.mark.parametrize(
    "change",
    [
        {"windows": "4"},
        {"windows": 3},
        {"windows": 10**9},
        {"text": "another.txt"},
        {"model": "another"},
        {"versions": {"torch": "1.0"}},
        {"weights": "0" * 16},
        {"bos": True},
    ],
    ids=str,
)
def test_an_altered_manifest_is_refused(change: dict[str, Any], folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match="manifest.json' is damaged"):
        Records.open(folder)


def test_windows_of_an_old_manifest_are_not_made_room_for_before_they_are_there(folder: Path) -> None:
    as_schema_1(folder)
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"windows": 99_999}))
    with pytest.raises(UserError, match="window-00004.safetensors' is missing"):
        Records.open(folder).read_layer(0, "key")
    for windows in ("4", 10**9, 0, True):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"windows": windows}))
        with pytest.raises(UserError, match="manifest.json' is damaged"):
            Records.open(folder)


@pytest.mark.parametrize("change", ["dtypes", "shapes", "no metadata", "no checksums", "names"])
def test_a_window_with_another_header_is_refused_and_recorded_again(
    change: str, folder: Path, record_arguments: list[str], snapshot: Snapshot
) -> None:
    before, path = snapshot(folder), folder / "window-00001.safetensors"
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    if change == "dtypes":  # both are of two bytes
        header |= {name: entry | {"dtype": "F16"} for name, entry in header.items() if name.endswith("fisher")}
    elif change == "shapes":
        header |= {name: entry | {"shape": [24, 65]} for name, entry in header.items() if name != "__metadata__"}
    elif change == "names":
        one, other = "layers.0.key.fisher", "layers.1.key.fisher"
        header[one], header[other] = header[other], header[one]
    elif change == "no metadata":
        del header["__metadata__"]
    else:
        header["__metadata__"]["kvquant"] = "{}"
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + content[8 + size :])
    with pytest.raises(UserError, match="window-00001.safetensors' .*delete it and run"):
        Records.open(folder).read(1, 0, "key")
    again = main([*record_arguments, "--output", str(folder)])
    if change == "names":  # known only once the bytes are read
        path.unlink()
        again = main([*record_arguments, "--output", str(folder)])
    assert again["recorded_now"] == 1
    assert snapshot(folder) == before


def test_two_commands_at_once_say_so(folder: Path, record_arguments: list[str], snapshot: Snapshot) -> None:
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
    assert run.returncode == 2 and "is being recorded by another process; wait for it" in run.stderr
    assert snapshot(folder) == before
    assert main(arguments)["recorded_now"] == 1


def test_what_killed_runs_left_half_written_is_removed(
    folder: Path, records: Records, record_arguments: list[str], snapshot: Snapshot
) -> None:
    before = snapshot(folder)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    alive = folder / f".window-00002.safetensors.{os.getppid()}.tmp"
    for name in (f".window-00001.safetensors.{ended.pid}.tmp", alive.name, f".manifest.json.{ended.pid}.tmp"):
        (folder / name).write_bytes(b"half")
    main([*record_arguments, "--output", str(folder)])
    assert snapshot(folder) == before | {alive.name: b"half"}


def test_growing_is_recorded_before_the_windows_are(folder: Path, records: Records) -> None:
    """An interrupted growth shows as missing windows, not as a smaller recording."""
    grown = Records.create(folder, replace(records.manifest, windows=6))
    assert Records.open(folder).manifest.windows == grown.manifest.windows == 6
    with pytest.raises(UserError, match="window-00004.safetensors' is missing"):
        grown.read_layer(0, "key")


def test_fingerprints_ignore_weights_and_see_rope(make_model: Callable[[str], Any]) -> None:
    one, other = make_model("llama").config, make_model("llama").config
    assert Fingerprint.of(one) == Fingerprint.of(other)
    other.rope_parameters = dict(other.rope_parameters) | {"rope_theta": 500000.0}
    assert "rope" in Fingerprint.of(one).difference(Fingerprint.of(other))
    assert Fingerprint.of(one).difference(Fingerprint.of(one)) == ""


def test_windows_of_moments_only_are_recorded_again_when_their_activations_are_wanted(
    record_arguments: list[str], records: Records, tmp_path: Path
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


def test_fewer_windows_have_fewer_moments(records: Records) -> None:
    two = records.first(2)
    by_hand = sum(two.read_tensor(window, 0, "key", "moment").double() for window in range(2)) / (2 * 64)
    torch.testing.assert_close(two.read_moment(0, "key"), by_hand)
    assert not torch.allclose(two.read_moment(0, "key"), records.read_moment(0, "key"))
