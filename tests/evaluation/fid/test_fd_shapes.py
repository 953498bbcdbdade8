"""FD-shapes: closed forms, an independent float64 oracle, guards and the reference cache."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_fakes import FakeModel

from fastgen.data.shapes import ShapesWorld
from fastgen.errors import FastgenError
from fastgen.evaluation.fid.fd_shapes import FDResult, FDShapes, render_reference
from fastgen.evaluation.fid.readers import CallbackSource
from fastgen.evaluation.fid.statistics import Moments
from fastgen.io import user_cache_dir


def oracle(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance of two feature sets [n, d] in float64, by eigenvalues of sqrt(S1) S2 sqrt(S1)."""
    m1, m2 = a.mean(0), b.mean(0)
    s1, s2 = np.cov(a.T), np.cov(b.T)
    values, vectors = np.linalg.eigh(s1)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ s2 @ root), 0, None)).sum()
    return float(((m1 - m2) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * cross)


class Numbers(FakeModel):
    """A network whose features are written in the pixels: exact control over both distributions."""

    dims = 4

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, 0, : self.dims, 0].float()


def pictures(values: np.ndarray) -> list[np.ndarray]:
    """Pictures [64, 64, 3] whose features in `Numbers` are `values` [n, 4], rounded to 0 .. 255."""
    images = np.zeros((len(values), 64, 64, 3), np.uint8)
    images[:, 0, : values.shape[1], 0] = np.clip(np.rint(values), 0, 255)
    return list(images)


class FixedReference(FDShapes):
    """A distance to a given set of pictures instead of renders, taken in parts."""

    def __init__(self, *parts: list[np.ndarray], model: FakeModel | None = None) -> None:
        super().__init__(model or Numbers(), cache_dir="/nonexistent/never-written")
        moments = Moments(self.dims)
        for part in parts:
            moments.update(self.extractor(torch.from_numpy(np.stack(part)))["pool"])
        self._gaussian = moments.gaussian()


def distance(fd: FDShapes, images: list[np.ndarray], allow_small: bool = False) -> FDResult:
    """From pictures in memory."""
    source = CallbackSource(len(images), lambda index: images[index], identity="given", name="images")
    return fd.measure(source, allow_small=allow_small)[0]


def test_identical_sets_have_no_distance() -> None:
    images = pictures(np.random.default_rng(0).normal(120, 20, (300, 4)))
    assert distance(FixedReference(images), images).value == pytest.approx(0.0, abs=1e-6)


def test_agrees_with_the_oracle() -> None:
    rng = np.random.default_rng(1)
    mix = rng.normal(size=(4, 4))
    a, b = rng.normal(120, 10, (400, 4)), 120 + 8 * rng.normal(size=(500, 4)) @ mix + rng.normal(size=4) * 5
    ours = distance(FixedReference(pictures(a)), pictures(b)).value
    read = [np.stack([p[0, :4, 0] for p in pictures(x)]).astype(np.float64) for x in (a, b)]
    assert ours == pytest.approx(oracle(*read), rel=1e-9)


def test_agrees_with_the_oracle_on_wide_and_rank_deficient_features() -> None:
    """Fewer images than features: both covariances are singular, where a matrix root is most delicate."""
    model = FakeModel()
    model.dims = 64
    model.projection = torch.randn(192, 64, generator=torch.Generator().manual_seed(1))
    a, b = ShapesWorld(1).batch(50).images, ShapesWorld(2).batch(40).images
    ours = distance(FixedReference(list(a), model=model), list(b), allow_small=True).value
    read = [model.features(torch.from_numpy(x)).double().numpy() for x in (a, b)]
    assert ours == pytest.approx(oracle(*read), rel=1e-5)


