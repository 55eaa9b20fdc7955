"""The assistant turns of an agent: generation and parsing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import logging

from ..cache import DecodingState
from ..data.trajectories import content_text, render_calls
from ..logits_process import ToolCodeLogitsProcessor
from ..retrieval import CALLED_PENALTY, RetrievedTool, cut_prompt
from .facts import facts_of, tells, tells_more
from .run import AgentRun, as_json, from_json
from .schema import find_error
from .text_stream import TextStream


if TYPE_CHECKING:
    from .loop import ToolAgent


logger = logging.get_logger(__name__)

MAX_FACTS, MAX_FACT_WORDS, MAX_FACT_LENGTH = 20, 12, 100
"""An answer to a result with more facts selects from them, and sums up longer ones (in words, and in characters)."""
MAX_PENDING = 4  # tokens of a character that has begun: its bytes
BEGIN_SHARE, END_SHARE = 2 / 3, 5 / 3
"""Fractions of the copy bonus: for beginning a fact in an answer, and against ending it before all are told."""


class Turn:
    """The turns of one run: the tokens of the conversation, the model's cache, and the last parsed turn."""

    def __init__(self, agent: ToolAgent, run: AgentRun, allowed: list[str]):
        self.agent, self.run, self.allowed = agent, run, allowed
        tokenizer = agent.tokenizer
        self.ids = self._encode(render_calls(run.messages, tokenizer))
        self.state = DecodingState(agent.model)
        self.codes = {start: self._constraint(start, allowed) for start in ("allowed", "forbidden")}
        self._again: list[str] = []  # the tools that alone a turn may call, since no other is missing
        first = tokenizer.level_offsets[0]
        self.first_level = range(first, first + tokenizer.codebook_sizes[0])
        self.num_levels = len(tokenizer.codebook_sizes)
        self.new_ids: list[int] = []
        self._call_starts: set[int] = set()  # what turns began with that called a tool after a thought
        self._refused: int | None = None  # what an answer must not begin with, where a turn has to be one

    def _constraint(self, code_start: str, tool_ids: Sequence[str]) -> ToolCodeLogitsProcessor:
        agent, tokenizer = self.agent, self.agent.tokenizer
        return ToolCodeLogitsProcessor(
            agent.trie,
            mode="trajectory",
            code_start=code_start,
            code_token_ids=tokenizer.code_token_ids,
            allowed_rows=[[agent._tool_rows[tool_id] for tool_id in tool_ids]],
            vocab_size=len(tokenizer),
        )

    def _encode(self, messages: list[dict[str, Any]]) -> list[int]:
        """Tokenize a conversation; its oldest messages are dropped if it exceeds the model's context length."""
        agent = self.agent
        positions = getattr(agent.model.config.get_text_config(), "max_position_embeddings", None)
        room = None if positions is None else positions - min(agent.max_new_tokens, positions // 2)

        def encode(messages: list[dict[str, Any]]) -> list[int]:
            return agent.tokenizer.encode_conversation(messages, add_generation_prompt=True)["input_ids"]

        ids = encode(messages)
        system, later = messages[:1], [i for i, message in enumerate(messages) if i > 1 and message["role"] == "user"]
        while room is not None and len(ids) > room and later:
            logger.warning_once("A conversation exceeds the model's context length: its oldest messages are dropped.")
            ids = encode([*system, *messages[later.pop(0) :]])
        return cut_prompt(ids, encode([*system, {"role": "user", "content": ""}]), room)

    def generate(self, stream_tokens: bool, begun: Sequence[int] = ()) -> Iterator[str]:
        """Generate one turn, optionally from its first tokens, and parse it."""
        agent, tokenizer = self.agent, self.agent.tokenizer
        self.new_ids, self.stop_reason = list(begun), None
        self._chosen: list[int] = []  # the rest of a code that was chosen as a whole
        self._facts = self._facts_to_tell()
        text = TextStream(tokenizer)
        while True:
            if self.run._cancelled.done():
                self.stop_reason = "cancelled"
            elif len(self.new_ids) >= agent.max_new_tokens or self._is_full():
                self.stop_reason = "max_tokens"
            if self.stop_reason:
                break
            if not self._chosen:
                self._chosen = self._next_tokens()
            self.new_ids.append(self._chosen.pop(0))
            self.run.num_new_tokens += 1
            if stream_tokens and (piece := text.put(self.new_ids[-1])):
                yield piece
            if self.new_ids[-1] in agent._end_ids or self._is_whole_call():
                break
        if piece := text.end():
            yield piece
        self._read()

    def plan(self) -> list[int]:
        """Decide what the next turn may call, and return the code that it has to begin with, if any.

        Once a tool has answered, a model that is known to tell is asked, as in retrieval, whether the query needs
        another one. If so, the turn begins with its code. If not, the turn may call none but those that have answered,
        with other arguments, since a query's tools do not say how often each is needed. Before the first result and
        after an error the model decides alone.
        """
        self._again = []
        retriever, messages = self.agent.retriever, self.run.messages
        if retriever is None or retriever.trie is None or not retriever.text_expert.tells_end:
            return []
        if messages[-1]["role"] != "tool" or _is_error(messages[-1]["content"]):
            return []
        called = list(dict.fromkeys(tool_id for tool_id, _ in self._answered_calls()))
        others = [tool_id for tool_id in self.allowed if tool_id not in called]
        if not called or not others:
            return []
        query = self._asked()
        state, logits = retriever.read_answers([query], [called])
        if retriever.more_log_odds(logits) > 0:
            return self._draw(retriever.choose(state, logits, query, others))
        self._again = called
        self.codes["again"] = self._constraint("allowed", called)
        return []

    def retry(self, stream_tokens: bool) -> Iterator[str]:
        """Generate the arguments of the same tool once more, given the error, which the conversation does not keep."""
        kept, length = self.new_ids[: self._code_start() + self.num_levels], len(self.ids)
        self.close(as_json({"error": self.arguments_error}))
        yield from self.generate(stream_tokens, begun=kept)
        del self.ids[length:]
        self.state = DecodingState(self.agent.model)

    def repeats(self) -> bool:
        """Whether the turn's call was made before, since the user's last message, and has a result that is no error."""
        return (self.tool_id, self.arguments) in self._answered_calls()

    def _answered_calls(self) -> list[tuple[str, dict[str, Any]]]:
        """Return tool and arguments of the calls since the user's last message that have a result that is no error."""
        messages, asked = self.run.messages, self._asked_at()
        return [
            (call["function"]["name"], call["function"]["arguments"])
            for message, result in zip(messages[asked:], messages[asked + 1 :], strict=False)
            for call in message.get("tool_calls") or ()
            if result["role"] == "tool" and not _is_error(result["content"])
        ]

    def answer(self, stream_tokens: bool) -> Iterator[str]:
        """Generate the turn once more, as an answer: without a code, and with another first token."""
        self._refused = self.new_ids[0]
        self.state = DecodingState(self.agent.model)
        yield from self.generate(stream_tokens)
        self._refused = None

    def close(self, observation: str) -> None:
        """Append the generated turn, its end, the tool's result as plain text, and the start of the next turn."""
        ends = self.agent._end_ids
        written = self.new_ids[:-1] if self.new_ids[-1] in ends else self.new_ids
        self._call_starts |= {self.new_ids[0]}.difference(self.first_level)
        self.ids += [*written, *self.agent.tokenizer.encode_reply(observation, ends)]

    @torch.inference_mode()
    def _next_tokens(self) -> list[int]:
        """Generate the next token, or the whole code if it starts one and there is a text expert."""
        input_ids = torch.tensor([self.ids + self.new_ids], device=self.agent.model.device)
        logits = self.state.read(input_ids[:, self.state.length :])
        scores = self.agent.logits_processor(input_ids, logits.to(torch.float32, copy=True))
        new_ids = input_ids[:, len(self.ids) :]
        has_code = self._code_start() + self.num_levels <= len(self.new_ids)
        may_call = "again" if self._again else "allowed"
        scores = self.codes["forbidden" if has_code or self._refused is not None else may_call](new_ids, scores)
        if self._again:  # few queries need the same tool again
            scores[:, self.first_level.start : self.first_level.stop] -= CALLED_PENALTY
            if not self.new_ids:  # nor a thought like the one before its call
                scores[:, sorted(self._call_starts)] -= CALLED_PENALTY
        if self._refused is not None and not self.new_ids:
            scores[:, self._refused] = -torch.inf
        if has_code and self.agent.copy_bonus:
            self._favor_words(scores)
        elif self._facts:
            self._favor_facts(scores)
        if self.agent._grammar is not None:
            scores = self.agent._grammar(new_ids, scores)
        token = self._next_token(scores[0])
        if token not in self.first_level or self.agent.retriever is None:
            return [token]
        called = {tool_id for tool_id, _ in self._answered_calls()}
        return self._draw(
            self.agent.retriever.choose(self.state, logits, self._expert_query(), self._again or self.allowed, called)
        )

    def _favor_words(self, scores: torch.Tensor) -> None:
        """Raise the scores of what goes on, in arguments, with the words of the conversation."""
        messages = [message for message in self.run.messages if message["role"] in ("user", "tool")]
        said = [content_text(message["content"]) for message in messages]
        scores[:, self.agent._copier.in_arguments(self._arguments_text(), said)] += self.agent.copy_bonus

    def _favor_facts(self, scores: torch.Tensor) -> None:
        """Raise the scores of what begins a fact of the results or goes on with it, in an answer; lower that of its end
        before all are told."""
        tokenizer, whole = self.agent.tokenizer, len(self.new_ids)
        text = tokenizer.decode(self.new_ids)
        while len(self.new_ids) - whole < MAX_PENDING and text.endswith("\ufffd"):
            whole -= 1  # the tokens of a character that has only begun
            text = tokenizer.decode(self.new_ids[:whole])
        _, answer = tokenizer.split_thought(text + ".")
        if not answer:  # in a thought
            return
        answer, bonus = answer[:-1], self.agent.copy_bonus
        told = [fact for fact in self._facts if tells(answer, fact)]
        missing = [fact for fact in self._facts if fact not in told]
        going_on, beginning = self.agent._copier.in_answer(answer, missing, self.new_ids[whole:])
        scores[:, going_on] += bonus
        scores[:, beginning] += BEGIN_SHARE * bonus
        if missing and (going_on or tells_more(answer, told)):  # else it does not get there by going on
            codes = scores[:, self.first_level.start : self.first_level.stop]
            if scores[:, self.agent._end_ids].max() > codes.logsumexp(1).max():
                codes -= END_SHARE * bonus  # to end later is no reason to call a tool
            scores[:, self.agent._end_ids] -= END_SHARE * bonus

    def _facts_to_tell(self) -> list[str]:
        """Return the facts that the turn has to tell if it is known to be an answer, and they are few and short."""
        if not self.agent.copy_bonus or (not self._again and self._refused is None):
            return []
        results = [
            content_text(message["content"])
            for message in self.run.messages[self._asked_at() :]
            if message["role"] == "tool" and not _is_error(message["content"])
        ]
        facts = list(islice(filter(self._can_tell, facts_of(results)), MAX_FACTS + 1))
        return facts if len(facts) <= MAX_FACTS else []

    def _can_tell(self, fact: str) -> bool:
        """Whether a fact is short, and stays as it is when the model writes it to the letter."""
        if len(fact.split()) > MAX_FACT_WORDS or len(fact) > MAX_FACT_LENGTH:
            return False
        tokenizer = self.agent.tokenizer
        return tokenizer.split_thought(tokenizer.decode(tokenizer.encode_data(fact)))[1] == fact

    def _draw(self, found: Sequence[RetrievedTool]) -> list[int]:
        """Return the code of the best of some tools, or of one that is sampled."""
        weights = torch.tensor([tool.score for tool in found]).exp()
        best = int(weights.multinomial(1)) if self.agent.do_sample else 0
        return self.agent.tokenizer.encode_tool(found[best].tool_id)

    def _next_token(self, scores: torch.Tensor) -> int:
        """Sample a token, or take the best one. Where a code may begin, its first tokens count together against each
        other token: which tool it is does not matter for whether one is called."""
        if self.agent.do_sample:
            return int(scores.softmax(-1).multinomial(1))
        begin = slice(self.first_level.start, self.first_level.stop)
        if scores[begin].logsumexp(0) >= scores.max():
            return self.first_level.start + int(scores[begin].argmax())
        return int(scores.argmax())

    def _asked_at(self) -> int:
        """Return the position of the user's last message."""
        return max((i for i, message in enumerate(self.run.messages) if message["role"] == "user"), default=0)

    def _asked(self) -> str:
        """Return the user's last message."""
        return content_text(self.run.messages[self._asked_at()]["content"])

    def _expert_query(self) -> str:
        """Return the text expert's query: the user's last message, and once a tool has answered it also the thought
        before the code, which says what is still to be done."""
        said = self._asked()
        if self.run.messages[-1]["role"] == "user":
            return said
        thought = self.agent.tokenizer.decode(self.new_ids, skip_special_tokens=True).strip()
        return f"{said} {thought}".strip()

    def _is_full(self) -> bool:
        config = self.agent.model.config.get_text_config()
        limit, context = self.agent.max_total_tokens, getattr(config, "max_position_embeddings", None)
        return (limit is not None and self.run.num_new_tokens >= limit) or (
            context is not None and len(self.ids) + len(self.new_ids) >= context
        )

    def _code_start(self) -> int:
        """Return the position of the turn's code, or the turn's length if it has none."""
        return next((i for i, token in enumerate(self.new_ids) if token in self.first_level), len(self.new_ids))

    def _is_whole_call(self) -> bool:
        if self.agent._grammar is not None:
            return self.agent._grammar.is_complete(self.new_ids)
        text = self._arguments_text()
        return text.rstrip().endswith("}") and isinstance(from_json(text), dict)

    def _arguments_text(self) -> str:
        return self.agent.tokenizer.decode(
            self.new_ids[self._code_start() + self.num_levels :], skip_special_tokens=True
        )

    def _read(self) -> None:
        """Parse the turn into thought, content, the chosen tool (`None` for an answer) and the arguments."""
        tokenizer, start = self.agent.tokenizer, self._code_start()
        text = [token_id for token_id in self.new_ids[:start] if token_id not in self.agent._end_ids]
        thought, content = tokenizer.split_thought(tokenizer.decode(text))
        self.said = {"content": content} | ({"reasoning_content": thought} if thought else {})
        self.tool_id, self.arguments, self.arguments_error = None, {}, None
        end = start + self.num_levels
        if end > len(self.new_ids):
            return
        self.tool_id = tokenizer.decode_tool(self.new_ids[start:end])
        arguments = from_json(self._arguments_text())
        if not isinstance(arguments, dict):
            self.arguments_error = "the arguments are not one JSON object"
            return
        self.arguments = arguments
        self.arguments_error = find_error(arguments, self.agent.catalog[self.tool_id].parameters)


def _is_error(observation: Any) -> bool:
    result = from_json(observation) if isinstance(observation, str) else observation
    return isinstance(result, dict) and "error" in result
