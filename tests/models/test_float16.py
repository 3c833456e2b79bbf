"""float16: activations that overflow are measured, and the rescaled model is the same function without them."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from torch import nn

from kl_autoencoder import KLAutoencoder
from kl_autoencoder.cli.main import main
from kl_autoencoder.models.half_precision import float16, float16_check
from kl_autoencoder.networks.convolutional import NORM_EPS
from tests.published import PUBLISHED, reduced

STREAM = 1e5  # not a power of two, as the factors of the fix are


def model(published="sd", widths=(16, 32, 32), layers=1, **config):
    """A small network whose norms differ in weight and bias, as in a trained one; activations of order 1."""
    torch.manual_seed(0)
    kinds = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    config = {**reduced(PUBLISHED[published], widths), **kinds, "layers_per_block": layers, **config}
    vae = KLAutoencoder(**config).eval().requires_grad_(False)
    for module in vae.modules():
        if isinstance(module, nn.GroupNorm):
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(std=0.3)
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            module.weight.mul_(1.7)
    return vae


def enlarge(vae, stream=STREAM, inside=3e4):
    """Make the residual streams `stream` and conv1's outputs `inside` times larger; but for eps nothing changes."""
    for name, parameter in vae.named_parameters():
        into_stream = ("coder.conv_in.", ".conv2.", ".to_out.0.")
        along_stream = (".conv_shortcut.bias", "samplers.0.conv.bias")
        if any(layer in name for layer in into_stream) or name.endswith(along_stream):
            parameter.mul_(stream)
        elif ".conv1." in name:
            parameter.mul_(inside)
    return vae


def multiply(vae, name, by):
    """Weight and bias of a layer, wherever there is one of that name."""
    for found, parameter in vae.named_parameters():
        if f".{name}." in f".{found}":
            parameter.mul_(by)


@pytest.fixture(scope="module")
def images():
    """(4, 3, 32, 32): two photographs, noise of the extremes, white."""
    _black, white, *_, noise = float16_check.hard_images(32)
    return torch.cat([*list(float16_check.sample_photographs(32))[:2], noise, white])


def fixed(vae, images):
    return float16.rescaled(vae, float16.measure(vae, images.split(1)))


@torch.no_grad()
def outputs(vae, images, latents):
    """Moments and images by the public methods, in the model's own type, as float32."""
    distribution = vae.encode(images.to(vae.dtype)).latent_dist
    decoded = vae.decode(latents.to(vae.dtype)).sample
    return torch.cat([distribution.mean, distribution.logvar], dim=1).float(), decoded.float()


@torch.no_grad()
def mode(vae, images):
    return vae.encode(images).latent_dist.mode()


def relative(got, wanted):
    return ((got - wanted).abs().max() / (wanted.max() - wanted.min())).item()


def psnr(got, wanted):
    return (-10 * ((got - wanted).square().mean() / (wanted.max() - wanted.min()) ** 2).log10()).item()


OVERFLOWING = {
    "attention and quant convs": lambda: enlarge(model()),
    "16 channels, no quant convs": lambda: enlarge(model("sd3")),
    "no attention": lambda: enlarge(model("no-attention")),
    "shortcuts both ways": lambda: enlarge(model(widths=(32, 16, 48), layers=2)),
    "one level": lambda: enlarge(model(widths=(16,))),
    "a group of one channel": lambda: enlarge(model(norm_num_groups=16)),
}


@pytest.fixture(scope="module", params=OVERFLOWING)
def overflowing(request):
    return OVERFLOWING[request.param]()


