"""`DecodingState`: what a model has read of a batch of sequences, in whatever way its architecture keeps it."""

from __future__ import annotations

import copy
import inspect

import torch
from transformers import Cache, PreTrainedModel
from transformers.utils import logging


logger = logging.get_logger(__name__)


class DecodingState:
    r"""
    The tokens that a causal language model has read of a batch of sequences, and its cache of them.

    The model prepares its inputs and its cache itself, as in `generate`. Where that would change what it predicts, as
    with a cache that cannot be reordered or padding that is read, all tokens are read again at every step, with the
    padding behind them. A short example decides it, once for each model.

    Args:
        model ([`PreTrainedModel`]):
            The model, in evaluation mode. PEFT may have wrapped it.
        use_cache (`bool`, *optional*):
            Whether to read on from a cache. By default as the example shows.

    Raises:
        `ValueError`: for a model whose predictions depend on the tokens that follow, such as an encoder.

    Example:

    ```python
    >>> state = DecodingState(model)
    >>> logits = state.read(input_ids, attention_mask)  # of the prompts
    >>> state.select(beams)  # rows of the batch, as often as each is gone on with
    >>> logits = state.read(next_tokens)
    ```
    """

    def __init__(self, model: PreTrainedModel, use_cache: bool | None = None):
        self.model = model
        self.use_cache = can_use_cache(model) if use_cache is None else use_cache
        self.cache: Cache | None = None
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
        first = self.input_ids is None
        self.input_ids = input_ids if first else torch.cat([self.input_ids, input_ids], dim=1)
        self.attention_mask = mask if first else torch.cat([self.attention_mask, mask], dim=1)
        if not self.use_cache:
            order = self.attention_mask.argsort(dim=1, descending=True, stable=True)  # padding goes to the right
            values = _values(module(input_ids=self.input_ids.gather(1, order), use_cache=False))
            return values[torch.arange(len(order), device=values.device), self.attention_mask.sum(1) - 1]
        parameters = inspect.signature(type(_unwrap(module)).forward).parameters
        inputs = {"cache": self.cache, "use_cache": True, "logits_to_keep": 1}
        if "position_ids" in parameters:
            inputs["position_ids"] = (self.attention_mask.cumsum(1) - 1).clamp(min=0)
        inputs = _unwrap(self.model).prepare_inputs_for_generation(
            self.input_ids,
            attention_mask=self.attention_mask,
            is_first_iteration=first,
            next_sequence_length=None if first else input_ids.shape[1],
            **inputs,
        )
        if "logits_to_keep" not in parameters:
            inputs.pop("logits_to_keep", None)
        output = module(**inputs)
        self.cache = output.cache
        return _values(output)[:, -1]

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


@torch.no_grad()
def can_use_cache(model: PreTrainedModel) -> bool:
    """Whether a model that reads on from its cache, with padding, predicts as in plain forward passes.

    It is measured on 32 tokens, and remembered with the model.

    Raises:
        `ValueError`: if what it predicts depends on the tokens that follow.
    """
    base = _unwrap(model)
    if not hasattr(base, "_can_use_cache"):
        pad = getattr(base.config.get_text_config(), "pad_token_id", None)
        ids = [3 + 7 * i * i % (base.get_input_embeddings().weight.shape[0] - 4) for i in range(32)]
        ids = torch.tensor([[i + (i == pad) for i in ids]], device=model.device)
        long, short, further = ids[:, :21], ids[:, 21:31], ids[:, 31:]
        logits = _values(model(input_ids=torch.cat([long, further], dim=1), use_cache=False))
        # Of the same length, so that it is computed alike: in half precision another length rounds otherwise.
        changed = torch.cat([long[:, :8], ids[:, :14]], dim=1)
        follows = _distance(_values(model(input_ids=changed, use_cache=False))[:, 7], logits[:, 7]) > 1e-2
        rounding = _distance(_values(model(input_ids=long[:, :8], use_cache=False))[:, -1], logits[:, 7])
        if follows or (_tolerance(base) < 1e-1 and rounding > _tolerance(base)):
            raise ValueError(
                f"{type(base).__name__} is no causal language model: the tokens that follow change what it predicts "
                "(an encoder reads from left to right with is_decoder=True in its configuration)"
            )
        expected = torch.cat(
            [_values(model(input_ids=torch.cat([short, further], dim=1), use_cache=False))[:, -1], logits[:, -1]]
        )
        tolerance = max(_tolerance(base), 4 * rounding)
        base._can_use_cache = False
        try:
            state = DecodingState(model, use_cache=True)
            mask = torch.tensor([[1] * 21, [0] * 11 + [1] * 10], device=model.device)
            padded = torch.nn.functional.pad(short, (11, 0), value=0 if pad is None else pad)
            state.read(torch.cat([long, padded]), mask)
            state.select(torch.tensor([1, 0, 1], device=model.device))
            found = state.read(further.expand(3, 1))
            distances = _distance(found[:2], expected), _distance(found[2], found[0])
            base._can_use_cache = all(distance <= tolerance for distance in distances)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # as many kinds as there are caches
            logger.info(f"the cache of {type(base).__name__} fails: {error}")
        if not base._can_use_cache:
            logger.warning(
                f"{type(base).__name__} predicts something else with its cache or with padding: it reads all tokens "
                "again for each new one, which is slower"
            )
    return base._can_use_cache


def _distance(values: torch.Tensor, expected: torch.Tensor) -> float:
    """The distance between logits, as a share of how far those expected spread; infinite where it is not a number."""
    values, expected = values.float(), expected.float()
    spread = (expected - expected.mean(-1, keepdim=True)).norm()
    return float(((values - expected).norm() / spread).nan_to_num(nan=torch.inf))


def _tolerance(model: torch.nn.Module) -> float:
    """How far logits may differ by rounding alone."""
    autocast = torch.is_autocast_enabled(model.device.type) or hasattr(model, "_original_forward")  # accelerate's
    if autocast or model.dtype not in (torch.float32, torch.float64) or getattr(model, "is_quantized", False):
        return 1e-1  # of half precision, or a mixture whose router turns at a near tie
    return 1e-4 if model.device.type == "cpu" else 1e-2  # accelerators may multiply in TF32


def _unwrap(model: torch.nn.Module) -> torch.nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _values(output) -> torch.Tensor:
    return output.logits if "logits" in output else output.last_hidden_state
