"""What a model has read of a batch of sequences, in whatever way its architecture keeps it, and of a tree behind each."""

from __future__ import annotations

import copy
import inspect

import torch
from transformers import Cache, DynamicCache, PreTrainedModel
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


class DecodingTree:
    r"""
    The prompts that a causal language model has read, and trees of tokens behind them.

    A prompt and all of its branches are one row: a mask shows each token its own branch alone, and positions go on from
    the prompt in every branch. So a prompt and branches are read in one forward pass, and the keys and values of a
    prompt are kept once, however many branches there are. This is for models of which [`can_branch`] holds.

    Args:
        model ([`PreTrainedModel`]): The model, which may be wrapped by PEFT.

    Example:

    ```python
    >>> tree = DecodingTree(model)
    >>> logits = tree.read(input_ids, attention_mask, branches=drafts, parents=torch.full_like(drafts, -1))
    >>> next_token, behind_drafts = logits[:, 0], logits[:, 1:]
    >>> logits = tree.read(branches=more, parents=parents)  # places of the drafts, counted from 0
    ```
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.cache = DynamicCache(config=model.config)
        self.attention_mask = torch.ones((1, 0), dtype=torch.bool, device=model.device)  # of the prompts
        self.parents = torch.zeros((1, 0), dtype=torch.long, device=model.device)

    def repeat(self, batch_size: int) -> DecodingTree:
        """Return a state of its own for each of several prompts that go on from this one, which stays as it is."""
        tree = copy.copy(self)
        tree.cache = copy.deepcopy(self.cache)
        tree.cache.batch_repeat_interleave(batch_size)
        tree.attention_mask = self.attention_mask.repeat_interleave(batch_size, 0)
        tree.parents = self.parents.repeat_interleave(batch_size, 0)
        return tree

    def read(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        branches: torch.LongTensor | None = None,
        parents: torch.LongTensor | None = None,
        module: torch.nn.Module | None = None,
    ) -> torch.Tensor:
        """Read the rest of each prompt, branches behind it, or both.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*):
                Tokens of the prompts, padded on the left. Once there are branches, the prompts are complete.
            attention_mask (`torch.LongTensor` of shape `(batch, length)`, *optional*):
                0 for padding among them.
            branches (`torch.LongTensor` of shape `(batch, num_branches)`, *optional*):
                Tokens behind the prompts.
            parents (`torch.LongTensor` of shape `(batch, num_branches)`, *optional*):
                For each of them the place of the token that it follows, counted over all branches that the state has
                read and those before it in this call; -1 for the prompt.
            module (`torch.nn.Module`, *optional*):
                The part of the model to call, such as its `base_model`.

        Returns:
            `torch.Tensor` of shape `(batch, 1 + num_branches, vocab_size)`: the logits behind the prompt's last token
            and behind each branch, without the first row where no prompt was given; the hidden states where the module
            gives no logits.
        """
        module = self.model if module is None else module
        given = branches if input_ids is None else input_ids
        none = given.new_zeros((len(given), 0))
        input_ids = none if input_ids is None else input_ids
        branches, parents = (none, none) if branches is None else (branches, parents)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        known, length = self.attention_mask.shape[1], input_ids.shape[1]
        self.attention_mask = torch.cat([self.attention_mask, attention_mask.bool()], dim=1)
        self.parents = torch.cat([self.parents, parents], dim=1)
        prompt = self.attention_mask[:, None]
        own = self._own_branch(branches.shape[1])

        places = torch.arange(known + length, device=given.device)
        causal = places <= places[known:, None]
        itself = places == places[known:, None]  # padding has to see something, or its attention is NaN
        seen = torch.cat(
            [
                torch.nn.functional.pad(prompt & causal | itself, (0, own.shape[2])),
                torch.cat([prompt.expand(-1, own.shape[1], -1), own], dim=2),
            ],
            dim=1,
        )
        positions = (self.attention_mask.cumsum(1) - 1).clamp(min=0)[:, known:]
        below = self.attention_mask.sum(1, keepdim=True) + own.sum(2) - 1
        new = branches.shape[1] + bool(length)
        inputs = {"logits_to_keep": new}
        if "logits_to_keep" not in inspect.signature(type(_unwrap(module)).forward).parameters:
            inputs = {}
        output = module(
            input_ids=torch.cat([input_ids, branches], dim=1),
            attention_mask=seen[:, None],
            position_ids=torch.cat([positions, below], dim=1),
            cache=self.cache,
            use_cache=True,
            **inputs,
        )
        return _values(output)[:, -new:]

    def _own_branch(self, new: int) -> torch.BoolTensor:
        """Which branch tokens each of the last ones sees: itself and those that it goes on from."""
        batch, total = self.parents.shape
        places = torch.arange(total, device=self.parents.device)
        at = places[total - new :].expand(batch, -1)
        own = torch.zeros((batch, new, total), dtype=torch.bool, device=at.device)
        while (at >= 0).any():
            own |= at[:, :, None] == places
            at = torch.where(at >= 0, self.parents.gather(1, at.clamp(min=0)), -1)
        return own


def can_share_prompts(model: PreTrainedModel) -> bool:
    """Whether the attention mask alone decides which tokens attend to each other, so that answers can share a prompt."""
    config = model.config.get_text_config()
    return (
        config._attn_implementation == "sdpa"
        and not model._is_stateful
        and set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
        and getattr(config, "sliding_window", None) is None  # some have a window and name no types of layers
        and not hasattr(config, "output_router_logits")  # the load of experts is balanced by a mask of two dimensions
        and getattr(config, "rope_parameters", None) is not None
    )


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
        ids = _example(base, 32)[None]
        long, short, further = ids[:, :21], ids[:, 21:31], ids[:, 31:]
        logits = _values(model(input_ids=torch.cat([long, further], dim=1), use_cache=False))
        # Of the same length, so that it is computed alike: in half precision another length rounds otherwise.
        changed = torch.cat([long[:, :8], ids[:, :14]], dim=1)
        # Rounding to 8 bits depends on all tokens of a batch, and moves logits by a few hundredths.
        limit = 1e-1 if getattr(base, "is_quantized", False) else 1e-2
        follows = _distance(_values(model(input_ids=changed, use_cache=False))[:, 7], logits[:, 7]) > limit
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


@torch.no_grad()
def can_branch(model: PreTrainedModel) -> bool:
    """Whether a model that reads branches behind a prompt, in one row, predicts as in plain forward passes.

    Where [`can_share_prompts`] allows it, it is measured on a few tokens, and remembered with the model.
    """
    base = _unwrap(model)
    if not hasattr(base, "_can_branch"):
        base._can_branch = False
        if can_share_prompts(model) and can_use_cache(model):
            ids = _example(base, 10)
            prompts = torch.stack([ids[:6], torch.cat([ids[:2], ids[:1], ids[3:6]])])
            mask = torch.ones_like(prompts[:, 2:])
            mask[1, 0] = 0
            branches, parents = ids[6:9].expand(2, -1), torch.tensor([[-1, 0, -1]] * 2, device=model.device)
            try:
                tree = DecodingTree(model)
                tree.read(prompts[:1, :2])
                found = tree.repeat(2).read(prompts[:, 2:], mask, branches, parents)[:, 2:]
                plain = [torch.cat([ids[:2], row[2:][seen > 0]]) for row, seen in zip(prompts, mask, strict=True)]
                ends = [[torch.cat([row, ids[6:8]]), torch.cat([row, ids[8:9]])] for row in plain]
                # With a token more, the same is computed in another order, which shows how far rounding goes.
                longer = [[torch.cat([end, ids[9:]]) for end in row] for row in ends]
                expected, again = (
                    torch.stack(
                        [
                            torch.stack(
                                [_values(model(input_ids=end[None], use_cache=False))[0, place] for end in row]
                            )
                            for row in rows
                        ]
                    )
                    for rows, place in ((ends, -1), (longer, -2))
                )
                tolerance = max(_tolerance(base), 4 * _distance(again, expected))
                base._can_branch = _distance(found, expected) <= tolerance
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # as many kinds as there are architectures
                logger.info(f"{type(base).__name__} reads no branches: {error}")
    return base._can_branch


def _example(model: PreTrainedModel, length: int) -> torch.LongTensor:
    """Return token ids from all over the vocabulary, without padding: the first ones may be tokens of control, which
    models are trained on so little that what they say behind them is mostly rounding."""
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    ids = [3 + 7 * i * i % (model.get_input_embeddings().weight.shape[0] - 4) for i in range(length)]
    return torch.tensor([i + (i == pad) for i in ids], device=model.device)


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
