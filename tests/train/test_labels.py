"""Classes of images: numbered alike by rows and streams, over ranks, workers and restarts; what is refused."""

import io
import itertools
import json
from functools import partial

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from kl_autoencoder.cli.main import main as command
from kl_autoencoder.data.image_io import load_image, tensor_to_images
from kl_autoencoder.latents.augmentation import Augmenter, Variant
from kl_autoencoder.models.autoencoder import Autoencoder
from tests.file_server import write_tar
from train.autoencoder.task import AutoencoderTask
from train.autoencoder.validation import HeldOut
from train.config import load_config
from train.data.config import DataConfig
from train.data.training_data import TrainingData
from train.loop.trainer import Trainer

COLOURS = ("red", "green", "blue", "white", "black", "gray")
SORTED = sorted(COLOURS)
pytestmark = pytest.mark.usefixtures("datasets_cache")


def png(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, "PNG")
    return file.getvalue()


def colour_of(image: torch.Tensor) -> str:
    """(3, H, W) of one colour -> its name."""
    found = tuple(((image[:, 0, 0] + 1) * 127.5).round().int().tolist())
    return next(name for name in COLOURS if Image.new("RGB", (1, 1), name).getpixel((0, 0)) == found)


def table(values) -> datasets.Dataset:
    """48 images of six colours with their labels; `values`: the labels' feature, and a function colour -> label."""
    rows = [COLOURS[i % 6] for i in range(48)]
    records = [{"bytes": png(colour), "path": f"{i:03d}.png"} for i, colour in enumerate(rows)]
    features = datasets.Features({"image": datasets.Image(decode=False), "class": values[0]})
    return datasets.Dataset.from_dict(
        {"image": records, "class": [values[1](colour) for colour in rows]}, features=features
    )


NAMES = datasets.Value("string"), str
NUMBERS = datasets.Value("int64"), SORTED.index
CLASSES = datasets.ClassLabel(names=SORTED), SORTED.index


def parquet(tmp_path, values, files=4):
    for i in range(files):
        part = table(values).shard(files, i)
        part.to_parquet(tmp_path / f"part-{i}.parquet")
    return str(tmp_path / "*.parquet"), {"label_column": "class"}


def saved(tmp_path, values):
    table(values).save_to_disk(tmp_path / "saved")
    return str(tmp_path / "saved"), {"label_column": "class"}


def folders(tmp_path, values):
    for i in range(48):
        folder = tmp_path / "photos" / COLOURS[i % 6]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i:03d}.png").write_bytes(png(COLOURS[i % 6]))
    return str(tmp_path / "photos"), {"labels": "folders"}


def tars(tmp_path, values):
    for i in range(2):
        numbers = range(i, 48, 2)
        entries = [(f"{n:03d}.png", png(COLOURS[n % 6])) for n in numbers]
        entries += [(f"{n:03d}.cls", str(SORTED.index(COLOURS[n % 6])).encode()) for n in numbers]
        write_tar(tmp_path / f"{i}.tar", sorted(entries))
    return str(tmp_path / "*.tar"), {"label_column": "cls", "image_column": "png"}


def config(source: str, **values) -> DataConfig:
    small = {"resolution": 8, "batch_size": 4, "num_workers": 0, "validation": source}
    return DataConfig(train=source, **small | values)


