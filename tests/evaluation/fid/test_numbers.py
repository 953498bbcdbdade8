"""Golden values: closed forms, float64 oracles, scipy and torchmetrics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgen.evaluation.fid.frechet import bootstrap_frechet, frechet_distance, matrix_root
from fastgen.evaluation.fid.inception_score import inception_score
from fastgen.evaluation.fid.manifold import precision_recall
from fastgen.evaluation.fid.mmd import cmmd, kid
from fastgen.evaluation.fid.statistics import Gaussian, Moments


def drawn(n: int, dims: int, seed: int, shift: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    """Correlated features, float32 [n, dims]."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(dims, dims)) / dims**0.5 + np.eye(dims)
    return torch.from_numpy((rng.normal(size=(n, dims)) @ mix * scale + shift).astype(np.float32))


def statistics(features: torch.Tensor, batch: int = 64) -> Gaussian:
    moments = Moments(features.shape[1])
    for part in features.split(batch):
        moments.update(part)
    return moments.gaussian()


# --- statistics --------------------------------------------------------------------------------------------------


@given(st.integers(2, 40), st.integers(1, 9), st.integers(1, 50), st.floats(-1e3, 1e3), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_moments_are_mean_and_covariance(n: int, dims: int, batch: int, shift: float, seed: int) -> None:
    x = drawn(n, dims, seed, shift)
    found = statistics(x, batch)
    exact = x.double().numpy()
    np.testing.assert_allclose(found.mean.numpy(), exact.mean(0), rtol=1e-12, atol=1e-12)
    # Sums of squares lose (shift / deviation)^2 of the 16 digits.
    np.testing.assert_allclose(
        found.covariance.numpy(), np.cov(exact.T).reshape(dims, dims), rtol=1e-9, atol=1e-13 * (1 + shift**2) * n
    )


@given(st.integers(2, 60), st.integers(1, 4), st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_sums_of_shards_are_the_sums_of_the_whole(n: int, shards: int, seed: int) -> None:
    x = drawn(n, 5, seed, 3.0)
    whole, parts = Moments(5), [Moments(5) for _ in range(shards)]
    whole.update(x)
    for index, row in enumerate(x):
        parts[index % shards].update(row[None])
    added = Moments(5)
    for part in parts:
        added.total += part.total
        added.outer += part.outer
        added.count += part.count
    assert added.count == n
    torch.testing.assert_close(added.gaussian().covariance, whole.gaussian().covariance, rtol=1e-9, atol=1e-12)


def test_bad_features_change_nothing() -> None:
    moments = Moments(3)
    moments.update(drawn(4, 3, 0))
    before = moments.to_bytes()
    bad = drawn(4, 3, 1)
    bad[2, 1] = math.nan
    for features, message in ((bad, "NaN"), (bad * math.inf, "NaN"), (drawn(4, 2, 0), r"shape \[n, 3\]")):
        with pytest.raises(ValueError, match=message):
            moments.update(features)
    assert moments.to_bytes() == before
    with pytest.raises(ValueError, match="at least 2 images, got 0"):
        Moments(3).gaussian()
    with pytest.raises(ValueError, match="dims"):
        Moments(0)


def test_moments_are_kept_and_damage_is_seen() -> None:
    moments = Moments(3)
    moments.update(drawn(7, 3, 0))
    data = moments.to_bytes()
    again = Moments.from_bytes(data, 3)
    assert torch.equal(again.outer, moments.outer) and again.count == 7
    for broken in (data[:-20], b"", data.replace(b"outer", b"inner")):
        with pytest.raises(ValueError, match="statistics"):
            Moments.from_bytes(broken, 3)
    with pytest.raises(ValueError, match="statistics of 4"):
        Moments.from_bytes(data, 4)


# --- Fréchet distance --------------------------------------------------------------------------------------------


def by_sqrtm(a: Gaussian, b: Gaussian) -> float:
    """The textbook formula with scipy's general matrix root."""
    root = scipy.linalg.sqrtm((a.covariance @ b.covariance).numpy())
    traces = np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.trace(root).real
    return float(((a.mean - b.mean) ** 2).sum() + traces)


@pytest.mark.parametrize("dims", [1, 2, 17, 64])
def test_agrees_with_a_matrix_root(dims: int) -> None:
    a, b = statistics(drawn(400, dims, 0)), statistics(drawn(300, dims, 1, 0.5, 2.0))
    assert frechet_distance(a, b) == pytest.approx(by_sqrtm(a, b), rel=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)


def test_agrees_with_torchmetrics() -> None:
    from torchmetrics.image.fid import _compute_fid

    a, b = statistics(drawn(400, 32, 0)), statistics(drawn(300, 32, 1, 0.5))
    theirs = float(_compute_fid(a.mean, a.covariance, b.mean, b.covariance))
    assert frechet_distance(a, b) == pytest.approx(theirs, rel=1e-9)


@given(st.integers(1, 6), st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_commuting_gaussians_have_a_closed_form(dims: int, seed: int) -> None:
    """With shared eigenvectors: |m1 - m2|^2 + sum (s1 - s2)^2, also where some deviations are zero."""
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.normal(size=(dims, dims)))
    s1, s2 = rng.uniform(0, 3, dims), rng.uniform(0, 3, dims)
    s1[rng.random(dims) < 0.3] = 0
    m1, m2 = rng.normal(size=(2, dims))
    a, b = (Gaussian(torch.from_numpy(m), torch.from_numpy((basis * s**2) @ basis.T)) for m, s in ((m1, s1), (m2, s2)))
    expected = ((m1 - m2) ** 2).sum() + ((s1 - s2) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_identical_and_singular_sets() -> None:
    wide = statistics(drawn(20, 50, 0))  # rank 19 of 50
    assert frechet_distance(wide, wide) == pytest.approx(0, abs=1e-6)
    constant = statistics(torch.ones(5, 3))
    shifted = statistics(torch.ones(5, 3) * 3)
    assert frechet_distance(constant, shifted) == pytest.approx(12.0)


def test_what_is_no_gaussian_is_refused() -> None:
    mean, eye = torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    with pytest.raises(ValueError, match="negative eigenvalue"):
        matrix_root(-eye)
    with pytest.raises(ValueError, match="mean"):
        Gaussian(mean, torch.eye(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="NaN"):
        Gaussian(mean * math.nan, eye)
    with pytest.raises(ValueError, match="of 2 and of 3"):
        frechet_distance(Gaussian(mean, eye), Gaussian(torch.zeros(3), torch.eye(3)))


# --- bootstrap ---------------------------------------------------------------------------------------------------


def test_bootstrap_spreads_as_fresh_samples_do() -> None:
    """The error bar of one sample against the scatter of the distance over 60 independent samples."""
    reference = Gaussian(torch.zeros(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64))
    rng = np.random.default_rng(0)
    samples = [torch.from_numpy(rng.normal(0.7, 1.3, (300, 4)).astype(np.float32)) for _ in range(60)]
    values = [frechet_distance(statistics(x), reference) for x in samples]
    errors = [
        bootstrap_frechet(x, reference, v, replicates=60).stderr for x, v in zip(samples[:5], values, strict=False)
    ]
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.35)
    first = bootstrap_frechet(samples[0], reference, values[0], replicates=40, seed=3)
    assert first.low < values[0] < first.high
    assert first == bootstrap_frechet(samples[0], reference, values[0], replicates=40, seed=3)
    assert first != bootstrap_frechet(samples[0], reference, values[0], replicates=40, seed=4)
    for bad in ((samples[0], 1), (samples[0][:1], 5)):
        with pytest.raises(ValueError, match="replicates|at least 2"):
            bootstrap_frechet(bad[0], reference, 0.0, replicates=bad[1])


def test_wide_bootstrap_in_single_precision_agrees_with_double() -> None:
    from fastgen.evaluation.fid import frechet

    x = drawn(700, 600, 0, 5.0)
    weights = torch.bincount(torch.from_numpy(np.random.default_rng(1).integers(0, 700, 700)), minlength=700)
    center = x.double().mean(0)
    single = frechet._weighted(x, weights, center)
    rows = x.double().repeat_interleave(weights, 0)
    np.testing.assert_allclose(single.covariance.numpy(), np.cov(rows.T.numpy()), rtol=1e-4, atol=1e-4)


# --- kernel distances --------------------------------------------------------------------------------------------


def test_kid_is_the_unbiased_estimate() -> None:
    """One subset that is the whole set, by the definition."""
    x, y = drawn(60, 8, 0).double().numpy(), drawn(60, 8, 1, 0.5).double().numpy()

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / 8 + 1) ** 3

    n = 60
    within = sum((k.sum() - np.trace(k)) / (n * (n - 1)) for k in (kernel(x, x), kernel(y, y)))
    expected = within - 2 * kernel(x, y).mean()
    mean, std = kid(torch.from_numpy(x), torch.from_numpy(y), subsets=1, subset_size=60)
    assert mean == pytest.approx(expected, rel=1e-9) and std == 0.0


def test_kid_subsets_are_seeded() -> None:
    x, y = drawn(300, 8, 0), drawn(200, 8, 1)
    first = kid(x, y, subsets=10, subset_size=50, seed=1)
    torch.manual_seed(5)  # the caller's own randomness is neither used nor moved
    state = torch.get_rng_state()
    assert kid(x, y, subsets=10, subset_size=50, seed=1) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert kid(x, y, subsets=10, subset_size=50, seed=2) != first
    with pytest.raises(ValueError, match="reference has 200 images, a subset needs 201"):
        kid(x, y, subset_size=201)


@pytest.mark.parametrize("rows", [1, 7, 4096])
def test_cmmd_agrees_with_the_whole_kernel(rows: int) -> None:
    x, y = (torch.nn.functional.normalize(drawn(n, 6, n), dim=1) for n in (31, 45))

    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.exp(-(torch.cdist(a.double(), b.double()) ** 2) / 200)

    expected = 1000 * (kernel(x, x).mean() + kernel(y, y).mean() - 2 * kernel(x, y).mean())
    assert cmmd(x, y, rows=rows) == pytest.approx(float(expected), rel=1e-6)
    assert cmmd(x, x.flip(0), rows=rows) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="embeddings"):
        cmmd(x, y[:0])


# --- precision and recall ----------------------------------------------------------------------------------------


def naive_precision_recall(x: np.ndarray, y: np.ndarray, k: int) -> tuple[float, float]:
    def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.linalg.norm(a[:, None] - b[None], axis=-1)

    radius_x, radius_y = (np.sort(distances(z, z), 1)[:, k] for z in (x, y))
    d = distances(x, y)
    return float((d <= radius_y[None]).any(1).mean()), float((d <= radius_x[:, None]).any(0).mean())


@given(st.integers(5, 40), st.integers(5, 40), st.integers(1, 4), st.integers(1, 50), st.integers(1, 50))
@settings(max_examples=60, deadline=None)
def test_precision_and_recall_agree_with_whole_matrices(n: int, m: int, k: int, rows: int, columns: int) -> None:
    x, y = drawn(n, 4, n + 100 * m, 0.8), drawn(m, 4, m)
    found = precision_recall(x.double(), y.double(), k=k, rows=rows, columns=columns)
    assert found == naive_precision_recall(x.double().numpy(), y.double().numpy(), k)


def test_precision_and_recall_of_extremes() -> None:
    x = drawn(50, 4, 0)
    assert precision_recall(x, x) == (1.0, 1.0)
    assert precision_recall(x, x + 1000) == (0.0, 0.0)
    assert precision_recall(x[:10] * 1e-3, x)[1] < 0.2 < precision_recall(x[:10] * 1e-3, x)[0]  # narrow: precise
    with pytest.raises(ValueError, match="3 images are too few"):
        precision_recall(x[:3], x)


# --- inception score ---------------------------------------------------------------------------------------------


def test_inception_score_closed_forms() -> None:
    certain = torch.eye(10).repeat(5, 1) * 1000  # each class equally often and without doubt
    assert inception_score(certain, splits=1) == pytest.approx((10.0, 0.0))
    assert inception_score(torch.zeros(50, 10), splits=5)[0] == pytest.approx(1.0)


def test_inception_score_parts() -> None:
    logits = drawn(23, 10, 0)

    def score(part: torch.Tensor) -> float:
        p = part.double().softmax(1).numpy()
        return math.exp((p * np.log(p / p.mean(0))).sum(1).mean())

    by_size = [score(part) for part in logits.split(10)]
    assert inception_score(logits, split_size=10)[0] == pytest.approx(np.mean(by_size))
    order = np.random.RandomState(2020).permutation(23)
    equal = [score(logits[order][i * 23 // 4 : (i + 1) * 23 // 4]) for i in range(4)]
    found = inception_score(logits, splits=4, shuffle_seed=2020)
    assert found == pytest.approx((np.mean(equal), np.std(equal)))
    for bad in ({}, {"splits": 2, "split_size": 5}, {"splits": 24}, {"splits": 0}):
        with pytest.raises(ValueError, match="inception score"):
            inception_score(logits, **bad)


def test_inception_score_agrees_with_torchmetrics() -> None:
    from torchmetrics.image.inception import InceptionScore

    logits = drawn(64, 12, 3)
    metric = InceptionScore(feature=torch.nn.Flatten(), splits=1)  # one part: its shuffle does not matter
    metric.features = [logits]
    theirs = float(metric.compute()[0])
    assert inception_score(logits, splits=1)[0] == pytest.approx(theirs, rel=1e-5)
