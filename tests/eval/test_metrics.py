"""Every metric against an independent computation."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from dit_accel import InputError
from dit_accel.eval.metrics import bootstrap, distribution, fidelity, semantic, vbench
from dit_accel.pipelines.tiny_wan import scenes


def clips(seed=0, noise=0.1, shape=(3, 3, 24, 20)):
    generator = torch.Generator().manual_seed(seed)
    dense = torch.rand(shape, generator=generator)
    return (dense + noise * torch.randn(shape, generator=generator)).clamp(0, 1), dense


# -- fidelity --------------------------------------------------------------------------------------


def test_psnr_is_that_of_skimage():
    one, dense = clips()
    for ours, a, b in zip(fidelity.psnr_by_frame(one, dense), one, dense, strict=True):
        theirs = peak_signal_noise_ratio(b.double().numpy(), a.double().numpy(), data_range=1.0)
        assert ours == pytest.approx(theirs, abs=1e-4)
    whole = peak_signal_noise_ratio(dense.double().numpy(), one.double().numpy(), data_range=1.0)
    assert fidelity.psnr(one, dense) == pytest.approx(whole, abs=1e-4)
    assert fidelity.psnr(dense, dense) == math.inf


def test_ssim_is_that_of_skimage():
    one, dense = clips()
    for ours, a, b in zip(fidelity.ssim_by_frame(one, dense), one, dense, strict=True):
        theirs = structural_similarity(
            b.double().numpy(),
            a.double().numpy(),
            channel_axis=0,
            data_range=1.0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        assert ours == pytest.approx(theirs, abs=1e-4)
    each = fidelity.ssim_by_frame(one, dense)
    assert fidelity.ssim(one, dense) == pytest.approx(sum(each) / len(each))
    assert fidelity.ssim(dense, dense) == pytest.approx(1.0)


def test_latent_error_by_hand():
    dense = torch.tensor([3.0, 4.0])
    assert fidelity.latent_error(torch.tensor([3.0, 4.5]), dense) == pytest.approx(0.1)
    assert fidelity.latent_error(dense, dense) == 0
    assert fidelity.latent_error(dense, dense * 0) == math.inf
    with pytest.raises(InputError, match=r"one shape, got \[2\] and \[1\]"):
        fidelity.latent_error(dense, dense[:1])


def test_lpips_says_why_it_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert fidelity.lpips() == "torchvision is not installed"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    assert "are not in torch's hub folder" in fidelity.lpips()


# -- distributions ---------------------------------------------------------------------------------


def gaussian(seed, size):
    rng = np.random.default_rng(seed)
    half = rng.standard_normal((size, size))
    return rng.standard_normal(size), half @ half.T / size


def test_fid_of_known_gaussians_is_that_of_scipys_square_root():
    (m1, s1), (m2, s2) = gaussian(0, 12), gaussian(1, 12)
    root = scipy.linalg.sqrtm(s1 @ s2)
    expected = ((m1 - m2) ** 2).sum() + np.trace(s1 + s2 - 2 * root.real)
    got = distribution.frechet_of_moments(*map(torch.from_numpy, (m1, s1, m2, s2)))
    assert got == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("count", [40, 6], ids=["full-rank", "singular"])
def test_fid_of_features(count):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((count, 10)), rng.standard_normal((count + 3, 10)) * 1.5 + 0.3
    s1, s2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    # eigenvalues of the product, which need no square root of a matrix
    between = np.sqrt(np.clip(scipy.linalg.eigvals(s1 @ s2).real, 0, None)).sum()
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * between
    got = distribution.frechet(torch.from_numpy(x), torch.from_numpy(y))
    assert got == pytest.approx(expected, rel=1e-6)
    same = torch.from_numpy(x)
    assert distribution.frechet(same, same) == pytest.approx(0, abs=1e-6)


def test_kid_is_the_formula():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((7, 5)), rng.standard_normal((9, 5)) + 0.5

    def kernel(a, b):
        return (float(a @ b) / 5 + 1) ** 3

    def mean(pairs):
        values = [kernel(a, b) for a, b in pairs]
        return sum(values) / len(values)

    expected = (
        mean([(x[i], x[j]) for i in range(7) for j in range(7) if i != j])
        + mean([(y[i], y[j]) for i in range(9) for j in range(9) if i != j])
        - 2 * mean([(a, b) for a in x for b in y])
    )
    got = distribution.kernel_distance(torch.from_numpy(x), torch.from_numpy(y))
    assert got == pytest.approx(expected, rel=1e-10)
    paired = (
        mean([(x[i], x[j]) for i in range(7) for j in range(7) if i != j])
        + mean([(y[i], y[j]) for i in range(7) for j in range(7) if i != j])
        - 2 * mean([(x[i], y[j]) for i in range(7) for j in range(7) if i != j])
    )
    got = distribution.kernel_distance(torch.from_numpy(x), torch.from_numpy(y[:7]), paired=True)
    assert got == pytest.approx(paired, rel=1e-10)


def test_kid_is_unbiased_where_fid_is_not():
    """Of two samples of one distribution KID is 0 in the mean, and FID is above it."""
    rng = np.random.default_rng(0)
    kids, fids = [], []
    for _ in range(200):
        x, y = (torch.from_numpy(rng.standard_normal((20, 4))) for _ in range(2))
        kids.append(distribution.kernel_distance(x, y))
        fids.append(distribution.frechet(x, y))
    error = np.std(kids) / math.sqrt(len(kids))
    assert abs(np.mean(kids)) < 3 * error
    assert np.mean(fids) > 10 * np.std(fids) / math.sqrt(len(fids))
    assert distribution.kernel_distance(x, x, paired=True) == pytest.approx(0, abs=1e-12)


def test_features_that_do_not_fit():
    for one, other in (
        (torch.zeros(1, 3), torch.zeros(4, 3)),
        (torch.zeros(4, 2), torch.zeros(4, 3)),
    ):
        for measure in (distribution.frechet, distribution.kernel_distance):
            with pytest.raises(InputError, match="features: expected"):
                measure(one, other)


# -- VBench ----------------------------------------------------------------------------------------


def test_temporal_flickering_by_hand():
    # a clip that goes 0, 51, 0 of 255 everywhere: neighbours differ by 51
    level = torch.tensor([0.0, 51 / 255, 0.0])
    clip = level[:, None, None, None].expand(3, 3, 4, 4)
    assert vbench.temporal_flickering(clip) == pytest.approx((255 - 51) / 255)
    assert vbench.temporal_flickering(clip[:1].expand(5, 3, 4, 4)) == 1
    # half of the pixels jump once, over two pairs of frames: (255 - (127.5 + 0) / 2) / 255
    clip = torch.zeros(3, 3, 4, 4)
    clip[1:, :, :2] = 1
    assert vbench.temporal_flickering(clip) == pytest.approx(0.75)
    # numpy, in 8 bits, pair by pair
    frames = clips()[0]
    pixels = (frames.numpy() * 255).round().astype(np.int64).transpose(0, 2, 3, 1)
    each = [np.abs(pixels[i] - pixels[i + 1]).mean() for i in range(2)]
    assert vbench.temporal_flickering(frames) == pytest.approx((255 - np.mean(each)) / 255)
    with pytest.raises(InputError, match="T >= 2"):
        vbench.temporal_flickering(frames[:1])


def test_dimensions_with_weights_say_why_they_are_not_run(monkeypatch, tmp_path):
    assert set(vbench.reasons()) == set(vbench.NEEDS_WEIGHTS)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setenv("VBENCH_CACHE_DIR", str(tmp_path))
    weights = tmp_path / "amt_model/amt-s.pth"
    assert "amt-s.pth" in vbench.reasons()["motion_smoothness"]
    weights.parent.mkdir()
    weights.touch()
    assert "motion_smoothness" not in vbench.reasons()


def test_what_the_package_says_is_read(monkeypatch, tmp_path, capsys):
    """Against a stand-in with the package's interface, since the package is not to be had."""
    import json
    import sys
    import types
    from pathlib import Path

    class VBench:
        def __init__(self, device, full_info_dir, output_path):
            self.out = Path(output_path)

        # as in vbench 0.1.5
        def evaluate(
            self,
            videos_path,
            name,
            prompt_list=(),
            dimension_list=None,
            local=False,
            read_frame=False,
            mode="vbench_standard",
            **kwargs,
        ):
            print("told")
            assert (mode, local) == ("custom_input", True)
            (dimension,) = dimension_list
            if dimension == "dynamic_degree":
                raise RuntimeError("no RAFT")
            videos = sorted(Path(videos_path).iterdir())
            rows = [
                {"video_path": str(v), "video_results": 10.0 * (i + 1)}
                for i, v in enumerate(videos)
            ]
            mean = sum(r["video_results"] for r in rows) / len(rows)
            if dimension == "imaging_quality":
                mean /= 100
            self.out.mkdir(exist_ok=True)
            (self.out / f"{name}_eval_results.json").write_text(
                json.dumps({dimension: [mean, rows]})
            )

    monkeypatch.setitem(sys.modules, "vbench", types.SimpleNamespace(VBench=VBench))
    paths = [tmp_path / name for name in ("a.mp4", "b.mp4")]
    for path in paths:
        path.touch()
    wanted = ["motion_smoothness", "imaging_quality", "dynamic_degree"]
    got = vbench.by_package(paths, wanted, "cpu")
    assert got["motion_smoothness"] == {str(paths[0]): 10.0, str(paths[1]): 20.0}
    assert got["imaging_quality"] == pytest.approx({str(paths[0]): 0.1, str(paths[1]): 0.2})
    assert got["dynamic_degree"] == "vbench failed: RuntimeError: no RAFT"
    assert capsys.readouterr().out == "", "stdout is for our results"