class TestRescaled:
    def test_the_same_in_float32_and_fit_for_float16(self, overflowing, images, tmp_path):
        z = mode(overflowing, images)
        wanted = outputs(overflowing, images, z)
        before = outputs(float16.copied(overflowing, torch.float16), images, z)
        assert not any(x.isfinite().all() for x in before)  # black images

        fixed(overflowing, images).save_pretrained(tmp_path)
        for kind in (KLAutoencoder, AutoencoderKL):
            for got, right in zip(outputs(kind.from_pretrained(tmp_path), images, z), wanted, strict=True):
                assert relative(got, right) <= 1e-5
            in_half = kind.from_pretrained(tmp_path, torch_dtype=torch.float16)
            assert in_half.dtype == torch.float16 and in_half.config.force_upcast is False
            for got, right in zip(outputs(in_half, images, z), wanted, strict=True):
                assert got.isfinite().all()
                assert psnr(got, right) >= 50

    def test_leaves_the_margin_and_the_original(self, overflowing, images):
        state = {name: tensor.clone() for name, tensor in overflowing.state_dict().items()}
        after = float16.measure(fixed(overflowing, images), images.split(1))
        assert not after.unsafe()
        assert max(float16.measure(overflowing, images.split(1)).by_layer().values()) > float16.LARGEST
        assert all((tensor == state[name]).all() for name, tensor in overflowing.state_dict().items())

    @pytest.mark.parametrize(
        "places",
        [
            {"to_v": 1e6, "to_out.0.weight": 1e-6},
            {"group_norm": 1e5, "to_q.weight": 1e-5, "to_k.weight": 1e-5, "to_v.weight": 1e-5},
            {"to_q": 1e6, "to_k": 1e-6},
            {"to_q": 1e-6, "to_k": 1e6},
            {"encoder.conv_out": 1e6, "quant_conv.weight": 1e-6},
            {"post_quant_conv": 1e5, "decoder.conv_in.weight": 1e-5},
            {"conv1": 1e6},
        ],
        ids=lambda places: next(iter(places)),
    )
    def test_an_overflow_in_any_other_layer_is_repaired(self, images, places):
        vae, images = model(), images[:2]
        for name, by in places.items():
            layer, _, leaf = name.rpartition(".weight")
            if layer:
                for found, parameter in vae.named_parameters():
                    if f".{found}".endswith(f".{layer}.weight"):
                        parameter.mul_(by)
            else:
                multiply(vae, leaf, by)
        z = mode(vae, images)
        wanted = outputs(vae, images, z)
        half_before = outputs(float16.copied(vae, torch.float16), images, z)
        repaired = fixed(vae, images)
        assert not all(
            x.isfinite().all() and psnr(x, y) > 50 for x, y in zip(half_before, wanted, strict=True)
        )
        for got, right in zip(outputs(repaired, images, z), wanted, strict=True):
            assert relative(got, right) <= 1e-5
        for got, right in zip(
            outputs(float16.copied(repaired, torch.float16), images, z), wanted, strict=True
        ):
            assert psnr(got, right) >= 50

    def test_touches_nothing_that_is_in_range(self, images):
        vae = model()
        repaired = fixed(vae, images)
        assert all((tensor == vae.state_dict()[name]).all() for name, tensor in repaired.state_dict().items())

    def test_shrinks_only_the_groups_beyond_and_no_more_than_needed(self, images):
        vae = model()
        conv = vae.decoder.mid_block.resnets[0].conv1  # 32 channels in 8 groups
        conv.weight[:4] *= 1e5
        conv.bias[:4] *= 1e5
        repaired = fixed(vae, images)
        after = float16.measure(repaired, images.split(1)).largest["decoder.mid_block.resnets.0.conv1"]
        assert float16.LIMIT / 2 < after[:4].max() <= float16.LIMIT
        for name, tensor in repaired.state_dict().items():
            rows = 4 if "decoder.mid_block.resnets.0.conv1" in name else 0
            assert (tensor[rows:] == vae.state_dict()[name][rows:]).all(), name
        ratio = conv.weight[:4] / repaired.decoder.mid_block.resnets[0].conv1.weight[:4]
        assert ratio.unique().numel() == 1 and ratio.unique().log2().frac() == 0

    def test_an_overflow_before_silu_cannot_be_repaired(self, images):
        vae = model()
        vae.decoder.conv_norm_out.weight.mul_(1e5)
        assert float16.measure(fixed(vae, images), images.split(1)).unsafe()[0] == "decoder.conv_norm_out"