def take(data: DataConfig, samples: int, start=0, ranks=1, classes=None) -> dict[int, int]:
    """The labels of samples start ... start + samples - 1, each checked against the colour of its image."""
    seen = {}
    for rank in range(ranks):
        loader = TrainingData(data, 3, classes).loader(start, rank, ranks)
        for batch in itertools.islice(loader, samples // (ranks * data.batch_size)):
            assert batch["labels"].dtype == torch.int64
            assert [SORTED[label] for label in batch["labels"]] == [colour_of(x) for x in batch["images"]]
            seen |= dict(zip(batch["sample"].tolist(), batch["labels"].tolist(), strict=True))
    assert sorted(seen) == list(range(start, start + samples))
    return seen


@pytest.mark.parametrize(
    ("make", "values"),
    [(parquet, NAMES), (parquet, NUMBERS), (parquet, CLASSES), (saved, NAMES), (folders, None), (tars, None)],
    ids=["parquet-names", "parquet-numbers", "parquet-classes", "saved", "folders", "tars"],
)
def test_labels_of_rows_over_ranks_workers_and_restarts(make, values, tmp_path):
    source, keys = make(tmp_path, values)
    alone = take(config(source, **keys), 96, classes=6)
    assert [list(alone.values()).count(label) for label in range(6)] == [16] * 6
    assert (
        take(config(source, **keys, num_workers=2), 48, ranks=2) | take(config(source, **keys), 48, 48)
        == alone
    )


@pytest.mark.parametrize(
    ("make", "values"), [(parquet, NAMES), (parquet, CLASSES), (tars, None)], ids=["names", "classes", "tars"]
)
def test_labels_of_streams_over_ranks_workers_and_restarts(make, values, tmp_path):
    source, keys = make(tmp_path, values)
    keys |= {"streaming": True}
    alone = take(config(source, **keys), 96, classes=6)
    changing = take(config(source, **keys, num_workers=2), 48, ranks=2) | take(config(source, **keys), 48, 48)
    assert changing == alone


def test_held_out_images_have_the_numbers_of_the_training_source(tmp_path):
    source, keys = folders(tmp_path, None)
    (tmp_path / "other" / "white").mkdir(parents=True)
    (tmp_path / "other" / "white" / "a.png").write_bytes(png("white"))
    (tmp_path / "other" / "pink").mkdir()
    (tmp_path / "other" / "pink" / "b.png").write_bytes(png("pink"))
    photographs = TrainingData(config(source, **keys, validation=str(tmp_path / "other")), 0).held_out()
    held_out = HeldOut(photographs, 4)
    assert [labels.tolist() for labels in held_out.labels] == [[SORTED.index("white")]]
    assert list(photographs.skipped.values()) == ["class 'pink' is none of the 6 of data.train"]


def test_an_image_without_a_label_is_skipped_and_named(tmp_path):
    source, keys = parquet(tmp_path, (NAMES[0], lambda colour: None if colour == "red" else colour))
    batches = itertools.islice(TrainingData(config(source, **keys), 0).loader(), 12)
    skipped = {name: why for batch in batches for name, why in batch["skipped"]}
    assert len(skipped) == 8 and set(skipped.values()) == {"unreadable: no label"}


@pytest.mark.parametrize(
    ("values", "keys", "classes", "message"),
    [
        (
            NAMES,
            {"label_column": "kind"},
            None,
            r"^data.label_column: no column 'kind' in .*; allowed: image, class",
        ),
        (NUMBERS, {}, 5, r"^data.label_column: 5; allowed: whole numbers from 0 to 4 \(model.classes=5\)$"),
        (NAMES, {}, 5, r"^data.label_column: 6 classes in .*; allowed: at most model.classes, 5$"),
        ((NUMBERS[0], lambda c: -1), {}, None, r"^data.label_column: -1; allowed: whole numbers from 0 on$"),
        (
            (datasets.Value("float32"), lambda c: 0.5),
            {},
            None,
            r"^data.label_column: 0.5; allowed: whole numbers",
        ),
        ((NAMES[0], lambda c: None), {}, None, r"^data.label_column: no labels in "),
    ],
    ids=["column", "outside", "too-many", "negative", "fraction", "none"],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_labels_that_cannot_be_used(values, keys, classes, message, streaming, tmp_path):
    source, own = parquet(tmp_path, values, files=1)
    with pytest.raises(ValueError, match=message):
        TrainingData(config(source, **{**own, **keys}, streaming=streaming), 0, classes)


def test_a_label_that_only_the_stream_shows_to_be_outside_ends_the_run(tmp_path):
    source, keys = tars(tmp_path, None)
    loader = TrainingData(config(source, **keys, streaming=True), 0, classes=3).loader()
    with pytest.raises(RuntimeError, match=r"^data.label_column: \d; allowed: whole numbers from 0 to 2"):
        list(itertools.islice(loader, 12))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"label_column": "label"}, r"data.label_column: 'label', but .* is files; allowed: of parquet"),
        ({"label_column": "label", "labels": "folders"}, r"data.labels: folders beside data.label_column"),
    ],
)
def test_a_folder_has_no_columns(keys, message, tmp_path):
    source, _ = folders(tmp_path, None)
    with pytest.raises(ValueError, match=message):
        TrainingData(config(source, **keys), 0)


# ---------------------------------------------------------------- MNIST's layout

MNIST = """
output_dir: {folder}/run
model: {{in_channels: 1, out_channels: 1, block_out_channels: [8, 8, 8], layers_per_block: 1, norm_num_groups: 4}}
data: {{train: "{folder}/mnist/train-*.parquet", validation: "{folder}/mnist/test-*.parquet", label_column: label,
       channels: 1, resolution: 28, crop_scale: [1, 1], horizontal_flip: false, binarize: dynamic, batch_size: 8,
       num_workers: 1, validation_images: 4}}
loss: {{reconstruction: bernoulli, perceptual: {{weight: 0}}}}
train: {{steps: 2}}
validation: {{every: 0}}
log: {{every: 1, tensorboard: false}}
"""


