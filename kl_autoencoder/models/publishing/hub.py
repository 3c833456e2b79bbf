"""The hub: check whether a model is available, explain refusals in one sentence, publish a folder."""

from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from ...files import clipped, one_line

PATIENCE = 10  # seconds to wait for the hub's answer about a model
LOG_IN = "`hf auth login`, or HF_TOKEN"


def is_reachable(name: str) -> bool:
    """Whether the hub answers for the model `name` (owner/name).

    False if the hub cannot be reached (the model may still be in the cache). Raises ValueError if it refuses the
    model.
    """
    try:
        HfApi().model_info(name, timeout=PATIENCE)
    except HfHubHTTPError as error:
        raise ValueError(refusal(name, error)) from error
    except Exception:  # errors of any HTTP library: no route, no such host, no answer in time
        return False
    return True


def refusal(name: str, error: HfHubHTTPError) -> str:
    """Return the hub's answer as a sentence that says what to do."""
    if isinstance(error, GatedRepoError):
        return f"{name}: is gated; ask for access on its page, then log in ({LOG_IN})"
    if isinstance(error, RepositoryNotFoundError):
        return f"{name}: no such model on the hub, or a private one that needs {LOG_IN}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"{name}: the hub refuses (HTTP {status}); log in with a token that may do this ({LOG_IN})"
    return f"{name}: the hub failed ({clipped(one_line(str(error)), 120)})"


def unreachable(name: str) -> str:
    """Return the message for a model that is neither available from the hub nor cached."""
    return f"{name}: the hub ({constants.ENDPOINT}) cannot be reached, and the model is not in the cache"


def refusal_in(error: BaseException | None) -> HfHubHTTPError | None:
    """Return the hub's error among the causes of an error, or None."""
    while error is not None and not isinstance(error, HfHubHTTPError):
        error = error.__cause__ or error.__context__
    return error


def check_token(repo: str) -> None:
    """Raise ValueError if there is no token; to be called before computing what is pushed to `repo`."""
    if not get_token():
        raise ValueError(f"{repo}: pushing needs a token that may write; {LOG_IN}")


def publish(folder: Path, repo: str, private: bool) -> str:
    """Create the repository if there is none and commit all files of `folder`; returns the URL of its page.

    Raises ValueError naming the repository: without a token, for refusals of the hub, and if it cannot be reached.
    """
    check_token(repo)
    api = HfApi()
    try:
        url = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload the autoencoder")
    except HfHubHTTPError as error:
        raise ValueError(refusal(repo, error)) from error
    except ValueError:
        raise
    except Exception as error:
        said = clipped(one_line(str(error)), 120)
        raise ValueError(f"{repo}: the hub ({constants.ENDPOINT}) cannot be reached ({said})") from error
    return str(url)
