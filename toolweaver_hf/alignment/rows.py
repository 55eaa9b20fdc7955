"""The rows that a language model is trained on: conversations, then tokens and labels."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from itertools import chain, groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from datasets.utils import tqdm

from ..data.catalog import ToolCatalog
from ..data.trajectories import code_text, render_calls


if TYPE_CHECKING:
    from ..tokenization_toolweaver import ToolWeaverTokenizer
from ..data.queries import Query


def memorization_rows(catalog: ToolCatalog, tokenizer: ToolWeaverTokenizer) -> list[dict[str, Any]]:
    """Rows that teach tool document -> code: one conversation a tool."""
    return [_code_row(tool.id, tool.document, [tool.id], tokenizer) for tool in catalog]


def retrieval_rows(
    queries: Iterable[Query], tokenizer: ToolWeaverTokenizer, as_sequence: bool = False
) -> list[dict[str, Any]]:
    """Rows that teach query -> code.

    Args:
        queries (`Iterable[Query]`):
            The queries.
        tokenizer ([`ToolWeaverTokenizer`]):
            The tokenizer with the tools' codes.
        as_sequence (`bool`, *optional*, defaults to `False`):
            Whether a query's ground-truth tools make one conversation, answered by their codes one after another,
            rather than one conversation for each tool.

    Raises:
        `ValueError`: naming the query whose tool has no code.
    """
    rows = []
    for query in queries:
        answers = [query.tools] if as_sequence else [[tool_id] for tool_id in query.tools]
        rows += [_code_row(query.id, query.text, answer, tokenizer) for answer in answers]
    return rows


def _code_row(row_id: str, text: str, tool_ids: Sequence[str], tokenizer: ToolWeaverTokenizer) -> dict[str, Any]:
    try:
        answer = "".join(code_text(tool_id, tokenizer) for tool_id in tool_ids)
    except ValueError as error:
        raise ValueError(f"{row_id}: {error}") from None
    return {"id": row_id, "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]}


def trajectory_rows(trajectories: Iterable[dict[str, Any]], tokenizer: ToolWeaverTokenizer) -> list[dict[str, Any]]:
    """Rows that teach whole trajectories: thought, code, arguments, observation, answer.

    Raises:
        `ValueError`: naming the trajectory that calls a tool without a code.
    """
    rows = []
    for row in trajectories:
        try:
            rows.append({"id": row["id"], "messages": render_calls(row["messages"], tokenizer)})
        except ValueError as error:
            raise ValueError(f"{row['id']}: {error}") from None
    return rows


def drop_words(row: dict[str, Any], generator: random.Random) -> dict[str, Any]:
    """Copy a row with some words of the user's messages alone, in their order.

    Half to all of a query's words stay; of a document no more than a query has, 16.
    """

    def thin(text: str) -> str:
        words = text.split()
        kept = math.ceil(generator.uniform(0.5, 1) * min(len(words), 16))
        return " ".join(words[i] for i in sorted(generator.sample(range(len(words)), kept)))

    messages = [
        {**message, "content": thin(message["content"])} if message["role"] == "user" else message
        for message in row["messages"]
    ]
    return {**row, "messages": messages}


def tokenize_rows(
    rows: Iterable[dict[str, Any]],
    tokenizer: ToolWeaverTokenizer,
    max_length: int | None = None,
    codes_alone: bool = False,
    split_share: float = 0.0,
    seed: int = 0,
) -> tuple[Dataset, int]:
    """Tokenize conversations for `SFTTrainer`, with the loss on the messages to learn alone.

    These are the assistant's messages, or those that say `loss: true` where messages say it. A conversation whose
    earlier turns the chat template rewrites becomes one row for each turn to learn, which ends with it.

    Args:
        rows (`Iterable[dict]`):
            Rows of an `id` and `messages` with a plain `content`.
        tokenizer ([`ToolWeaverTokenizer`]):
            The tokenizer with the tools' codes.
        max_length (`int`, *optional*):
            Rows of more tokens are left out whole: a cut row would lose the answer that it teaches.
        codes_alone (`bool`, *optional*, defaults to `False`):
            Whether to learn of an answer its codes alone, and end the row with them, since retrieval decodes a code
            and nothing else.
        split_share (`float`, *optional*, defaults to 0):
            Fraction of unlabeled tokens to re-split at random (as in BPE-dropout).
        seed (`int`, *optional*, defaults to 0):
            Seed of the re-splitting.

    Returns:
        `tuple[Dataset, int]`: the dataset with the columns `id`, `input_ids` and `labels` (-100 where no loss is
        taken), and the number of rows that were left out.
    """
    columns: dict[str, list] = {"id": [], "input_ids": [], "labels": []}
    too_long = 0
    generator = random.Random(seed)
    codes = set(tokenizer.code_token_ids)
    for row in tqdm(rows, desc="Tokenizing", leave=False):
        for messages in _learnable(row["messages"], tokenizer):
            encoded = tokenizer.encode_conversation(messages)
            ids, mask = encoded["input_ids"], encoded["assistant_mask"]
            if codes_alone:
                mask = [int(learn and token_id in codes) for token_id, learn in zip(ids, mask, strict=True)]
                length = max((i + 1 for i, learn in enumerate(mask) if learn), default=0)
                ids, mask = ids[:length], mask[:length]
            input_ids, labels = [], []
            for learn, part in groupby(zip(ids, mask, strict=True), itemgetter(1)):
                ids = [token_id for token_id, _ in part]
                if split_share and not learn:
                    ids = tokenizer.split_tokens(ids, split_share, generator)
                input_ids += ids
                labels += ids if learn else [-100] * len(ids)
            if max_length is not None and len(input_ids) > max_length:
                too_long += 1
            else:
                for name, value in (("id", row["id"]), ("input_ids", input_ids), ("labels", labels)):
                    columns[name].append(value)
    return Dataset.from_dict(columns), too_long


def _learnable(messages: list[dict[str, Any]], tokenizer: ToolWeaverTokenizer) -> list[list[dict[str, Any]]]:
    """Cut a conversation where the chat template requires it, so that every turn is learned as it will be generated."""
    if tokenizer.appends_messages:
        return [messages]
    return [
        [{**earlier, "loss": False} for earlier in messages[:i]] + [{**message, "loss": True}]
        for i, message in enumerate(messages)
        if message.get("loss", message["role"] == "assistant")
    ]


def repeat_rows(dataset: Dataset, weight: float, seed: int) -> Dataset:
    """Repeat a dataset's rows so that each is seen `weight` times an epoch: 2 is twice, 0.5 is half of the rows."""
    copies, rest = divmod(weight, 1)
    some = random.Random(seed).sample(range(len(dataset)), round(rest * len(dataset)))
    return dataset.select([*range(len(dataset))] * int(copies) + sorted(some))


