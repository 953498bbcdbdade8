"""Sources of images: order, content, damage, and memory."""

from __future__ import annotations

import io
import json
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastgen.errors import FastgenError
from fastgen.evaluation.fid.npz import NpzSource, holds_statistics, read_statistics, write_statistics
from fastgen.evaluation.fid.readers import CallbackSource, FolderSource, TarSource, ZipSource, open_images
from fastgen.evaluation.fid.statistics import Gaussian

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 6, 8, 3), dtype=np.uint8)
NAMES = ["a.png", "b/2.png", "b/10.png", "c.PNG", "d.png"]
ORDER = [0, 2, 1, 3, 4]  # by the alphabet: b/10 before b/2


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def folder(path: Path, captions: bool = False) -> Path:
    for name, image in zip(NAMES, IMAGES, strict=True):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(png(image))
        if captions:
            (path / name).with_suffix(".txt").write_text(f"caption of {name}\n")
    (path / "notes.md").write_text("none")
    (path / ".hidden.png").write_bytes(b"")
    (path / ".cache").mkdir()
    (path / ".cache" / "x.png").write_bytes(b"")
    return path


def zipped(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, image in zip(reversed(NAMES), IMAGES[::-1], strict=True):
            archive.writestr(name, png(image))
        archive.writestr("__MACOSX/a.png", b"")
        archive.writestr("notes.md", "none")
    return path


def tarred(path: Path, names: list[str], images: np.ndarray, sidecar: str = "txt") -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as archive:

        def add(name: str, data: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))

        for name, image in zip(names, images, strict=True):
            add(name, png(image))
            text = f"caption of {name}"
            add(name[:-4] + "." + sidecar, (json.dumps({"caption": text}) if sidecar == "json" else text).encode())
    return path


def content(source) -> np.ndarray:
    return np.stack([source.read(i) for i in range(len(source))])


# --- order and content -------------------------------------------------------------------------------------------


def test_a_folder_is_read_by_the_alphabet(tmp_path: Path) -> None:
    source = open_images(folder(tmp_path / "x"))
    assert isinstance(source, FolderSource)
    assert [source.files[i] for i in range(5)] == [NAMES[i] for i in ORDER]
    np.testing.assert_array_equal(content(source), IMAGES[ORDER])
    assert source.prompts is None
    assert source.label(1).endswith("x/b/10.png")


def test_captions_next_to_images_are_prompts(tmp_path: Path) -> None:
    source = FolderSource(folder(tmp_path / "x", captions=True))
    assert source.prompts == [f"caption of {NAMES[i]}" for i in ORDER]
    (tmp_path / "x" / "d.txt").unlink()
    assert FolderSource(tmp_path / "x").prompts is None  # one is missing


def test_the_layout_of_geneval_gives_its_samples_and_prompts(tmp_path: Path) -> None:
    for prompt in (0, 1, 10):
        home = tmp_path / f"{prompt:05d}"
        (home / "samples").mkdir(parents=True)
        (home / "metadata.jsonl").write_text(json.dumps({"prompt": f"prompt {prompt}"}))
        for image in (0, 1):
            (home / "samples" / f"{image:04d}.png").write_bytes(png(IMAGES[image]))
        (home / "grid.png").write_bytes(png(IMAGES[4]))
    source = open_images(tmp_path)
    np.testing.assert_array_equal(content(source), IMAGES[[0, 1] * 3])
    assert source.prompts == ["prompt 0"] * 2 + ["prompt 1"] * 2 + ["prompt 10"] * 2
    (tmp_path / "00001" / "metadata.jsonl").write_text("{")
    assert len(open_images(tmp_path)) == 6 and open_images(tmp_path).prompts is None


def test_a_zip_file(tmp_path: Path) -> None:
    source = open_images(zipped(tmp_path / "x.zip"))
    assert isinstance(source, ZipSource)
    np.testing.assert_array_equal(content(source), IMAGES[ORDER])
    assert source.digest() == FolderSource(folder(tmp_path / "f")).digest()  # the same names and bytes


