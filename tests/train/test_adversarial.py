"""The adversarial objective: formulas against their definitions, gradients against one plain graph, isolation."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from tests.conftest import backbone_missing
from tests.processes import finish, start_ranks
from tests.train.runs import make, records, small_config, weights
from train.autoencoder.adversarial import losses
from train.autoencoder.adversarial.discriminator import PatchDiscriminator


def logits(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 1, 3, 4, generator=generator) * 2, torch.randn(2, 1, 3, 4, generator=generator) * 2


# ------------------------------------------------------------------ formulas


def test_hinge_and_logistic_losses_are_those_of_their_papers():
    real, fake = logits()
    pairs = list(zip(real.flatten().tolist(), fake.flatten().tolist(), strict=True))
    hinge = sum(max(0, 1 - r) + max(0, 1 + f) for r, f in pairs) / len(pairs) / 2
    # cross-entropy of sigmoid(logit) with labels 1 and 0
    logistic = -sum(math.log(1 / (1 + math.exp(-r))) + math.log(1 - 1 / (1 + math.exp(-f))) for r, f in pairs)
    assert losses.discriminator_loss("hinge", real, fake).item() == pytest.approx(hinge, rel=1e-5)
    assert losses.discriminator_loss("logistic", real, fake).item() == pytest.approx(
        logistic / len(pairs) / 2, rel=1e-5
    )
    for kind, each in (("hinge", lambda f: -f), ("logistic", lambda f: -math.log(1 / (1 + math.exp(-f))))):
        mean = sum(each(f) for _, f in pairs) / len(pairs)
        assert losses.generator_loss(kind, fake).item() == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("kind", ["hinge", "logistic"])
def test_the_two_losses_push_the_logits_of_fakes_in_opposite_directions(kind):
    real, fake = (x.requires_grad_() for x in logits(1))
    losses.discriminator_loss(kind, real, fake).backward()
    assert (real.grad <= 0).all() and (fake.grad >= 0).all() and real.grad.any() and fake.grad.any()
    fake.grad = None
    losses.generator_loss(kind, fake).backward()
    assert (fake.grad < 0).all()


def test_losses_of_half_precision_logits_are_computed_in_float32():
    real, fake = (x.half() for x in logits(2))
    for kind in ("hinge", "logistic"):
        for loss in (
            losses.discriminator_loss(kind, real, fake),
            losses.generator_loss(kind, fake),
            losses.lecam(real, fake, torch.tensor(0.1), torch.tensor(-0.2)),
        ):
            assert loss.dtype == torch.float32
    assert losses.generator_loss("logistic", torch.full((1,), -6e4).half()).item() == pytest.approx(
        6e4, rel=1e-3
    )


def test_lecam_pulls_real_and_fake_logits_towards_each_others_average():
    real, fake = logits(3)
    expected = (real - -0.25).pow(2).mean() + (fake - 0.5).pow(2).mean()
    ours = losses.lecam(real, fake, torch.tensor(0.5), torch.tensor(-0.25))
    torch.testing.assert_close(ours, expected)


def test_r1_of_a_linear_discriminator_is_half_the_squared_norm_of_its_weights():
    weight = torch.randn(3, 5, 7, requires_grad=True, generator=torch.Generator().manual_seed(4))
    images = torch.randn(6, 3, 5, 7).requires_grad_()
    penalty = losses.r1_penalty((images * weight).sum(dim=(1, 2, 3)) + 3, images)
    torch.testing.assert_close(penalty, 0.5 * weight.square().sum())
    penalty.backward()  # through the gradient: d/dw of |w|^2 / 2
    torch.testing.assert_close(weight.grad, weight.detach())


def test_r1_and_its_gradient_against_finite_differences():
    torch.manual_seed(0)
    network = PatchDiscriminator(channels=2, layers=1).double()
    for p in network.parameters():
        p.data.normal_(0, 0.3)
    images = torch.randn(2, 3, 6, 6, dtype=torch.double)

    def penalty():
        x = images.clone().requires_grad_()
        return losses.r1_penalty(network(x), x)

    squares, h = 0.0, 1e-5
    for i in range(images.numel()):
        values = []
        for sign in (1, -1):
            moved = images.clone()
            moved.view(-1)[i] += sign * h
            values.append(network(moved).sum().item())
        squares += ((values[0] - values[1]) / (2 * h)) ** 2
    assert penalty().item() == pytest.approx(0.5 * squares / 2, rel=1e-3)  # float32 logits

    parameters = list(network.parameters())
    gradients = torch.autograd.grad(penalty(), parameters, allow_unused=True)
    directions = [torch.randn_like(p) for p in parameters]
    ours = sum((g * d).sum().item() for g, d in zip(gradients, directions, strict=True) if g is not None)
    values, h = [], 1e-4
    for sign in (1, -1):
        for p, d in zip(parameters, directions, strict=True):
            p.data += sign * h * d
        values.append(penalty().item())
        for p, d in zip(parameters, directions, strict=True):
            p.data -= sign * h * d
    assert ours == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-2)


def test_the_adaptive_weight_is_clamped_and_finite():
    three, four, zero = torch.full((9,), 1.0), torch.full((4,), 2.0), torch.zeros(5)  # named by their norms
    assert losses.adaptive_weight(three, four, 9.0).item() == pytest.approx(3 / (4 + 1e-4))
    assert losses.adaptive_weight(three, four, 0.5).item() == 0.5
    assert losses.adaptive_weight(three, zero, 9.0).item() == 9
    for none in (four, zero):
        assert losses.adaptive_weight(zero, none, 9.0).item() == 0
    for bad in (math.nan, math.inf):
        for pair in ((three * bad, four), (three, four * bad), (three * bad, four * bad)):
            assert 0 <= losses.adaptive_weight(*pair, 9.0).item() <= 9


# ------------------------------------------------------------------ against one plain graph


def adversarial(**values):
    return {"weight": 0.5, "disc_start": 0, "channels": 4, "lecam_weight": 0.1, "r1_weight": 0.1} | values


def loss_section(net=None, **values):
    perceptual = {"weight": 0.7 if net else 0.0, "net": net or "vgg"}
    return {"reconstruction": "laplace", "perceptual": perceptual, "kl": {"weight": 0.1},
            "adversarial": adversarial(**values)}  # fmt: skip


def all_parameters(run):
    return [p for player in run.task.players for p in player.parameters]


def keep_gradients(run):
    """Take the optimizers' updates out of a run, so that a step leaves its gradients for the test to read."""

    def norm_alone(player):
        return {player.gradient_norm: torch.ones(())} if run.accelerator.sync_gradients else {}

    for player in run.task.players:
        player.update = partial(norm_alone, player)
    return run


