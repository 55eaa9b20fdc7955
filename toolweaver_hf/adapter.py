"""LoRA adapters, and the base models that they belong to."""

from __future__ import annotations

import hashlib
import json
import os
from typing import TYPE_CHECKING, Any

import torch
from torch.func import functional_call
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import CONFIG_NAME, cached_file, logging
from transformers.utils.hub import extract_commit_hash


if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.get_logger(__name__)

ADAPTER_WEIGHTS = "adapter_model.safetensors"
BASE_MODEL_FILE = "base_model.json"
BASE_MODEL_VERSION = 1  # its schema_version
HUB_KWARGS = ("revision", "token", "cache_dir", "subfolder", "force_download", "local_files_only")
"""Arguments of every `from_pretrained` that say where on the Hub a file is and how to get it."""
EMBEDDING_MULTIPLE = 64
"""Embedding matrices get a multiple of this many rows, which matrix products are fast with."""


def describe_base(model: PreTrainedModel, name: str, revision: str | None = None) -> dict[str, Any]:
    """Describe the base model of an adapter, so that no other is taken for it: the content of a `base_model.json`.

    Args:
        model ([`PreTrainedModel`]): The base model as it was loaded, before anything is added to it.
        name (`str`): Its id or folder.
        revision (`str`, *optional*): The revision that was asked for. On the Hub, its commit is recorded.
    """
    config_file = cached_file(name, CONFIG_NAME, revision=revision, _raise_exceptions_for_missing_entries=False)
    commit = extract_commit_hash(config_file, None)
    return {
        "schema_version": BASE_MODEL_VERSION,
        "name": str(name),
        "revision": None if os.path.isdir(name) else commit or revision,
        "config_checksum": None if config_file is None else _config_checksum(config_file),
        "embeddings_checksum": _embeddings_checksum(model),
        "quantized": bool(getattr(model, "is_quantized", False)),
    }


def load_model(name: str | os.PathLike, **kwargs) -> PreTrainedModel:
    """Load a language model: [`AutoModelForCausalLM.from_pretrained`], also for models that read images beside text.

    Args:
        name (`str`): Id or folder.
        kwargs: As for every `from_pretrained`.
    """
    if "gguf_file" in kwargs:
        return AutoModelForCausalLM.from_pretrained(name, **kwargs)
    access = {key: kwargs[key] for key in (*HUB_KWARGS, "trust_remote_code") if key in kwargs}
    return auto_class(AutoConfig.from_pretrained(name, **access)).from_pretrained(name, **kwargs)


def auto_class(config: PreTrainedConfig) -> type:
    """Return the Auto class of a configuration's language model.

    Models that read images beside text, such as Qwen2.5-VL and SmolVLM, are models of text to those who give them none.
    """
    causal_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    # Mllama and Emu3 have one whose own configuration no Auto class knows, so that it could not be loaded again.
    causal = causal_class is not None and causal_class.config_class in MODEL_FOR_CAUSAL_LM_MAPPING
    if (
        causal
        or "AutoModelForCausalLM" in getattr(config, "auto_map", {})
        or getattr(config, "is_encoder_decoder", False)
        or type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    ):
        return AutoModelForCausalLM
    return AutoModelForImageTextToText


