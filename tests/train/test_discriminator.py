"""PatchDiscriminator: shapes, patches, independence of samples, and what training does with it."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from train.autoencoder.adversarial.discriminator import PatchDiscriminator


@pytest.fixture
def small():
    torch.manual_seed(0)
    return PatchDiscriminator(channels=8)


def images(batch=2, size=(48, 56), channels=3):
    return torch.rand(batch, channels, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_parameters_are_those_of_a_count_by_hand():
    counts = [3 * 64 * 16 + 64, 64 * 128 * 16 + 128, 128 * 256 * 16 + 256, 256 * 512 * 16 + 512, 512 * 16 + 1]
    model = PatchDiscriminator()
    assert sum(p.numel() for p in model.parameters()) == sum(counts) == 2_764_737
    assert not list(model.buffers())


def test_channels_double_up_to_eight_times():
    convolutions = [m for m in PatchDiscriminator(1, 4, 5).modules() if isinstance(m, torch.nn.Conv2d)]
    widths = [(m.in_channels, m.out_channels, m.stride[0]) for m in convolutions]
    assert widths == [(1, 4, 2), (4, 8, 2), (8, 16, 2), (16, 32, 2), (32, 32, 2), (32, 32, 1), (32, 1, 1)]


@pytest.mark.parametrize(
    "layers, size, logits",
    [
        (1, (6, 9), (1, 2)),
        (2, (64, 33), (14, 6)),
        (3, (256, 256), (30, 30)),
        (3, (24, 31), (1, 1)),
        (4, (50, 96), (1, 4)),
    ],
)
def test_shape(layers, size, logits):
    assert PatchDiscriminator(3, 2, layers)(images(2, size)).shape == (2, 1, *logits)


@pytest.mark.parametrize("layers, field", [(1, 16), (2, 34), (3, 70), (4, 142)])
def test_a_logit_sees_a_patch(layers, field):
    """The pixels that move a logit in the middle, by gradient: a full square of `field` pixels."""
    model = PatchDiscriminator(3, 2, layers).double()
    for p in model.parameters():
        p.data.abs_()  # so that no path cancels another
    size = 2 * field
    x = (images(1, (size, size)).double().abs() + 0.1).requires_grad_()
    logits = model(x)
    middle = logits.shape[-1] // 2
    logits[0, 0, middle, middle].backward()
    seen = x.grad[0].abs().amax(0) > 0
    rows, columns = seen.any(1).nonzero().flatten(), seen.any(0).nonzero().flatten()
    assert rows[-1] - rows[0] + 1 == columns[-1] - columns[0] + 1 == field
    assert seen.sum() == field**2


def test_samples_do_not_see_each_other(small):
    x, other = images(3).requires_grad_(), images(3).clone()
    other[1:] = other[1:].flip(0).neg()
    torch.testing.assert_close(small(x)[0], small(other)[0], rtol=0, atol=0)
    small(x)[0].sum().backward()
    assert x.grad[0].any() and not x.grad[1:].any()


def test_one_forward_over_real_and_fake_equals_two(small):
    real, fake = images(2), images(2).flip(-1)
    both = small(torch.cat([real, fake]))
    torch.testing.assert_close(both, torch.cat([small(real), small(fake)]), rtol=1e-5, atol=1e-7)


def test_weights_start_small_and_so_do_the_logits():
    torch.manual_seed(0)
    model = PatchDiscriminator()
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any()
        elif p.numel() > 50_000:
            assert abs(p.mean()) < 3e-4 and abs(p.std() - 0.02) < 3e-4
    logits = model(images(2, (64, 64)))
    assert 1e-4 < logits.std() < 0.1 and logits.abs().max() < 0.5


def test_state_dict_reloads_strictly(small):
    other = PatchDiscriminator(channels=8)
    other.load_state_dict(small.state_dict(), strict=True)
    assert other(images()).equal(small(images()))
    with pytest.raises(RuntimeError, match="size mismatch"):
        PatchDiscriminator(channels=4).load_state_dict(small.state_dict())


def gradients(model, forward) -> list[torch.Tensor]:
    x = images().requires_grad_()
    model.zero_grad()
    logits = forward(x)
    torch.nn.functional.softplus(-logits).mean().backward()
    return [logits.detach(), x.grad, *(p.grad.clone() for p in model.parameters())]


def test_checkpointing_changes_nothing(small):
    plain = gradients(small, small)
    torch.testing.assert_close(gradients(small, lambda x: checkpoint(small, x, use_reentrant=False)), plain)


def test_compiles_without_a_graph_break(small):
    plain = gradients(small, small)
    torch.testing.assert_close(gradients(small, torch.compile(small, fullgraph=True, backend="eager")), plain)


def test_channels_last_changes_nothing(small):
    plain = gradients(small, small)
    last = copy.deepcopy(small).to(memory_format=torch.channels_last)
    theirs = gradients(last, lambda x: last(x.contiguous(memory_format=torch.channels_last)))
    torch.testing.assert_close(theirs, plain, rtol=1e-4, atol=1e-6)


def test_autocast_stays_near_float32(small):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = small(images())
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), small(images()), rtol=0.1, atol=1e-3)


def test_a_gradient_penalty_can_be_differentiated(small):
    """R1 = |d logits / d images|^2, its gradient against central differences."""
    small = small.double()
    weight = small.main[0].weight

    def penalty():
        x = images(1, (24, 24)).double().requires_grad_()
        (gradient,) = torch.autograd.grad(small(x).sum(), x, create_graph=True)
        return gradient.square().sum()

    (ours,) = torch.autograd.grad(penalty(), weight)
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2), dtype=torch.double)
    values, step = [], 1e-6
    for sign in (1, -1):
        weight.data += sign * step * direction
        values.append(penalty().item())
        weight.data -= sign * step * direction
    assert (ours * direction).sum().item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5)


def test_it_learns_to_tell_sharp_from_blurred():
    torch.manual_seed(0)
    model = PatchDiscriminator(channels=8, layers=2)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3, betas=(0.5, 0.9))
    generator = torch.Generator().manual_seed(3)
    for _ in range(60):
        real = torch.rand(4, 3, 32, 32, generator=generator) * 2 - 1
        fake = torch.nn.functional.avg_pool2d(real, 3, 1, 1)
        on_real, on_fake = model(torch.cat([real, fake])).chunk(2)
        loss = (1 - on_real).relu().mean() + (1 + on_fake).relu().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5  # 2 at the start
    assert (on_real > 0).float().mean() > 0.95 and (on_fake < 0).float().mean() > 0.95


@pytest.mark.parametrize("arguments", [{"channels": 0}, {"layers": 0}, {"in_channels": -1}, {"layers": 2.0}])
def test_arguments(arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=f"discriminator {name}: .*allowed: whole numbers from 1 on"):
        PatchDiscriminator(**arguments)


@pytest.mark.parametrize("shape", [(2, 4, 64, 64), (3, 64, 64), (1, 3, 23, 64), (1, 3, 64, 23)])
def test_images_that_do_not_fit_are_refused(small, shape):
    with pytest.raises(ValueError, match=r"discriminator: images of shape .*\(B, 3, H, W\) .* at least 24"):
        small(torch.zeros(shape))