def inputs(run, batch):
    images = batch["images"].to(memory_format=torch.channels_last)
    return images, run.task.noise(batch)


ANCHORS = [0.3, -0.2]


def lively(run):
    """Give the discriminator larger weights, lest its terms be lost beside the others, and LeCam its anchors."""
    torch.manual_seed(7)
    for p in run.task.adversary.player.parameters:
        p.data.normal_(0, 0.15)
    run.task.adversary.lecam_anchors = torch.tensor(ANCHORS)
    return run


def whole_graph(run, images, noise):
    """The objective written again, in one graph; returns it, the adaptive weight and the reconstruction."""
    config, vae, network = run.config.loss, run.task.vae, run.task.adversary.player.network
    posterior = vae.encode(images).latent_dist
    output = vae.decode(posterior.mean + posterior.std * noise).sample
    scale = run.task.model.log_scale
    nll = ((images - output).abs() / scale.exp() + scale + math.log(2)).mean()
    if run.task.objective.perceptual is not None:
        nll = nll + config.perceptual.weight * run.task.objective.perceptual(output, images).mean()
    variance = posterior.logvar.exp()
    kl = 0.5 * (posterior.mean**2 + variance - 1 - posterior.logvar).sum() / images.numel()
    fooled = -network(output).mean()
    last, d = vae.decoder.conv_out.weight, images[0].numel()
    # as in latent diffusion the nll is a sum over an image and the clamp is 1e4; then all is divided by d
    norms = [torch.autograd.grad(term, last, retain_graph=True)[0].norm() for term in (nll * d, fooled)]
    adaptive = min((norms[0] / (norms[1] + 1e-4)).item(), 1e4) / d if config.adversarial.adaptive else 1.0
    total = nll + config.kl.weight * kl + config.adversarial.weight * adaptive * fooled
    return total, adaptive, output