def test_two_gaussians_have_the_closed_form() -> None:
    """Independent coordinates: sum (m1 - m2)^2 + (s1 - s2)^2, here 4 x (10^2 + 6^2) = 544.

    With 8,000 samples a side a mean difference errs by 0.18 and a deviation by 0.13, which moves the value by about
    2 * sqrt(4) * hypot(10 * 0.18, 6 * 0.13) = 8 (one standard deviation); rounding to whole numbers adds 1/12 to each
    variance, under 0.1 in all. A wrong factor on any of the terms moves it by over 100.
    """
    rng = np.random.default_rng(2)
    a, b = rng.normal(110, 8, (8_000, 4)), rng.normal(120, 14, (8_000, 4))
    # In parts, since a picture takes 12 kB for its four numbers.
    fd = FixedReference(*map(pictures, np.split(a, 16)))
    value = distance(fd, [image for part in np.split(b, 16) for image in pictures(part)]).value
    assert value == pytest.approx(544, abs=40)


def test_order_and_batches_change_nothing() -> None:
    rng = np.random.default_rng(3)
    reference, images = pictures(rng.normal(120, 20, (250, 4))), pictures(rng.normal(100, 30, (333, 4)))
    fd = FixedReference(reference)
    first = distance(fd, images).value
    assert distance(fd, [images[i] for i in rng.permutation(333)]).value == pytest.approx(first, rel=1e-12)
    assert distance(fd, images).value == first  # the second and third use of one object


def test_large_images_are_resized() -> None:
    batch = ShapesWorld(4).batch(40).images
    fd = FixedReference(list(batch), model=FakeModel())
    doubled = [np.repeat(np.repeat(image, 2, 0), 2, 1) for image in batch]
    assert distance(fd, doubled).value < 0.05 * distance(fd, [255 - image for image in batch]).value


# --- guards ------------------------------------------------------------------------------------------------------


def test_refuses_small_sets_before_any_work() -> None:
    fd = FixedReference(pictures(np.random.default_rng(0).normal(120, 20, (300, 4))))
    images = pictures(np.random.default_rng(1).normal(120, 20, (7, 4)))
    with pytest.raises(FastgenError, match="7 images are too few for a covariance of 4 features, needs at least 8"):
        distance(fd, images)
    assert distance(fd, images, allow_small=True).n_images == 7
    with pytest.raises(FastgenError, match="at least 2"):
        distance(fd, images[:1], allow_small=True)


def test_refuses_features_that_are_not_finite() -> None:
    class Broken(Numbers):
        def features(self, images: torch.Tensor) -> torch.Tensor:
            return super().features(images) / images[:, 0, :1, 0].float()  # 0 / 0 on a black picture

    fd = FixedReference(pictures(np.random.default_rng(0).normal(120, 20, (300, 4))))
    fd.extractor.model = Broken()
    black = [np.zeros((64, 64, 3), np.uint8)] * 12
    source = CallbackSource(12, lambda index: black[index], identity="black", name="black")
    with pytest.raises(FastgenError, match=r"black\[0\]: shapes-detector-4 gives NaN"):
        fd.measure(source)


def test_refuses_what_is_no_image() -> None:
    fd = FixedReference(pictures(np.random.default_rng(0).normal(120, 20, (300, 4))))
    with pytest.raises(ValueError, match=r"images\[0\]"):
        distance(fd, [np.zeros((64, 64, 3))] * 12)


def test_a_source_gives_what_its_images_give(tmp_path) -> None:
    """A pass that keeps its finished parts, and one that keeps none."""
    images = ShapesWorld(4).batch(300).images  # two chunks
    fd = small(tmp_path)
    source = CallbackSource(300, lambda index: images[index], identity="x")
    result, store = fd.measure(source, work=tmp_path / "work")
    assert result.value == pytest.approx(distance(fd, list(images)).value, rel=1e-6)
    assert len(list((tmp_path / "work").glob("*/*.chunk"))) == 2
    store.discard()
    assert not (tmp_path / "work").exists()
    with pytest.raises(FastgenError, match="300 images are too few"):
        fd.extractor.taps = {"pool": 200}
        fd.measure(source)


# --- protocol and cache ------------------------------------------------------------------------------------------