def write_mnist(folder, split: str, images: int):
    """As ylecun/mnist on the hub: columns image, {bytes, path} of 28x28 gray PNG, and label, a ClassLabel."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(len(split))
    records = []
    for _ in range(images):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (28, 28), dtype=np.uint8)).save(file, "PNG")
        records.append({"bytes": file.getvalue(), "path": None})
    names = [str(digit) for digit in range(10)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    rows = {"image": records, "label": [n % 10 for n in range(images)]}
    path = folder / f"{split}-00000-of-00001.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)


def test_mnist_by_parquet_is_trained_on(tmp_path):
    write_mnist(tmp_path / "mnist", "train", 40)
    write_mnist(tmp_path / "mnist", "test", 6)
    (tmp_path / "a.yaml").write_text(MNIST.format(folder=tmp_path))
    config = load_config(tmp_path / "a.yaml")
    trainer = Trainer(config, partial(AutoencoderTask, statistics_samples=8))
    trainer.fit()
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [0.5 < line["train/reconstruction"] < 1.5 for line in lines if "train/loss" in line] == [True] * 2
    batch = next(iter(trainer.task.data.loader()))
    assert batch["images"].shape == (8, 1, 28, 28) and set(batch["images"].unique().tolist()) == {-1.0, 1.0}
    assert batch["labels"].shape == (8,) and batch["labels"].max() < 10
    assert trainer.task.held_out.labels[0].tolist() == sorted(trainer.task.held_out.labels[0].tolist())


DIGITS = """
output_dir: {folder}/run
model: {{network: mlp, hidden_sizes: [8], in_channels: 1, out_channels: 1, sample_size: 8, classes: {classes}}}
data: {{train: sample-digits, validation: sample-digits, label_column: label, channels: 1, resolution: 8,
       batch_size: 8, crop_scale: [1, 1], horizontal_flip: false, num_workers: 0, validation_images: 4}}
loss: {{perceptual: {{weight: 0}}}}
train: {{steps: 1}}
validation: {{every: 0}}
log: {{every: 1, tensorboard: false}}
"""


def test_labels_beyond_the_networks_classes_are_refused_before_any_work(tmp_path):
    (tmp_path / "a.yaml").write_text(DIGITS.format(folder=tmp_path, classes=5))
    message = r"data.label_column: [5-9]; allowed: whole numbers from 0 to 4 \(model.classes=5\)$"
    with pytest.raises(ValueError, match=message):
        Trainer(load_config(tmp_path / "a.yaml"), AutoencoderTask)


def test_a_trained_conditional_autoencoder_draws_by_class_for_augment(tmp_path, capsys):
    """The command on what the trainer exported: each class's draws are decoded with its number."""
    (tmp_path / "a.yaml").write_text(DIGITS.format(folder=tmp_path, classes=10))
    Trainer(load_config(tmp_path / "a.yaml"), partial(AutoencoderTask, statistics_samples=8)).fit()
    for digit in range(10):
        (tmp_path / "few" / str(digit)).mkdir(parents=True)
        Image.fromarray(np.full((8, 8), 20 * digit, np.uint8)).save(tmp_path / "few" / str(digit) / "a.png")
    arguments = [
        "augment",
        str(tmp_path / "few"),
        "--model",
        str(tmp_path / "run"),
        "-o",
        str(tmp_path / "more"),
    ]
    assert command([*arguments, "--kinds", "drawn", "noise"]) == 0
    assert capsys.readouterr().out.endswith("more: 10 drawn, 10 noise, of 10 images\n")
    augmenter = Augmenter(
        Autoencoder.from_pretrained(tmp_path / "run" / "export").eval(),
        lambda name, size: load_image(tmp_path / "few" / name, size, 1, channels=1),
        [f"{digit}/a.png" for digit in range(10)],
    )
    generator = torch.Generator().manual_seed(augmenter._seed_of(Variant("drawn", "7/a.png", 0)))
    z = torch.randn(1, augmenter.vae.config.latent_channels, 1, 1, generator=generator)
    with torch.no_grad():
        wanted = augmenter.vae.decode(z, labels=torch.tensor([7])).sample
    with Image.open(tmp_path / "more" / "7" / "a-drawn-0.png") as made:
        assert (np.asarray(made) == np.asarray(tensor_to_images(wanted)[0])).all()