@pytest.mark.parametrize("adaptive", ["adaptive", "clamped", "fixed"])
@pytest.mark.parametrize("net", [None, "squeeze"], ids=["", "lpips"])
def test_the_autoencoders_gradients_are_those_of_one_whole_graph(small, tmp_path, net, adaptive):
    if net and backbone_missing(net):
        pytest.skip(f"the LPIPS backbone {net} is not in TORCH_HOME")
    loss = loss_section(net, adaptive=adaptive != "fixed")
    run = lively(keep_gradients(make(small(tmp_path, loss=loss))))
    if adaptive == "clamped":
        run.task.adversary.player.parameters[-2].data.mul_(0.01)  # the weight of the logits
    images, noise = inputs(run, next(iter(run.loader)))
    total, weight, _ = whole_graph(run, images, noise)
    expected = torch.autograd.grad(total, run.task.autoencoder.parameters)
    with run.accelerator.accumulate(run.task.autoencoder.network, run.task.adversary.player.network):
        terms, *_ = run.task.autoencoder_step(run.step, images, noise)
    assert terms["loss"].item() == pytest.approx(total.item(), rel=1e-5)
    assert terms.get("adaptive_weight", torch.tensor(1.0)).item() == pytest.approx(weight, rel=1e-4)
    assert (weight == 1e4 / (3 * 32 * 32)) == (adaptive == "clamped") and weight > 0.05
    names = [name for name, _ in run.task.model.named_parameters()]
    ours = dict(zip(names, (p.grad for p in run.task.autoencoder.parameters), strict=True))
    assert_near(ours, dict(zip(names, expected, strict=True)), 1e-4)


def test_the_adversarial_term_is_felt(small, tmp_path):
    """The gradients above would also agree if neither side had the term."""
    gradients = []
    for value in (0.5, 1.0):
        config = small(tmp_path / str(value), loss=loss_section(weight=value))
        run = lively(keep_gradients(make(config)))
        with run.accelerator.accumulate(run.task.autoencoder.network, run.task.adversary.player.network):
            run.task.autoencoder_step(run.step, *inputs(run, next(iter(run.loader))))
        gradients.append(run.task.vae.decoder.conv_in.weight.grad)
    assert (gradients[1] - gradients[0]).norm() > 0.1 * gradients[0].norm()


