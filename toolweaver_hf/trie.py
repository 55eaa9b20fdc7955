"""The prefix trie of all codes, in flat tensors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


KEY_STRIDE = 1 << 31  # exceeds any token id, so that node and token form one key


class CodeTrie:
    """A prefix trie over codes of equal length, in compressed sparse row form.

    Nodes are numbered breadth first: the root is 0, the children of a node are consecutive and ordered by token, and
    the leaves, one per tool, come last. Looking up the children of a batch of prefixes takes a few tensor operations,
    for any number of tools.

    [`CodeTrie.restrict`] returns a forest in the same form, with one root per set of tools.

    Args:
        tool_code_ids (`np.ndarray` or `torch.Tensor` of shape `(num_tools, num_levels)`):
            Token ids of the tools' codes.

    Raises:
        `ValueError`: if two tools share a code, or there are no codes.

    Attributes:
        num_levels (`int`): Length of every code.
        roots (`torch.LongTensor` of shape `(num_sets,)`): The root of each set of tools, -1 for an empty one.
        child_ranges (`torch.LongTensor` of shape `(num_nodes + 1, 2)`): The children of node `i` are the nodes
            `child_ranges[i, 0]` to `child_ranges[i, 1] - 1`; the last row, for the node -1, is empty.
        max_children (`list[int]`): The maximum number of children of a node, for each depth.
        tools (`torch.LongTensor` of shape `(num_leaves,)`): Row in `tool_code_ids` of each leaf.
        level_sizes (`list[int]`): The number of nodes of each level, without the roots.
        node_of_leaf (`torch.LongTensor` of shape `(num_levels, num_leaves)`): For each level the ancestor of each leaf
            (on the last level the leaf itself), counted from the level's first node.
    """

    def __init__(self, tool_code_ids: np.ndarray | torch.Tensor):
        codes = torch.as_tensor(tool_code_ids).cpu().numpy().astype(np.int64, copy=False)
        if codes.ndim != 2 or codes.size == 0:
            raise ValueError(f"tool_code_ids must have the shape (num_tools, num_levels), not {codes.shape}")
        order = np.lexsort(codes.T[::-1])
        codes = codes[order]
        twins = np.flatnonzero((codes[1:] == codes[:-1]).all(1))
        if len(twins):
            raise ValueError(f"the tools in rows {order[twins[0]]} and {order[twins[0] + 1]} have the same code")
        self._codes, self._order = codes, order
        self.vocab_size = int(codes.max()) + 1  # large enough for the tokens of all codes
        self._leaf_of_tool = np.empty_like(order)
        self._leaf_of_tool[order] = np.arange(len(order))
        self._build(codes, order, np.zeros(len(codes), dtype=np.int64))
        self.roots = torch.zeros(1, dtype=torch.long)

    def _build(self, codes: np.ndarray, tools: np.ndarray, sets: np.ndarray) -> None:
        """Build the nodes from codes that are sorted within each set."""
        num_leaves, self.num_levels = codes.shape
        # A code opens a new node on a level if it differs from the previous code there, above, or in its set.
        opens = np.ones((num_leaves, self.num_levels + 1), dtype=bool)
        opens[1:, 0] = sets[1:] != sets[:-1]
        opens[1:, 1:] = codes[1:] != codes[:-1]
        np.logical_or.accumulate(opens, axis=1, out=opens)
        node_of_leaf = np.cumsum(opens[:, 0]) - 1
        num_roots = num_nodes = int(opens[:, 0].sum())
        tokens, parents, self.max_children = [np.zeros(num_nodes, dtype=np.int64)], [], []
        for level in range(self.num_levels):
            starts = np.flatnonzero(opens[:, level + 1])
            tokens.append(codes[starts, level])
            parents.append(node_of_leaf[starts])
            self.max_children.append(int(np.bincount(parents[-1] - parents[-1][0]).max()) if num_leaves else 1)
            node_of_leaf = num_nodes - 1 + np.cumsum(opens[:, level + 1])
            num_nodes += len(starts)
        parent = np.concatenate(parents)
        children = np.bincount(parent, minlength=num_nodes)
        self.num_nodes = num_nodes
        ends = num_roots + np.cumsum(children)
        self.child_ranges = torch.from_numpy(np.append(np.stack([ends - children, ends], axis=1), [[0, 0]], axis=0))
        self._places = torch.arange(max(self.max_children))
        # The nodes of each depth are consecutive; so are the leaves below each of them.
        self.level_sizes = opens[:, 1:].sum(0).tolist()
        self.node_of_leaf = torch.from_numpy(np.cumsum(opens[:, 1:], axis=0).T - 1)
        self.tools = torch.from_numpy(tools)
        # Padded, so that `max_children` tokens can be read at every node.
        self._tokens = torch.from_numpy(np.concatenate([*tokens, np.zeros(max(self.max_children), dtype=np.int64)]))
        # Sorted, because parents and the tokens below each parent ascend, so that a binary search finds a child. The
        # last key is a sentinel.
        keys = parent * KEY_STRIDE + self._tokens.numpy()[num_roots:num_nodes]
        self._keys = torch.from_numpy(np.append(keys, np.iinfo(np.int64).max))

    def __len__(self) -> int:
        return len(self.tools)

    @property
    def code_tokens(self) -> np.ndarray:
        """`np.ndarray`: The tokens of all codes, ascending, including tools outside the sets."""
        return np.unique(self._codes)

    def to(self, device: torch.device | str) -> CodeTrie:
        """Return the trie with its tensors on `device`."""
        if self._tokens.device == torch.device(device):
            return self
        trie = object.__new__(CodeTrie)
        trie.__dict__ = {
            name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in vars(self).items()
        }
        return trie

    def restrict(self, tool_sets: Sequence[Sequence[int]]) -> CodeTrie:
        """Return a forest with one root for each row of a batch, above the tools that are allowed for the row.

        Equal sets share a root. The cost depends on the size of the sets, not of the catalog: nothing is sorted again.

        Args:
            tool_sets (`Sequence[Sequence[int]]`): The allowed tools of each batch row, as rows of `tool_code_ids`.

        Raises:
            `ValueError`: if there is no set, or a set names a row that does not exist.
        """
        if len(tool_sets) == 0:
            raise ValueError("give at least one set of tools")
        numbers: dict[bytes, int] = {}  # distinct set -> its number
        below_sets: list[np.ndarray] = []
        rows: list[int] = []
        for tool_set in tool_sets:
            tools = np.asarray(tool_set, dtype=np.int64)
            if tools.size and not (tools.min() >= 0 and tools.max() < len(self._order)):
                raise ValueError(f"tools must be rows of tool_code_ids, 0 to {len(self._order) - 1}, not {tools}")
            below = np.unique(self._leaf_of_tool[tools])
            rows.append(numbers.setdefault(below.tobytes(), len(numbers)))
            if len(numbers) > len(below_sets):
                below_sets.append(below)
        sizes = np.array([len(below) for below in below_sets])
        leaves = np.concatenate(below_sets)
        forest = object.__new__(CodeTrie)
        forest._codes, forest._order, forest._leaf_of_tool = self._codes, self._order, self._leaf_of_tool
        forest.vocab_size = self.vocab_size
        forest._build(self._codes[leaves], self._order[leaves], np.repeat(np.arange(len(sizes)), sizes))
        root_of_set = np.where(sizes > 0, np.cumsum(sizes > 0) - 1, -1)
        forest.roots = torch.from_numpy(root_of_set[rows])
        return forest.to(self._tokens.device)

    def step(self, nodes: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Follow one token from each node.

        Args:
            nodes (`torch.LongTensor` of shape `(batch,)`): Nodes; -1 for none.
            tokens (`torch.LongTensor` of shape `(batch,)`): The token to follow from each.

        Returns:
            `torch.LongTensor` of shape `(batch,)`: the child of each node, -1 if there is none for the token.
        """
        keys = nodes * KEY_STRIDE + tokens  # negative, and so not found, for the node -1
        position = torch.searchsorted(self._keys, keys)
        found = self._keys[position] == keys
        return torch.where(found, position + (self.num_nodes - len(self._keys) + 1), -1)

    def walk(self, prefixes: torch.Tensor, nodes: torch.Tensor | None = None) -> torch.Tensor:
        """Follow prefixes of codes.

        Args:
            prefixes (`torch.LongTensor` of shape `(batch, depth)`): Token ids.
            nodes (`torch.LongTensor` of shape `(batch,)`, *optional*): The start nodes. Defaults to the first root.

        Returns:
            `torch.LongTensor` of shape `(batch,)`: the node of each prefix, -1 if no code starts with it.
        """
        nodes = self.roots[:1].expand(len(prefixes)) if nodes is None else nodes
        for tokens in prefixes.unbind(1):
            nodes = self.step(nodes, tokens)
        return nodes

    def children(self, nodes: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """List the valid continuations of each node.

        Args:
            nodes (`torch.LongTensor` of shape `(batch,)`): Nodes; -1 for none.
            width (`int`): Number of columns: the entry of `max_children` for the nodes' depth, or its maximum.

        Returns:
            `tuple` of two tensors of shape `(batch, width)`: the tokens, ascending, and a mask of the valid ones.
        """
        child, present = self.child_nodes(nodes, width)
        return self._tokens[child], present

    def child_nodes(self, nodes: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """List the children of each node.

        Args:
            nodes (`torch.LongTensor` of shape `(batch,)`): Nodes; -1 for none.
            width (`int`): As for `children`.

        Returns:
            `tuple` of two tensors of shape `(batch, width)`: the children, and which of them are there.
        """
        ranges = self.child_ranges[nodes]
        child = ranges[:, :1] + self._places[:width]
        return child, child < ranges[:, 1:]

    def tokens_of(self, nodes: torch.Tensor) -> torch.Tensor:
        """Return the token that leads to each node."""
        return self._tokens[nodes]

    def look_ahead(self, leaf_logits: torch.Tensor, weight: float) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        r"""Estimate what a search may hope for below each node: the log of the sum over the tools below it of
        \\(p_{LM}(tool | node)^w p_{expert}(tool)\\), as if the model knew of them what the expert does. It is exact on the
        last level.

        Args:
            leaf_logits (`torch.Tensor` of shape `(batch, num_leaves)`): The expert's log-probabilities of the leaves.
            weight (`float`): \\(w\\), the weight of the model.

        Returns:
            `tuple` of two lists with a tensor of shape `(batch, level_size)` for each level: what the expert says of the
            tools below each node together, as `sum_below` gives it, and the estimates.
        """
        sharp, plain = self.sum_below((1 + weight) * leaf_logits), self.sum_below(leaf_logits)
        hopes = [torch.where(b > -torch.inf, a - weight * b, -torch.inf) for a, b in zip(sharp, plain, strict=True)]
        return plain, hopes

    def sum_below(self, leaf_logits: torch.Tensor) -> list[torch.Tensor]:
        """Add up over each node what its leaves have: a log-sum-exp over the tools below it.

        Args:
            leaf_logits (`torch.Tensor` of shape `(batch, num_leaves)`): Logits of the leaves, in their order.

        Returns:
            `list[torch.Tensor]`: for each level a tensor of shape `(batch, level_size)`.
        """
        sums = []
        for nodes, size in zip(self.node_of_leaf, self.level_sizes, strict=True):
            index = nodes.expand(len(leaf_logits), -1)
            peak = leaf_logits.new_full((len(leaf_logits), size), -torch.inf)
            peak = peak.scatter_reduce(1, index, leaf_logits, "amax")
            finite = peak.clamp(min=torch.finfo(peak.dtype).min)
            share = (leaf_logits - finite.gather(1, index)).exp()
            sums.append(finite + torch.zeros_like(peak).scatter_add(1, index, share).log())
        return sums
