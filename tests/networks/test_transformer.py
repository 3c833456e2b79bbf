"""The transformer over codes: it is causal, and draws from the probabilities of its forward pass."""

import math

import pytest
import torch

from kl_autoencoder.models.priors import CodePrior
from kl_autoencoder.networks.transformer import CodeTransformer


def transformer(labels=1, codes=7, length=9):
    torch.manual_seed(0)
    made = CodeTransformer(codes, length, labels, width=16, layers=2, heads=4)
    for parameter in made.parameters():  # large enough that every part matters
        torch.nn.init.normal_(parameter, std=0.5)
    return made


def test_a_later_code_changes_no_earlier_logit():
    made, codes, labels = transformer(), torch.randint(7, (2, 9)), torch.zeros(2, dtype=torch.int64)
    logits = made(codes, labels)
    for i in range(9):
        other = codes.clone()
        other[:, i] = (other[:, i] + 1) % 7
        changed = (made(other, labels) - logits).abs().amax(dim=(0, 2)) > 1e-6
        assert changed.tolist() == [False] * (i + 1) + [True] * (8 - i)


def test_the_label_changes_every_logit():
    made, codes = transformer(labels=2), torch.randint(7, (1, 9))
    zero, one = (made(codes, torch.tensor([label])) for label in (0, 1))
    assert ((zero - one).abs().amax(dim=2) > 1e-6).all()


def test_codes_are_drawn_from_the_logits_of_the_forward_pass():
    """At a temperature of almost 0 each code is the likeliest, given those drawn before it."""
    made, labels = transformer(), torch.zeros(5, dtype=torch.int64)
    drawn = made.draw(labels, temperature=1e-4)
    assert torch.equal(made(drawn, labels).argmax(dim=2), drawn)


def test_draws_have_the_probabilities_of_the_model():
    made = transformer(codes=3, length=2)
    drawn = made.draw(torch.zeros(20_000, dtype=torch.int64), generator=torch.Generator().manual_seed(0))
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    logs = made(pairs, torch.zeros(9, dtype=torch.int64)).log_softmax(dim=2)
    expected = logs.gather(2, pairs[..., None]).sum(dim=(1, 2)).exp()
    found = torch.stack([(drawn == pair).all(dim=1).float().mean() for pair in pairs])
    torch.testing.assert_close(found, expected, atol=0.015, rtol=0)
    assert expected.max() > 0.2  # far from uniform


def test_an_untrained_prior_knows_nothing_and_is_saved_whole(tmp_path):
    """Weights of deviation .02: -log p is that of uniform codes, log(codes) a code."""
    torch.manual_seed(0)
    prior = CodePrior(codes=32, height=3, width=4, classes=5, autoencoder="runs/vq")
    codes, labels = torch.randint(32, (64, 3, 4)), torch.randint(5, (64,))
    assert prior.nll(codes, labels).mean().item() == pytest.approx(12 * math.log(32), rel=0.01)
    prior.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }
    again = CodePrior.from_pretrained(tmp_path)
    assert again.config.autoencoder == "runs/vq" and torch.equal(again(codes, labels), prior(codes, labels))
    with pytest.raises(ValueError, match="labels: none; allowed: numbers below 5"):
        again.sample(1)
    assert again.sample(2, torch.tensor([0, 4])).shape == (2, 3, 4)
