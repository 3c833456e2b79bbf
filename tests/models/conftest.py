"""A fixture that several test modules of models share."""

import pytest


@pytest.fixture
def pieces(monkeypatch):
    """One entry for every network that is executed in pieces: whether in the least memory."""
    from kl_autoencoder.inference import dispatch

    calls, execute = [], dispatch.infer_in_pieces

    def counted(network, x, least=False, *arguments):
        calls.append(least)
        return execute(network, x, least, *arguments)

    monkeypatch.setattr(dispatch, "infer_in_pieces", counted)
    return calls
