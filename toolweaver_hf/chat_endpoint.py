"""`ChatEndpoint`: a chat model behind an OpenAI-compatible endpoint, asked for JSON, its tokens counted."""

from __future__ import annotations

import json
import os
import time
from typing import Any, NamedTuple

from huggingface_hub import InferenceClient


NUM_ATTEMPTS = 5
LASTING_ERRORS = (400, 401, 403, 404, 413, 422)
"""Statuses of HTTP that the same request would get again."""


class Reply(NamedTuple):
    """What a model replied: a JSON object, or `None` where no reply held one, and the tokens of all attempts."""

    content: dict[str, Any] | None
    prompt_tokens: int
    completion_tokens: int


class ChatEndpoint:
    """A chat model behind an OpenAI-compatible endpoint: OpenAI's, vLLM's, `transformers serve`, the Hub's router.

    Args:
        model (`str`):
            The model's name there.
        base_url (`str`, *optional*, defaults to `"https://api.openai.com/v1"`):
            The endpoint, up to where `/chat/completions` follows.
        api_key (`str`, *optional*):
            The key. Defaults to the environment's `OPENAI_API_KEY`. Never the Hub's token, unless given here.
        temperature (`float`, *optional*, defaults to 0.2):
            Temperature of sampling.
        max_tokens (`int`, *optional*, defaults to 1024):
            Most tokens of a reply.
    """

    def __init__(
        self,
        model: str,
        base_url: str = "https://api.openai.com/v1",
        api_key: str | None = None,
        temperature: float = 0.2,
        max_tokens: int = 1024,
    ):
        self.model, self.base_url = model, base_url
        self.temperature, self.max_tokens = temperature, max_tokens
        # Without a key of its own, the client would send the Hub's token along, to whoever answers there.
        key = api_key or os.environ.get("OPENAI_API_KEY") or "none"
        self._client = InferenceClient(base_url=base_url, api_key=key, timeout=300)

    def ask(self, instructions: str, question: str, seed: int = 0) -> Reply:
        """Ask for a JSON object; a reply that holds none is asked for twice more, with other seeds.

        Raises:
            `OSError`: if the endpoint refuses, or does not answer in five attempts.
        """
        messages = [{"role": "system", "content": instructions}, {"role": "user", "content": question}]
        prompt_tokens = completion_tokens = 0
        for attempt in range(3):
            output = self._complete(messages, seed + 1_000_003 * attempt)
            if output.usage is not None:
                prompt_tokens += output.usage.prompt_tokens
                completion_tokens += output.usage.completion_tokens
            content = _find_object(output.choices[0].message.content or "")
            if content is not None:
                break
        return Reply(content, prompt_tokens, completion_tokens)

    def _complete(self, messages: list[dict[str, str]], seed: int):
        for attempt in range(1, NUM_ATTEMPTS + 1):
            try:
                return self._client.chat_completion(
                    messages,
                    model=self.model,
                    temperature=self.temperature,
                    max_tokens=self.max_tokens,
                    seed=seed % 2**31,
                )
            except Exception as error:  # the client's, and those of the transport below it
                status = getattr(getattr(error, "response", None), "status_code", None)
                if attempt == NUM_ATTEMPTS or status in LASTING_ERRORS:
                    raise OSError(f"{self.base_url} does not answer for the model {self.model!r}: {error}") from error
                time.sleep(2 ** (attempt - 1))


def _find_object(text: str) -> dict[str, Any] | None:
    """Find the JSON object in a reply, with or without words or a code fence around it."""
    try:
        content = json.loads(text[text.index("{") : text.rindex("}") + 1])
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None