class TestMeasure:
    def test_equals_hooks_on_diffusers(self, images):
        vae = enlarge(model())
        plain = AutoencoderKL.from_config(vae.config).eval()
        plain.load_state_dict(vae.state_dict())
        reached = {}

        def hook(name):
            return lambda module, inputs, output: reached.update({name: output.detach()})

        ours = float16.largest_activations(vae, images)
        assert list(ours.values()) == sorted(ours.values(), reverse=True)
        named = dict(plain.named_modules())
        scores = [name for name in ours if name.endswith(".scores")]
        layers = [name for name in ours if name in named]
        assert len(scores) == 2 and {*layers, *scores, float16.WEIGHTS} == set(ours)
        for name in layers:
            named[name].register_forward_hook(hook(name))
        outputs(plain, images, mode(vae, images))
        for name in layers:
            value, bias = reached[name], getattr(named[name], "bias", None)
            alternatives = [value.abs().max()]
            if isinstance(named[name], (nn.Conv2d, nn.Linear)):
                shape = (-1, 1, 1) if isinstance(named[name], nn.Conv2d) else (-1,)
                alternatives.append((value - bias.view(shape)).abs().max())
            assert ours[name] == pytest.approx(max(alternatives).item(), rel=1e-4), name
        for name in scores:
            block = name.removesuffix(".scores")
            q, k = (reached[f"{block}.{p}"].flatten(1, -2) for p in ("to_q", "to_k"))
            wanted = torch.einsum("bic,bjc->bij", q, k).abs().max() / q.shape[-1] ** 0.5
            assert ours[name] == pytest.approx(wanted.item(), rel=1e-4)
        weights = max(parameter.abs().max().item() for parameter in plain.parameters())
        assert ours[float16.WEIGHTS] == pytest.approx(weights)

    def test_more_images_and_latents_only_add(self, images):
        vae = model()
        some, more = (
            float16.measure(vae, [images[:1]]),
            float16.measure(vae, images.split(2), [torch.ones(1, 4, 4, 4) * 9]),
        )
        assert all((more.largest[name] >= some.largest[name] * 0.9999).all() for name in some.largest)
        assert all((more.variance[name] <= some.variance[name] * 1.0001).all() for name in some.variance)
        assert (
            more.by_layer()["post_quant_conv"]
            > float16.measure(vae, images.split(2)).by_layer()["post_quant_conv"]
        )

    def test_leaves_no_hooks(self, images):
        vae = model()
        with pytest.raises(ValueError, match=r"images: shape \(1, 3, 30, 32\); allowed: .* multiples of 4"):
            float16.measure(vae, [images[:1, :, :30]])
        assert not any(module._forward_hooks for module in vae.modules())

    def test_refuses(self, images):
        with pytest.raises(ValueError, match="float16; allowed: float32"):
            float16.measure(float16.copied(model(), torch.float16), images.split(1))
        vae = model()
        vae.decoder.mid_block.resnets[0].conv2.bias[3] = torch.nan
        with pytest.raises(ValueError, match="weight: not finite in torch.float32"):
            float16.measure(vae, images.split(1))
        vae = enlarge(model(), stream=1e38)
        with pytest.raises(ValueError, match="not finite in torch.float32"):
            float16.measure(vae, images.split(1))

    def test_norm_change_is_what_group_norm_does(self):
        x = torch.randn(2, 8, 5, 5, dtype=torch.float64) * torch.tensor([1.0, 0.03]).repeat_interleave(
            4
        ).view(8, 1, 1)
        scale = 2.0**-6

        def reached(x):
            variance = x.unflatten(1, (2, 4)).flatten(2).var(dim=2, unbiased=False).amin(0)
            return float16.Activations(variance={"norm": variance})

        a, b = (F.group_norm(y, 2, eps=NORM_EPS) for y in (x, x * scale))
        wanted = (b / a - 1).abs().max().item()
        assert wanted > 1e-2  # else it says nothing
        assert float16.norm_change(reached(x), reached(x * scale)) == pytest.approx(wanted, rel=1e-6)
        assert float16.norm_change(reached(x), reached(x)) == 0


class TestComparing:
    def test_rounding_stands_for_float16(self, images):
        vae = fixed(enlarge(model()), images)
        broken = enlarge(model())
        others = {
            "true": float16.copied(vae, torch.float16),
            "rounded": float16_check.in_float16(vae),
            "true, broken": float16.copied(broken, torch.float16),
            "rounded, broken": float16_check.in_float16(broken),
        }
        compared = float16_check.compare(vae, others, images.split(1), [float16_check.noise_latents(vae, 32)])
        for true, rounded in zip(compared["true"], compared["rounded"], strict=True):
            assert 50 < true.psnr == pytest.approx(rounded.psnr, abs=1)
        for name in ("true, broken", "rounded, broken"):
            assert [str(difference) for difference in compared[name]] == ["not finite (black)"] * 2

    def test_difference_over_pairs(self):
        a, b = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
        difference = float16_check.Difference()
        for pair in zip(a.split(1), b.split(1), strict=True):
            difference.add(*pair)
        assert difference.relative == pytest.approx(relative(b, a), rel=1e-5)
        assert difference.psnr == pytest.approx(psnr(b, a), rel=1e-5)
        difference.add(a, torch.full_like(a, torch.nan))
        assert difference.relative == torch.inf and difference.psnr == -torch.inf


def run(*arguments):
    return main(["fp16-check", *[str(argument) for argument in arguments], "--size", "32", "--device", "cpu"])


