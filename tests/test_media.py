"""Frames from all forms, files of all forms, and nothing left behind when writing fails."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from patchkit import media
from patchkit.errors import InvalidOption, MissingDependency


@pytest.fixture
def clip():
    return torch.rand((5, 3, 16, 24), generator=torch.Generator().manual_seed(0))


def test_as_tensor_takes_all_forms(clip):
    array = clip.permute(0, 2, 3, 1).numpy()
    images = [Image.fromarray((f * 255).round().astype(np.uint8)) for f in array]
    for form in (clip, array, list(clip), list(array)):
        assert torch.equal(media.as_tensor(form), clip)
    assert (media.as_tensor(images) - clip).abs().max() < 0.003
    assert (media.as_tensor((clip * 255).round().to(torch.uint8)) - clip).abs().max() < 0.003
    assert media.as_tensor(images[0]).shape == (1, 3, 16, 24)
    assert media.as_tensor(images[0].convert("L")).shape == (1, 3, 16, 24)


@pytest.mark.parametrize("bad", [torch.zeros(4), torch.zeros(2, 5, 8, 8), np.zeros((4, 4)), []])
def test_as_tensor_refuses(bad):
    with pytest.raises(InvalidOption):
        media.as_tensor(bad)


def test_enlarge_repeats_pixels(clip):
    big = media.enlarge(clip, 3)
    assert big.shape == (5, 3, 48, 72)
    assert torch.equal(big[..., ::3, ::3], clip)
    assert torch.equal(big[..., 2::3, 1::3], clip)
    assert media.enlarge(torch.zeros(1, 3, 64, 64)).shape[-2:] == (256, 256)
    assert media.enlarge(torch.zeros(1, 3, 480, 720)).shape[-2:] == (480, 720)
    with pytest.raises(InvalidOption):
        media.enlarge(clip, 0)


def test_mp4_keeps_frames_and_pixels(clip, tmp_path):
    imageio = pytest.importorskip("imageio.v2")
    smooth = torch.nn.functional.interpolate(clip[:, :, :2, :3], size=(15, 25), mode="bilinear")  # odd sides
    path = media.save(smooth, tmp_path / "new" / "a.mp4", fps=4, scale=3)
    with imageio.get_reader(path) as reader:
        back = media.as_tensor([np.asarray(f) for f in reader])
        assert reader.get_meta_data()["fps"] == pytest.approx(4)
    assert back.shape == (5, 3, 46, 76)
    assert (back[..., :45, :75] - media.enlarge(smooth, 3)).abs().mean() < 0.03
    assert [p.name for p in path.parent.iterdir()] == ["a.mp4"]


def test_gif_png_and_folder(clip, tmp_path):
    with Image.open(media.save(clip, tmp_path / "a.gif", fps=5, scale=1)) as gif:
        assert gif.n_frames == 5
        assert gif.info["duration"] == 200
    one = media.save(clip[:1], tmp_path / "one.png", scale=1)
    with Image.open(one) as image:
        assert (media.as_tensor(image) - clip[:1]).abs().max() < 0.003
    with Image.open(media.save(clip, tmp_path / "sheet.png", scale=1)) as sheet:
        assert sheet.size == (5 * 24 + 4 * 4, 16)
    folder = media.save(clip, tmp_path / "frames")
    assert sorted(p.name for p in folder.iterdir()) == [f"{i:04d}.png" for i in range(5)]
    with pytest.raises(InvalidOption, match="avi"):
        media.save(clip, tmp_path / "a.avi")


def test_side_by_side_and_contact_sheet_show_both(clip):
    both = media.side_by_side({"dense": clip, "patched": clip[:3]}, scale=4)
    assert both.shape == (5, 3, 64 + 22, 2 * 96 + 4)
    assert torch.equal(both[:, :, 22:, :96], media.enlarge(clip, 4))
    assert torch.equal(both[4, :, 22:, 100:], media.enlarge(clip[2], 4))  # the shorter one waits
    assert both[0, :, :22].min() < 0.5  # there is a label
    sheet = media.contact_sheet({"a": clip, "b": clip[:2]}, columns=3, scale=2)
    assert sheet.shape == (3, 2 * (22 + 32) + 4, 3 * 48 + 2 * 4)
    with pytest.raises(InvalidOption):
        media.side_by_side({"a": clip, "b": clip[..., :8]})


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(error, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), media.replacing(path) as part:  # noqa: PT012
        part.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_interrupted_mp4_leaves_nothing(clip, tmp_path, monkeypatch):
    writer = pytest.importorskip("imageio.plugins.ffmpeg").FfmpegFormat.Writer

    def interrupt(self, im, meta):
        raise KeyboardInterrupt

    monkeypatch.setattr(writer, "_append_data", interrupt)
    with pytest.raises(KeyboardInterrupt):
        media.save(clip, tmp_path / "a.mp4")
    assert list(tmp_path.iterdir()) == []


def test_missing_ffmpeg_names_the_extra(clip, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(MissingDependency, match=r"patchkit\[video\]"):
        media.save(clip, tmp_path / "a.mp4")
    assert list(tmp_path.iterdir()) == []


def test_bad_fps(clip, tmp_path):
    for name in ("a.mp4", "a.gif"):
        with pytest.raises(InvalidOption, match="fps"):
            media.save(clip, tmp_path / name, fps=0)
