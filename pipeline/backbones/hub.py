"""Weights on the Hugging Face hub or at a URL: from the local cache, else downloaded if the host
answers.

Without a network, the clients' own retries take most of a minute and print a page of warnings, so
the host is tried first.
"""

from __future__ import annotations

import ssl
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import timm
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError
from timm.models._hub import check_cached_file

from pipeline.errors import BackboneError

ANSWER_SECONDS = 4
SAFE_WEIGHTS = "model.safetensors"
_OTHER_WEIGHTS = "pytorch_model.bin"


def check_pretrained(model: str) -> None:
    """Check that timm's weights of `model` are on this machine or can be downloaded.

    Raises:
        BackboneError: neither; in less than five seconds.
    """
    config: Any = timm.get_pretrained_cfg(model)
    if config is None or not config.has_weights:
        return  # timm says so itself
    if config.hf_hub_id:
        repository, _, revision = config.hf_hub_id.partition("@")
        files = (
            [config.hf_hub_filename] if config.hf_hub_filename else [SAFE_WEIGHTS, _OTHER_WEIGHTS]
        )
        is_here = any(
            isinstance(try_to_load_from_cache(repository, file, revision=revision or None), str)
            for file in files
        )
    else:
        is_here = check_cached_file(config.url, check_hash=False)
    if not is_here:
        _check_answers(
            constants.ENDPOINT if config.hf_hub_id else config.url,
            f"backbone.weights: the pretrained weights of {model}",
        )


def hub_file(repository: str, file: str) -> Path:
    """A file of a hub repository `OWNER/NAME` or `OWNER/NAME@REVISION`, from the cache or else
    downloaded.

    Raises:
        BackboneError: the hub cannot be reached, or has no such file.
    """
    name, _, revision = repository.partition("@")
    cached = try_to_load_from_cache(name, file, revision=revision or None)
    if isinstance(cached, str):
        return Path(cached)
    _check_answers(constants.ENDPOINT, f"backbone.model: {file} of hf-hub:{repository}")
    try:
        return Path(hf_hub_download(name, file, revision=revision or None))
    except EntryNotFoundError:
        raise BackboneError(
            f"backbone.model: hf-hub:{repository} has no {file}; only timm models in safetensors"
            " format can be loaded"
        ) from None
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise BackboneError(
            f"backbone.model: {file} of hf-hub:{repository} could not be fetched"
            f" ({type(error).__name__}: {reason})"
        ) from None


def _check_answers(url: str, what: str) -> None:
    reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _no_answer(url)
    if reason is not None:
        raise BackboneError(
            f"{what} are not on this machine, and {urlsplit(url).hostname} cannot be reached"
            f" ({reason}); connect to the network, or download a safetensors checkpoint and give"
            " its path: as `weights`, or to `import` and `predict` as --backbone FILE"
        )


def _no_answer(url: str) -> str | None:
    """Why the host of `url` does not answer, or None. It is tried in a thread, because name
    resolution has no timeout.
    """
    reasons: list[str | None] = []
    asking = threading.Thread(target=lambda: reasons.append(_ask(url)), daemon=True)
    asking.start()
    asking.join(ANSWER_SECONDS)
    return reasons[0] if reasons else f"no answer in {ANSWER_SECONDS} s"


def _ask(url: str) -> str | None:
    try:
        urllib.request.urlopen(
            urllib.request.Request(url, method="HEAD"), timeout=ANSWER_SECONDS
        ).close()
    except urllib.error.HTTPError as error:
        error.close()  # an answer, whatever it says
    except urllib.error.URLError as error:
        # A certificate that Python does not know is an answer too; the client that downloads may
        # know it.
        return (
            None
            if isinstance(error.reason, ssl.SSLError)
            else str(getattr(error.reason, "strerror", None) or error.reason)
        )
    except OSError as error:
        return error.strerror or str(error)
    return None
