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
from ..data.queries import Query
from ..data.trajectories import code_text, render_calls


if TYPE_CHECKING:
    from ..tokenization_toolweaver import ToolWeaverTokenizer


def memorization_rows(catalog: ToolCatalog, tokenizer: ToolWeaverTokenizer) -> list[dict[str, Any]]:
    """Rows that teach tool document -> code: one conversation a tool."""
    return [_code_row(tool.id, tool.document, [tool.id], tokenizer) for tool in catalog]


def retrieval_rows(
    queries: Iterable[Query], tokenizer: ToolWeaverTokenizer, bad_rows: list[str] | None = None
) -> list[dict[str, Any]]:
    """Rows that teach query -> code: one conversation for each ground-truth tool of a query.

    In one of them, in turn the first, the second and so on, the query's other tools follow and the answer ends, so that
    the model also learns how many tools a query needs.

    Args:
        queries (`Iterable[Query]`):
            The queries.
        tokenizer ([`ToolWeaverTokenizer`]):
            The tokenizer with the tools' codes.
        bad_rows (`list[str]`, *optional*):
            Where it is given, a query that cannot be learned is left out, and what is wrong with it is added to this
            list.

    Raises:
        `ValueError`: naming the query whose tool has no code.
    """
    rows = []
    for number, query in enumerate(queries):
        tools, whole = query.tools, number % len(query.tools)
        answers: list[Sequence[str]] = [[tool_id] for tool_id in tools]
        answers[whole] = [*tools[whole:], *tools[:whole]]
        try:
            rows += [
                _code_row(query.id, query.text, answer, tokenizer, query.place, i == whole)
                for i, answer in enumerate(answers)
            ]
        except ValueError as error:
            _refuse(query.place or query.id, error, bad_rows)
    return rows


def _code_row(
    row_id: str,
    text: str,
    tool_ids: Sequence[str],
    tokenizer: ToolWeaverTokenizer,
    place: str | None = None,
    whole: bool = False,
) -> dict[str, Any]:
    answer = "".join(code_text(tool_id, tokenizer) for tool_id in tool_ids)
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
    return {"id": row_id, "messages": messages, "task": "retrieval", "whole": whole, "place": place or row_id}


def trajectory_rows(
    trajectories: Iterable[dict[str, Any]], tokenizer: ToolWeaverTokenizer, bad_rows: list[str] | None = None
) -> list[dict[str, Any]]:
    """Rows that teach whole trajectories: thought, code, arguments, observation, answer.

    Args:
        trajectories (`Iterable[dict]`):
            Trajectories as [`~data.trajectories.load_trajectories`] gives them.
        tokenizer ([`ToolWeaverTokenizer`]):
            The tokenizer with the tools' codes.
        bad_rows (`list[str]`, *optional*):
            Where it is given, a trajectory that cannot be learned is left out, and what is wrong with it is added to
            this list.

    Raises:
        `ValueError`: naming the trajectory that calls a tool without a code.
    """
    rows = []
    for row in trajectories:
        try:
            rows.append({**row, "messages": render_calls(row["messages"], tokenizer), "task": "agent"})
        except ValueError as error:
            _refuse(row.get("place", row["id"]), error, bad_rows)
    return rows


def replay_rows(
    conversations: Iterable[dict[str, Any]], tokenizer: ToolWeaverTokenizer, bad_rows: list[str] | None = None
) -> list[dict[str, Any]]:
    """Rows of general chat, against forgetting. Those that call tools are learned as trajectories.

    The arguments are those of [`trajectory_rows`].
    """
    rows = []
    for row in conversations:
        calls = any(message.get("tool_calls") or message["role"] == "tool" for message in row["messages"])
        rows += trajectory_rows([row], tokenizer, bad_rows) if calls else [row | {"task": "chat"}]
    return rows


