"""What LoRA trains of a model: which of its linear layers, and the rows of the code tokens."""

from __future__ import annotations

from collections import Counter

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..adapter import embedding_modules
from ..tokenization_toolweaver import ToolWeaverTokenizer


FEED_FORWARD = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
"""In a mixture of experts, PEFT takes these names for those of the experts."""


def linear_layers(model: PreTrainedModel) -> list[str]:
    """Name the linear layers that LoRA adapts by default, for its `target_modules`.

    They are those that PEFT chooses for the architecture. For the many for which it chooses none, they are all of the
    language model's, without the head and without those that share a weight, such as Zamba's; in a mixture of experts
    without the feed-forward layers, which are no linear layers there.

    Args:
        model ([`PreTrainedModel`]): The base model.
    """
    chosen = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model.config.model_type)
    if chosen is not None:
        return chosen
    names = {id(module): name for name, module in model.named_modules()}
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    decoder = model.base_model if decoder is head else decoder  # ModernBERT calls its head so
    shared = Counter(id(getattr(module, "weight", None)) for module in model.modules())
    mixture = any(name.split(".")[-1] == "experts" for name in names.values())
    found = []
    for parent in decoder.modules():
        for leaf, module in parent.named_children():
            if not isinstance(module, torch.nn.Linear | Conv1D) or module is head or shared[id(module.weight)] > 1:
                continue
            # A layer that the model's own file derives from a linear one computes something else.
            if type(module).__module__ == type(decoder).__module__:
                continue
            # The kernels of state-space layers read this weight without its adapter, and PEFT refuses it.
            if (leaf == "out_proj" and hasattr(parent, "conv1d")) or (mixture and leaf in FEED_FORWARD):
                continue
            found.append(names[id(module)])
    return found


def check_shared_weights(model: PeftModel) -> None:
    """Make sure that no two adapted layers share a weight, into which the adapters of both would be merged.

    Args:
        model ([`PeftModel`]): The model with its adapters.

    Raises:
        `ValueError`: naming such layers.
    """
    names: dict[int, list[str]] = {}
    for name, module in model.get_base_model().named_modules():
        weight = getattr(module.get_base_layer(), "weight", None) if isinstance(module, LoraLayer) else None
        if weight is not None:
            names.setdefault(id(weight), []).append(name)
    shared = next((found for found in names.values() if len(found) > 1), None)
    if shared is not None:
        raise ValueError(
            f"{' and '.join(shared)} share a weight, so that their adapters cannot be merged: name other layers in "
            "--lora_target_modules, or leave it out"
        )


def trainable_code_rows(model: PreTrainedModel, tokenizer: ToolWeaverTokenizer) -> dict[str, list[int]]:
    """Name the embedding matrices of a model and the rows of the code tokens, for `trainable_token_indices` of LoRA.

    PEFT takes all modules whose names end as it is told, so an ending is given that no other module's name has.

    Args:
        model ([`PreTrainedModel`]): The base model.
        tokenizer ([`ToolWeaverTokenizer`]): The tokenizer of its code tokens.

    Raises:
        `ValueError`: if the name of another module ends as the whole name of the embeddings or of the head.
    """
    names = dict(model.named_modules())
    matrices = embedding_modules(model)
    rows = {}
    for matrix in (model.get_input_embeddings(), model.get_output_embeddings()):
        if matrix is None:
            continue
        parts = next(name for name, module in names.items() if module is matrix).split(".")
        endings = [".".join(parts[-length:]) for length in range(1, len(parts) + 1)]
        alone = [ending for ending in endings if sum(name.endswith(ending) for name in names) == 1]
        if not alone:
            raise ValueError(
                f"LoRA cannot train {type(model).__name__}: PEFT finds the rows of new tokens by how a module's name "
                f"ends, and other names end in {endings[-1]!r} as well; train it without --use_peft"
            )
        if matrix in matrices:  # PEFT finds a tied head by itself
            rows[alone[0]] = tokenizer.code_token_ids
    return rows