@pytest.mark.parametrize("kind", ["hinge", "logistic"])
def test_the_discriminators_gradients_are_those_of_one_whole_graph(small, tmp_path, kind):
    run = lively(keep_gradients(make(small(tmp_path, loss=loss_section(loss=kind)))))
    images, noise = inputs(run, next(iter(run.loader)))
    _, _, output = whole_graph(run, images, noise)
    x, (real_anchor, fake_anchor) = images.clone().requires_grad_(), run.task.adversary.lecam_anchors
    real, fake = run.task.adversary.player.network(x), run.task.adversary.player.network(output.detach())
    each = {"hinge": torch.relu, "logistic": nn.functional.softplus}[kind]
    margin = 1 if kind == "hinge" else 0
    expected = 0.5 * (each(margin - real).mean() + each(margin + fake).mean())
    expected = expected + 0.1 * ((real - fake_anchor) ** 2).mean() + 0.1 * ((fake - real_anchor) ** 2).mean()
    (slope,) = torch.autograd.grad(real.sum(), x, create_graph=True)
    # R1 comes every 16th step, 16 times as strong
    expected = expected + 0.1 * 16 * 0.5 * slope.square().sum() / len(x)
    gradients = torch.autograd.grad(expected, run.task.adversary.player.parameters)
    with run.accelerator.accumulate(run.task.autoencoder.network, run.task.adversary.player.network):
        _, reconstruction, *_ = run.task.autoencoder_step(run.step, images, noise)
        terms = run.task.adversary.micro_batch(run.step, images, reconstruction)
    assert terms["discriminator/loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    for p, wanted in zip(run.task.adversary.player.parameters, gradients, strict=True):
        torch.testing.assert_close(p.grad, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())
    torch.testing.assert_close(
        run.task.adversary.lecam_anchors,
        0.99 * torch.tensor([real_anchor, fake_anchor]) + 0.01 * torch.stack([real.mean(), fake.mean()]),
    )
    assert not images.requires_grad


@pytest.mark.parametrize("options", [{}, {"mixed_precision": "bf16"}, {"gradient_checkpointing": "blocks"}],
                         ids=lambda options: next(iter(options), "plain"))  # fmt: skip
def test_neither_step_touches_the_gradients_of_the_other_network(small, tmp_path, options):
    """What the other network's `.grad` holds stays the same to the bit, and None stays None."""
    run = lively(keep_gradients(make(small(tmp_path, loss=loss_section(), train=options))))
    images, noise = inputs(run, next(iter(run.loader)))
    for left in (None, 3.0):
        for p in all_parameters(run):
            p.grad = left and torch.full_like(p, left)
        before = [left and p.grad.clone() for p in run.task.adversary.player.parameters]
        with run.accelerator.accumulate(run.task.autoencoder.network, run.task.adversary.player.network):
            _, reconstruction, *_ = run.task.autoencoder_step(run.step, images, noise)
        assert untouched(run.task.adversary.player.parameters, before)
        assert not reconstruction.requires_grad
        assert all(p.grad is not None and p.grad.isfinite().all() for p in run.task.autoencoder.parameters)
        assert all(
            (p.grad != (left or 0)).any()
            for p in (run.task.autoencoder.parameters[0], run.task.autoencoder.parameters[-1])
        )
        before = [p.grad.clone() for p in run.task.autoencoder.parameters]
        with run.accelerator.accumulate(run.task.autoencoder.network, run.task.adversary.player.network):
            run.task.adversary.micro_batch(run.step, images, reconstruction)
        assert untouched(run.task.autoencoder.parameters, before)
        assert all(
            p.grad is not None and (p.grad != (left or 0)).any() for p in run.task.adversary.player.parameters
        )


def untouched(parameters, before):
    pairs = zip(parameters, before, strict=True)
    return all(p.grad is None if was is None else torch.equal(p.grad, was) for p, was in pairs)


# ------------------------------------------------------------------ when


def count_calls(run):
    calls = []
    run.task.adversary.player.network.register_forward_hook(lambda *_: calls.append(run.step))
    return calls


def test_before_its_start_the_discriminator_costs_nothing(small, tmp_path):
    """The discriminator is not called and does not move; the autoencoder trains as in a run without one."""
    train = {"steps": 4, "gradient_accumulation": 2}
    run = make(small(tmp_path / "with", loss=loss_section(disc_start=3), train=train))
    first, calls = [p.clone() for p in run.task.adversary.player.parameters], count_calls(run)
    for micro_batches in run.batches():
        if run.step == 3:
            break
        run.train_step(micro_batches)
        assert not calls and not run.task.adversary.player.optimizer.state
    assert all(
        torch.equal(p, was) for p, was in zip(run.task.adversary.player.parameters, first, strict=True)
    )
    without = make(small(tmp_path / "without", loss=loss_section(weight=0.0), train=train))
    assert without.task.adversary is None
    for micro_batches in without.batches():
        if without.step == 3:
            break
        without.train_step(micro_batches)
    for ours, theirs in (
        (run.task.model, without.task.model),
        (run.task.ema.network, without.task.ema.network),
    ):
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    run.train_step(next(run.batches()))
    assert set(calls) == {3} and run.task.adversary.player.optimizer.state


def test_the_discriminator_trains_alone_before_the_autoencoder_feels_it(small, tmp_path):
    """The discriminator moves from disc_start on; the autoencoder is a plain run's for disc_warmup_steps more."""
    values = {"disc_start": 1, "disc_warmup_steps": 2, "ramp_steps": 3}
    train = {"steps": 8}
    run = make(small(tmp_path / "with", loss=loss_section(**values), train=train))
    plain = make(small(tmp_path / "plain", loss=loss_section(weight=0.0), train=train))
    felt, moved, factors = [], [], []
    for ours, theirs in zip(run.batches(), plain.batches(), strict=True):
        before = [p.clone() for p in run.task.adversary.player.parameters]
        factors.append(run.task.adversary.weight(run.step))
        run.train_step(ours)
        plain.train_step(theirs)
        pairs = zip(run.task.model.parameters(), plain.task.model.parameters(), strict=True)
        felt.append(any(not torch.equal(a, b) for a, b in pairs))
        moved.append(
            any(
                not torch.equal(a, b)
                for a, b in zip(run.task.adversary.player.parameters, before, strict=True)
            )
        )
    assert moved == [False] + [True] * 7
    assert felt == [False] * 3 + [True] * 5
    assert factors == pytest.approx([0, 0, 0, 0.125, 0.25, 0.375, 0.5, 0.5])


def test_the_ramp_multiplies_what_the_autoencoder_feels(small, tmp_path):
    """The adversarial gradient at the output: a third, two thirds and all of it over a ramp of two steps."""
    config = small(tmp_path, loss=loss_section(ramp_steps=2, adaptive=False, r1_weight=0.0))
    shares = []
    for step in (0, 1, 2, 50):
        run = lively(keep_gradients(make(config)))
        images, noise = inputs(run, next(iter(run.loader)))
        output = run.task.autoencoder.network(images, noise)
        reconstruction = output.images.detach().requires_grad_()
        gradient, *_ = run.task.adversary.gradient(step, reconstruction, output.features, None)
        shares.append(gradient.norm().item())
    assert shares == pytest.approx([shares[3] / 3, shares[3] * 2 / 3, shares[3], shares[3]], rel=1e-5)


def test_the_discriminator_can_have_its_own_learning_rate(small, tmp_path):
    run = make(small(tmp_path, loss=loss_section(learning_rate=5e-4)))
    for player in run.task.players:
        player.begin(run.step)
    ratio = (
        run.task.adversary.player.optimizer.param_groups[0]["lr"]
        / run.task.autoencoder.optimizer.param_groups[0]["lr"]
    )
    assert ratio == pytest.approx(5e-4 / 2e-3)


# ------------------------------------------------------------------ accumulation, precision, ranks, compilation


def both_gradients(run, batches):
    """The gradients of a step over these micro-batches, of both networks by name."""
    keep_gradients(lively(run)).train_step(batches)
    networks = {
        "autoencoder": run.task.model,
        "discriminator": run.accelerator.unwrap_model(run.task.adversary.player.network),
    }
    return {f"{n}.{k}": p.grad.clone() for n, net in networks.items() for k, p in net.named_parameters()}


def assert_near(ours, expected, tolerance):
    """Compare relative to each tensor's norm, or to 1e-3 if it is less: a bias whose terms cancel is rounding."""
    assert ours.keys() == expected.keys()
    for name, wanted in expected.items():
        scale = max(wanted.norm().item(), 1e-3)
        assert (ours[name] - wanted).norm().item() < tolerance * scale, name


def split(batch, parts):
    pieces = zip(batch["images"].chunk(parts), batch["sample"].chunk(parts), strict=True)
    return [{"images": images, "sample": sample, "skipped": []} for images, sample in pieces]


def test_micro_batches_give_the_gradients_of_one_large_batch(small, tmp_path):
    """True of terms that are means over images: all but the adaptive weight. LeCam's anchors move once a step."""
    loss = loss_section(adaptive=False)
    one = make(small(tmp_path / "one", loss=loss))
    batch = next(iter(one.loader))
    expected = both_gradients(one, [batch])
    assert not torch.equal(one.task.adversary.lecam_anchors, torch.tensor(ANCHORS))
    train = {"steps": 6, "gradient_accumulation": 4}
    four = make(small(tmp_path / "four", loss=loss, train=train, data={"batch_size": 1}))
    assert_near(both_gradients(four, split(batch, 4)), expected, 1e-4)
    torch.testing.assert_close(four.task.adversary.lecam_anchors, one.task.adversary.lecam_anchors)


@pytest.mark.parametrize("options, tolerance", [
    ({"gradient_checkpointing": "blocks"}, 1e-5), ({"gradient_checkpointing": "no"}, 1e-5),
    ({"mixed_precision": "bf16"}, 0.2),
], ids=["recomputed", "kept", "bf16"])  # fmt: skip
def test_the_ways_to_run_a_step_give_the_same_gradients(small, tmp_path, options, tolerance):
    found = []
    for name, more in (("plain", {}), ("other", options)):
        config = small(tmp_path / name, loss=loss_section(adaptive=False), train={"steps": 6, **more})
        run = make(config)
        found.append(both_gradients(run, [next(iter(run.loader))]))
    if "mixed_precision" in options:  # the gradient of a single tensor may be mostly rounding
        found = [{network: whole(gradients, network) for network in NETWORKS} for gradients in found]
    assert_near(*found, tolerance)


NETWORKS = ("autoencoder", "discriminator")


def whole(gradients, network):
    return torch.cat([g.flatten() for name, g in gradients.items() if name.startswith(network)])


def test_r1_is_float32_under_autocast(small, tmp_path):
    run = lively(make(small(tmp_path, loss=loss_section(), train={"steps": 6, "mixed_precision": "bf16"})))
    kinds = []
    for module in run.task.adversary.player.network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda module, given, out: kinds.append(out.dtype))
    images, _ = inputs(run, next(iter(run.loader)))
    run.task.adversary.player.network(images)
    assert set(kinds) == {torch.bfloat16}
    kinds.clear()
    run.task.adversary.r1(images)
    assert set(kinds) == {torch.float32}


