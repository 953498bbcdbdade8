"""The Inception network and the resize modes in front of it; random weights, known structure."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from fastgen.errors import FastgenError
from fastgen.evaluation.fid.extractors import Inception, load_extractor
from fastgen.evaluation.fid.inception import WEIGHT_FILES, InceptionV3, find_weights, load_inception
from fastgen.evaluation.fid.protocols import METRICS, PROTOCOLS, check_metrics, count_name, find_protocol
from fastgen.evaluation.fid.resize_modes import RESIZE, tf1_bilinear


@pytest.fixture(scope="module")
def model() -> InceptionV3:
    torch.manual_seed(0)
    made = InceptionV3().eval()
    with torch.no_grad():
        for module in made.modules():
            if isinstance(module, torch.nn.BatchNorm2d):  # fresh ones hide a wrong epsilon and a forgotten mean
                module.running_var.uniform_(0.001, 0.01)
                module.running_mean.normal_(0, 0.01)
    return made


def test_structure(model: InceptionV3) -> None:
    """Parameters of Inception v3 without auxiliary head and classes, and 1008 classes; 94 convolutions."""
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count - (2048 * 1008 + 1008) == 21_785_568
    assert sum(isinstance(module, torch.nn.Conv2d) for module in model.modules()) == 94
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_children():
        module.register_forward_hook(lambda _, __, out, name=name: shapes.update({name: tuple(out.shape[1:])}))
    with torch.no_grad():
        pool, spatial = model(torch.zeros(1, 3, 299, 299))
    assert pool.shape == (1, 2048) and spatial.shape == (1, 2023)
    assert shapes["Conv2d_1a_3x3"] == (32, 149, 149) and shapes["Conv2d_4a_3x3"] == (192, 71, 71)
    assert shapes["Mixed_5b"] == (256, 35, 35) and shapes["Mixed_5d"] == (288, 35, 35)
    assert shapes["Mixed_6a"] == shapes["Mixed_6e"] == (768, 17, 17)
    assert shapes["Mixed_7a"] == (1280, 8, 8) and shapes["Mixed_7c"] == (2048, 8, 8)


def test_blocks_agree_with_torchvision(model: InceptionV3) -> None:
    """The same names and shapes; the same blocks except for the pooling of three kinds."""
    torchvision = pytest.importorskip("torchvision")
    theirs = torchvision.models.inception_v3(init_weights=False, aux_logits=False, num_classes=1008).eval()
    assert {k: v.shape for k, v in theirs.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    theirs.load_state_dict(model.state_dict())
    x = torch.randn(1, 288, 35, 35)
    y = torch.randn(1, 768, 17, 17)
    z = torch.rand(1, 2048, 8, 8) + 1
    with torch.no_grad():
        torch.testing.assert_close(model.Mixed_6a(x), theirs.Mixed_6a(x))
        torch.testing.assert_close(model.Mixed_7a(y), theirs.Mixed_7a(y))
        for ours, other, data, pooled in (
            (model.Mixed_5d, theirs.Mixed_5d, x, 64),
            (model.Mixed_6d, theirs.Mixed_6d, y, 192),
            (model.Mixed_7c, theirs.Mixed_7c, z, 192),
        ):
            a, b = ours(data), other(data)
            torch.testing.assert_close(a[:, :-pooled], b[:, :-pooled])  # every branch but the pooled one
            assert not torch.allclose(a[:, -pooled:], b[:, -pooled:])
        # Inside, where no padding reaches, the average is the usual one.
        inside = slice(1, -1)
        ours, other = model.Mixed_5d(x)[:, -64:, inside, inside], theirs.Mixed_5d(x)[:, -64:, inside, inside]
        torch.testing.assert_close(ours, other)
        pool = functional.max_pool2d(z, 3, stride=1, padding=1)
        torch.testing.assert_close(model.Mixed_7c(z)[:, -192:], model.Mixed_7c.branch_pool(pool))


def test_the_spatial_tap_has_channels_last(model: InceptionV3) -> None:
    seen = {}
    handle = model.Mixed_6d.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    with torch.no_grad():
        _, spatial = model(torch.randn(2, 3, 299, 299))
        conv = model.Mixed_6d.branch1x1(seen["x"])
    handle.remove()
    assert conv.shape == (2, 192, 17, 17)
    np.testing.assert_array_equal(spatial.reshape(2, 17, 17, 7), conv[:, :7].permute(0, 2, 3, 1))


def test_logits_have_no_bias(model: InceptionV3) -> None:
    pool = torch.randn(3, 2048)
    with torch.no_grad():
        torch.testing.assert_close(model.logits(pool) + model.fc.bias, model.fc(pool))


# --- weights -----------------------------------------------------------------------------------------------------


def save(path: Path, model: InceptionV3, drop: str | None = None) -> Path:
    state = {k: v for k, v in model.state_dict().items() if k != drop and not k.endswith("num_batches_tracked")}
    torch.save(state, path)
    return path


def test_weights_are_found_in_the_cache_of_torch_hub(tmp_path: Path, monkeypatch, model: InceptionV3) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(FastgenError, match=r"not in .*checkpoints: download https://.*--weights inception=FILE"):
        load_inception()
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    file = save(tmp_path / "hub" / "checkpoints" / WEIGHT_FILES[1], model)
    assert find_weights() == file
    with pytest.raises(FastgenError, match="is damaged .*6726825d"):  # the published name, and other bytes
        load_inception()


def test_weights_by_path(tmp_path: Path, model: InceptionV3) -> None:
    file = save(tmp_path / "weights.pth", model)
    loaded = load_inception(file)
    x = torch.randn(1, 3, 299, 299)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x)[0], model(x)[0])
    save(tmp_path / "less.pth", model, drop="Mixed_7c.branch_pool.bn.weight")
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("no weights")
    for name, message in (
        ("none.pth", "no such weights file"),
        ("less.pth", "lacks 1 weights, the first is Mixed_7c.branch_pool.bn.weight"),
        ("other.pth", "lacks"),
        ("text.pth", "not the weights"),
    ):
        with pytest.raises(FastgenError, match=f"{name}: .*{message}|{name}: {message}"):
            load_inception(tmp_path / name)


# --- resize ------------------------------------------------------------------------------------------------------

PICTURE = np.random.default_rng(3).integers(0, 256, (37, 53, 3), dtype=np.uint8)

#: sha256 of the picture resized to 9 x 9, in quarters of a level; the offset keeps every value away from a tie.
DIGESTS = {
    "tf1-bilinear": "ee28730091a26292",
    "pil-bicubic-float": "e1f40c38ee704262",
    "torch-bilinear": "bd2b6b671314d190",
    "torch-bicubic": "adbbc3ed9fd65b7f",
    "pil-bicubic": "1d3ff218873306ec",
}


def digest(x: torch.Tensor) -> str:
    return hashlib.sha256((x * 4 + 0.22).round().to(torch.int16).numpy().tobytes()).hexdigest()[:16]


@pytest.mark.parametrize("mode", list(RESIZE))
def test_resize_modes_give_the_stored_digests(mode: str) -> None:
    small = RESIZE[mode](PICTURE, 9)
    assert small.shape == (3, 9, 9) and small.dtype == torch.float32
    assert digest(small) == DIGESTS[mode]


def test_tf1_bilinear_by_its_definition() -> None:
    for side in (20, 29, 64, 111):
        found = tf1_bilinear(PICTURE, side).double().numpy()
        for i in range(0, side, 7):
            for j in range(0, side, 5):
                y, x = i * (37 / side), j * (53 / side)
                y0, x0 = int(y), int(x)
                y1, x1 = min(y0 + 1, 36), min(x0 + 1, 52)
                p = PICTURE.astype(np.float64)
                above = p[y0, x0] + (p[y0, x1] - p[y0, x0]) * (x - x0)
                below = p[y1, x0] + (p[y1, x1] - p[y1, x0]) * (x - x0)
                np.testing.assert_allclose(found[:, i, j], above + (below - above) * (y - y0), atol=2e-3)


def test_resize_modes_against_their_libraries() -> None:
    x = torch.from_numpy(PICTURE).permute(2, 0, 1).float()[None]
    torch.testing.assert_close(
        RESIZE["torch-bilinear"](PICTURE, 29), functional.interpolate(x, (29, 29), mode="bilinear")[0]
    )
    whole = np.asarray(Image.fromarray(PICTURE).resize((29, 29), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(RESIZE["pil-bicubic"](PICTURE, 29).permute(1, 2, 0).numpy(), whole)
    floats = RESIZE["pil-bicubic-float"](PICTURE, 29).permute(1, 2, 0).numpy()
    assert 0.1 < np.abs(floats - whole).mean() < 0.5  # rounded to bytes twice less
    assert floats.min() >= 0 and floats.max() <= 255


@pytest.mark.parametrize("mode", list(RESIZE))
def test_constant_pictures_stay_constant(mode: str) -> None:
    for side in (1, 8, 31):
        small = RESIZE[mode](np.full((9, 14, 3), 77, np.uint8), side)
        torch.testing.assert_close(small, torch.full((3, side, side), 77.0), atol=1e-4, rtol=0)


# --- protocols ---------------------------------------------------------------------------------------------------


def test_protocols_differ_in_what_they_say() -> None:
    assert len({(p.resize, p.shift, p.splits) for p in PROTOCOLS.values()}) == 4
    assert len({p.label for p in PROTOCOLS.values()}) == 4
    with pytest.raises(FastgenError, match="protocol: 'fid' is unknown, needs one of adm, torch-fidelity"):
        find_protocol("fid")
    assert [count_name(n) for n in (10_000, 50_000, 999, 1500, 0)] == ["10k", "50k", "999", "1500", "0"]


def test_metrics_that_a_protocol_does_not_define() -> None:
    with pytest.raises(FastgenError, match="sfid is not defined by protocol clean-fid, only by adm"):
        check_metrics(["fid", "sfid"], PROTOCOLS["clean-fid"])
    with pytest.raises(
        FastgenError, match="is is not defined by protocol legacy-pytorch, only by adm, torch-fidelity"
    ):
        check_metrics(["is"], PROTOCOLS["legacy-pytorch"])
    with pytest.raises(FastgenError, match="metric: 'fd' is unknown"):
        check_metrics(["fd"], PROTOCOLS["adm"])
    with pytest.raises(FastgenError, match="needs at least one"):
        check_metrics([], PROTOCOLS["adm"])
    assert [m.name for m in check_metrics(["fid", "fid", "kid"], PROTOCOLS["adm"])] == ["fid", "kid"]
    assert {m.extractor for m in METRICS.values()} == {"inception", "shapes", "dinov2", "cmmd", "clip-score"}


def test_protocols_see_the_same_picture_differently(model: InceptionV3) -> None:
    inputs = {}
    for name, protocol in PROTOCOLS.items():
        extractor = Inception(protocol, model)
        x = extractor.prepare(PICTURE)
        inputs[name] = (x - protocol.shift) / protocol.scale
        assert x.shape == (3, 299, 299) and inputs[name].abs().max() <= 1.01
        assert extractor.describe()["protocol"] == protocol.label
    torch.testing.assert_close(inputs["adm"], inputs["torch-fidelity"])
    for a, b in (("adm", "clean-fid"), ("clean-fid", "legacy-pytorch"), ("adm", "legacy-pytorch")):
        assert (inputs[a] - inputs[b]).abs().mean() > 0.002


def test_unknown_extractors_and_absent_weights_are_errors() -> None:
    with pytest.raises(FastgenError, match="extractor: 'vgg' is unknown"):
        load_extractor("vgg", PROTOCOLS["adm"])
    for name in ("dinov2", "cmmd", "clip-score"):
        with pytest.raises(FastgenError, match="not in the local cache and the Hub cannot be reached"):
            load_extractor(name, PROTOCOLS["adm"])
