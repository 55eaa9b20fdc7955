"""What a model says behind the nodes of a trie, for each prompt of a batch."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from .cache import DecodingState, DecodingTree


class NodeStates:
    r"""
    The model's output behind each node of a trie that was read, in a row of the cache for each beam.

    It works for every architecture. Each level has to be read before the next one.

    Args:
        model ([`PreTrainedModel`]): The model.
        module (`torch.nn.Module`, *optional*): The part of the model to call, such as its `base_model`.
        state ([`DecodingState`], *optional*): What was read before.
    """

    def __init__(
        self, model: PreTrainedModel, module: torch.nn.Module | None = None, state: DecodingState | None = None
    ):
        self.module = module
        self._state = DecodingState(model) if state is None else state

    def start(self, input_ids: torch.LongTensor, attention_mask: torch.LongTensor) -> None:
        """Read the prompts, which lead to the trie's root, the node 0.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`): The prompts, padded on the left.
            attention_mask (`torch.LongTensor` of shape `(batch, length)`): 0 for padding.
        """
        self.begin(self._state.read(input_ids, attention_mask, self.module)[:, None])

    def begin(self, values: torch.Tensor) -> None:
        """Take what the model says behind the prompts, of shape `(batch, 1, vocab_size or hidden_size)`, as it is."""
        self._nodes = torch.zeros(values.shape[:2], dtype=torch.long, device=values.device)
        self._values = values

    @property
    def num_nodes(self) -> int:
        """`int`: How many nodes were read for each prompt, the root included."""
        return self._nodes.shape[1]

    def place(self, nodes: torch.LongTensor) -> torch.LongTensor:
        """Find nodes among those that were read; -1 for those that were not."""
        found = nodes[:, :, None] == self._nodes[:, None]
        return torch.where(found.any(2), found.int().argmax(2), -1)

    def values(self, nodes: torch.LongTensor) -> torch.Tensor:
        """Return the logits, or hidden states, behind nodes; arbitrary ones behind those that were not read.

        Args:
            nodes (`torch.LongTensor` of shape `(batch, num_nodes)`): The nodes.

        Returns:
            `torch.Tensor` of shape `(batch, num_nodes, vocab_size or hidden_size)`.
        """
        batch = torch.arange(len(nodes), device=nodes.device)[:, None]
        return self._values[batch, self.place(nodes).clamp(min=0)]

    def read(self, nodes: torch.LongTensor, tokens: torch.LongTensor, parents: torch.LongTensor) -> None:
        """Read nodes that all belong to one level.

        Args:
            nodes (`torch.LongTensor` of shape `(batch, num_nodes)`): The nodes; -1 for none.
            tokens (`torch.LongTensor` of shape `(batch, num_nodes)`): The tokens that lead to them.
            parents (`torch.LongTensor` of shape `(batch, num_nodes)`): The nodes above them, which were read.
        """
        batch, width = self._nodes.shape
        rows = torch.arange(batch, device=nodes.device)[:, None] * width + self.place(parents).clamp(min=0)
        self._state.select(rows.flatten())
        self._values = self._state.read(tokens.reshape(-1, 1), None, self.module).view(*nodes.shape, -1)
        self._nodes = nodes


class NodeTree(NodeStates):
    r"""
    The same, with all nodes behind a prompt in one row of the cache.

    So nodes can be read along with the prompt, and in any order that has parents first.

    Args:
        model ([`PreTrainedModel`]): The model, of which [`can_branch`] holds.
        module (`torch.nn.Module`, *optional*): The part of the model to call.
        prefix ([`DecodingTree`], *optional*): What was read of the tokens that all prompts begin with.
    """

    def __init__(
        self, model: PreTrainedModel, module: torch.nn.Module | None = None, prefix: DecodingTree | None = None
    ):
        self.module = module
        self._state = DecodingTree(model) if prefix is None else prefix

    def start(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor,
        nodes: torch.LongTensor,
        tokens: torch.LongTensor,
        parents: torch.LongTensor,
    ) -> None:
        """Read the prompts and nodes behind them in one pass.

        Args:
            input_ids, attention_mask: The prompts, without the prefix.
            nodes, tokens, parents: The nodes, as for `read`, of any levels.
        """
        self._state = self._state.repeat(len(input_ids))
        self._nodes = torch.cat([nodes.new_zeros((len(nodes), 1)), nodes], dim=1)
        above = torch.where(nodes >= 0, self.place(parents), 0) - 1
        self._values = self._state.read(input_ids, attention_mask, tokens, above, self.module)

    def read(self, nodes: torch.LongTensor, tokens: torch.LongTensor, parents: torch.LongTensor) -> None:
        missing = (nodes >= 0) & (self.place(nodes) < 0)
        width = int(missing.sum(1).max())
        # Those that are missing, side by side; what fills a row up goes on from the prompt, and nothing from it.
        order = missing.int().argsort(dim=1, descending=True, stable=True)[:, :width]
        missing = missing.gather(1, order)
        nodes = torch.where(missing, nodes.gather(1, order), -1)
        above = torch.where(missing, self.place(parents.gather(1, order)), 0) - 1
        values = self._state.read(branches=tokens.gather(1, order), parents=above, module=self.module)
        self._nodes = torch.cat([self._nodes, nodes], dim=1)
        self._values = torch.cat([self._values, values], dim=1)
