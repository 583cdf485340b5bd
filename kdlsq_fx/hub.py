"""Whether a name means a model on the Hugging Face hub, asked once and briefly."""

from __future__ import annotations

from pathlib import Path

from kdlsq_fx.errors import ConfigError


def check_hub_name(name: str, *, what: str = "model") -> None:
    """ConfigError where ``name``, which is no folder, is no model on the hub either, or the hub cannot be asked.
    ``what`` is wanted of it.

    One request, the one that a download begins with, and no retry. What is in the local cache is not asked for, and an
    answer such as "too many requests" is left to the download itself.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
    )

    if Path(name).exists():
        raise ConfigError(f"a file, not the folder of a {what}", where=name, do="give a folder, or a hub name")
    do = f"give the folder of a {what}, or a hub name such as google-bert/bert-base-uncased"
    if name.startswith((".", "/", "~")):
        raise ConfigError(f"no {what} there: no such folder", where=name, do=do)
    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
    except HFValidationError:
        raise ConfigError("no such folder, and no hub name", where=name, do=do) from None
    if constants.HF_HUB_OFFLINE:
        found = "no such folder, and HF_HUB_OFFLINE is set: only models in the local cache can be named"
        raise ConfigError(found, where=name, do="give a folder, or unset it to download")
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"))
    except GatedRepoError:
        found, do = "the model is gated on the hub", "accept its terms there and log in: hf auth login"
        raise ConfigError(found, where=name, do=do) from None
    except RepositoryNotFoundError:
        found = "no such folder, and no such model on the hub (or a private one)"
        raise ConfigError(found, where=name, do=f"{do}; for a private one: hf auth login") from None
    except EntryNotFoundError:
        if what != "model":  # a tokenizer needs none
            return
        found = "the hub has it, but without a config.json: no transformers model"
        raise ConfigError(found, where=name, do=do) from None
    except HfHubHTTPError:
        return
    except Exception as e:  # the HTTP library's own kinds: no network, no answer, a proxy
        found = f"no such folder, and the hub cannot be reached ({str(e) or type(e).__name__})"
        raise ConfigError(found, where=name, do=f"offline, give the folder of a {what} that was copied here") from e
