"""Files: written whole or not at all, read as data, and taken for nothing else than they are."""

import os
import pickle
import random
import sys
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from pqn_breakout import Args, BestModel, Checkpoint, UserError, load, save

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's files and signals")
NETWORK = {"w": torch.arange(99.0), "zeros": torch.zeros(9999)}
CONTENT = asdict(BestModel("BreakoutNoFrameskip-v4", NETWORK, global_step=1))


@pytest.fixture
def path(tmp_path):
    """A file with CONTENT."""
    save(tmp_path / "model.pth", CONTENT)
    return tmp_path / "model.pth"


def same(a, b):
    """Whether two contents of files are the same, bit for bit."""
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def is_refused(path):
    try:
        load(path, BestModel)
    except UserError as error:
        return path.name in str(error) and "\n" not in str(error)
    return False


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left"), SystemExit()])  # as if killed
def test_a_write_that_fails_or_is_killed_leaves_the_old_file(monkeypatch, path, function, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(os, function, fail)
    with pytest.raises((UserError, SystemExit)) as raised:
        save(path, CONTENT | {"global_step": 2})

    assert load(path, BestModel).global_step == 1
    assert os.listdir(path.parent) == [path.name]
    assert isinstance(error, SystemExit) or path.name in str(raised.value)


def test_a_file_gets_its_name_when_all_of_it_is_on_the_disk(monkeypatch, path):
    def fsync_and_look(file):
        fsync(file)
        on_disk.append(os.fstat(file).st_size)
        assert load(path, BestModel).global_step == 1

    on_disk = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", fsync_and_look)
    save(path, CONTENT | {"global_step": 2})

    assert load(path, BestModel).global_step == 2
    assert on_disk == [path.stat().st_size]


def test_a_flipped_bit_is_never_taken_for_content(path):
    whole = path.read_bytes()
    choose = random.Random(1)
    refused = 0
    for at in choose.sample(range(len(whole)), 300):
        flipped = bytes([whole[at] ^ 1 << choose.randrange(8)])
        path.write_bytes(whole[:at] + flipped + whole[at + 1 :])
        if is_refused(path):
            refused += 1
        else:  # it was in what nobody reads, as a time stamp
            assert same(asdict(load(path, BestModel)), CONTENT)

    assert refused > 100


def test_a_file_without_its_end_is_refused(path):
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 997), len(whole) - 1]:
        path.write_bytes(whole[:length])
        assert is_refused(path), length


class Trap:
    """Once unpickled, leaves a folder."""

    def __reduce__(self):
        return os.mkdir, ("sprung",)


TRAPS = [CONTENT | {"network": Trap()}, CONTENT | {"x": Trap()}]


@pytest.mark.parametrize("content", [torch.zeros(3), [1, 2], {"state_dict": {}}, {1: 2}, *TRAPS])
@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_something_else_are_refused_and_never_run(monkeypatch, path, content, zipped):
    monkeypatch.chdir(path.parent)
    torch.save(content, path, _use_new_zipfile_serialization=zipped)

    assert is_refused(path)
    assert not Path("sprung").exists()


def test_the_trap_works(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Trap()))
    assert Path("sprung").exists()


@pytest.mark.parametrize(
    "data",
    [b"", b"import os\n", b"\x89PNG\r\n\x1a\n" + bytes(256), bytes(5000), pickle.dumps(TRAPS)],
)
def test_what_is_no_file_of_pytorch_is_refused(path, data):
    path.write_bytes(data)
    assert is_refused(path)


def test_what_is_no_file_is_refused(tmp_path):
    assert is_refused(tmp_path)
    assert is_refused(tmp_path / "nothing.pth")


def test_a_model_is_no_checkpoint_and_is_told_apart(path):
    with pytest.raises(UserError, match="model.pth: no Checkpoint: .*args"):
        load(path, Checkpoint)


def test_a_checkpoint_is_no_model_and_is_told_apart(path):
    model = BestModel(**CONTENT)
    save(path, asdict(Checkpoint(Args(), 8, [1.0], NETWORK, 2, model)))
    assert load(path, Checkpoint).global_step == 8

    with pytest.raises(UserError, match="model.pth: no BestModel"):
        load(path, BestModel)


def test_a_model_of_an_older_release_is_read(path):
    older = {name: CONTENT[name] for name in ("env_id", "network", "global_step", "mean_return")}
    save(path, older)
    assert same(asdict(load(path, BestModel)), CONTENT)


@LINUX
def test_files_without_an_end_are_refused_before_they_are_read(tmp_path):
    os.mkfifo(tmp_path / "fifo")  # whoever reads it waits for ever
    assert is_refused(tmp_path / "fifo")
    assert is_refused(Path("/dev/zero"))


def test_a_file_that_inflates_is_refused_before_it_is_read(path, tmp_path):
    bomb = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path) as plain, zipfile.ZipFile(bomb, "w") as deflated:
        for entry in plain.infolist():
            deflated.writestr(entry.filename, plain.read(entry), zipfile.ZIP_DEFLATED)
    assert torch.load(bomb)["global_step"] == 1

    assert is_refused(bomb)
