"""Files of statistics: what is written is read; what is damaged, foreign or of another version is refused."""

from pathlib import Path

import pytest
import safetensors.torch
import torch

import pcafast
from pcafast import ChannelMoments, Covariance, FeatureMapRank, PatchCovariance, Taylor
from pcafast.files import write_atomically


@pytest.fixture
def statistics():
    covariance, taylor = Covariance(correction=1, groups=2), Taylor(reduction="signed", tap="norm")
    rank, empty = FeatureMapRank(rtol=1e-3), ChannelMoments()
    x = torch.randn(3, 4, 5, 5)
    covariance.update(x)
    taylor.update(x, x)
    rank.update(x)
    patches = PatchCovariance(kernel_size=(3, 2), padding=((1, 0), (2, 1)), stride=2, padding_mode="circular")
    patches.update(x)
    return {"a": {"layer.1": covariance, "b/c": taylor}, "a/b": {"c": rank, "": empty, "p": patches}}


def test_round_trip(statistics, tmp_path):
    pcafast.save_statistics(statistics, tmp_path / "new" / "s.safetensors")
    loaded = pcafast.load_statistics(tmp_path / "new" / "s.safetensors")
    assert {name: list(layers) for name, layers in loaded.items()} == {"a": ["layer.1", "b/c"], "a/b": ["c", "", "p"]}
    for name, layers in statistics.items():
        for layer, one in layers.items():
            other = loaded[name][layer]
            assert other == one
            assert other.layer == layer
            assert other.state_dict().keys() == one.state_dict().keys()
            assert all(torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items())


def test_a_killed_write_leaves_the_old_file(statistics, tmp_path, monkeypatch):
    path = tmp_path / "s.safetensors"
    pcafast.save_statistics(statistics, path)
    before = path.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(pcafast.FileError, match=r"cannot write .*s\.safetensors: No space left on device"):
        pcafast.save_statistics({"a": {}}, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_renaming_that_fails_is_told(tmp_path, monkeypatch):
    first, second, rename = tmp_path / "first", tmp_path / "second", Path.replace

    def fails_for_second(self, target):
        if target == second:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", fails_for_second)
    with pytest.raises(pcafast.FileError, match=r"Input/output error. Only .*first had been written anew"):
        write_atomically({path: lambda temporary: temporary.write_text("new") for path in (first, second)})
    assert first.read_text() == "new"
    assert list(tmp_path.iterdir()) == [first]


@pytest.mark.parametrize("length", [0, 4, 40, 1000])
def test_a_truncated_file_is_refused(statistics, tmp_path, length):
    path = tmp_path / "s.safetensors"
    pcafast.save_statistics(statistics, path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(pcafast.FileError, match=r"cannot read statistics from .*s\.safetensors"):
        pcafast.load_statistics(path)


def test_an_absent_file_is_an_error(tmp_path):
    with pytest.raises(pcafast.FileError, match=r"cannot read statistics from .*none\.safetensors"):
        pcafast.load_statistics(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (None, "is not a file of pcafast statistics"),
        ({"format": "pcafast statistics", "version": "99", "index": "[]"}, "version 99 and this pcafast reads"),
        ({"format": "pcafast statistics", "version": "1"}, "is damaged"),
        ({"format": "pcafast statistics", "version": "1", "index": '[["a", "b", "Spam", {}]]'}, "is damaged"),
        (
            {"format": "pcafast statistics", "version": "1", "index": '[["a", "b", "Taylor", {"x": 1}]]'},
            "is damaged",
        ),
        (
            {"format": "pcafast statistics", "version": "1", "index": '[["a", "b", "Taylor", {}]]'},
            r"is damaged: state: expected \['examples', 'positions', 'skipped', 'sums'\], got \['sums'\]",
        ),
    ],
)
def test_a_foreign_file_is_refused(header, message, tmp_path):
    path = tmp_path / "s.safetensors"
    path.write_bytes(safetensors.torch.save({"0/sums": torch.zeros(4, 3)}, header))
    with pytest.raises(pcafast.FileError, match=message):
        pcafast.load_statistics(path)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"sums": torch.zeros(4, 3)}, "state: expected"),
        ({"mean": torch.zeros(3), "count": torch.zeros(())}, "state: expected"),
        (
            {
                "count": torch.zeros((), dtype=torch.float64),
                "mean": torch.zeros(3, dtype=torch.float64),
                "comoment": torch.zeros(1, 3, 4, dtype=torch.float64),
                "skipped": torch.zeros((), dtype=torch.int64),
            },
            "state 'comoment': expected torch.float64",
        ),
    ],
)
def test_a_state_that_does_not_fit_is_refused(state, message):
    with pytest.raises(pcafast.ArgumentError, match=message):
        Covariance().load_state_dict(state)


def test_statistics_of_other_settings_or_channels_do_not_merge():
    one, other = Covariance(), Covariance()
    one.update(torch.randn(2, 3))
    other.update(torch.randn(2, 4))
    with pytest.raises(pcafast.ArgumentError, match=r"expected a Covariance\(.*to merge, got Taylor"):
        one.merge(Taylor())
    with pytest.raises(pcafast.ArgumentError, match="to merge, got Covariance"):
        one.merge(Covariance(correction=1))
    with pytest.raises(pcafast.ArgumentError, match="expected 3 channels as before, got 4"):
        one.merge(other)
    with pytest.raises(pcafast.ArgumentError, match="expected 3 channels as before, got 5"):
        one.update(torch.randn(2, 5))