@pytest.mark.parametrize(("name", "sidecar"), [("x.tar", "txt"), ("x.tgz", "json")])
def test_a_webdataset(tmp_path: Path, name: str, sidecar: str) -> None:
    source = open_images(tarred(tmp_path / name, NAMES[:3], IMAGES[:3], sidecar))
    np.testing.assert_array_equal(content(source), IMAGES[:3])  # in the order of its members
    np.testing.assert_array_equal(source.read(0), IMAGES[0])  # and back
    assert source.prompts == [f"caption of {name}" for name in NAMES[:3]]


def test_a_folder_of_shards(tmp_path: Path) -> None:
    tarred(tmp_path / "0.tar", NAMES[:3], IMAGES[:3])
    tarred(tmp_path / "1.tar", NAMES[3:], IMAGES[3:])
    source = open_images(tmp_path)
    assert isinstance(source, TarSource) and source.name == str(tmp_path)
    np.testing.assert_array_equal(content(source), IMAGES)
    assert source.label(3).endswith("1.tar/c.PNG") and len(source.prompts or ()) == 5


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_in_any_order(tmp_path: Path, save) -> None:
    save(tmp_path / "x.npz", IMAGES)
    source = open_images(tmp_path / "x.npz")
    for index in (0, 3, 1, 4, 4, 2):
        np.testing.assert_array_equal(source.read(index), IMAGES[index])
    assert source.label(3).endswith("x.npz[3]")


def test_a_function(tmp_path: Path) -> None:
    source = CallbackSource(5, lambda i: IMAGES[i], identity="x", prompts=list("abcde"))
    np.testing.assert_array_equal(content(source), IMAGES)
    assert source.digest() != CallbackSource(5, lambda i: IMAGES[i], identity="y").digest() != source.digest(4)
    with pytest.raises(ValueError, match=r"generated\[0\]"):
        CallbackSource(1, lambda i: IMAGES[i].astype(float), identity="x").read(0)
    for bad in ({"count": 0}, {"prompts": ["a"]}):
        with pytest.raises(ValueError, match="count|prompts"):
            CallbackSource(**{"count": 5, "make": lambda i: IMAGES[i], "identity": "x", **bad})


def test_the_digest_is_of_names_order_and_bytes(tmp_path: Path) -> None:
    source = FolderSource(folder(tmp_path / "x"))
    first = source.digest()
    assert first == FolderSource(tmp_path / "x").digest() != source.digest(4)
    (tmp_path / "x" / "a.png").rename(tmp_path / "x" / "aa.png")
    renamed = FolderSource(tmp_path / "x").digest()
    (tmp_path / "x" / "d.png").write_bytes(png(255 - IMAGES[4]))
    assert len({first, renamed, FolderSource(tmp_path / "x").digest()}) == 3


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "CMYK"])
def test_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(IMAGES[0]).convert(mode)
    image.save(tmp_path / ("x.tif" if mode == "CMYK" else "x.png"))
    np.testing.assert_array_equal(open_images(tmp_path).read(0), np.asarray(image.convert("RGB")))


# --- damage ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"not a png", png(IMAGES[0])[:-30]])
def test_a_damaged_image_is_named(tmp_path: Path, data: bytes) -> None:
    folder(tmp_path / "x")
    (tmp_path / "x" / "b" / "2.png").write_bytes(data)
    with pytest.raises(FastgenError, match=r"x/b/2.png: not a readable image"):
        content(open_images(tmp_path / "x"))
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("y.png", data)
    with pytest.raises(FastgenError, match=r"x.zip/y.png: not a readable image"):
        open_images(tmp_path / "x.zip").read(0)


def test_deep_pixels_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "x.png")
    with pytest.raises(FastgenError, match="x.png: has more than 8 bits a channel .mode I"):
        open_images(tmp_path).read(0)


