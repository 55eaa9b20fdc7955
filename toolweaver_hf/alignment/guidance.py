"""Fitting the weights of guided decoding: how far to trust the model, the embeddings and BM25."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers.utils import logging

from ..data.queries import Query
from ..retrieval import ToolRetriever
from ..text_expert import SCORE_WEIGHTS, SENTENCE_WEIGHTS, mean_distribution, split_sentences


logger = logging.get_logger(__name__)


SEARCH_WEIGHTS = {"cosine_weight", "bm25_weight"}
PRIORS = {
    "cosine_weight": 15.0,
    "bm25_weight": 0.4,
    "centroid_weight": 10.0,
    "memory_weight": 0.5,
    "model_weight": 0.5,
}
CAUTIOUS_WEIGHTS = PRIORS | {"centroid_weight": 0.0, "memory_weight": 0.0, "model_weight": 0.15}
"""How far to trust what was learned from the queries of an unreliable generator, where there are no others to fit on:
the model a little, the remembered queries not at all. Its held-out queries are of the kind that it wrote for training:
weights fitted on them made the product worse than search on queries of people, by five points of nDCG@1 on two catalogs
of three."""
BATCH_SIZE = 8  # queries of which it is asked at once whether they need a further tool
SIGNIFICANT = 1.64  # standard errors, one-sided 5 %


def fit_guidance(
    retriever: ToolRetriever,
    queries: Sequence[Query],
    max_queries: int = 100,
    seed: int = 0,
    show_progress_bar: bool = False,
) -> dict[str, float]:
    r"""Fit how far to trust the cosine, BM25, remembered queries and the model, by likelihood.

    The loss is the mean over queries and their ground-truth tools of \\(-\log p(tool | query)\\), where the other
    ground-truth tools of a query do not compete. (Where they do, weights come out flatter, and nDCG lower.)

    Search alone is fitted first. The centroids of remembered queries, their density and then the model are given a
    weight only if the loss falls by more than chance (a one-sided 5 % test over the queries); otherwise it is 0, so
    that a model is never worse than search. Twenty queries are enough to tell a good model. Never fit on queries that
    the model was trained on: it knows them by heart.

    Where there are queries of people, generated ones (see [`Query`]) are left out. Otherwise, on those of a reliable
    generator, the weights are set halfway from the defaults to the fit, as geometric means: the queries resemble those
    that the model was trained on, so that a fit trusts it too much. On those of an unreliable one nothing is fitted, but
    cautious weights are set, with a warning.

    It also finds out whether the model tells how many tools a query needs (`tells_end`): whether it predicts the end of
    the ground-truth tools better than their mean number does, by more than chance.

    Args:
        retriever ([`ToolRetriever`]): The retriever; the weights of its text expert are set.
        queries (`Sequence[Query]`): Held-out queries. Ground-truth tools that the retriever lacks are left out.
        max_queries (`int`, *optional*, defaults to 100): How many of them to use, drawn at random.
        seed (`int`, *optional*, defaults to 0): Seed of the drawing.
        show_progress_bar (`bool`, *optional*, defaults to `False`): Whether to show a progress bar.

    Returns:
        `dict[str, float]`: the weights, `tells_end`, the number of `queries`, and `search_loss` and `loss` in nats, of
        search alone and of the fit; these are missing where nothing was fitted.

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
    people = [query for query in queries if not query.generated]
    asked = people or [query for query in queries if query.reliable]
    if not asked:
        logger.warning(
            f"all {len(queries)} queries are of a generator that often breaks its instructions, and tell little of "
            "people's: the weights are cautious ones. Fit them with 20 queries of people or more: toolweaver fit-guidance"
        )
        for name, value in CAUTIOUS_WEIGHTS.items():
            setattr(expert, name, value)
        expert.tells_end = False
        return {**CAUTIOUS_WEIGHTS, "tells_end": False, "queries": 0}
    queries = random.Random(seed).sample(asked, min(max_queries, len(asked)))
    texts, query_of_text = split_sentences([query.text for query in queries])
    features = dict(zip(SCORE_WEIGHTS, expert.scores(texts), strict=True))
    if retriever.trie is not None:
        features["model_weight"] = retriever.model_log_probs(texts[: len(queries)], show_progress_bar)
    # A score that is 0 throughout says nothing.
    features = {name: scores.double() for name, scores in features.items() if scores.any()}
    relevant = torch.zeros((len(queries), len(row_of_tool)), dtype=torch.bool)
    for row, query in enumerate(queries):
        relevant[row, [row_of_tool[tool] for tool in query.tools if tool in row_of_tool]] = True

    names = [name for name in features if name in SEARCH_WEIGHTS]
    weights, search_losses = _fit(features, names, relevant, query_of_text)
    losses = search_losses
    for name in [name for name in features if name not in SEARCH_WEIGHTS]:
        more_weights, fewer_losses = _fit(features, [*names, name], relevant, query_of_text)
        if _is_gain(losses - fewer_losses):
            names, weights, losses = [*names, name], more_weights, fewer_losses
    if not people:
        weights = {name: (PRIORS[name] * weight) ** 0.5 for name, weight in weights.items()}
    fitted = {name: round(weights.get(name, 0.0), 4) for name in features}
    fitted["tells_end"] = _tells_end(retriever, queries)
    for name, value in fitted.items():
        setattr(expert, name, value)
    means = {"search_loss": search_losses.mean(), "loss": losses.mean()}
    return {**fitted, "queries": len(queries), **{name: round(float(mean), 4) for name, mean in means.items()}}


