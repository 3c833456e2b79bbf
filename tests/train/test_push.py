"""export.push_to: a run that ends on the hub, against a stand-in for it on this machine."""

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load

from kl_autoencoder.models.packaged import COMPACT
from tests.hub_stand_in import StandIn
from tests.train.runs import make, weights
from train.config import ExportConfig


@pytest.fixture
def hub(monkeypatch):
    with StandIn((COMPACT / "config.json").read_bytes()) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield hub


def test_the_end_of_a_run_is_published(small, hub, tmp_path):
    config = small(tmp_path / "my-run", export={"push_to": "me/vae", "license": "mit", "private": True})
    summary = make(config).fit()
    assert hub.created[0]["organization"] == "me" and hub.tokens == {"Bearer hf_secret"}
    pushed = load(hub.files["diffusion_pytorch_model.safetensors"])
    ema = weights(tmp_path / "my-run", 6, "ema")
    assert pushed.keys() == ema.keys() and all((pushed[name] == ema[name]).all() for name in ema)
    card = ModelCard(hub.files["README.md"].decode())
    measured = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert measured["psnr"] == pytest.approx(summary["after"]["psnr"], abs=1e-4)
    assert card.data.license == "mit" and hub.files["reconstructions.png"] == summary["picture"].read_bytes()
    assert not any(str(tmp_path).encode() in content for content in hub.files.values())


def test_a_dry_run_writes_the_same_and_asks_nobody(small, monkeypatch, tmp_path):
    monkeypatch.setattr("kl_autoencoder.models.publishing.hub.get_token", lambda: None)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    make(small(tmp_path, export={"push_to": "me/vae", "dry_run": True})).fit()
    names = {path.name for path in (tmp_path / "published").iterdir()}
    assert names == {
        "config.json", "diffusion_pytorch_model.safetensors", "README.md", "reconstructions.png"
    }  # fmt: skip


def test_a_refused_push_leaves_the_export_and_says_how_to_push_it(small, hub, tmp_path):
    trainer = make(small(tmp_path, export={"push_to": "them/vae"}))
    with pytest.raises(OSError, match=r"them/vae: the hub refuses \(HTTP 403\).* the export is whole"):
        trainer.fit()
    assert (tmp_path / "export" / "config.json").is_file()


def test_without_a_token_no_step_is_taken(small, monkeypatch, tmp_path):
    monkeypatch.setattr("kl_autoencoder.models.publishing.hub.get_token", lambda: None)
    with pytest.raises(ValueError, match="export.push_to: me/vae: pushing needs a token that may write"):
        make(small(tmp_path, export={"push_to": "me/vae"}))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"push_to": "nobody"}, "export.push_to: 'nobody'; allowed: owner/name"),
        ({"push_to": "a/b", "license": "Mine!"}, "export.license: 'Mine!'; allowed: an identifier"),
        ({"dry_run": True}, "allowed with export.push_to"),
    ],
)
def test_values_that_are_refused(values, said):
    with pytest.raises(ValueError, match=said):
        ExportConfig(**values)