class TestCommand:
    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory):
        path = tmp_path_factory.mktemp("models") / "overflows"
        enlarge(model()).save_pretrained(path)
        (path / "README.md").write_text("a card")
        return path

    @pytest.fixture(scope="class")
    def safe(self, tmp_path_factory):
        path = tmp_path_factory.mktemp("models") / "safe"
        model().save_pretrained(path)
        return path

    def test_unsafe(self, folder, capsys):
        assert run(folder) == 1
        out = capsys.readouterr().out
        largest = max(
            float16.measure(
                KLAutoencoder.from_pretrained(folder),
                [*float16_check.hard_images(32), *float16_check.sample_photographs(32)],
            )
            .by_layer()
            .values()
        )
        value, name = out.splitlines()[1].split()
        assert float(value.replace(",", "")) >= largest * 0.9999 and "decoder" in name
        assert "unsafe in float16" in out and "--fix" in out

    def test_safe(self, safe, capsys):
        assert run(safe) == 0
        out = capsys.readouterr().out
        assert "safe in float16: all" in out and "unsafe" not in out and "force_upcast" in out

    def test_fix(self, folder, images, tmp_path, capsys):
        target = tmp_path / "new" / "fixed"
        assert run(folder, "--fix", "-o", target) == 0
        out = capsys.readouterr().out
        assert "before: unsafe" in out and "after:  safe" in out and out.splitlines()[-1] == str(target)
        assert "before against float32: latents not finite (black), images not finite (black)" in out
        decibels = [float(x) for x in out.split("float16: after")[1].split() if x.replace(".", "").isdigit()]
        assert len(decibels) == 2 and min(decibels) >= 50
        assert float(out.split("differ by ")[1].split()[0]) <= 1e-4

        before, after = KLAutoencoder.from_pretrained(folder), AutoencoderKL.from_pretrained(target)
        assert before.config.force_upcast and after.config.force_upcast is False
        assert after.config.scaling_factor == before.config.scaling_factor
        assert (target / "README.md").read_text() == "a card"
        z = mode(before, images)
        for got, right in zip(outputs(after, images, z), outputs(before, images, z), strict=True):
            assert relative(got, right) <= 1e-4
        capsys.readouterr()
        assert run(target) == 0
        assert "force_upcast" not in capsys.readouterr().out

    def test_a_folder_of_images(self, safe, tmp_path, capsys):
        pixels = torch.randint(
            256, (40, 50, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
        )
        for name in ("a.png", "sub/b.jpg"):
            (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.numpy()).save(tmp_path / "in" / name)
        (tmp_path / "in" / "broken.png").write_bytes(b"no picture")
        assert run(safe, "--images", tmp_path / "in", "--fix", "-o", tmp_path / "out") == 0
        told = capsys.readouterr()
        assert told.err.count("skipped") == 1 and "broken.png" in told.err
        assert "differ by 0 of" in told.out  # nothing was to be done

    def test_refuses(self, safe, tmp_path, capsys):
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "mine").write_text("mine")
        stuck = model()
        stuck.decoder.conv_norm_out.weight.mul_(1e5)
        stuck.save_pretrained(tmp_path / "stuck")
        # activations far from zero that hardly vary: eps decides what the norm gives, and float16 loses them
        flat = model()
        flat.decoder.mid_block.resnets[0].conv1.weight.mul_(0.01)
        flat.decoder.mid_block.resnets[0].conv1.bias.fill_(1e5)
        flat.save_pretrained(tmp_path / "flat")
        (tmp_path / "none").mkdir()
        cases = {
            (safe, "--fix"): "belong together",
            (safe, "-o", tmp_path / "out"): "belong together",
            (safe, "--fix", "-o", tmp_path / "full"): "full: exists already and is not empty",
            (safe, "--fix", "-o", tmp_path / "full" / "mine"): "mine: is a file",
            (safe, "--fix", "-o", safe, "--overwrite"): "is the model itself",
            (
                tmp_path / "stuck",
                "--fix",
                "-o",
                tmp_path / "out",
            ): "cannot bring into range: decoder.conv_norm_out",
            (tmp_path / "flat", "--fix", "-o", tmp_path / "out"): "the rescaled model is not the same",
            (tmp_path / "nothing",): "no such model",
            (safe, "--images", tmp_path / "none"): "no photographs in it",
            (safe, "--size", "30"): "multiples of 4",
        }
        for arguments, message in cases.items():
            capsys.readouterr()
            asked = ["fp16-check", "--size", "32", "--device", "cpu", *map(str, arguments)]
            assert main(asked) == 2, arguments
            err = capsys.readouterr().err
            assert err.count("\n") == 1 and message in err, err
        assert not (tmp_path / "out").exists()
        assert [p.name for p in (tmp_path / "full").iterdir()] == ["mine"]
        assert not any(p.name.startswith(".") for p in tmp_path.iterdir())
