"""The language models that write: one of transformers on this machine, or one behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from ..chat_template import complete_template
from ..data.catalog import Tool
from ..evaluation.chat_endpoint import ChatEndpoint, Reply, find_object
from ..text_expert import fast_dtype
from .prompts import INSTRUCTIONS, SET_INSTRUCTIONS, STYLES, query_messages


MAX_NEW_TOKENS = 48
MAX_OBJECT_TOKENS = 256
ENDPOINT_INSTRUCTIONS = """
Write one such message for each of the styles that are listed; the examples show three of the first style. No two \
messages are about the same details. Reply with a JSON object {"messages": [...]}, in the order of the styles."""


class Request(NamedTuple):
    """What a generator is asked for: a query in each style that needs all of these tools."""

    tools: tuple[Tool, ...]
    styles: tuple[str, ...]
    seed: int


class LocalGenerator:
    """A causal language model of transformers, which samples from its chat template.

    The instructions and examples that all prompts of a batch begin with are read once. Hybrid reasoning models write
    without a thought.

    Args:
        model (`str`): Id or path of the model.
        batch_size (`int`, *optional*, defaults to 32): How many queries are sampled at once.
        temperature (`float`, *optional*, defaults to 0.7): Temperature of sampling.
        top_p (`float`, *optional*, defaults to 0.9): Share of the probability to sample from.

    Raises:
        `ValueError`: for a model without a chat template.
    """

    def __init__(self, model: str | os.PathLike, batch_size: int = 32, temperature: float = 0.7, top_p: float = 0.9):
        self.name, self.batch_size, self.num_workers = str(model), batch_size, 1
        self.tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
        if self.tokenizer.chat_template is None:
            raise ValueError(f"{model} has no chat template: choose a model that is trained to follow instructions")
        template = self.tokenizer.get_chat_template()
        self.tokenizer.chat_template = complete_template(template, self.tokenizer.apply_chat_template)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=fast_dtype()).to(device).eval()
        self.sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        self.prompt_tokens = self.completion_tokens = 0

    def __call__(self, requests: Sequence[Request]) -> Iterator[list[str]]:
        """Yield the texts of each request, in order: one for each of its styles."""
        num_texts = max((len(request.styles) for request in requests), default=1)
        chunk = max(1, self.batch_size * len(STYLES) // num_texts)  # fills a batch of each style
        for start in range(0, len(requests), chunk):
            texts = [[""] * len(request.styles) for request in requests[start : start + chunk]]
            # A batch is of one style, so that its prompts share instructions and examples
            places: dict[tuple[str, bool], list[tuple[int, int]]] = {}
            for i, request in enumerate(requests[start : start + chunk]):
                for number, style in enumerate(request.styles):
                    places.setdefault((style, len(request.tools) > 1), []).append((i, number))
            for (style, _), found in places.items():
                for first in range(0, len(found), self.batch_size):
                    batch = found[first : first + self.batch_size]
                    prompts = [query_messages(requests[start + i].tools, style) for i, _ in batch]
                    i, number = batch[0]
                    seed = requests[start + i].seed + 1_000_003 * number
                    written = self._sample(prompts, seed, MAX_NEW_TOKENS, stop="\n")
                    for (i, number), text in zip(batch, written, strict=True):
                        texts[i][number] = text.split("\n")[0].strip()
            yield from texts

    def ask(self, instructions: str, question: str, seed: int = 0) -> dict[str, Any] | None:
        """Ask for a JSON object; `None` where the answer holds none."""
        messages = [{"role": "system", "content": instructions}, {"role": "user", "content": question}]
        return find_object(self._sample([messages], seed, MAX_OBJECT_TOKENS)[0])

    def _sample(
        self, prompts: list[list[dict[str, str]]], seed: int, max_new_tokens: int, stop: str | None = None
    ) -> list[str]:
        """Sample an answer to each conversation, which ends with `stop`."""
        chats = self.tokenizer.apply_chat_template(
            prompts, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        ids = self.tokenizer(chats, add_special_tokens=False).input_ids
        shared = next((i for i, column in enumerate(zip(*ids, strict=False)) if len({*column}) > 1), len(ids[0]))
        shared = min(shared, min(map(len, ids)) - 1)  # the model needs a token to go on from
        prefix = torch.tensor([ids[0][:shared]], device=self.model.device)
        padded = self.tokenizer.pad({"input_ids": [row[shared:] for row in ids]}, return_tensors="pt")
        padded = padded.to(self.model.device)
        torch.manual_seed(seed)
        with torch.inference_mode():
            cache = DynamicCache(config=self.model.config)
            if shared:
                self.model(prefix, cache=cache, use_cache=True, logits_to_keep=1)
                cache.batch_repeat_interleave(len(ids))
            prefixes = prefix.expand(len(ids), -1)
            output = self.model.generate(
                input_ids=torch.cat([prefixes, padded.input_ids], dim=1),
                attention_mask=torch.cat([torch.ones_like(prefixes), padded.attention_mask], dim=1),
                cache=cache,
                max_new_tokens=max_new_tokens,
                stop_strings=stop,
                tokenizer=self.tokenizer,
                pad_token_id=self.tokenizer.pad_token_id,
                **self.sampling,
            )
        new = output[:, shared + padded.input_ids.shape[1] :]
        self.prompt_tokens += sum(map(len, ids))
        self.completion_tokens += int((new != self.tokenizer.pad_token_id).sum())
        return self.tokenizer.batch_decode(new, skip_special_tokens=True)


class EndpointGenerator:
    """A chat model behind an endpoint, which writes all queries of a request in one answer.

    Args:
        endpoint ([`ChatEndpoint`]): The model.
        num_workers (`int`, *optional*, defaults to 8): How many requests are under way at once.
    """

    def __init__(self, endpoint: ChatEndpoint, num_workers: int = 8):
        self.name, self.endpoint, self.num_workers = endpoint.model, endpoint, num_workers
        self.prompt_tokens = self.completion_tokens = 0
        self._lock = threading.Lock()

    def __call__(self, requests: Sequence[Request]) -> Iterator[list[str]]:
        """Yield the texts of each request, in order: one for each style, or none where the model refused.

        Raises:
            `OSError`: if the endpoint does not answer.
        """
        with ThreadPoolExecutor(self.num_workers) as pool:
            try:
                for reply, request in zip(pool.map(self._ask, requests), requests, strict=True):
                    self._count(reply)
                    messages = (reply.content or {}).get("messages")
                    messages = messages if isinstance(messages, list) else []
                    yield [str(text) for text in messages[: len(request.styles)]]
            finally:
                pool.shutdown(cancel_futures=True)  # after an error nothing more is asked for

    def ask(self, instructions: str, question: str, seed: int = 0) -> dict[str, Any] | None:
        """Ask for a JSON object; `None` where the replies hold none."""
        reply = self.endpoint.ask(instructions, question, seed)
        self._count(reply)
        return reply.content

    def _count(self, reply: Reply) -> None:
        with self._lock:
            self.prompt_tokens += reply.prompt_tokens
            self.completion_tokens += reply.completion_tokens

    def _ask(self, request: Request) -> Reply:
        _, *examples, question = query_messages(request.tools, request.styles[0])
        shown = [message["content"] for message in [*examples, question]]
        styles = [f"{number}. {STYLES[style].request}" for number, style in enumerate(request.styles, start=1)]
        instructions = (SET_INSTRUCTIONS if len(request.tools) > 1 else INSTRUCTIONS) + ENDPOINT_INSTRUCTIONS
        return self.endpoint.ask(instructions, "\n".join([*shown, "Styles:", *styles]), request.seed)
