"""The multi-turn loop: think, choose a tool, fill its arguments, observe, answer."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jsonschema
import torch
from transformers import PreTrainedModel

from .catalog import ToolCatalog
from .data import render_calls
from .logits_process import ToolCodeLogitsProcessor
from .retrieval import load_aligned_model
from .tokenization_toolweaver import HUB_KWARGS, ToolWeaverTokenizer
from .trie import CodeTrie


@dataclass
class AgentRun:
    """What an agent did for one query.

    Args:
        messages (`list[dict]`):
            The conversation in the format of a training trajectory (see [`~data.load_trajectories`]).
        stop_reason (`str`):
            `"answer"`, or `"max_steps"` when the step limit came first.
    """

    messages: list[dict[str, Any]] = field(default_factory=list)
    stop_reason: str = "max_steps"

    @property
    def answer(self) -> str | None:
        """`str`: The final answer, or `None` where the step limit came first."""
        return self.messages[-1]["content"] if self.stop_reason == "answer" else None


class ToolAgent:
    """Answers queries by calling tools, with a model that `recipes/sft.py` aligned on trajectories.

    Each turn is generated greedily. Once the model writes the first token of a code, the rest of it is constrained to
    tools that exist; what follows is read as the arguments. A call that fails, for arguments that break the tool's
    schema or an error of the tool itself, is answered by an observation `{"error": ...}`, and the model goes on.

    Args:
        model ([`PreTrainedModel`]): The aligned model.
        tokenizer ([`ToolWeaverTokenizer`]): Its tokenizer.
        catalog ([`ToolCatalog`]): The tools, with the schemas of their arguments.
        functions (`Mapping[str, Callable]`):
            For each tool id the function to call with the arguments as keywords; it returns something that JSON can
            hold. Only these tools can be chosen.
        max_steps (`int`, *optional*, defaults to 5): Most turns of the assistant in one run.
        max_new_tokens (`int`, *optional*, defaults to 256): Most tokens of one turn.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: ToolWeaverTokenizer,
        catalog: ToolCatalog,
        functions: Mapping[str, Callable[..., Any]],
        max_steps: int = 5,
        max_new_tokens: int = 256,
    ):
        unknown = [tool_id for tool_id in functions if tool_id not in catalog]
        if unknown:
            raise ValueError(f"functions are given for tools that the catalogue lacks: {', '.join(unknown[:5])}")
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.catalog = catalog
        self.functions = functions
        self.max_steps = max_steps
        self.max_new_tokens = max_new_tokens
        self.trie = CodeTrie(torch.tensor([tokenizer.encode_tool(tool_id) for tool_id in functions]))

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike, functions: Mapping[str, Callable[..., Any]], **kwargs
    ) -> ToolAgent:
        """Load model, tokenizer and catalogue from a folder that `recipes/sft.py` wrote, or a repository of the Hub.

        Args:
            folder (`str`): The folder or repository.
            functions (`Mapping[str, Callable]`): For each tool id the function to call.
            kwargs: As for the class; those that say where from, such as `revision` and `token`, hold for all files.
        """
        hub_kwargs = {name: kwargs.pop(name) for name in HUB_KWARGS if name in kwargs}
        return cls(
            load_aligned_model(folder, **hub_kwargs),
            ToolWeaverTokenizer.from_pretrained(folder, **hub_kwargs),
            ToolCatalog.from_pretrained(folder, repo_type="model", **hub_kwargs),
            functions,
            **kwargs,
        )

    def __call__(self, query: str) -> AgentRun:
        """Answer a query."""
        run = AgentRun()
        for _ in self.stream(query, run):
            pass
        return run

    def stream(self, query: str, run: AgentRun | None = None) -> Iterator[dict[str, Any]]:
        """Answer a query and yield every message as soon as it is complete, the user's first.

        Args:
            query (`str`): What the user says.
            run ([`AgentRun`], *optional*): Receives the messages and the stop reason.
        """
        run = AgentRun() if run is None else run
        run.messages.append({"role": "user", "content": query})
        yield run.messages[-1]
        for _ in range(self.max_steps):
            thought, tool_id, arguments = self._turn(run.messages)
            if tool_id is None:
                run.messages.append({"role": "assistant", "content": thought})
                run.stop_reason = "answer"
                yield run.messages[-1]
                return
            call, observation = self._call(tool_id, arguments)
            run.messages.append({"role": "assistant", "content": thought, "tool_calls": [call]})
            yield run.messages[-1]
            run.messages.append({"role": "tool", "content": json.dumps(observation, ensure_ascii=False)})
            yield run.messages[-1]

    @torch.inference_mode()
    def _turn(self, messages: list[dict[str, Any]]) -> tuple[str, str | None, str]:
        """Generate one turn: the thought, the tool chosen (`None` for a final answer) and the arguments' text."""
        prompt = self.tokenizer.encode_conversation(
            render_calls(messages, self.tokenizer), add_generation_prompt=True
        )["input_ids"]
        input_ids = torch.tensor([prompt], device=self.model.device)
        processor = ToolCodeLogitsProcessor(
            self.trie,
            mode="trajectory",
            prompt_length=len(prompt),
            code_token_ids=self.tokenizer.code_token_ids,
        )
        output = self.model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            do_sample=False,
            max_new_tokens=self.max_new_tokens,
            logits_processor=[processor],
            pad_token_id=self.tokenizer.pad_token_id,
        )[0, len(prompt) :].tolist()
        first_level = range(
            self.tokenizer.level_offsets[0], self.tokenizer.level_offsets[0] + self.tokenizer.codebook_sizes[0]
        )
        start = next((position for position, token in enumerate(output) if token in first_level), len(output))
        end = start + len(self.tokenizer.codebook_sizes)
        if end > len(output):  # no code, or one that max_new_tokens cut
            return self.tokenizer.decode(output[:start], skip_special_tokens=True).strip(), None, ""
        thought = self.tokenizer.decode(output[:start], skip_special_tokens=True).strip()
        arguments = self.tokenizer.decode(output[end:], skip_special_tokens=True).strip()
        return thought, self.tokenizer.decode_tool(output[start:end]), arguments

    def _call(self, tool_id: str, arguments: str) -> tuple[dict[str, Any], Any]:
        """Call a tool with the arguments that the model wrote; return the call and the observation."""
        try:
            parsed = json.loads(arguments)
            jsonschema.validate(parsed, self.catalog[tool_id].parameters)
        except ValueError as error:
            parsed, observation = {}, {"error": f"the arguments are not one JSON object: {error}"}
        except jsonschema.ValidationError as error:
            observation = {"error": error.message}
        else:
            try:
                observation = self.functions[tool_id](**parsed)
            except Exception as error:  # whatever a tool raises is an observation
                observation = {"error": f"{type(error).__name__}: {error}"}
        return {"type": "function", "function": {"name": tool_id, "arguments": parsed}}, observation
