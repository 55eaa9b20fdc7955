"""Load an aligned model; reject an invalid folder before allocating memory for it."""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from .adapter import HUB_KWARGS, auto_class, load_adapter, load_model, merge_adapter


def split_hub_kwargs(kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split the arguments of a `from_pretrained` into those that say where its files are on the Hub, and the others."""
    hub_kwargs = {name: value for name, value in kwargs.items() if name in HUB_KWARGS}
    return hub_kwargs, {name: value for name, value in kwargs.items() if name not in HUB_KWARGS}


def load_aligned_model(pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> PreTrainedModel:
    """Load a model that was aligned, from a folder or a repository of the Hub.

    Where it holds a LoRA adapter alone, the base model that it was trained on is loaded, gets room for the code
    tokens, and takes the adapter into its weights; with a `quantization_config` the adapter stays beside them.

    Args:
        pretrained_model_name_or_path (`str`): The folder or repository.
        kwargs: Passed on to the model's `from_pretrained`, such as `dtype` and `device_map`.

    Raises:
        `ValueError`: if the configuration is not valid, or declares another model than the weights are of, or the
            base is not the one of the adapter.
        `OSError`: if a file is missing, such as weights in safetensors.
    """
    kwargs["use_safetensors"] = True  # no pickle is opened
    hub_kwargs, model_kwargs = split_hub_kwargs(kwargs)
    try:
        if find_adapter_config_file(os.fspath(pretrained_model_name_or_path), **hub_kwargs) is None:
            _check_declared_size(pretrained_model_name_or_path, kwargs.get("trust_remote_code"), hub_kwargs)
            return load_model(pretrained_model_name_or_path, **kwargs)
        model = load_adapter(pretrained_model_name_or_path, hub_kwargs, model_kwargs)
        # A quantized base keeps the adapter beside it: merged, its weights would be rounded anew.
        return model if getattr(model.get_base_model(), "is_quantized", False) else merge_adapter(model)
    except (ValueError, OSError, ImportError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a malformed configuration can raise almost any exception
        raise ValueError(f"{pretrained_model_name_or_path} holds no valid model: {error}") from error


def _check_declared_size(
    folder: str | os.PathLike, trust_remote_code: bool | None, hub_kwargs: dict[str, Any]
) -> None:
    """Refuse a configuration of far more layers or weights than the files hold: memory would be taken for them."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, **hub_kwargs)
    num_tensors = num_bytes = 0
    for path in _weight_files(folder, hub_kwargs):
        num_bytes += os.path.getsize(path)
        try:
            with safe_open(path, framework="pt") as file:
                num_tensors += len(file.keys())
        except SafetensorError as error:
            raise ValueError(f"{path} is not a valid safetensors file: {error}") from None
    num_layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if num_layers > num_tensors:
        raise ValueError(f"{folder} holds {num_tensors} tensors, but its configuration declares {num_layers} layers")
    with torch.device("meta"):
        num_weights = auto_class(config).from_config(config, trust_remote_code=trust_remote_code).num_parameters()
    if num_weights > 16 * num_bytes:  # twice as many as weights of one bit
        raise ValueError(f"{folder} holds {num_bytes} bytes, but its configuration declares {num_weights} weights")


def _weight_files(folder: str | os.PathLike, hub_kwargs: dict[str, Any]) -> list[str]:
    whole = cached_file(folder, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False, **hub_kwargs)
    if whole is not None:
        return [whole]
    index = cached_file(folder, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False, **hub_kwargs)
    if index is None:
        raise OSError(f"{folder} has no {SAFE_WEIGHTS_NAME}; weights of another format are not read")
    with open(index, encoding="utf-8") as file:
        names = set(json.load(file)["weight_map"].values())
    outside = [name for name in names if os.path.basename(name) != name]
    if outside:
        raise ValueError(f"{index} names the file {outside[0]!r}, which is not of its folder")
    return [cached_file(folder, name, **hub_kwargs) for name in sorted(names)]
