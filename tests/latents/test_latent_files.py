"""Scaling against the pipelines' formulas, statistics against numpy, files there and back."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file

from kl_autoencoder.files import read_tensors
from kl_autoencoder.latents.latent_files import load_latents, save_latents
from kl_autoencoder.latents.statistics import LatentStatistics
from kl_autoencoder.models.scaling import scale, unscale

MEAN, STD = [-1.5, 2.0, 0.25, 0.0], [8.5, 5.0, 0.5, 1.0]
CONFIGS = {
    "sd": {"scaling_factor": 0.18215},
    "sd3": {"scaling_factor": 1.5305, "shift_factor": 0.0609, "latents_mean": None, "latents_std": None},
    "per-channel": {"scaling_factor": 0.5, "shift_factor": None, "latents_mean": MEAN, "latents_std": STD},
}


def latents(batch=3, channels=4, height=5, width=7, seed=0):
    z = torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(seed))
    return z * torch.linspace(0.5, 6, channels).view(-1, 1, 1) + torch.linspace(-3, 9, channels).view(
        -1, 1, 1
    )


class TestScaling:
    def test_sd(self):
        """pipeline_stable_diffusion_img2img.py: scaling_factor * z; pipeline_stable_diffusion.py: z / factor."""
        z = latents()
        assert torch.equal(scale(z, CONFIGS["sd"]), z * 0.18215)
        assert torch.equal(unscale(z, CONFIGS["sd"]), z / 0.18215)

    def test_sd3_and_flux(self):
        """pipeline_stable_diffusion_3_img2img.py and pipeline_flux_img2img.py."""
        z = latents()
        assert torch.equal(scale(z, CONFIGS["sd3"]), (z - 0.0609) * 1.5305)
        assert torch.equal(unscale(z, CONFIGS["sd3"]), (z / 1.5305) + 0.0609)

    def test_sdxl_with_mean_and_std(self):
        """pipeline_stable_diffusion_xl_img2img.py, prepare_latents and the decoding at the end."""
        z, mean, std = latents(), torch.tensor(MEAN).view(1, 4, 1, 1), torch.tensor(STD).view(1, 4, 1, 1)
        assert torch.equal(scale(z, CONFIGS["per-channel"]), (z - mean) * 0.5 / std)
        assert torch.equal(unscale(z, CONFIGS["per-channel"]), z * std / 0.5 + mean)

    @pytest.mark.parametrize("name", CONFIGS)
    @pytest.mark.parametrize(
        "dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.1)]
    )
    def test_round_trip(self, name, dtype, tolerance):
        z = latents().to(dtype)
        back = unscale(scale(z, CONFIGS[name]), CONFIGS[name])
        assert back.dtype == dtype
        assert torch.allclose(back, z, atol=tolerance, rtol=tolerance)
        assert not torch.allclose(scale(z, CONFIGS[name]), z, rtol=0.1)

    def test_a_diffusers_config(self):
        model = AutoencoderKL(scaling_factor=0.5, latents_mean=MEAN, latents_std=STD)
        assert torch.equal(scale(latents(), model.config), scale(latents(), CONFIGS["per-channel"]))

    def test_wrong_channels(self):
        for function in (scale, unscale):
            with pytest.raises(ValueError, match=r"\(B, 4, h, w\) .* not \(3, 5, 5, 7\)"):
                function(latents(channels=5), CONFIGS["per-channel"])


class TestStatistics:
    BATCHES = ((3, 5, 7), (1, 2, 2), (8, 1, 1), (2, 16, 9))

    def parts(self):
        return [latents(b, 4, h, w, seed) for seed, (b, h, w) in enumerate(self.BATCHES)]

    def numpy(self):
        """(C, n): every value of each channel."""
        return np.concatenate(
            [p.double().numpy().transpose(1, 0, 2, 3).reshape(4, -1) for p in self.parts()], 1
        )

    def assert_matches(self, statistics):
        values = self.numpy()
        assert statistics.count == values.shape[1]
        np.testing.assert_allclose(statistics.mean.numpy(), values.mean(1), rtol=1e-13)
        np.testing.assert_allclose(statistics.std.numpy(), values.std(1), rtol=1e-13)
        np.testing.assert_allclose(statistics.shift_factor, values.mean(), rtol=1e-13)
        np.testing.assert_allclose(statistics.scaling_factor, 1 / values.std(), rtol=1e-13)

    def collected(self, parts):
        statistics = LatentStatistics(4)
        for part in parts:
            statistics.update(part)
        return statistics

    def test_equals_numpy(self):
        self.assert_matches(self.collected(self.parts()))

    def test_merge(self):
        parts = self.parts()
        left, right = self.collected(parts[:1]), self.collected(parts[1:])
        left.merge(right)
        left.merge(LatentStatistics(4))
        self.assert_matches(left)
        empty = LatentStatistics(4)
        empty.merge(left)
        self.assert_matches(empty)

    @pytest.mark.parametrize("split", [[1, 3], [0, 4], [2, 1, 1]])
    def test_reduced_over_ranks(self, split):
        """A thread a rank; the sum waits for all of them, as all-reduce does."""
        parts = iter(self.parts())
        ranks = [self.collected([next(parts) for _ in range(n)]) for n in split]
        barrier, given = threading.Barrier(len(ranks)), [None] * len(ranks)

        def reduce(rank):
            def sum_over_ranks(tensor):
                given[rank] = tensor
                barrier.wait(10)
                total = sum(given)
                barrier.wait(10)
                return total

            return ranks[rank].reduced(sum_over_ranks)

        with ThreadPoolExecutor(len(ranks)) as pool:
            for total in pool.map(reduce, range(len(ranks))):
                self.assert_matches(total)

    def test_far_from_zero(self):
        """Where the sum of squares minus the square of the sum would lose every digit."""
        z = latents(64) + 1e6
        statistics = LatentStatistics(4)
        for part in z.split(5):
            statistics.update(part)
        np.testing.assert_allclose(statistics.std.numpy(), z.double().numpy().std((0, 2, 3)), rtol=1e-9)

    def test_the_scaling_factor_gives_unit_variance(self):
        z = latents(64)
        statistics = self.collected([z])
        config = {"scaling_factor": statistics.scaling_factor, "shift_factor": statistics.shift_factor}
        assert float(scale(z, config).std(correction=0)) == pytest.approx(1, abs=1e-5)
        assert float(scale(z, config).mean()) == pytest.approx(0, abs=1e-5)

    def test_half_precision_latents_are_summed_in_double(self):
        z = latents(16).half()
        np.testing.assert_allclose(
            self.collected([z]).mean.numpy(), z.double().numpy().mean((0, 2, 3)), rtol=1e-13
        )

    def test_refused(self):
        statistics = LatentStatistics(4)
        for name in ("mean", "std", "scaling_factor", "shift_factor"):
            with pytest.raises(ValueError, match="no latents"):
                getattr(statistics, name)
        for shape in [(4, 5, 7), (1, 3, 5, 7), (0, 4, 5, 7)]:
            with pytest.raises(ValueError, match=r"\(B, 4, h, w\)"):
                statistics.update(torch.zeros(shape))
        with pytest.raises(ValueError, match="1 of 8 latents are NaN or infinite"):
            statistics.update(torch.tensor([float("nan")] + [0.0] * 7).view(1, 4, 2, 1))
        assert statistics.count == 0
        statistics.update(torch.ones(1, 4, 2, 2))
        with pytest.raises(ValueError, match="all latents are equal"):
            _ = statistics.scaling_factor


class TestFiles:
    def write(self, path, **options):
        parts = [latents(1, 4, 5, 7)[0], latents(1, 4, 2, 9)[0]]
        options = {"config": CONFIGS["sd3"], "model": "some/model", **options}
        save_latents(path, parts, ["a.jpg", "b c.png"], [(33, 55), (16, 70)], **options)
        return parts

    @pytest.mark.parametrize("scaled", [False, True])
    def test_round_trip(self, tmp_path, scaled):
        parts = self.write(tmp_path / "z.safetensors", scaled=scaled)
        got = load_latents(tmp_path / "z.safetensors")
        assert got.names == ["a.jpg", "b c.png"] and got.sizes == [(33, 55), (16, 70)]
        assert got.scaled is scaled and got.model == "some/model" and got.config == CONFIGS["sd3"]
        for z, raw, expected in zip(got.latents, got.raw(), parts, strict=True):
            assert torch.equal(z, expected)
            assert torch.equal(raw, expected / 1.5305 + 0.0609 if scaled else expected)

    def test_parts_of_a_batch(self, tmp_path):
        batch = latents(3).to(memory_format=torch.channels_last).requires_grad_()
        save_latents(
            tmp_path / "z.safetensors", list(batch), ["a", "a", "b"], [(40, 56)] * 3, config=CONFIGS["sd"]
        )
        assert torch.equal(torch.stack(load_latents(tmp_path / "z.safetensors").latents), batch)

    def test_refused(self, tmp_path):
        path = tmp_path / "z.safetensors"
        with pytest.raises(ValueError, match="1 latents, 2 names and 1 sizes"):
            save_latents(path, [torch.zeros(4, 2, 2)], ["a", "b"], [(1, 1)], config={})
        with pytest.raises(ValueError, match=r"a: latents must be \(C, h, w\), not \(1, 4, 2, 2\)"):
            save_latents(path, [torch.zeros(1, 4, 2, 2)], ["a"], [(1, 1)], config={})
        with pytest.raises(ValueError, match="no tensors"):
            save_latents(path, [], [], [], config={})
        assert not list(tmp_path.iterdir())

    def test_not_a_latent_file(self, tmp_path):
        path = tmp_path / "z.safetensors"
        with pytest.raises(FileNotFoundError, match=r"z\.safetensors"):
            load_latents(path)
        self.write(path)
        tensors, metadata = read_tensors(path)
        (key,) = set(metadata) - {"format"}
        lacking = {k: v for k, v in json.loads(metadata[key]).items() if k != "sizes"}
        for broken in ({}, {key: "{"}, {key: "[]"}, {key: json.dumps(lacking)}):
            save_file(tensors, tmp_path / "broken.safetensors", metadata=broken)
            with pytest.raises(ValueError, match=r"broken\.safetensors: not a file of latents"):
                load_latents(tmp_path / "broken.safetensors")
        tensors.popitem()
        save_file(tensors, tmp_path / "broken.safetensors", metadata=metadata)
        with pytest.raises(ValueError, match=r"broken\.safetensors: not a file of latents"):
            load_latents(tmp_path / "broken.safetensors")

    @pytest.mark.parametrize("key, value, told", [
        ("names", "ab", "names: 'ab'; allowed: a list of names"),
        ("sizes", [[8, 8], [8, 0]], r"sizes: \[\[8, 8\], \[8, 0\]\]; allowed: 2 times"),
        ("sizes", [[8, 8]], "sizes: .*allowed: 2"), ("sizes", [[8, 2.5], [8, 8]], "sizes: .*allowed: 2"),
        ("scaled", 1, "scaled: 1; allowed: bool"), ("model", None, "model: None; allowed: str"),
        ("config", [], r"config: \[\]; allowed: dict"),
        ("config", {"scaling_factor": "x" * 999}, "scaling_factor: 'xxx"),
        ("config", {"scaling_factor": 1.0, "latents_std": [1.0, 0.0]}, r"latents_std: \[1.0, 0.0\]; allowed:"),
        ("config", {"scaling_factor": 1.0, "latents_mean": [0.0] * 5}, "latents_mean: 5 values; allowed: one"),
    ])  # fmt: skip
    def test_entries_are_checked_by_name(self, tmp_path, key, value, told):
        path = tmp_path / "z.safetensors"
        two = [torch.randn(4, 2, 2), torch.randn(4, 1, 1)]
        save_latents(path, two, ["a", "b"], [(8, 8), (4, 4)], config={"scaling_factor": 1.0})
        tensors, metadata = read_tensors(path)
        (name,) = set(metadata) - {"format"}
        save_file(tensors, path, metadata={name: json.dumps(json.loads(metadata[name]) | {key: value})})
        with pytest.raises(ValueError, match=rf"z\.safetensors: {told}") as error:
            load_latents(path)
        assert len(str(error.value)) < 300
