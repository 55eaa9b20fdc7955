"""`DecodingState`: what a model has read of a batch of sequences, in whatever way its architecture keeps it."""

from __future__ import annotations

import copy
import inspect

import torch
from transformers import DynamicCache, PreTrainedModel


class DecodingState:
    r"""
    The tokens that a causal language model has read of a batch of sequences, and its cache of them.

    It calls the model as its architecture takes it: with the cache and the positions that its forward pass knows of.
    A model that takes no cache reads all tokens again at every step, with the padding on the right, where it changes
    nothing for a causal model.

    Args:
        model ([`PreTrainedModel`]): The model, which may be wrapped by PEFT.

    Example:

    ```python
    >>> state = DecodingState(model)
    >>> logits = state.read(input_ids, attention_mask)  # of the prompts
    >>> state.select(beams)  # rows of the batch, as often as each is gone on with
    >>> logits = state.read(next_tokens)
    ```
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.cache = DynamicCache(config=model.config) if "cache" in _parameters(model) else None
        self.input_ids: torch.LongTensor | None = None
        self.attention_mask: torch.LongTensor | None = None

    @property
    def length(self) -> int:
        """`int`: The number of tokens that were read, padding included."""
        return 0 if self.input_ids is None else self.input_ids.shape[1]

    def read(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor | None = None,
        module: torch.nn.Module | None = None,
    ) -> torch.Tensor:
        """Read further tokens of each sequence.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`): The tokens, padded on the left.
            attention_mask (`torch.LongTensor` of shape `(batch, length)`, *optional*): 0 for padding among them.
            module (`torch.nn.Module`, *optional*): The part of the model to call, such as its `base_model`.

        Returns:
            `torch.Tensor` of shape `(batch, vocab_size)`: the logits of the token that follows; the last hidden states
            where the module gives no logits.
        """
        module = self.model if module is None else module
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if self.input_ids is None:
            self.input_ids, self.attention_mask = input_ids, mask
        else:
            self.input_ids = torch.cat([self.input_ids, input_ids], dim=1)
            self.attention_mask = torch.cat([self.attention_mask, mask], dim=1)
        known = _parameters(module)
        if self.cache is None:
            order = self.attention_mask.argsort(dim=1, descending=True, stable=True)  # padding goes to the right
            mask = self.attention_mask.gather(1, order)
            inputs = {"input_ids": self.input_ids.gather(1, order), "attention_mask": mask}
            last = mask.sum(1) - 1
            return _values(module(**_only(inputs, known)))[torch.arange(len(mask), device=mask.device), last]
        positions = (self.attention_mask.cumsum(1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        inputs = {
            "input_ids": input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": positions,
            "cache": self.cache,
            "logits_to_keep": 1,
        }
        return _values(module(**_only(inputs, known), use_cache=True))[:, -1]

    def fork(self) -> DecodingState:
        """Return a copy to go on with apart from this one."""
        state = copy.copy(self)
        state.cache = copy.deepcopy(self.cache)
        return state

    def select(self, rows: torch.LongTensor) -> None:
        """Go on with some rows of the batch, each as often as it is named.

        Args:
            rows (`torch.LongTensor` of shape `(new_batch,)`): The row that each of the new batch goes on from.
        """
        self.input_ids, self.attention_mask = self.input_ids[rows], self.attention_mask[rows]
        if self.cache is not None:
            self.cache.reorder_cache(rows)


def _parameters(module: torch.nn.Module) -> set[str]:
    """The arguments of a model's forward pass."""
    inner = module.get_base_model() if hasattr(module, "get_base_model") else module  # PEFT's wrapper names none
    return set(inspect.signature(type(inner).forward).parameters)


def _only(inputs: dict, known: set[str]) -> dict:
    return {name: value for name, value in inputs.items() if name in known}


def _values(output) -> torch.Tensor:
    return output.logits if "logits" in output else output.last_hidden_state