def test_a_source_without_images_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "prompts" / "00000" / "samples").mkdir(parents=True)
    (tmp_path / "prompts" / "00000" / "metadata.jsonl").write_text("{}")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as archive:
        archive.writestr("x.txt", "")
    tarred(tmp_path / "empty.tar", [], IMAGES[:0])
    for name in ("x.zip", "x.tar", "x.npz", "x.gif"):
        (tmp_path / name).write_bytes(b"nothing of the kind")
    for name, message in (
        ("none", "none: no such file or folder"),
        ("empty", "empty: has no image"),
        ("prompts", "its prompt folders have no image"),
        ("empty.zip", "empty.zip: has no image"),
        ("empty.tar", "empty.tar: has no image"),
        ("x.zip", "x.zip: not a readable zip file"),
        ("x.tar", "x.tar: not a readable tar file"),
        ("x.npz", "x.npz: not a readable npz file"),
        ("x.gif", "x.gif: needs a folder of images"),
    ):
        with pytest.raises(FastgenError, match=message):
            open_images(tmp_path / name)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": IMAGES.astype(np.float32)}, r"arr_0 is float32 \[5, 6, 8, 3\]; needs uint8"),
        ({"arr_0": IMAGES[0]}, r"arr_0 is uint8 \[6, 8, 3\]"),
        ({"arr_0": IMAGES.transpose(0, 3, 1, 2).copy()}, r"arr_0 is uint8 \[5, 3, 6, 8\]"),
        ({"arr_0": IMAGES[:0]}, r"arr_0 is uint8 \[0, 6, 8, 3\]"),
        ({"arr_0": np.asfortranarray(IMAGES)}, ".*Fortran order"),
        ({"x": IMAGES, "y": IMAGES}, "contains x, y; needs images as arr_0"),
    ],
)
def test_an_npz_of_another_kind_is_an_error(tmp_path: Path, arrays: dict, message: str) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(FastgenError, match="x.npz: " + message):
        open_images(tmp_path / "x.npz")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_that_is_cut_off_is_an_error(tmp_path: Path, save) -> None:
    save(tmp_path / "x.npz", IMAGES)
    raw = (tmp_path / "x.npz").read_bytes()
    (tmp_path / "x.npz").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(FastgenError, match="x.npz: not a readable npz file"):
        open_images(tmp_path / "x.npz")
    (tmp_path / "x.npz").write_bytes(raw[: len(raw) // 3] + raw[len(raw) // 3 + 200 :])
    with pytest.raises(FastgenError, match="x.npz"):
        content(open_images(tmp_path / "x.npz"))


# --- statistics --------------------------------------------------------------------------------------------------


def gaussian(dims: int, seed: int = 0) -> Gaussian:
    import torch

    rng = np.random.default_rng(seed)
    return Gaussian(torch.from_numpy(rng.normal(size=dims)), torch.from_numpy(np.cov(rng.normal(size=(dims, 50)))), 50)


def test_statistics_of_the_adm_evaluator(tmp_path: Path) -> None:
    pool, spatial = gaussian(4), gaussian(3, 1)
    np.savez(
        tmp_path / "ref.npz",
        arr_0=IMAGES,
        mu=pool.mean.numpy(),
        sigma=pool.covariance.numpy(),
        mu_s=spatial.mean.numpy(),
        sigma_s=spatial.covariance.numpy().astype(np.float32),
    )
    assert holds_statistics(tmp_path / "ref.npz")
    found = read_statistics(tmp_path / "ref.npz")
    assert found.protocol == "adm" and found.has_images and found.taps["pool"].count is None
    np.testing.assert_array_equal(found.taps["pool"].covariance, pool.covariance)
    assert found.taps["spatial"].dims == 3
    np.testing.assert_array_equal(content(NpzSource(tmp_path / "ref.npz")), IMAGES)


def test_statistics_are_written_and_read(tmp_path: Path) -> None:
    record = {"protocol": "clean-fid", "fingerprint": "x"}
    write_statistics(tmp_path / "ref.npz", {"pool": gaussian(4)}, record)
    found = read_statistics(tmp_path / "ref.npz")
    assert found.protocol == "clean-fid" and not found.has_images and found.record["fingerprint"] == "x"
    assert found.taps["pool"].count == 50
    np.testing.assert_array_equal(found.taps["pool"].mean, gaussian(4).mean)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mu": np.zeros(4, np.int64)}, r"mu is int64 \[4\]; needs floating"),
        ({"mu": np.zeros(5)}, "mu, sigma: .*have shapes"),
        ({"sigma": np.full((4, 4), np.nan)}, ".*NaN"),
        ({"mu": np.array([{}] * 4, dtype=object)}, "mu is object"),
    ],
)
def test_broken_statistics_are_an_error(tmp_path: Path, change: dict, message: str) -> None:
    np.savez(tmp_path / "ref.npz", **{"mu": np.zeros(4), "sigma": np.eye(4), **change})
    with pytest.raises(FastgenError, match="ref.npz: " + message):
        read_statistics(tmp_path / "ref.npz")