def small(cache: Path, **changes) -> FDShapes:
    return FDShapes(**{"detector": FakeModel(), "n_reference": 64, "seed": 9, "cache_dir": cache, **changes})


def test_protocol_names_everything() -> None:
    fd = FDShapes(FakeModel(), cache_dir="/nonexistent")
    assert fd.protocol == f"FD-shapes[10k, shapes-detector-16, seed 1000003, detector {fd.detector_hash[:8]}]"


def test_reference_is_cached_and_reused(tmp_path, monkeypatch) -> None:
    images = list(ShapesWorld(4).batch(40).images)
    first = distance(small(tmp_path), images).value
    (path,) = tmp_path.iterdir()
    fd = small(tmp_path)
    monkeypatch.setattr(fd.reference.images, "fetch", lambda index: pytest.fail("computed again"))
    assert distance(fd, images).value == first


def test_reference_is_the_renders(tmp_path) -> None:
    images = ShapesWorld(4).batch(40).images
    reference = ShapesWorld(9, held_out=False).batch(64).images
    read = [FakeModel().features(torch.from_numpy(x)).double().numpy() for x in (reference, images)]
    assert distance(small(tmp_path), list(images)).value == pytest.approx(oracle(*read), rel=1e-9)


def test_cache_key_covers_network_seed_and_size(tmp_path) -> None:
    other = FakeModel()
    other.projection = other.projection + 1e-3
    for change in ({}, {"seed": 10}, {"n_reference": 65}, {"detector": other}, {}):
        small(tmp_path, **change).reference_statistics()
    assert len(list(tmp_path.iterdir())) == 4


def test_cache_key_covers_the_renderer(monkeypatch) -> None:
    first = render_reference(64, 9).images.digest()
    assert render_reference(64, 9).images.digest() == first

    class Redrawn(ShapesWorld):
        def batch(self, *args, **kwargs):
            made = super().batch(*args, **kwargs)
            made.images[0] ^= 1
            return made

    monkeypatch.setattr("fastgen.evaluation.fid.fd_shapes.ShapesWorld", Redrawn)
    assert render_reference(64, 9).images.digest() != first


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty"])
def test_damaged_cache_is_recomputed(tmp_path, damage: str, caplog) -> None:
    images = list(ShapesWorld(4).batch(40).images)
    first = distance(small(tmp_path), images).value
    (path,) = tmp_path.glob("*/*")
    raw = bytearray(path.read_bytes())
    good = bytes(raw)
    if damage == "truncate":
        path.write_bytes(raw[: len(raw) // 2])
    elif damage == "flip":
        raw[len(raw) // 2] ^= 0xFF
        path.write_bytes(raw)
    else:
        path.write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert distance(small(tmp_path), images).value == first
    assert "computed again" in caplog.text
    assert path.read_bytes() == good


def test_an_interrupted_reference_is_not_counted_twice(tmp_path) -> None:
    images = list(ShapesWorld(4).batch(40).images)
    first = distance(small(tmp_path / "a"), images).value

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    fd = small(tmp_path / "b", on_progress=interrupt)
    with pytest.raises(KeyboardInterrupt):
        distance(fd, images)
    fd._on_progress = None
    assert distance(fd, images).value == first


def test_unwritable_cache_costs_only_time(tmp_path, caplog) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with caplog.at_level(logging.WARNING):
        result = distance(small(blocked / "cache"), list(ShapesWorld(4).batch(40).images))
    assert (
        result.n_images == 40
        and "cannot write" in caplog.text
        or "not writable" in caplog.text
        or "is a file" in caplog.text
    )


def test_cache_folder(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("FASTGEN_CACHE", raising=False)
    assert user_cache_dir() == tmp_path / "fastgen"
    monkeypatch.setenv("FASTGEN_CACHE", str(tmp_path / "mine"))
    assert user_cache_dir() == tmp_path / "mine"
    monkeypatch.delenv("FASTGEN_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert user_cache_dir() == Path.home() / ".cache" / "fastgen"
