"""The prefix trie of all codes, as flat tensors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


class CodeTrie:
    """A prefix trie over codes of equal length, in compressed sparse row form.

    Nodes are numbered breadth first: the root is 0, the children of a node are consecutive and ordered by token, and
    the leaves, one a tool, come last. Looking up the children of a whole batch of prefixes takes a few tensor
    operations, whatever the number of tools.

    Args:
        tool_code_ids (`np.ndarray` or `torch.Tensor` of shape `(num_tools, num_levels)`):
            Token ids of the tools' codes.

    Raises:
        `ValueError`: if two tools share a code, or there is none.

    Attributes:
        tokens (`torch.LongTensor` of shape `(num_nodes,)`): Token that leads to each node; -1 for the root.
        first_child (`torch.LongTensor` of shape `(num_nodes + 1,)`): The children of node `i` are the nodes
            `first_child[i]` to `first_child[i + 1] - 1`.
        first_leaf (`torch.LongTensor` of shape `(num_nodes + 1,)`): Below node `i` are the leaves, counted from the
            first leaf of all, `first_leaf[i]` to `end_leaf[i] - 1`.
        tools (`torch.LongTensor` of shape `(num_tools,)`): Row in `tool_code_ids` of each leaf.
    """

    def __init__(self, tool_code_ids: np.ndarray | torch.Tensor):
        codes = np.asarray(tool_code_ids, dtype=np.int64)
        if codes.ndim != 2 or codes.size == 0:
            raise ValueError(f"tool_code_ids must have the shape (num_tools, num_levels), not {codes.shape}")
        num_tools, self.num_levels = codes.shape
        self.vocab_size = int(codes.max()) + 1  # of the trie: no token of a code is larger

        order = np.lexsort(codes.T[::-1])
        codes = codes[order]
        # A sorted code opens a new node on a level if it differs from the one before there or on a level above.
        opens = np.ones((num_tools, self.num_levels), dtype=bool)
        opens[1:] = np.logical_or.accumulate(codes[1:] != codes[:-1], axis=1)
        if not opens[:, -1].all():
            twin = int(np.flatnonzero(~opens[:, -1])[0])
            raise ValueError(f"the tools in rows {order[twin - 1]} and {order[twin]} have the same code")

        tokens, parents, first_leaf = [np.array([-1])], [np.array([-1])], [np.array([0])]
        node_of_leaf, num_nodes = np.zeros(num_tools, dtype=np.int64), 1
        self.max_children = []  # most children of a node, for each depth
        for level in range(self.num_levels):
            starts = np.flatnonzero(opens[:, level])
            tokens.append(codes[starts, level])
            parents.append(node_of_leaf[starts])
            first_leaf.append(starts)
            self.max_children.append(int(np.unique(parents[-1], return_counts=True)[1].max()))
            node_of_leaf = num_nodes + np.cumsum(opens[:, level]) - 1
            num_nodes += len(starts)
        parent = np.concatenate(parents)
        children = np.bincount(parent[1:], minlength=num_nodes)
        end_leaf = [np.append(starts[1:], num_tools) for starts in first_leaf]

        self.tokens = torch.from_numpy(np.concatenate(tokens))
        self.first_child = torch.from_numpy(np.concatenate([[1], 1 + np.cumsum(children)]))
        self.first_leaf = torch.from_numpy(np.concatenate(first_leaf))
        self.end_leaf = torch.from_numpy(np.concatenate(end_leaf))
        self.tools = torch.from_numpy(order)
        # Sorted, because parents ascend and the tokens below a parent do: one binary search finds a child.
        self._keys = torch.from_numpy(parent[1:] * self.vocab_size + self.tokens.numpy()[1:])

    def __len__(self) -> int:
        return len(self.tools)

    @property
    def num_nodes(self) -> int:
        """`int`: The number of nodes, the root and the leaves included."""
        return len(self.tokens)

    def to(self, device: torch.device | str) -> CodeTrie:
        """Return the trie with its tensors on a device."""
        if self.tokens.device == torch.device(device):
            return self
        trie = object.__new__(CodeTrie)
        trie.__dict__ = {
            name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in vars(self).items()
        }
        return trie

    def step(self, nodes: torch.LongTensor, tokens: torch.LongTensor) -> torch.LongTensor:
        """Follow one token from each node.

        Args:
            nodes (`torch.LongTensor` of shape `(batch,)`): Nodes; -1 for none.
            tokens (`torch.LongTensor` of shape `(batch,)`): The token to follow from each.

        Returns:
            `torch.LongTensor` of shape `(batch,)`: the child of each node, -1 where the token leads nowhere.
        """
        keys = nodes * self.vocab_size + tokens
        position = torch.searchsorted(self._keys, keys).clamp(max=len(self._keys) - 1)
        found = (self._keys[position] == keys) & (nodes >= 0) & (tokens >= 0) & (tokens < self.vocab_size)
        return torch.where(found, position + 1, -1)

    def walk(self, prefixes: torch.LongTensor) -> torch.LongTensor:
        """Follow prefixes of codes from the root.

        Args:
            prefixes (`torch.LongTensor` of shape `(batch, depth)`): Token ids.

        Returns:
            `torch.LongTensor` of shape `(batch,)`: the node of each prefix, -1 where no code starts with it.
        """
        nodes = torch.zeros(len(prefixes), dtype=torch.long, device=prefixes.device)
        for tokens in prefixes.unbind(1):
            nodes = self.step(nodes, tokens)
        return nodes

    def children(
        self, nodes: torch.LongTensor, width: int, allowed: torch.Tensor | None = None
    ) -> tuple[torch.LongTensor, torch.BoolTensor]:
        """List the tokens that may follow each node.

        Args:
            nodes (`torch.LongTensor` of shape `(batch,)`): Nodes; -1 for none.
            width (`int`): Room for children, at least the most that one of the nodes has.
            allowed (`torch.Tensor` of shape `(batch, num_tools + 1)`, *optional*):
                The tools that each row may reach, as [`CodeTrie.allow`] gives it.

        Returns:
            `tuple` of two tensors of shape `(batch, width)`: the tokens, ascending, and which of them are there.
        """
        start = self.first_child[nodes.clamp(min=0)]
        end = torch.where(nodes >= 0, self.first_child[nodes.clamp(min=0) + 1], start)
        child = start[:, None] + torch.arange(width, device=nodes.device)
        present = child < end[:, None]
        child = torch.where(present, child, 1)
        if allowed is not None:
            reachable = allowed.gather(1, self.end_leaf[child]) - allowed.gather(1, self.first_leaf[child])
            present = present & (reachable > 0)
        return self.tokens[child], present

    def allow(self, tool_sets: Sequence[Sequence[int]]) -> torch.IntTensor:
        """Prepare sets of tools that restrict decoding, one for each row of a batch.

        Args:
            tool_sets (`Sequence[Sequence[int]]`): For each row the tools, as rows of `tool_code_ids`.

        Returns:
            `torch.IntTensor` of shape `(batch, num_tools + 1)`: the number of allowed tools among the first `i` leaves.
        """
        leaf_of_tool = torch.empty_like(self.tools)
        leaf_of_tool[self.tools] = torch.arange(len(self.tools), device=self.tools.device)
        counts = torch.zeros((len(tool_sets), len(self) + 1), dtype=torch.int32, device=self.tools.device)
        for row, tools in zip(counts, tool_sets, strict=True):
            row[1 + leaf_of_tool[torch.as_tensor(tools, dtype=torch.long, device=self.tools.device)]] = 1
        return counts.cumsum(1, dtype=torch.int32)