def test_statistics_of_an_unknown_protocol(tmp_path: Path) -> None:
    np.savez(tmp_path / "ref.npz", mu=np.zeros(4), sigma=np.eye(4))
    assert read_statistics(tmp_path / "ref.npz").protocol is None
    np.savez(tmp_path / "other.npz", x=np.zeros(4))
    assert not holds_statistics(tmp_path / "other.npz")
    with pytest.raises(FastgenError, match="other.npz: has no statistics"):
        read_statistics(tmp_path / "other.npz")


# --- memory ------------------------------------------------------------------------------------------------------


def sparse_npz(path: Path, count: int) -> None:
    """An npz of `count` black pictures with one bright pixel, of which the disk holds only the ends."""
    header = io.BytesIO()
    np.lib.format.write_array_header_2_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (count, 256, 256, 3)}
    )
    size = len(header.getvalue()) + count * 256 * 256 * 3
    name = b"arr_0.npy"
    # Sizes above 4 GiB are in the zip64 field of the local header and of the directory.
    extra = b"\x01\x00\x10\x00" + size.to_bytes(8, "little") * 2
    common = b"\x2d\x00\x00\x00\x00\x00\x00\x00\x21\x00\x00\x00\x00\x00" + b"\xff" * 8
    local = b"PK\x03\x04" + common + len(name).to_bytes(2, "little") + len(extra).to_bytes(2, "little") + name + extra
    with open(path, "wb") as file:
        file.write(local + header.getvalue())
        file.seek(len(local) + size - 256 * 256 * 3)
        file.write(b"\x07")
        file.seek(len(local) + size)
        directory = b"PK\x01\x02\x2d\x00" + common + len(name).to_bytes(2, "little")
        directory += len(extra).to_bytes(2, "little") + b"\x00" * 14 + name + extra
        end64 = b"PK\x06\x06" + (44).to_bytes(8, "little") + b"\x2d\x00\x2d\x00" + b"\x00" * 8
        end64 += (1).to_bytes(8, "little") * 2 + len(directory).to_bytes(8, "little")
        end64 += (len(local) + size).to_bytes(8, "little")
        locator = b"PK\x06\x07" + b"\x00" * 4 + (len(local) + size + len(directory)).to_bytes(8, "little")
        locator += (1).to_bytes(4, "little")
        end = b"PK\x05\x06" + b"\x00" * 4 + b"\xff" * 12 + b"\x00" * 2
        file.write(directory + end64 + locator + end)


def resident() -> int:
    """Bytes of memory of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's account of memory")
def test_a_big_npz_is_streamed(tmp_path: Path) -> None:
    """10 GB of pictures, as one sparse file: every 500th is read, with less than 100 MB of memory."""
    path = tmp_path / "big.npz"
    sparse_npz(path, 52_000)
    assert path.stat().st_size > 10 * 10**9
    before = resident()
    source, most = NpzSource(path), 0
    for index in range(0, len(source), 500):
        assert source.read(index).shape == (256, 256, 3)
        most = max(most, resident())
    assert source.read(len(source) - 1)[0, 0, 0] == 7
    assert most - before < 100e6


# --- archives that declare more than they should -------------------------------------------------------------------


def _forged(path: Path, name: str, size: int) -> Path:
    """A zip whose directory and local header declare another size of its only member."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, bytes(1 << 16))
    data = bytearray(path.read_bytes())
    data[22:26] = size.to_bytes(4, "little")
    place = data.index(b"PK\x01\x02") + 24
    data[place : place + 4] = size.to_bytes(4, "little")
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("size", [300 << 20, 0xFFFFFFFE])
def test_a_member_of_a_zip_is_not_read_when_it_declares_too_much(tmp_path: Path, size: int, monkeypatch) -> None:
    source = ZipSource(_forged(tmp_path / "x.zip", "a.png", size))
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda *_: pytest.fail("it was read"))
    with pytest.raises(FastgenError, match=f"x.zip/a.png: declares {size} bytes"):
        source.read(0)


