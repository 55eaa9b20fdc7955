"""The agent loop: think, choose a tool, generate its arguments, observe the result, answer."""

from __future__ import annotations

import asyncio
import copy
import inspect
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

import torch
from transformers import LogitsProcessorList, PreTrainedModel
from transformers.utils import cached_file, logging

from ..cache import can_use_cache
from ..data.catalog import ToolCatalog
from ..loading import load_aligned_model, split_hub_kwargs
from ..retrieval import ToolRetriever
from ..text_expert import TEXT_EXPERT_FILE, TextExpert
from ..tokenization_toolweaver import ToolWeaverTokenizer
from ..trie import CodeTrie
from .arguments import ToolArgumentsLogitsProcessor
from .copying import WordCopier
from .run import AgentRun, as_json
from .turn import Turn


logger = logging.get_logger(__name__)


class ToolAgent:
    """Answers queries by calling tools, with a model that `recipes/sft.py` aligned on trajectories.

    Once the model generates the first token of a code, decoding is constrained to the codes of allowed tools, and then
    to arguments that match the tool's JSON Schema if llguidance is installed (`pip install "toolweaver-hf[grammar]"`).
    Arguments that still violate the schema are generated once more, given the error. A failed call results in the
    observation `{"error": ...}`, and the run continues. A call that repeats one of the same run, whose result the model
    has, is not made: the turn is generated once more, as an answer.

    Where the model is known to tell how many tools a query needs (see [`TextExpert`]), it is asked after each result, as
    in retrieval, whether one is missing. If so, the next turn begins with that tool's code, without a thought; if not,
    it calls no tool that has not answered yet. Such a turn is an answer in most cases, as is one after a repeated call:
    it is led to tell what the tools returned, unless that is much.

    User messages and tool results are tokenized as plain text, so they cannot contain codes or role markers. Generated
    tokens are kept as they are; the conversation is never tokenized again.

    Args:
        model ([`PreTrainedModel`]): The aligned model.
        tokenizer ([`ToolWeaverTokenizer`]): Its tokenizer.
        catalog ([`ToolCatalog`]): The tools, with the schemas of their arguments.
        functions (`Mapping[str, Callable]`):
            Maps tool ids to functions, plain or `async`, such as [`MCPTools`]. They are called with the arguments as
            keywords and return a JSON-serializable value. Only these tools can be chosen.
        max_steps (`int`, *optional*, defaults to 5): Maximum number of assistant turns per run.
        max_new_tokens (`int`, *optional*, defaults to 256): Maximum number of generated tokens per turn.
        max_total_tokens (`int`, *optional*): Maximum number of generated tokens per run.
        time_limit (`float`, *optional*, defaults to 60): Time limit of a call in seconds; `None` for no limit.
        do_sample (`bool`, *optional*, defaults to `False`): Whether to use sampling; greedy decoding otherwise.
        text_expert ([`TextExpert`], *optional*):
            Text expert for the choice of tools, as in [`ToolRetriever`]. When the model starts a code, the tool is
            chosen by the product of model and expert. The expert's query is the user's last message, and once a tool
            has answered it also the thought before the code. [`ToolAgent.from_pretrained`] loads the expert that is
            saved with the model.
        logits_processor (`LogitsProcessorList`, *optional*): Applied before the constraints, for example a temperature.
        copy_bonus (`float`, *optional*, defaults to 3):
            How much the scores rise of the tokens that go on as the conversation does: in string arguments with what
            the user or a tool has said, in what is known to be an answer with numbers and strings of results (see above).
            Small models garble what they should copy, and leave out half of it; 0 leaves the scores as they are.

    Raises:
        `ValueError`: if there is no function, or a function's tool is missing in the catalog or has no code.

    Example:

    ```python
    >>> agent = ToolAgent.from_pretrained("out/agent", {"weather": get_weather, "air_quality": get_air_quality})
    >>> agent("Is it a good day for the park?").answer
    >>> for event in agent.stream("Is it a good day for the park?", stream_tokens=True):
    ...     print(event, end="" if isinstance(event, str) else "\\n")
    ```
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: ToolWeaverTokenizer,
        catalog: ToolCatalog,
        functions: Mapping[str, Callable[..., Any]],
        max_steps: int = 5,
        max_new_tokens: int = 256,
        max_total_tokens: int | None = None,
        time_limit: float | None = 60.0,
        do_sample: bool = False,
        logits_processor: LogitsProcessorList | None = None,
        text_expert: TextExpert | None = None,
        copy_bonus: float = 3.0,
    ):
        if not functions:
            raise ValueError("an agent needs the function of at least one tool")
        unknown = [tool_id for tool_id in functions if tool_id not in catalog]
        if unknown:
            raise ValueError(f"functions are given for tools that the catalog lacks: {', '.join(unknown[:5])}")
        uncoded = [tool_id for tool_id in functions if not tokenizer.has_tool(tool_id)]
        if uncoded:
            raise ValueError(
                f"these tools have no code, so that the model cannot name them: {', '.join(uncoded[:5])}; align it with "
                "a catalog that holds them, or give functions without them"
            )
        self.model = model.eval()
        can_use_cache(self.model)  # raises for anything but a causal language model
        self.tokenizer = tokenizer
        self.catalog = catalog
        self.functions = functions
        self.max_steps = max_steps
        self.max_new_tokens = max_new_tokens
        self.max_total_tokens = max_total_tokens
        self.time_limit = time_limit
        self.do_sample = do_sample
        self.logits_processor = logits_processor or LogitsProcessorList()
        self.copy_bonus = copy_bonus
        self._copier = WordCopier(tokenizer)
        self.retriever = None
        if text_expert is not None:
            self.retriever = ToolRetriever(model, tokenizer, text_expert)
            self.retriever.add(catalog[tool_id] for tool_id in functions.keys() - set(text_expert.tool_ids))
        self._tool_rows = {tool_id: row for row, tool_id in enumerate(functions)}
        self.trie = CodeTrie(torch.tensor([tokenizer.encode_tool(tool_id) for tool_id in functions]))
        self._end_ids = tokenizer.end_token_ids(model.generation_config.eos_token_id)
        try:
            self._grammar = ToolArgumentsLogitsProcessor(tokenizer, catalog, self._end_ids)
        except (ImportError, ValueError) as error:
            logger.warning_once(f"The arguments of calls are validated, but not constrained: {error}")
            self._grammar = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        functions: Mapping[str, Callable[..., Any]],
        catalog: ToolCatalog | None = None,
        **kwargs,
    ) -> ToolAgent:
        """Load model, tokenizer and catalog from an output folder of `recipes/sft.py` or a Hub repository.

        Args:
            pretrained_model_name_or_path (`str`): The folder or repository.
            functions (`Mapping[str, Callable]`): Maps tool ids to functions.
            catalog ([`ToolCatalog`], *optional*): The current tools, such as [`MCPTools.catalog`]. Defaults to the
                catalog saved with the model.
            kwargs: Arguments of [`ToolAgent`]; Hub options such as `revision` and `token`, used for all files; others
                are passed on to [`AutoModelForCausalLM.from_pretrained`], such as `dtype` and `device_map`.
        """
        hub_kwargs, kwargs = split_hub_kwargs(kwargs)
        settings = {name: kwargs.pop(name) for name in inspect.signature(cls).parameters if name in kwargs}
        if "text_expert" not in settings and cached_file(
            pretrained_model_name_or_path, TEXT_EXPERT_FILE, _raise_exceptions_for_missing_entries=False, **hub_kwargs
        ):
            settings["text_expert"] = TextExpert.from_pretrained(pretrained_model_name_or_path, **hub_kwargs)
        return cls(
            load_aligned_model(pretrained_model_name_or_path, **hub_kwargs, **kwargs),
            ToolWeaverTokenizer.from_pretrained(pretrained_model_name_or_path, **hub_kwargs),
            catalog or ToolCatalog.from_pretrained(pretrained_model_name_or_path, repo_type="model", **hub_kwargs),
            functions,
            **settings,
        )

    def __call__(self, query: str | Sequence[dict[str, Any]], allowed_tools: Iterable[str] | None = None) -> AgentRun:
        """Answer a query. See [`ToolAgent.stream`] for the arguments."""
        run = AgentRun()
        for _ in self.stream(query, run, allowed_tools=allowed_tools):
            pass
        return run

    def stream(
        self,
        query: str | Sequence[dict[str, Any]],
        run: AgentRun | None = None,
        allowed_tools: Iterable[str] | None = None,
        stream_tokens: bool = False,
    ) -> Iterator[dict[str, Any] | str]:
        """Answer a query and yield each message once it is complete, starting with the user's.

        Args:
            query (`str` or `Sequence[dict]`):
                The user's message, or a conversation that ends with it.
            run ([`AgentRun`], *optional*):
                Receives the messages and the stop reason, and can be cancelled.
            allowed_tools (`Iterable[str]`, *optional*):
                The tools that this run may choose. Defaults to all tools with a function.
            stream_tokens (`bool`, *optional*, defaults to `False`):
                Whether to also yield the generated text, in pieces, before each complete message. What is generated
                once more is yielded twice.

        Raises:
            `ValueError`: for an allowed tool without a function.
        """
        run = AgentRun() if run is None else run
        run.messages += [{"role": "user", "content": query}] if isinstance(query, str) else [dict(m) for m in query]
        allowed = list(self.functions if allowed_tools is None else allowed_tools)
        unknown = [tool_id for tool_id in allowed if tool_id not in self.functions]
        if unknown:
            raise ValueError(f"these allowed tools have no function: {', '.join(unknown[:5])}")
        turn = Turn(self, run, allowed)
        yield run.messages[-1]
        for _ in range(self.max_steps):
            yield from turn.generate(stream_tokens, begun=turn.plan())
            if turn.tool_id is not None and turn.arguments_error and not turn.stop_reason:
                yield from turn.retry(stream_tokens)
            if turn.tool_id is not None and not turn.stop_reason and turn.repeats():
                yield from turn.answer(stream_tokens)
            if turn.tool_id is None or turn.stop_reason:
                run.stop_reason = turn.stop_reason or "answer"
                run.token_ids = turn.ids + turn.new_ids
                run.messages.append({"role": "assistant", **turn.said})  # without an incomplete call
                yield run.messages[-1]
                return
            call = {"type": "function", "function": {"name": turn.tool_id, "arguments": turn.arguments}}
            run.messages.append({"role": "assistant", **turn.said, "tool_calls": [call]})
            yield run.messages[-1]
            observation = self._observe(turn, run)
            if observation is None:
                run.stop_reason = "cancelled"
                return
            turn.close(observation)
            run.token_ids = list(turn.ids)
            run.messages.append({"role": "tool", "content": observation})
            yield run.messages[-1]

    def _observe(self, turn: Turn, run: AgentRun) -> str | None:
        """Call the chosen tool and return the observation as JSON; `None` if the run was cancelled."""
        if turn.arguments_error:
            return as_json({"error": turn.arguments_error})
        result: Future = Future()

        def call() -> None:
            try:
                value = self.functions[turn.tool_id](**copy.deepcopy(turn.arguments))
                result.set_result(asyncio.run(value) if inspect.iscoroutine(value) else value)
            except BaseException as error:  # any error of a tool becomes an observation
                result.set_exception(error)

        # A daemon thread, so that a hanging call blocks neither the agent nor the exit of the program.
        threading.Thread(target=call, name=f"tool {turn.tool_id}", daemon=True).start()
        wait([result, run._cancelled], timeout=self.time_limit, return_when=FIRST_COMPLETED)
        if run._cancelled.done():
            return None
        if not result.done():
            return as_json({"error": f"the call took longer than {self.time_limit:g} seconds"})
        if result.exception() is not None:
            return as_json({"error": f"{type(result.exception()).__name__}: {result.exception()}"})
        return as_json(result.result())