def load_adapter(
    folder: str | os.PathLike, hub_kwargs: dict[str, Any], model_kwargs: dict[str, Any], is_trainable: bool = False
) -> PeftModel:
    """Load a LoRA adapter on its base model, in which there is room for the code tokens.

    Args:
        folder (`str`): The adapter's folder or repository.
        hub_kwargs (`dict`): Where on the Hub the adapter is, such as its `revision`.
        model_kwargs (`dict`): For `from_pretrained` of the base.
        is_trainable (`bool`, *optional*, defaults to `False`): Whether the adapter is to be trained further.

    Raises:
        `ValueError`: if the base is not the one that the adapter was trained on.
        `ImportError`: without PEFT.
    """
    try:
        from peft import PeftConfig, PeftModel, prepare_model_for_kbit_training
    except ImportError:
        raise ImportError(f"{folder} holds a LoRA adapter alone; to load it, pip install peft") from None
    # Files of the Hub are found here, so that PEFT reads a folder: it asks for some that need not be there.
    local = os.path.dirname(cached_file(folder, ADAPTER_WEIGHTS, **hub_kwargs))
    cached_file(folder, "adapter_config.json", **hub_kwargs)
    config = PeftConfig.from_pretrained(local)
    record_file = cached_file(folder, BASE_MODEL_FILE, _raise_exceptions_for_missing_entries=False, **hub_kwargs)
    record = {}
    if record_file is not None:
        with open(record_file, encoding="utf-8") as file:
            record = json.load(file)
    name, revision = config.base_model_name_or_path, record.get("revision") or config.revision
    access = {key: value for key, value in hub_kwargs.items() if key not in ("revision", "subfolder")}
    model = load_model(name, revision=revision or "main", **access, **model_kwargs)
    found = describe_base(model, name, revision)
    for kind in ("config", "embeddings"):
        expected, value = record.get(f"{kind}_checksum"), found.get(f"{kind}_checksum")
        if expected and value and expected != value:
            raise ValueError(
                f"{folder} was trained on another base model than {name} is now: the {kind} differ; give it the base "
                f"of revision {record.get('revision')}"
            )
    rows = config.trainable_token_indices or {}
    rows = [row for indices in (rows.values() if isinstance(rows, dict) else [rows]) for row in indices]
    make_room(model, max(rows, default=-1) + 1)
    if is_trainable and getattr(model, "is_quantized", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model.adapter_base = record or found
    model = PeftModel.from_pretrained(model, local, is_trainable=is_trainable)
    keep_embedding(model)
    return model


def keep_embedding(model: PeftModel) -> None:
    """Let input embeddings whose rows PEFT trains compute what they do beside the look-up, such as Inkling's norm.

    Args:
        model ([`PeftModel`]): The model. PEFT by itself multiplies by `embed_scale` at most.
    """
    layer = getattr(model.get_input_embeddings(), "token_adapter", None)
    embedding = None if layer is None else layer.get_base_layer()
    if embedding is None or type(embedding).forward is torch.nn.Embedding.forward or hasattr(embedding, "embed_scale"):
        return
    layer.forward_adapters = lambda token_ids, adapters: functional_call(
        embedding, {"weight": layer.get_merged_weights(adapters)}, token_ids
    )


def merge_adapter(model: PeftModel) -> PreTrainedModel:
    """Merge an adapter into its base model; warn where it was trained on a quantized base and this one is not.

    Args:
        model ([`PeftModel`]): The model that [`load_adapter`] returns.
    """
    if model.adapter_base.get("quantized") and not getattr(model.get_base_model(), "is_quantized", False):
        logger.warning(
            "The adapter was trained on a quantized base model and is merged into that model in full precision, so "
            "scores differ a little from those of training. To keep it on a quantized base, give a quantization_config."
        )
    return model.merge_and_unload()


@torch.no_grad()
def make_room(model: PreTrainedModel, num_tokens: int, multiple: int | None = EMBEDDING_MULTIPLE) -> None:
    """Make room for tokens in a model's embeddings and head.

    Rows beyond the tokens are padding: they get the mean of the rows that were there, with which no token is as
    probable as the best.

    Args:
        model ([`PreTrainedModel`]): The model; changed in place, where its matrices are too small.
        num_tokens (`int`): The number of tokens.
        multiple (`int`, *optional*, defaults to 64): Pad the matrices to a multiple of so many rows.

    Raises:
        `ValueError`: if its embeddings cannot be resized.
    """
    config, before = model.config.get_text_config(), model.get_input_embeddings().num_embeddings
    unpadded = getattr(config, "unpadded_vocab_size", None)  # what Inkling cuts its head or its logits to
    # Other rows beyond those of the head have a use of their own, so that no token can take their place.
    can_grow = unpadded is not None or getattr(model.get_output_embeddings(), "out_features", before) >= before
    can_grow &= config.model_type != "reformer"  # whose larger head transformers cannot save
    refusal = f"the embeddings of {type(model).__name__} cannot be resized, so it cannot learn new tokens"
    if not can_grow:
        raise ValueError(refusal)
    if num_tokens <= (unpadded or before):
        return
    tables = [name for name, module in model.named_modules() if getattr(module, "num_embeddings", None) == before]
    try:
        model.resize_token_embeddings(num_tokens, pad_to_multiple_of=multiple, mean_resizing=False)
    except AttributeError as error:  # xLSTM initializes new embeddings by an attribute that it lacks
        raise ValueError(refusal) from error
    after = model.get_input_embeddings().num_embeddings
    if after < num_tokens:
        raise ValueError(refusal)
    if unpadded is not None:
        before, config.unpadded_vocab_size = unpadded, after
    if getattr(config, "decoder_vocab_size", None) is not None:  # Marian's, which it does not set itself
        config.decoder_vocab_size = after
    others = [model.get_submodule(name) for name in tables]  # such as Gemma's embeddings of each layer
    for module in [*embedding_modules(model), *(other for other in others if other.num_embeddings == after)]:
        weight = module.weight
        if weight.numel():  # else ZeRO-3 holds it in parts
            weight[before:] = weight[:before].float().mean(0).to(weight)
    for module in model.modules():  # routers by hash have a table of the experts of each token id
        table = getattr(module, "tid2eid", None)
        if table is not None and len(table) == before:
            module.tid2eid = torch.cat([table, table[torch.arange(after - before, device=table.device) % before]])


def embedding_modules(model: PreTrainedModel) -> list[torch.nn.Module]:
    """Return the input embeddings and, where it has a matrix of its own, the head."""
    modules, head = [model.get_input_embeddings()], model.get_output_embeddings()
    return modules if head is None or head.weight is modules[0].weight else [*modules, head]


def _config_checksum(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        config = json.load(file)
    for name in ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache"):
        config.pop(name, None)
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def _embeddings_checksum(model: PreTrainedModel) -> str | None:
    """A checksum of some rows of the embeddings in bfloat16, which loading in float32 or bfloat16 does not change."""
    weight = model.get_input_embeddings().weight
    if weight.dtype not in (torch.float32, torch.bfloat16) or weight.ndim != 2 or not weight.numel():
        return None  # rounded in another way, or held in parts
    rows = weight[:: len(weight) // 1024 + 1].detach().to("cpu", torch.bfloat16).contiguous()
    shape = str(tuple(weight.shape)).encode()
    return hashlib.sha256(shape + rows.view(torch.uint8).numpy().tobytes()).hexdigest()
