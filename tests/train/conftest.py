"""Fixtures that several test modules of training share."""

from functools import partial

import pytest


@pytest.fixture
def small(photographs):
    """`small(folder, **sections)`: the configuration of a run of a second or two, see `small_config`."""
    from tests.train.runs import small_config

    return partial(small_config, photographs)


@pytest.fixture
def datasets_cache(tmp_path_factory, monkeypatch):
    """`datasets` caches in a new folder, stays offline and shows no progress bars."""
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