def _refuse(place: str, error: ValueError, bad_rows: list[str] | None) -> None:
    if bad_rows is None:
        raise ValueError(f"{place}: {error}") from None
    bad_rows.append(f"{place}: {error}")


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
    split_share: float = 0.0,
    seed: int = 0,
    eos_token_id: int | Sequence[int] | None = None,
    bad_rows: list[str] | None = None,
) -> tuple[Dataset, int]:
    """Tokenize conversations for `SFTTrainer`, with the loss on what the model writes alone.

    These are the assistant's turns, save those that say `loss: false`. A conversation becomes several rows where the
    chat template rewrites earlier turns (see [`ToolWeaverTokenizer.encode_for_training`]).

    Args:
        rows (`Iterable[dict]`):
            Rows of an `id` and `messages` with a plain `content`. Of those with the `task` retrieval, codes are learned
            and, if they say that they are `whole`, the token that ends the answer; nothing else stands in it.
        tokenizer ([`ToolWeaverTokenizer`]):
            The tokenizer with the tools' codes.
        max_length (`int`, *optional*):
            Rows of more tokens are left out whole: a cut row would lose the answer that it teaches.
        split_share (`float`, *optional*, defaults to 0):
            Fraction of unlabeled tokens to re-split at random (as in BPE-dropout).
        seed (`int`, *optional*, defaults to 0):
            Seed of the re-splitting.
        eos_token_id (`int` or `Sequence[int]`, *optional*):
            The tokens at which generation stops, as in the model's `generation_config`; one of them ends each turn.
        bad_rows (`list[str]`, *optional*):
            Where it is given, a conversation that cannot be learned is left out, and what is wrong with it is added to
            this list.

    Returns:
        `tuple[Dataset, int]`: the dataset with the columns `id`, `input_ids` and `labels` (-100 where no loss is
        taken), and the number of rows that were left out for their length.

    Raises:
        `ValueError`: naming the conversation that the chat template cannot render, or in which nothing is to be learned.
    """
    columns: dict[str, list] = {"id": [], "input_ids": [], "labels": []}
    too_long = 0
    generator = random.Random(seed)
    codes = set(tokenizer.code_token_ids)
    for row in tqdm(rows, desc="Tokenizing", leave=False):
        try:
            encoded_rows = tokenizer.encode_for_training(row["messages"], eos_token_id, row.get("task", "chat"))
            if not encoded_rows:
                raise ValueError("no turn of the assistant is to be learned")
        except ValueError as error:
            _refuse(row.get("place", row["id"]), error, bad_rows)
            continue
        for encoded in encoded_rows:
            ids, mask = encoded["input_ids"], encoded["assistant_mask"]
            if row.get("task") == "retrieval":
                prompt = ids[: mask.index(1)]
                answer = [token_id for token_id, learn in zip(ids, mask, strict=True) if learn]
                answer = [token_id for token_id in answer if token_id in codes] + answer[-1:] * row["whole"]
                ids, mask = prompt + answer, [0] * len(prompt) + [1] * len(answer)
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


def repeat_rows(dataset: Dataset, weight: float, seed: int) -> Dataset:
    """Repeat a dataset's rows so that each is seen `weight` times an epoch: 2 is twice, 0.5 is half of the rows."""
    copies, rest = divmod(weight, 1)
    some = random.Random(seed).sample(range(len(dataset)), round(rest * len(dataset)))
    return dataset.select([*range(len(dataset))] * int(copies) + sorted(some))


def share_prompts(dataset: Dataset) -> Dataset:
    """Merge tokenized rows of one prompt, such as a query with several ground-truth tools, into rows that hold it once.

    Loss and gradient stay the same, but the prompt is computed once instead of once for each answer. A merged row is
    the prompt but for its last token, then for each answer this token and the answer;
    [`~alignment.trainer.SharedPromptCollator`] keeps the answers from seeing each other.

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
    for prompt, rows in groups.items():
        (*shared, last), (ids, answers) = prompt, zip(*rows, strict=True)
        parts = [[last, *answer] for answer in answers]
        columns["id"].append(ids[0])
        columns["input_ids"].append([*shared, *chain.from_iterable(parts)])
        columns["labels"].append([-100] * len(shared) + [i for answer in answers for i in (-100, *answer)])
        several = [len(shared), *map(len, parts)]
        columns["seq_lengths"].append(several if len(parts) > 1 else [sum(several)])
    return Dataset.from_dict(columns)