def test_vbenchs_layout():
    scores = {"temporal_flickering": {"a.mp4": 0.5, "b.mp4": 1.0}, "imaging_quality": {}}
    assert vbench.layout(scores) == {
        "temporal_flickering": [
            0.75,
            [
                {"video_path": "a.mp4", "video_results": 0.5},
                {"video_path": "b.mp4", "video_results": 1.0},
            ],
        ]
    }


# -- intervals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [8, 30])
@pytest.mark.parametrize("statistic", [bootstrap.mean, bootstrap.median])
def test_intervals_cover_the_truth_as_often_as_they_say(count, statistic, monkeypatch):
    monkeypatch.setattr(bootstrap, "_RESAMPLES", 600)
    rng = np.random.default_rng(0)
    trials = 300
    covered = 0
    for i in range(trials):
        low, high = bootstrap.interval(rng.normal(2.0, 1.0, count), statistic, seed=i)
        covered += low <= 2.0 <= high
    # 95%, within three standard errors of 300 trials; a median's goes in jumps, and may be wider
    assert 0.95 - 3 * math.sqrt(0.95 * 0.05 / trials) <= covered / trials
    assert covered / trials <= (0.985 if statistic is bootstrap.mean else 1.0)


def test_intervals_of_few_and_of_infinite_samples():
    assert bootstrap.interval([1.0] * 4) is None
    assert bootstrap.interval([3.0] * 5) == (3.0, 3.0)
    low, high = bootstrap.interval([20.0, 21.0, 22.0, 23.0, math.inf], bootstrap.mean)
    assert high == math.inf
    assert 20 <= low < math.inf


