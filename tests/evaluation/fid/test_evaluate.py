"""The engine: identical sets, invariances, protocols that must not mix, the cache, bad input; and the command."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastgen.cli.main import run
from fastgen.errors import FastgenError
from fastgen.evaluation.chunks import ranges
from fastgen.evaluation.fid import evaluate as engine
from fastgen.evaluation.fid.evaluate import FidSettings, evaluate_images
from fastgen.evaluation.fid.extractors import Extractor
from fastgen.evaluation.fid.features import CHUNK, extract
from fastgen.evaluation.fid.frechet import frechet_distance
from fastgen.evaluation.fid.npz import write_statistics
from fastgen.evaluation.fid.readers import CallbackSource, ImageSource, open_images
from fastgen.evaluation.fid.reference import Reference, open_reference
from fastgen.evaluation.fid.statistics import Gaussian

ALL = ("fd-shapes", "kd-shapes", "precision-shapes", "recall-shapes")
SMALL = {"bootstrap": 0, "subset_size": 50, "subsets": 5}


class Numbers(Extractor):
    """A network whose features are written in the pixels."""

    name, taps = "numbers", {"pool": 4}
    fingerprint, resize, label = "numbers-1", "none", "none"
    device = torch.device("cpu")
    seen = 0

    def prepare(self, image: np.ndarray) -> Tensor:
        return torch.from_numpy(np.array(image))

    def compute(self, batch: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        self.seen += len(batch)
        values = batch[:, 0, :4, 0].float()
        return {"pool": torch.where(values == 255, torch.nan, values)}


def pictures(n: int, seed: int, mean: float = 120, std: float = 20) -> np.ndarray:
    values = np.random.default_rng(seed).normal(mean, std, (n, 4))
    images = np.zeros((n, 2, 8, 3), np.uint8)
    images[:, 0, :4, 0] = np.clip(np.rint(values), 0, 254)
    return images


def source(images: np.ndarray, name: str = "images") -> ImageSource:
    return CallbackSource(len(images), lambda i: images[i], identity=str(hash(images.tobytes())), name=name)


def measure(images, reference, tmp_path: Path | None = None, network: Extractor | None = None, **settings):
    """The result of `images` against `reference`, arrays or sources."""
    sources = [x if isinstance(x, ImageSource) else source(x) for x in (images, reference)]
    data, stores = evaluate_images(
        sources[0],
        FidSettings(**{"metrics": ALL, **SMALL, **settings}),
        reference=Reference(sources[1].name, sources[1]),
        extractors={"shapes": network or Numbers()},
        cache=tmp_path / "cache" if tmp_path else None,
        work=tmp_path / "work" if tmp_path else None,
    )
    for store in stores:
        store.discard()
    return json.loads(json.dumps(data))


def values(data: dict) -> dict[str, float]:
    return {name: found["value"] for name, found in data["metrics"].items()}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("FASTGEN_CACHE", str(tmp_path / "user"))


# --- golden ------------------------------------------------------------------------------------------------------


def test_identical_sets() -> None:
    images = pictures(300, 0)
    found = values(measure(images, images))
    assert found["fd-shapes"] == pytest.approx(0, abs=1e-9)
    assert found["precision-shapes"] == found["recall-shapes"] == 1


def test_gaussians_have_the_closed_form() -> None:
    """4 coordinates, means 10 and deviations 6 apart: 4 x (100 + 36); the sampling error is in test_fd_shapes."""
    value = values(measure(pictures(8000, 0, 110, 8), pictures(8000, 1, 120, 14), metrics=("fd-shapes",)))
    assert value["fd-shapes"] == pytest.approx(544, abs=40)


def test_order_and_batches_change_nothing() -> None:
    a, b = pictures(600, 0), pictures(500, 1, 110)  # three and two chunks
    first = values(measure(a, b, metrics=("fd-shapes", "precision-shapes", "recall-shapes")))
    mixed = np.random.default_rng(2).permutation(600)
    for images, batch in ((a[mixed], 64), (a, 1), (a, 37), (a, 1000)):
        again = values(measure(images, b, metrics=tuple(first), batch_size=batch))
        assert again["fd-shapes"] == pytest.approx(first["fd-shapes"], rel=1e-11)
        assert again["precision-shapes"] == first["precision-shapes"]
        assert again["recall-shapes"] == first["recall-shapes"]


def test_one_pass_serves_all_metrics(tmp_path: Path) -> None:
    network = Numbers()
    data = measure(pictures(300, 0), pictures(280, 1), tmp_path, network, bootstrap=10)
    assert network.seen == 300 + 280
    assert list(data["metrics"]) == list(ALL)
    fd = data["metrics"]["fd-shapes"]
    assert fd["label"] == "fd-shapes[none, 300, numbers]" and fd["ci95"][0] < fd["value"] < fd["ci95"][1]
    assert data["metrics"]["kd-shapes"]["label"] == "kd-shapes[none, 300, numbers, 5 x 50]"
    assert data["extractors"]["shapes"]["fingerprint"] == "numbers-1"
    assert data["extractors"]["shapes"]["reference"]["n"] == 280
    assert data["resolution"] == [2, 8] and data["environment"]["versions"]["torch"]


def test_exactly_n() -> None:
    images = pictures(400, 0)
    data = measure(images, images, n=300, reference_n=200)
    assert data["n_images"] == 300 and data["metrics"]["fd-shapes"]["label"] == "fd-shapes[none, 300, numbers]"
    assert values(data) == values(measure(images[:300], images[:200]))
    for settings, message in (({"n": 401}, "has 400 images, 401"), ({"reference_n": 500}, "has 400 images, 500")):
        with pytest.raises(FastgenError, match=message):
            measure(images, images, **settings)


# --- guards ------------------------------------------------------------------------------------------------------


def test_small_sets_are_refused_before_any_work() -> None:
    network = Numbers()
    for a, b in ((7, 300), (300, 7)):
        with pytest.raises(
            FastgenError, match="7 images are too few for a covariance of 4 features, needs at least 8"
        ):
            measure(pictures(a, 0), pictures(b, 1), network=network)
    assert network.seen == 0
    assert values(measure(pictures(7, 0), pictures(300, 1), metrics=("fd-shapes",), allow_small=True))
    with pytest.raises(FastgenError, match="at least 2"):
        measure(pictures(1, 0), pictures(300, 1), metrics=("fd-shapes",), allow_small=True)


def test_features_that_are_not_finite_are_named() -> None:
    images = pictures(300, 0)
    images[261, 0, 2, 0] = 255
    with pytest.raises(FastgenError, match=r"images\[261\]: numbers gives NaN"):
        measure(images, pictures(300, 1))


def test_mixed_sizes_are_named_and_can_be_allowed() -> None:
    images = list(pictures(300, 0))
    images[170] = np.zeros((4, 8, 3), np.uint8)
    mixed = CallbackSource(300, lambda i: images[i], identity="mixed", name="mixed")
    with pytest.raises(FastgenError, match=r"mixed\[170\]: is 4 x 8 pixels, the first image is 2 x 8; --mixed-sizes"):
        measure(mixed, pictures(300, 1))
    assert measure(mixed, pictures(300, 1), mixed_sizes=True)["resolution"] is None


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"bootstrap": 1}, "bootstrap: 1 is not allowed"),
        ({"subset_size": 1}, "subset_size"),
        ({"batch_size": 0}, "batch_size"),
        ({"seed": -1}, "seed"),
        ({"metrics": ("fid", "sfid")}, "sfid is not defined by protocol clean-fid"),
        ({"protocol": "x"}, "protocol: 'x'"),
    ],
)
def test_settings_are_checked(bad: dict, message: str) -> None:
    with pytest.raises(FastgenError, match=message):
        FidSettings(**{"metrics": ALL, **bad})


# --- statistics of another protocol ------------------------------------------------------------------------------


def against(reference: Reference, protocol: str = "adm", name: str = "inception-tf", metric: str = "fid"):
    network = Numbers()
    network.name = name
    images = source(pictures(300, 0))
    extractor = engine.METRICS[metric].extractor
    return evaluate_images(
        images,
        FidSettings((metric,), protocol, bootstrap=0),
        reference=reference,
        extractors={extractor: network},
    )


def plain_npz(path: Path, spatial: bool = True, dims: int = 4) -> Path:
    arrays = {"mu": np.full(dims, 120.0), "sigma": np.eye(dims) * 400}
    np.savez(path, **arrays, **({"mu_s": np.zeros(3), "sigma_s": np.eye(3)} if spatial else {}))
    return path


def test_statistics_serve_their_own_protocol_only(tmp_path: Path) -> None:
    adm = plain_npz(tmp_path / "adm.npz")
    data, _ = against(open_reference(adm))
    assert data["metrics"]["fid"]["value"] < 20
    for protocol in ("clean-fid", "torch-fidelity"):
        with pytest.raises(FastgenError, match=f"adm.npz: has statistics of protocol adm, and {protocol} was asked"):
            against(open_reference(adm), protocol)
    with pytest.raises(FastgenError, match="adm.npz: has statistics of protocol adm, not clean-fid"):
        against(open_reference(adm, "clean-fid"), "clean-fid")
    with pytest.raises(FastgenError, match="adm.npz: has statistics of Inception, numbers needs its own"):
        against(open_reference(adm), name="numbers", metric="fd-shapes")
    with pytest.raises(FastgenError, match="adm.npz: has statistics only; kid needs images"):
        against(open_reference(adm), metric="kid")
    wide = plain_npz(tmp_path / "wide.npz", dims=5)
    with pytest.raises(FastgenError, match="wide.npz: has statistics of 5 pool features, inception-tf has 4"):
        against(open_reference(wide))


def test_statistics_that_tell_no_protocol_need_it_named(tmp_path: Path) -> None:
    bare = plain_npz(tmp_path / "bare.npz", spatial=False)
    with pytest.raises(FastgenError, match="bare.npz: does not say which protocol made it; .*--reference-protocol"):
        against(open_reference(bare), "legacy-pytorch")
    data, _ = against(open_reference(bare, "legacy-pytorch"), "legacy-pytorch")
    assert data["metrics"]["fid"]["value"] < 20


def test_own_statistics_tell_everything(tmp_path: Path) -> None:
    gaussian = Gaussian(torch.full((4,), 120.0).double(), torch.eye(4).double() * 400, 300)
    record = {**Numbers().describe(), "name": "inception-tf", "protocol": "adm"}
    for change in (
        {},
        {"resize": "other"},
        {"fingerprint": "numbers-2"},
        {"dtype": "float16"},
        {"protocol": "clean-fid"},
    ):
        write_statistics(tmp_path / "own.npz", {"pool": gaussian}, {**record, **change})
        if not change:
            assert against(open_reference(tmp_path / "own.npz"))[0]["extractors"]["inception"]["reference"]["n"] == 300
            continue
        with pytest.raises(FastgenError, match="own.npz: has statistics of another protocol"):
            against(open_reference(tmp_path / "own.npz"))


# --- cache and resuming ------------------------------------------------------------------------------------------


def test_a_reference_is_computed_once(tmp_path: Path) -> None:
    network, reference = Numbers(), pictures(300, 1)
    first = measure(pictures(300, 0), reference, tmp_path, network, metrics=("fd-shapes",))
    assert network.seen == 600
    again = measure(pictures(300, 0), reference, tmp_path, network, metrics=("fd-shapes",))
    assert network.seen == 900 and values(again) == values(first)
    measure(pictures(300, 0), reference, tmp_path, network)  # features are needed now, and then kept
    measure(pictures(300, 0), reference, tmp_path, network)
    assert network.seen == 900 + 600 + 300


@pytest.mark.parametrize("change", ["fingerprint", "resize", "dtype", "label", "images", "count"])
def test_the_cache_is_keyed_by_everything(tmp_path: Path, change: str) -> None:
    reference = pictures(300, 1)
    measure(pictures(300, 0), reference, tmp_path, metrics=("fd-shapes",))
    network, settings = Numbers(), {}
    if change == "images":
        reference = reference.copy()
        reference[7, 0, 0, 0] ^= 1
    elif change == "count":
        settings = {"reference_n": 299}
    else:
        setattr(network, change, "other")
    measure(pictures(300, 0), reference, tmp_path, network, metrics=("fd-shapes",), **settings)
    assert network.seen == 600 - (change == "count")


def test_an_interrupted_pass_continues(tmp_path: Path) -> None:
    images = pictures(600, 0)
    whole, _ = extract(source(images), Numbers(), keep=["pool"])
    broken = images.copy()
    broken[520, 0, 0, 0] = 255
    network = Numbers()
    mended = CallbackSource(600, lambda i: images[i], identity="x")
    with pytest.raises(FastgenError):
        extract(CallbackSource(600, lambda i: broken[i], identity="x"), network, store_root=tmp_path, keep=["pool"])
    network.seen = 0
    found, store = extract(mended, network, store_root=tmp_path, keep=["pool"])
    assert network.seen == 600 - 2 * CHUNK  # the two whole chunks were kept
    assert torch.equal(found.arrays["pool"], whole.arrays["pool"])
    assert torch.equal(found.moments["pool"].outer, whole.moments["pool"].outer)
    store.discard()
    assert not tmp_path.exists() or not list(tmp_path.iterdir())


def test_what_is_kept_of_other_settings_is_not_taken(tmp_path: Path) -> None:
    images, network = pictures(300, 0), Numbers()
    extract(source(images), network, store_root=tmp_path)
    extract(source(images), network, store_root=tmp_path)
    assert network.seen == 300
    network.resize = "other"
    extract(source(images), network, store_root=tmp_path)
    extract(source(images), network, store_root=tmp_path, batch_size=10)
    assert network.seen == 900


def test_shards_add_up_to_the_whole() -> None:
    """What two processes would send, added by hand."""
    images = pictures(700, 0)
    whole, _ = extract(source(images), Numbers())
    total, outer = torch.zeros(4, dtype=torch.float64), torch.zeros(4, 4, dtype=torch.float64)
    for rank in (0, 1):
        for number, items in enumerate(ranges(700, CHUNK)):
            if number % 2 == rank:
                part, _ = extract(source(images[items.start : items.stop]), Numbers())
                total += part.moments["pool"].total
                outer += part.moments["pool"].outer
    np.testing.assert_allclose(total, whole.moments["pool"].total, rtol=1e-12)
    np.testing.assert_allclose(outer, whole.moments["pool"].outer, rtol=1e-12)


# --- the command -------------------------------------------------------------------------------------------------


def folder(path: Path, images: np.ndarray) -> Path:
    path.mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image).save(path / f"{index:04d}.png")
    return path


@pytest.fixture()
def numbers(monkeypatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(engine, "load_extractor", lambda name, protocol, weights=None, device="cpu": Numbers())
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "mine", pictures(60, 0))
    folder(tmp_path / "real", pictures(80, 1))
    return tmp_path


FID = ["eval", "fid", "mine", "--reference", "real"]


def test_the_command_prints_one_object(numbers: Path, capsys) -> None:
    assert run([*FID, "--json", "--out", "r/result.json", "--save-statistics", "s/mine.npz", "--bootstrap", "5"]) == 0
    out = capsys.readouterr().out
    data = json.loads(out)
    assert out.count("\n") == 1 and list(data["metrics"]) == list(ALL)
    assert json.loads((numbers / "r/result.json").read_text()) == data
    assert data["settings"]["protocol"] == "clean-fid" and data["n_images"] == 60
    assert {"load", "reference", "features", "metrics"} <= set(data["stats"]["seconds"])
    assert run(["eval", "fid", "real", "--reference", "s/mine.npz", "--metrics", "fd-shapes", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["metrics"]["fd-shapes"]["value"] == pytest.approx(data["metrics"]["fd-shapes"]["value"], rel=1e-9)


def test_the_command_prints_text(numbers: Path, capsys) -> None:
    assert run([*FID, "--bootstrap", "5"]) == 0
    out = capsys.readouterr().out
    for text in ("fd-shapes[none, 60, numbers]: ", "(95 %: ", "60 images of 2x8 pixels in mine against real", "torch"):
        assert text in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--extractor", "vgg"], "--extractor: 'vgg'"),
        (["--metrics", "fid,nonsense"], "metric: 'nonsense'"),
        (["--metrics", ","], "metric: needs at least one"),
        (["--protocol", "x"], "protocol: 'x'"),
        (["--metrics", "sfid"], "sfid is not defined by protocol clean-fid"),
        (["--weights", "inception"], "--weights: 'inception'"),
        (["--weights", "vgg=x"], "--weights: 'vgg=x'"),
        (["--n", "0"], "n: 0 is not allowed"),
        (["--n", "61"], "mine: has 60 images, 61 are needed"),
        (["--bootstrap", "-1"], "bootstrap: -1"),
        (["--batch-size", "0"], "batch_size: 0"),
        (["--out", "x.txt"], "x.txt"),
        (["--save-statistics", "x.json"], "x.json"),
        (["--device", "abacus"], "abacus"),
        (["--prompts", "none.txt"], "--prompts: none.txt"),
        (["--prompts", "short.txt"], "--prompts: short.txt has 1 lines, mine has 60 images"),
        (["--metrics", "clip-score"], "mine: has no prompts"),
        (["--reference-protocol", "x"], "protocol: 'x'"),
    ],
)
def test_bad_options_are_one_line_and_exit_2(numbers: Path, monkeypatch, capsys, options, message) -> None:
    (numbers / "short.txt").write_text("one\n")
    monkeypatch.setattr(Numbers, "needs_prompts", "clip-score" in options)
    monkeypatch.setattr(engine, "extract", lambda *_, **__: pytest.fail("started to work"))
    assert run([*FID, *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert message in captured.err


def test_bad_places_are_named(numbers: Path, capsys) -> None:
    (numbers / "empty").mkdir()
    (numbers / "mine" / "0007.png").write_bytes((numbers / "mine" / "0007.png").read_bytes()[:40])
    for arguments, message in (
        (["none", "--reference", "real"], "none: no such file or folder"),
        (["empty", "--reference", "real"], "empty: has no image"),
        (["mine", "--reference", "none"], "none: no such file or folder"),
        (["mine", "--reference", "real"], "mine/0007.png: not a readable image"),
        (["mine", "--metrics", "fid"], "fid: needs a reference"),
        (["real", "--reference-protocol", "adm"], "--reference-protocol: needs --reference"),
    ):
        assert run(["eval", "fid", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_the_reader_of_images_is_that_of_the_library(numbers: Path) -> None:
    found = values(measure(open_images("mine"), open_images("real")))
    assert found == values(measure(pictures(60, 0), pictures(80, 1)))
    gaussians = [
        extract(source(x), Numbers())[0].moments["pool"].gaussian() for x in (pictures(60, 0), pictures(80, 1))
    ]
    assert found["fd-shapes"] == frechet_distance(*gaussians)


DRAWN = ["eval", "fid", "--model", "renders", "--reference", "real", "--limit", "1", "--images-per-prompt", "2"]


def test_a_model_is_drawn_and_scored(numbers: Path, monkeypatch, capsys) -> None:
    options = ["--mixed-sizes", "--bootstrap", "0", "--run", "run", "--json"]
    assert run([*DRAWN, *options]) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["n_images"] == 12 and first["model"] == "renders" and first["generation"]["images_made_now"] == 12
    assert first["images"] == "run" and first["resolution"] is None
    (numbers / "run" / "00003" / "samples" / "0001.png").unlink()
    assert run([*DRAWN, *options]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["generation"]["images_made_now"] == 1 and again["metrics"] == first["metrics"]
    # Twice the features are not there: an error before anything is drawn.
    monkeypatch.setattr(Numbers, "taps", {"pool": 40})
    assert run([*DRAWN, "--run", "other"]) == 2
    assert "other: 12 images are too few for a covariance of 40" in capsys.readouterr().err
    assert not list((numbers / "other").glob("*/samples/*.png"))


def test_prompts_for_a_model(numbers: Path, capsys) -> None:
    (numbers / "two.txt").write_text("a red circle\na zebra\n")
    (numbers / "blank.txt").write_text("a red circle\n\n")
    for arguments, message in (
        (["--prompts", "two.txt", "--allow-small"], "is no ShapesWorld evaluation prompt"),
        (["--prompts", "blank.txt"], "blank.txt: needs one prompt a line"),
        (["--prompts", "none.jsonl"], "none.jsonl: cannot read the metadata"),
        (["--metrics", "fid"], "--model: needs --prompts"),
        (["mine"], "not both"),
        (["--steps", "0"], "--steps: 0"),
    ):
        assert run([*DRAWN[:6], *arguments]) == 2
        assert message in capsys.readouterr().err
    assert run(["eval", "fid"]) == 2
    assert "needs IMAGES to score, or --model" in capsys.readouterr().err
    assert run(["eval", "fid", "mine", "--steps", "3"]) == 2
    assert "--steps: not allowed" in capsys.readouterr().err