def _is_gain(gains: torch.Tensor) -> bool:
    """Whether the mean of some gains is above 0 by more than chance."""
    return bool(gains.mean() > SIGNIFICANT * gains.std() / len(gains) ** 0.5)


def _tells_end(retriever: ToolRetriever, queries: Sequence[Query]) -> bool:
    """Whether the model predicts, behind each of a query's tools, if another one follows."""
    tokenizer = retriever.tokenizer
    if tokenizer is None or retriever.trie is None:
        return False
    asked = [
        (query.text, query.tools[:count], float(count < len(query.tools)))
        for query in sorted(queries, key=lambda query: len(query.text))  # so that little of a batch is padding
        if all(tokenizer.has_tool(tool_id) for tool_id in query.tools)
        for count in range(1, len(query.tools) + 1)
    ]
    target = torch.tensor([follows for *_, follows in asked])
    if len(target.unique()) < 2:
        return False
    told = []
    for start in range(0, len(asked), BATCH_SIZE):
        texts, tools, _ = zip(*asked[start : start + BATCH_SIZE], strict=True)
        told.append(retriever.more_log_odds(retriever.read_answers(texts, tools)[1]).cpu())
    guess = target.mean().logit().expand(len(target))
    losses = [binary_cross_entropy_with_logits(odds, target, reduction="none") for odds in (guess, torch.cat(told))]
    return _is_gain(losses[0] - losses[1])


def _fit(
    features: dict[str, torch.Tensor], names: list[str], relevant: torch.Tensor, query_of_text: torch.LongTensor
) -> tuple[dict[str, float], torch.Tensor]:
    """Fit the weights of some scores; return them, and the loss of each query."""
    by_sentence = [i for i, name in enumerate(names) if name in SENTENCE_WEIGHTS]
    others = [i for i, name in enumerate(names) if name not in SENTENCE_WEIGHTS]
    scores = torch.stack([features[names[i]] for i in by_sentence])
    prior = torch.tensor([PRIORS[name] for name in names], dtype=torch.float64).log()
    log_weights = prior.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([log_weights], max_iter=100, line_search_fn="strong_wolfe")

    def losses() -> torch.Tensor:
        weights = log_weights.exp()
        logits = mean_distribution(torch.tensordot(weights[by_sentence], scores, dims=1), query_of_text)
        for i in others:
            logits = logits + weights[i] * features[names[i]][: len(relevant)]
        rivals = logits.masked_fill(relevant, -torch.inf).logsumexp(1, keepdim=True)
        log_probs = logits - torch.logaddexp(logits, rivals)
        return -log_probs.masked_fill(~relevant, 0.0).sum(1) / relevant.sum(1)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = losses().mean() + 0.5 * (log_weights - prior).square().sum() / relevant.shape[0]
        value.backward()
        return value

    optimizer.step(closure)
    with torch.no_grad():
        return dict(zip(names, log_weights.exp().tolist(), strict=True)), losses()