def test_signs_are_exchanged_all_ways():
    # of 2^3 ways two are as far from zero as what was found: all plus, and all minus
    assert bootstrap.sign_flip_p([1.0, 2.0, 3.0]) == pytest.approx(2 / 8)
    assert bootstrap.sign_flip_p([1.0, -1.0]) == 1.0
    assert bootstrap.sign_flip_p([0.0, 0.0, 0.0]) == 1.0
    rng = np.random.default_rng(0)
    low = [bootstrap.sign_flip_p(rng.normal(0, 1, 8)) < 0.1 for _ in range(400)]
    assert np.mean(low) == pytest.approx(0.1, abs=3 * math.sqrt(0.09 / 400))
    assert bootstrap.sign_flip_p(rng.normal(1, 1, 40)) < 0.001


def test_the_jackknife_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(0).normal(size=10)
    value, low, high = bootstrap.jackknife(
        [[i] for i in range(10)], lambda kept: float(values[list(kept)].mean())
    )
    reach = 2.262157 * values.std(ddof=1) / math.sqrt(10)  # Student's t, 9 degrees of freedom
    assert (value, low, high) == pytest.approx(
        (values.mean(), values.mean() - reach, values.mean() + reach)
    )
    assert bootstrap.jackknife([[0], [1], [2], [3]], lambda kept: 0.0) is None


# -- semantic --------------------------------------------------------------------------------------


def test_no_caption_tells_where_two_shapes_stand():
    """Why spatial relations are absent; with such a word in the grammar they are to be judged."""
    places = {
        *("above", "below", "beside", "besides", "behind", "before", "beneath", "under", "near"),
        *("next", "between", "inside", "outside", "top", "bottom", "of", "front", "far", "in"),
    }
    assert not places & set(scenes.vocabulary())
    assert all(len(scene.movers) == 1 for scene in scenes.evaluation_scenes())
    assert "no word for where two shapes stand" in semantic.why_no_relation("tiny-wan")
    assert "embedded domain alone" in semantic.why_no_relation("/some/model")
