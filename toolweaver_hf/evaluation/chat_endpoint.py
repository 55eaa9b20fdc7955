"""`ChatEndpoint`: a chat model behind an OpenAI-compatible endpoint that replies in JSON, with token counts."""

from __future__ import annotations

import json
import os
import time
from typing import Any, NamedTuple

from huggingface_hub.utils import httpx


DEFAULT_URL = "https://api.openai.com/v1"
NUM_ATTEMPTS = 5
OPTIONS = ("temperature", "max_tokens")
LASTING_ERRORS = (400, 401, 403, 404, 413, 422)
"""HTTP status codes that are not worth a retry."""


class Reply(NamedTuple):
    """A model's reply: a JSON object, or `None` if no attempt returned one, and the tokens of all attempts."""

    content: dict[str, Any] | None
    prompt_tokens: int
    completion_tokens: int


class ChatEndpoint:
    """A chat model behind an OpenAI-compatible endpoint: OpenAI's, vLLM's, `transformers serve`, the Hub's router.

    Args:
        model (`str`):
            The name of the model at the endpoint.
        base_url (`str`, *optional*):
            The endpoint, without `/chat/completions`. Defaults to OpenAI's.
        api_key (`str`, *optional*):
            The key. Defaults to the environment variable `OPENAI_API_KEY`.
        temperature (`float`, *optional*, defaults to 0.2):
            Sampling temperature.
        max_tokens (`int`, *optional*, defaults to 1024):
            Maximum number of tokens of a reply. If a model refuses this or the temperature, it is asked without.
    """

    def __init__(
        self,
        model: str,
        base_url: str = DEFAULT_URL,
        api_key: str | None = None,
        temperature: float = 0.2,
        max_tokens: int = 1024,
    ):
        self.model, self.base_url = model, base_url
        self._options = {"temperature": temperature, "max_tokens": max_tokens}
        key = api_key or os.environ.get("OPENAI_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.Client(headers=headers, timeout=300)

    def ask(self, instructions: str, question: str, seed: int = 0) -> Reply:
        """Ask for a JSON object. If a reply holds none, ask up to twice more, with other seeds.

        Raises:
            `OSError`: if the endpoint refuses, or does not answer within five attempts.
        """
        messages = [{"role": "system", "content": instructions}, {"role": "user", "content": question}]
        prompt_tokens = completion_tokens = 0
        for attempt in range(3):
            text, usage = self._complete(messages, seed + 1_000_003 * attempt)
            prompt_tokens += usage.get("prompt_tokens", 0)
            completion_tokens += usage.get("completion_tokens", 0)
            content = find_object(text)
            if content is not None:
                break
        return Reply(content, prompt_tokens, completion_tokens)

    def _complete(self, messages: list[dict[str, str]], seed: int) -> tuple[str, dict[str, int]]:
        """Return the text of a completion and its `usage`."""
        attempt, problem, wait = 0, None, 0.0
        while attempt < NUM_ATTEMPTS:
            body = {"model": self.model, "messages": messages, "seed": seed % 2**31, **self._options}
            try:
                response = self._client.post(f"{self.base_url.rstrip('/')}/chat/completions", json=body)
                if response.is_success:
                    output = response.json()
                    return output["choices"][0]["message"]["content"] or "", output.get("usage") or {}
                problem = f"{response.status_code} {response.text[:300]}"
                wait = _retry_after(response)
                refused = [name for name in OPTIONS if name in body and name in response.text]
                if response.status_code == 400 and refused:
                    self._options = {name: value for name, value in self._options.items() if name not in refused}
                    continue
                if response.status_code in LASTING_ERRORS:
                    break
            except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
                problem = f"{type(error).__name__} {error}"
            attempt += 1
            if attempt < NUM_ATTEMPTS:
                time.sleep(max(2**attempt / 2, wait))
        raise OSError(f"{self.base_url} does not answer for the model {self.model!r}: {problem}")


def _retry_after(response: httpx.Response) -> float:
    """Return for how many seconds an endpoint that limits its rate asks to wait, two minutes at most."""
    try:
        return min(float(response.headers.get("retry-after", 0)), 120.0)
    except ValueError:
        return 0.0  # a date


def find_object(text: str) -> dict[str, Any] | None:
    """Extract the JSON object from a reply; text or a code fence around it is ignored."""
    try:
        content = json.loads(text[text.index("{") : text.rindex("}") + 1])
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None