def test_the_adaptive_weight_survives_half_precision(small, tmp_path):
    """The gradient of a mean over a real batch is some 1e-7, which is 0 in float16."""
    run = make(small(tmp_path, loss=loss_section()))
    images, noise = inputs(run, next(iter(run.loader)))
    output = run.task.autoencoder.network(images, noise)
    generator = torch.Generator().manual_seed(0)
    pair = [torch.randn(output.images.shape, generator=generator) * size for size in (3e-9, 1e-9)]
    large = [1e6 * g for g in pair]  # enough for the 1e-4 not to matter
    exact = run.task.adversary.adaptive_weight(output.features, *large)
    half = run.task.adversary.adaptive_weight(output.features.half(), *large)
    small_ones = run.task.adversary.adaptive_weight(output.features.half(), *pair)
    last = run.task.vae.decoder.conv_out.weight
    norms = [torch.autograd.grad(output.images, last, g, retain_graph=True)[0].norm() for g in pair]
    assert half.item() == pytest.approx(exact.item(), rel=1e-2)
    assert small_ones.item() == pytest.approx((norms[0] / (norms[1] + 1e-4)).item(), rel=1e-2)


def test_a_gradient_scaler_and_accumulation_go_together(small, tmp_path):
    """As in fp16 on a GPU: each network's gradients are divided once, by the scale that they were computed with."""
    train, ends = {"steps": 2, "gradient_accumulation": 2}, []
    for name in ("plain", "scaled"):
        scaler = torch.amp.GradScaler("cpu", 2.0**10, growth_interval=1) if name == "scaled" else None
        run = make(small(tmp_path / name, loss=loss_section(), train=train, optimizer={"warmup_steps": 0}))
        run.accelerator.scaler = scaler
        taken = run.batches()
        for _ in range(2):
            run.train_step(next(taken))
        ends.append([p.detach().clone() for p in all_parameters(run)])
    for plain, scaled in zip(*ends, strict=True):
        torch.testing.assert_close(scaled, plain, rtol=1e-3, atol=2e-4)
    assert scaler.get_scale() == 2.0**12