def share_prompts(dataset: Dataset) -> Dataset:
    """Merge tokenized rows of one prompt, such as a query with several ground-truth tools, into rows that hold it once.

    Loss and gradient stay the same, but the prompt is computed once instead of once for each answer. A merged row is
    the prompt but for its last token, then for each answer this token and the answer;
    [`~train_alignment.SharedPromptCollator`] keeps the answers from seeing each other.

    Args:
        dataset (`Dataset`): Rows as [`tokenize_rows`] makes them, each with one answer at its end.

    Returns:
        `Dataset`: rows with a further column `seq_lengths`, the lengths of these parts. A row with one answer has one
        part. What stood behind an answer, where no loss is taken, is left out.
    """
    groups: dict[tuple[int, ...], list[tuple[str, list[int]]]] = {}
    for row in dataset:
        learned = [i for i, label in enumerate(row["labels"]) if label != -100]
        prompt, answer = row["input_ids"][: learned[0]], row["input_ids"][learned[0] : learned[-1] + 1]
        groups.setdefault(tuple(prompt), []).append((row["id"], answer))
    columns: dict[str, list] = {"id": [], "input_ids": [], "labels": [], "seq_lengths": []}
    for prompt, answers in groups.items():
        (*shared, last), (ids, answers) = prompt, zip(*answers, strict=True)
        parts = [[last, *answer] for answer in answers]
        columns["id"].append(ids[0])
        columns["input_ids"].append([*shared, *chain.from_iterable(parts)])
        columns["labels"].append([-100] * len(shared) + [i for answer in answers for i in (-100, *answer)])
        several = [len(shared), *map(len, parts)]
        columns["seq_lengths"].append(several if len(parts) > 1 else [sum(several)])
    return Dataset.from_dict(columns)
