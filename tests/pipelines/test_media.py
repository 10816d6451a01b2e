"""Clips on disk, whole or not at all."""

import imageio.v2 as imageio
import numpy as np
import pytest
import torch

from dit_accel import InputError
from dit_accel.pipelines import media


def read(path):
    # a reader of ffmpeg's says that it is infinitely long: list() believes it
    with imageio.get_reader(path) as reader:
        return [frame for frame in reader]  # noqa: C416


@pytest.fixture
def clip():
    """A bright square that moves over a dark ground."""
    frames = torch.full((6, 3, 32, 48), 0.1)
    for i in range(6):
        frames[i, :, 8:24, 4 + 4 * i : 20 + 4 * i] = 0.9
    return frames


@pytest.mark.parametrize(("name", "tolerance"), [("c.mp4", 16), ("c.gif", 8), ("folder", 0)])
def test_what_is_written_can_be_read(tmp_path, clip, name, tolerance):
    path = tmp_path / name
    media.write_clip(clip, path, fps=8)
    if path.is_dir():
        assert sorted(p.name for p in path.iterdir()) == [f"{i:04d}.png" for i in range(6)]
        frames = [imageio.imread(p) for p in sorted(path.iterdir())]
    else:
        frames = read(path)
    wanted = (clip * 255).round().byte().permute(0, 2, 3, 1).numpy()
    got = np.stack([frame[..., :3] for frame in frames])
    assert got.shape == wanted.shape
    # coding may blur the square's edge, not its place
    assert np.median(np.abs(got.astype(int) - wanted)) <= tolerance
    assert np.abs(got.astype(int) - wanted).mean() <= tolerance
    assert [p.name for p in tmp_path.iterdir()] == [name], "nothing else is left"


def test_odd_sizes_can_be_coded(tmp_path):
    media.write_clip(torch.rand(3, 3, 31, 47), tmp_path / "odd.mp4", fps=8)
    assert len(read(tmp_path / "odd.mp4")) == 3


def test_the_rate_is_kept(tmp_path, clip):
    media.write_clip(clip, tmp_path / "c.mp4", fps=12)
    assert imageio.get_reader(tmp_path / "c.mp4").get_meta_data()["fps"] == 12


@pytest.mark.parametrize("name", ["c.mp4", "folder"])
def test_a_failure_leaves_what_was_there(tmp_path, clip, name, monkeypatch):
    path = tmp_path / name
    media.write_clip(clip, path, fps=8)
    before = path.read_bytes() if path.is_file() else sorted(path.iterdir())

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(media, "_write_mp4", fail)
    monkeypatch.setattr(media.imageio, "imwrite", fail)
    with pytest.raises(OSError, match="no space left"):
        media.write_clip(clip.flip(0), path, fps=8)
    assert before == (path.read_bytes() if path.is_file() else sorted(path.iterdir()))
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["c.gif", "folder"])
def test_a_replacement_is_whole(tmp_path, clip, name):
    media.write_clip(clip, tmp_path / name, fps=8)
    media.write_clip(clip[:2], tmp_path / name, fps=8)
    path = tmp_path / name
    assert len(list(path.iterdir()) if path.is_dir() else read(path)) == 2


def test_names_and_places(tmp_path):
    assert [media.kind_of(tmp_path / n) for n in ("a.MP4", "b.gif", "c")] == ["mp4", "gif", "png"]
    with pytest.raises(InputError, match=r"expected \.mp4, \.gif, a folder of png .* got 'a.avi'"):
        media.kind_of(tmp_path / "a.avi")
    media.check_writable(tmp_path / "new.mp4", force=False)
    (tmp_path / "old.mp4").touch()
    media.check_writable(tmp_path / "old.mp4", force=True)
    with pytest.raises(InputError, match=r"expected a new name \(or --force\)"):
        media.check_writable(tmp_path / "old.mp4", force=False)
    with pytest.raises(InputError, match="expected an existing folder"):
        media.check_writable(tmp_path / "no" / "new.mp4", force=False)
    with pytest.raises(InputError, match="expected a folder that can be written to"):
        media.check_writable(tmp_path.__class__("/proc/new.mp4"), force=False)
    with pytest.raises(InputError, match=r"expected \[T, 3, H, W\]"):
        media.write_clip(torch.zeros(3, 4, 4), tmp_path / "x.mp4", 8)