def test_a_member_that_holds_more_than_it_declares_is_damaged(tmp_path: Path) -> None:
    with pytest.raises(FastgenError, match=r"x.zip/a.png: cannot be read"):
        ZipSource(_forged(tmp_path / "x.zip", "a.png", 100)).read(0)


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("name", ["a.png", "notes.txt"])
def test_a_member_of_a_tar_that_declares_too_much_is_not_skipped_over(tmp_path: Path, mode: str, name: str) -> None:
    path = tmp_path / ("x.tar" if mode == "w" else "x.tgz")
    with tarfile.open(path, mode) as archive:
        member = tarfile.TarInfo(name)
        member.size = 1 << 40
        archive.addfile(member)
    with pytest.raises(FastgenError, match=f"{path.name}/{name}: declares {1 << 40} bytes"):
        open_images(path)


@pytest.mark.parametrize(
    ("mu", "sigma", "message"),
    [
        ((20000,), (20000, 20000), "d from 1 to 4096"),  # 3.2 GB of zeros in a small file
        ((1 << 40,), (1 << 40, 1 << 40), "d from 1 to 4096"),
        ((0,), (0, 0), "d from 1 to 4096"),
        ((4, 4), (4, 4), r"shapes \[4, 4\] and \[4, 4\]"),
        ((4,), (5, 5), r"shapes \[4\] and \[5, 5\]"),
        ((4,), (4,), r"shapes \[4\] and \[4\]"),
        ((), (), r"shapes \[\] and \[\]"),
        ((1000,), (1000, 1000), "mu: declares 8000 bytes and has 0"),
    ],
)
def test_statistics_of_a_wrong_shape_are_refused_by_their_headers(
    tmp_path: Path, mu: tuple[int, ...], sigma: tuple[int, ...], message: str
) -> None:
    """The arrays are not there at all: reading them would fail otherwise."""
    with zipfile.ZipFile(tmp_path / "s.npz", "w") as archive:
        for name, shape in (("mu", mu), ("sigma", sigma)):
            buffer = io.BytesIO()
            np.lib.format.write_array_header_1_0(buffer, {"descr": "<f8", "fortran_order": False, "shape": shape})
            archive.writestr(f"{name}.npy", buffer.getvalue())
    with pytest.raises(FastgenError, match=f"s.npz: .*{message}") as error:
        read_statistics(tmp_path / "s.npz")
    assert "\n" not in str(error.value)


def test_an_npz_of_huge_images_is_refused_by_its_header(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "i.npz", "w") as archive:
        buffer = io.BytesIO()
        header = {"descr": "|u1", "fortran_order": False, "shape": (1, 1 << 17, 1 << 17, 3)}
        np.lib.format.write_array_header_1_0(buffer, header)
        archive.writestr("arr_0.npy", buffer.getvalue())
    with pytest.raises(FastgenError, match="i.npz: arr_0 has images of 131072 x 131072 pixels"):
        NpzSource(tmp_path / "i.npz")


def test_images_of_other_formats_are_named_when_they_are_skipped(tmp_path: Path, caplog) -> None:
    place = folder(tmp_path / "mixed")
    for name in ("x.gif", "y.PGM", "b/z.jxl", "readme.txt", ".h.gif"):
        (place / name).write_bytes(b"")
    assert len(FolderSource(place)) == 5
    assert "mixed: 3 images of other formats are skipped: b/z.jxl, x.gif, y.PGM" in caplog.text
    caplog.clear()
    with zipfile.ZipFile(tmp_path / "m.zip", "w") as archive:
        archive.writestr("a.png", png(IMAGES[0]))
        archive.writestr("b.gif", b"")
    assert (
        len(ZipSource(tmp_path / "m.zip")) == 1
        and "m.zip: 1 images of other formats are skipped: b.gif" in caplog.text
    )
    caplog.clear()
    with tarfile.open(tmp_path / "m.tar", "w") as archive:
        for name in ("a.png", "b.pgm"):
            member = tarfile.TarInfo(name)
            member.size = len(png(IMAGES[0]))
            archive.addfile(member, io.BytesIO(png(IMAGES[0])))
    assert len(open_images(tmp_path / "m.tar")) == 1 and "skipped: b.pgm" in caplog.text
