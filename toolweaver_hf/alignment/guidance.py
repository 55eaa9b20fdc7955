"""Fitting the weights of guided decoding: how far to trust the model, the embeddings and BM25."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from ..data.queries import Query
from ..retrieval import ToolRetriever
from ..text_expert import SCORE_WEIGHTS


def fit_guidance(
    retriever: ToolRetriever,
    queries: Sequence[Query],
    max_queries: int = 100,
    seed: int = 0,
    show_progress_bar: bool = False,
) -> dict[str, float]:
    r"""Fit the weights of a retriever's text expert by likelihood: of the model, the cosine, BM25 and the memory.

    The loss is the mean over queries and their ground-truth tools of \\(-\log p(tool | query)\\), where the other
    ground-truth tools of a query do not compete. (Where they do, weights come out flatter, and nDCG lower.) Twenty
    queries are enough; a weak prior keeps the weights of fewer near those that the expert has. Never fit on queries
    that the model was trained on: it knows them by heart.

    Args:
        retriever ([`ToolRetriever`]): The retriever; the weights of its text expert are set.
        queries (`Sequence[Query]`): Held-out queries. Ground-truth tools that the retriever lacks are left out.
        max_queries (`int`, *optional*, defaults to 100): How many of them to use, drawn at random.
        seed (`int`, *optional*, defaults to 0): Seed of the drawing.
        show_progress_bar (`bool`, *optional*, defaults to `False`): Whether to show a progress bar.

    Returns:
        `dict[str, float]`: the weights, the number of `queries`, and `loss_before` and `loss` in nats.

    Raises:
        `ValueError`: for a retriever without a text expert, or if no query has a tool that the retriever knows.
    """
    expert = retriever.text_expert
    if expert is None:
        raise ValueError("the model has no text expert whose weights could be fitted")
    row_of_tool = {tool_id: row for row, tool_id in enumerate(retriever.tool_ids)}
    queries = [query for query in queries if any(tool in row_of_tool for tool in query.tools)]
    if not queries:
        raise ValueError("none of the queries has a ground-truth tool of the catalog")
    queries = random.Random(seed).sample(queries, min(max_queries, len(queries)))
    texts = [query.text for query in queries]
    by_name = dict(zip(SCORE_WEIGHTS, expert.scores(texts), strict=True))
    if retriever.trie is not None:
        by_name["model_weight"] = retriever.model_log_probs(texts, show_progress_bar)
    names = [name for name, scores in by_name.items() if scores.any()]  # a score that is 0 throughout says nothing
    features = torch.stack([by_name[name] for name in names]).double()
    relevant = torch.zeros(features.shape[1:], dtype=torch.bool)
    for row, query in enumerate(queries):
        relevant[row, [row_of_tool[tool] for tool in query.tools if tool in row_of_tool]] = True

    prior = torch.tensor([getattr(expert, name) for name in names], dtype=torch.float64).log()
    log_weights = prior.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([log_weights], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        scores = torch.tensordot(log_weights.exp(), features, dims=1)
        rivals = scores.masked_fill(relevant, -torch.inf).logsumexp(1, keepdim=True)
        log_probs = scores - torch.logaddexp(scores, rivals)
        return -(log_probs.masked_fill(~relevant, 0.0).sum(1) / relevant.sum(1)).mean()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss() + 0.5 * (log_weights - prior).square().sum() / len(queries)
        value.backward()
        return value

    with torch.no_grad():
        before = loss().item()
    optimizer.step(closure)
    for name, value in zip(names, log_weights.detach().exp().tolist(), strict=True):
        setattr(expert, name, value)
    with torch.no_grad():
        after = loss().item()
    fitted = {name: round(getattr(expert, name), 4) for name in names}
    return {**fitted, "queries": len(queries), "loss_before": round(before, 4), "loss": round(after, 4)}