def gradients_of_a_rank(photographs, folder, batch_size, accumulation, loss):
    config = small_config(
        photographs, folder, data={"batch_size": batch_size}, loss=loss,
        train={"steps": 6, "gradient_accumulation": accumulation},
    )  # fmt: skip
    run = lively(make(config))
    steps = iter(run.loader)
    gradients = both_gradients(run, [next(steps) for _ in range(accumulation)])
    if run.is_main:
        torch.save(gradients, folder / "gradients.pt")
    run.accelerator.end_training()


def assert_ranks_are_one_process(photographs, scratch, ranks, batch, accumulation, loss):
    """Compare a step's gradients on `ranks` ranks with those of one process that has the batches of them all."""
    found, log = {}, scratch / "log.txt"
    for processes, images in ((1, ranks * batch), (ranks, batch)):
        folder = scratch / str(processes)
        folder.mkdir()
        arguments = (photographs, folder, images, accumulation, loss)
        started = start_ranks(processes, log, gradients_of_a_rank, *arguments)
        assert finish(*started) == [0] * processes, log.read_text()
        found[processes] = torch.load(folder / "gradients.pt")
    assert_near(found[ranks], found[1], 1e-4)


@pytest.mark.parametrize("ranks, batch, accumulation", [(4, 2, 1), (2, 2, 2)])
def test_ranks_give_the_gradients_of_one_process(photographs, tmp_path, ranks, batch, accumulation):
    """The gradients of both networks; the adaptive weight is of the norms of the gradient averaged over ranks."""
    assert_ranks_are_one_process(photographs, tmp_path, ranks, batch, accumulation, loss_section())


def test_compiled_steps_are_the_plain_ones(small, tmp_path, monkeypatch):
    """Forward and backward traced ahead of time, run by torch's own kernels. The adaptive weight starts in the
    second step, after the traced backward has freed its buffers once."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    ends = []
    for on in (False, True):
        torch._dynamo.reset()
        config = small(tmp_path / str(on), loss=loss_section(disc_start=1), train={"steps": 3, "compile": on})
        make(config).fit()
        ends.append(weights(tmp_path / str(on), 3) | weights(tmp_path / str(on), 3, "discriminator"))
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-4, atol=1e-5)


def test_every_adversarial_term_is_logged(small, tmp_path):
    make(small(tmp_path, loss=loss_section(), train={"steps": 2})).fit()
    own = [f"discriminator/{name}" for name in ("loss", "r1", "logits_real", "logits_fake", "gradient_norm")]
    for name in ("adversarial", "adaptive_weight", "gradient_norm", *own):
        values = records(tmp_path, f"train/{name}")
        assert set(values) == ({1} if name == "discriminator/r1" else {1, 2})
        assert all(math.isfinite(value) for value in values.values())
