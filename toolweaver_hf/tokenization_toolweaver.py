"""`ToolWeaverTokenizer`: a fast base tokenizer whose vocabulary also holds the tokens of the tools' codes."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2.exceptions import TemplateError
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .chat_template import DEFAULT_CHAT_TEMPLATE, ConversationWriter, complete_template
from .tool_codes_file import TOOL_CODES_FILE, check_tool_codes, code_tokens, write_tool_codes


if TYPE_CHECKING:
    from .trie import CodeTrie


class ToolWeaverTokenizer(PreTrainedTokenizerFast):
    r"""
    A fast tokenizer that also knows the code of every tool (ToolWeaver, arXiv 2601.21947, section 3.2).

    Text is tokenized as the base tokenizer does it. Each code token, such as `<a_12>`, is one id wherever it stands.
    The tools' codes are saved beside the tokenizer's own files, in `tool_codes.json`.

    Build one with [`ToolWeaverTokenizer.from_base`], load one with [`ToolWeaverTokenizer.from_pretrained`].

    Args:
        tool_codes (`dict`, *optional*):
            The content of a `tool_codes.json`.
        tool_codes_file (`str`, *optional*):
            Path of a `tool_codes.json`, used where `tool_codes` is not given.
        kwargs:
            As for [`PreTrainedTokenizerFast`].

    Raises:
        `ValueError`: if the codes are not valid, or their tokens do not stand in the vocabulary in order.

    Example:

    ```python
    >>> from transformers import AutoTokenizer
    >>> from toolweaver_hf import ToolCodes, ToolWeaverTokenizer

    >>> base = AutoTokenizer.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
    >>> codes = ToolCodes([2, 2], {"weather": [0, 1], "air_quality": [0, 0]})
    >>> tokenizer = ToolWeaverTokenizer.from_base(base, codes)
    >>> tokenizer.convert_ids_to_tokens(tokenizer.encode_tool("weather"))
    ['<a_0>', '<b_1>']
    >>> tokenizer.decode_tool(tokenizer.encode("<a_0><b_0>"))
    'air_quality'
    ```
    """

    vocab_files_names = {"tokenizer_file": "tokenizer.json", "tool_codes_file": TOOL_CODES_FILE}

    def __init__(self, *args, tool_codes: dict[str, Any] | None = None, tool_codes_file: str | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        if tool_codes is None:
            if tool_codes_file is None:
                raise ValueError(
                    f"no {TOOL_CODES_FILE} was found: build the tokenizer with ToolWeaverTokenizer.from_base"
                )
            with open(tool_codes_file, encoding="utf-8") as file:
                try:
                    tool_codes = json.load(file)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{tool_codes_file} is not valid JSON: {error}") from None
        self._tool_codes = check_tool_codes(tool_codes, tool_codes_file or "tool_codes")
        self.codebook_sizes: list[int] = self._tool_codes["codebook_sizes"]
        num_tokens = sum(self.codebook_sizes)
        tokens = code_tokens(self.codebook_sizes) if num_tokens <= len(self) else [""]
        first = self.convert_tokens_to_ids(tokens[0])
        if first is None or self.convert_tokens_to_ids(tokens) != list(range(first, first + num_tokens)):
            raise ValueError(
                f"the vocabulary does not hold the {num_tokens} code tokens of {tool_codes_file or 'tool_codes'} in "
                "order: the two files belong to different tokenizers"
            )
        sizes = itertools.accumulate(self.codebook_sizes[:-1], initial=first)
        self.level_offsets: list[int] = list(sizes)
        self._tool_ids: dict[str, list[int]] = {
            tool_id: [offset + i for offset, i in zip(self.level_offsets, code, strict=True)]
            for tool_id, code in self._tool_codes["codes"].items()
        }
        self._writers: dict[tuple, ConversationWriter] = {}
        self._tool_of_ids = {tuple(ids): tool_id for tool_id, ids in self._tool_ids.items()}
        # Whether the base puts a space before what follows any added token, and drops one where it decodes
        probe = f"x{tokens[0]}x"
        ids = self.backend_tokenizer.encode(probe, add_special_tokens=False).ids
        self.opens_with_space = self.backend_tokenizer.decode(ids, skip_special_tokens=False) != probe

    @classmethod
    def from_pretrained(cls, *args, **kwargs) -> ToolWeaverTokenizer:
        """Load a tokenizer from a folder or a repository of the Hub, as every tokenizer.

        Raises:
            `ValueError`: if a file is not valid, or the codes do not belong to the vocabulary.
            `OSError`: if a file is missing.
        """
        try:
            return super().from_pretrained(*args, **kwargs)
        except (ValueError, OSError, ImportError):
            raise
        except Exception as error:  # what the parser of tokenizer.json raises is no narrower
            raise ValueError(f"the tokenizer's files are not valid: {error}") from error

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs) -> dict[str, Any]:
        return kwargs  # tokenizer.json is complete: nothing is to be rebuilt from vocabulary and merges

    @classmethod
    def from_base(cls, base: PreTrainedTokenizerBase, codes: Any) -> ToolWeaverTokenizer:
        """Add the codes of tools to a base tokenizer.

        The base's chat template is kept, or all of them where there are several. Where it has none, a plain one is
        given; where it cannot render the `tool` or the `system` role, a few lines are put before it that write these
        messages as the user's; where it reads contents as lists of parts alone, lines that make them of plain text.

        A base that puts a space before the text after any added token, and does not drop it again where it decodes
        (GPT-2's with `add_prefix_space`), does so after a code, too.

        Args:
            base ([`PreTrainedTokenizerFast`]):
                Any fast tokenizer. It is not changed.
            codes ([`ToolCodes`]):
                The tools' codes.

        Raises:
            `ValueError`: if the base is no fast tokenizer, or already holds one of the code tokens.
        """
        if not base.is_fast:
            raise ValueError(f"{type(base).__name__} is not a fast tokenizer: load the base with use_fast=True")
        tokens = code_tokens(codes.codebook_sizes)
        vocabulary = base.get_vocab()
        taken = next((token for token in tokens if token in vocabulary), None)
        if taken is not None:
            raise ValueError(f"the base tokenizer already holds the token {taken}: start from one without tool codes")
        backend = type(base.backend_tokenizer).from_str(base.backend_tokenizer.to_str())
        # As tokens that normalize to themselves and are not special: found in any text, kept by every decoding.
        backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in tokens])
        kept = (
            "model_max_length",
            "padding_side",
            "truncation_side",
            "clean_up_tokenization_spaces",
            "model_input_names",
        )
        tokenizer = cls(
            tokenizer_object=backend,
            tool_codes=codes.to_dict(),
            chat_template=base.chat_template,
            extra_special_tokens=base.extra_special_tokens,
            **{name: getattr(base, name) for name in kept},
            **base.special_tokens_map,
        )
        templates, render = tokenizer.chat_template or DEFAULT_CHAT_TEMPLATE, tokenizer.apply_chat_template
        if isinstance(templates, dict):
            completed = {name: complete_template(text, render) for name, text in templates.items()}
        else:
            completed = complete_template(templates, render)
        tokenizer.chat_template = completed
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def apply_chat_template(self, *args, **kwargs):
        """Render a conversation, as every tokenizer.

        Raises:
            `ValueError`: if the template refuses the conversation, or reaches out of its sandbox.
        """
        try:
            return super().apply_chat_template(*args, **kwargs)
        except TemplateError as error:
            raise ValueError(f"the chat template fails: {error}") from None

    @property
    def tool_ids(self) -> list[str]:
        """`list[str]`: The ids of the tools that have a code."""
        return list(self._tool_ids)

    @property
    def tool_codes(self) -> dict[str, tuple[int, ...]]:
        """`dict[str, tuple[int, ...]]`: For each tool its code, one index a level."""
        return {tool_id: tuple(code) for tool_id, code in self._tool_codes["codes"].items()}

    @property
    def tool_code_ids(self) -> np.ndarray:
        """`np.ndarray` of shape `(num_tools, num_levels)`: The token ids of the codes, in the order of `tool_ids`."""
        return np.array(list(self._tool_ids.values()), dtype=np.int64)

    @property
    def code_token_ids(self) -> list[int]:
        """`list[int]`: The token ids of all code tokens, used by a tool or not."""
        return list(range(self.level_offsets[0], self.level_offsets[-1] + self.codebook_sizes[-1]))

    def has_tool(self, tool_id: str) -> bool:
        """Whether a tool has a code."""
        return tool_id in self._tool_ids

    def encode_tool(self, tool_id: str) -> list[int]:
        """Return the token ids of a tool's code, one a level.

        Raises:
            `ValueError`: if the tool has no code.
        """
        if tool_id not in self._tool_ids:
            raise ValueError(f"the tool {tool_id!r} has no code; learn codes for a catalog that holds it")
        return list(self._tool_ids[tool_id])

    def decode_tool(self, token_ids: Iterable[int]) -> str:
        """Return the id of the tool whose code has these token ids.

        Raises:
            `ValueError`: if they are no tool's code.
        """
        token_ids = tuple(int(token_id) for token_id in token_ids)
        if token_ids not in self._tool_of_ids:
            tokens = "".join(map(str, self.convert_ids_to_tokens(list(token_ids))))
            raise ValueError(f"{tokens} is not the code of a tool")
        return self._tool_of_ids[token_ids]

    @cached_property
    def trie(self) -> CodeTrie:
        """[`CodeTrie`]: The prefix trie of all codes, on the CPU. Tool `i` is the one of row `i` of `tool_code_ids`."""
        from .trie import CodeTrie  # with torch, which tokenizing needs not

        return CodeTrie(self.tool_code_ids)

    @cached_property
    def _plain_backend(self) -> Tokenizer:
        """The backend without post-processing, so that offsets are whole."""
        return self._copy_backend(as_data=False)

    @cached_property
    def _data_backend(self) -> Tokenizer:
        """The backend without post-processing that finds no control token."""
        return self._copy_backend(as_data=True)

    def _copy_backend(self, as_data: bool) -> Tokenizer:
        document = json.loads(self.backend_tokenizer.to_str())
        document |= {"post_processor": None, "truncation": None, "padding": None}
        for token in document["added_tokens"]:
            token["special"] = token["id"] in self._control_ids
        backend = Tokenizer.from_str(json.dumps(document))
        backend.encode_special_tokens = as_data
        return backend

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        """Ids of the added tokens that do more than stand for text: code tokens, role markers, ends of turns."""
        added = self.backend_tokenizer.get_added_tokens_decoder()
        return frozenset(i for i, token in added.items() if token.content.replace("\u2581", " ").strip())

    @cached_property
    def _special_contents(self) -> list[str]:
        return [token.content for token in self.added_tokens_decoder.values() if token.special]

    def _spans(self, text: str, as_data: bool = False) -> list[tuple[int, int, int]]:
        """Tokenize text; return for each token its id, and where it starts and ends in the text."""
        backend = self._data_backend if as_data else self._plain_backend
        encoding = backend.encode(text, add_special_tokens=False)
        return [(i, start, end) for i, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)]

    def _add_tokens(self, new_tokens: list[str | AddedToken], special_tokens: bool = False) -> int:
        for name in ("_plain_backend", "_data_backend", "_control_ids", "_special_contents"):
            self.__dict__.pop(name, None)
        return super()._add_tokens(new_tokens, special_tokens)

    def _decode(self, token_ids: int | list[int], **kwargs) -> str:
        if not self.opens_with_space or isinstance(token_ids, int):
            return super()._decode(token_ids, **kwargs)
        first, end = self.level_offsets[0], self.level_offsets[-1] + self.codebook_sizes[-1]
        pieces = itertools.groupby(token_ids, key=lambda token_id: first <= token_id < end)
        return "".join(super(ToolWeaverTokenizer, self)._decode(list(piece), **kwargs) for _, piece in pieces)

    def encode_data(self, text: str) -> list[int]:
        """Tokenize text of others, such as what a tool returned, as text alone.

        The ids are those that the base tokenizer gives, save that no code token and no other control token of the
        vocabulary can come out, whatever the text holds: their spelling is tokenized as text. Added tokens of mere
        whitespace, which some tokenizers have, are text.
        """
        ids = []
        for token_id, start, end in self._spans(text, as_data=True):
            if token_id in self._control_ids:  # a model whose merges, too, spell out a control token
                ids += [i for letter in text[start:end] for i, *_ in self._spans(letter, as_data=True)]
            else:
                ids.append(token_id)
        return [i for i in ids if i not in self._control_ids]

    def encode_conversation(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False, task: str = "agent"
    ) -> dict[str, list[int]]:
        """Tokenize a conversation by the chat template.

        The ids are those of the rendered text, as `apply_chat_template` gives them, save that what users and tools say
        is never read as a control token: where it holds the spelling of one, it is tokenized by
        [`~ToolWeaverTokenizer.encode_data`].

        Args:
            messages (`Sequence[Mapping[str, Any]]`):
                Messages with a `role` and a plain `content`, those of the assistant also with a `reasoning_content`.
            add_generation_prompt (`bool`, *optional*, defaults to `False`):
                Whether to open the assistant's next turn at the end, up to what the model writes: where the template
                sets something before every text of the assistant, such as a space, this is part of the prompt.
            task (`str`, *optional*, defaults to `"agent"`):
                What the conversation is: `"agent"`, where tools may be called, `"retrieval"`, where a code is the
                answer, without a thought, or `"chat"`. Of several chat templates, `tool_use` is taken for the first
                two, `default` for the last.

        Returns:
            `dict[str, list[int]]`: `input_ids`.

        Raises:
            `ValueError`: if the chat template cannot render the conversation.
        """
        writer = self._writer(task)
        shown, data = self._hide_data(messages)
        text = writer.prompt(shown) if add_generation_prompt else writer.whole(shown)
        return {"input_ids": [token_id for token_id, _ in self._encode_text(text, data)]}

    def encode_query(self, query: str) -> list[int]:
        """Tokenize what a user says as the prompt that a code follows at once, without a thought."""
        messages = [{"role": "user", "content": query}]
        return self.encode_conversation(messages, add_generation_prompt=True, task="retrieval")["input_ids"]

    def encode_reply(self, observation: str | None, eos_token_id: int | Sequence[int] | None = None) -> list[int]:
        """Tokenize what follows a turn that the model wrote without its end: its end, a tool's result, the next prompt.

        Args:
            observation (`str`, *optional*):
                What the tool returned, as text alone.
            eos_token_id (`int` or `Sequence[int]`, *optional*):
                As for [`~ToolWeaverTokenizer.encode_for_training`].
        """
        message = {"role": "tool", "content": observation or ""}
        (shown,), data = self._hide_data([message])
        text, end = self._writer("agent", eos_token_id).reply(None if observation is None else shown["content"])
        before = "."  # a token that the reply does not merge with, for tokenizers that begin a text in their own way
        cuts = [len(before), len(before) + end]
        return [i for i, start in self._encode_text(before + text, data, cuts) if start >= len(before)]

    def encode_for_training(
        self,
        messages: Sequence[Mapping[str, Any]],
        eos_token_id: int | Sequence[int] | None = None,
        task: str = "agent",
    ) -> list[dict[str, list[int]]]:
        """Tokenize a conversation as rows to train on, in which every turn to learn stands as it will be generated.

        A row holds the prompt of a turn, as [`~ToolWeaverTokenizer.encode_conversation`] or
        [`~ToolWeaverTokenizer.encode_query`] give it, what the model writes, and then, as in a run of an agent, what
        tools return and what the model writes after that. A further message of the user begins another row where the
        chat template then writes the conversation before it in another way, such as without its thoughts. No token
        reaches across the bounds of a turn, since none can when it is generated.

        Args:
            messages (`Sequence[Mapping[str, Any]]`):
                Messages as for [`~ToolWeaverTokenizer.encode_conversation`]. One of the assistant may say by `loss`
                whether it is to be learned; all others are.
            eos_token_id (`int` or `Sequence[int]`, *optional*):
                Tokens at which generation stops, such as those of a model's `generation_config`, beside the
                tokenizer's own.
            task (`str`, *optional*, defaults to `"agent"`):
                As for [`~ToolWeaverTokenizer.encode_conversation`].

        Returns:
            `list[dict[str, list[int]]]`: rows of `input_ids`, and of `assistant_mask` with a 1 for every token to
            learn: of what the model writes in a turn, and of the turn's end.

        Raises:
            `ValueError`: if the chat template cannot render the conversation.
        """
        shown, data = self._hide_data(messages)
        rows = []
        for row in self._writer(task, eos_token_id).rows(shown):
            tokens = self._encode_text(row.text, data, row.cuts)
            mask = [int(any(first <= start < last for first, last in row.learned)) for _, start in tokens]
            rows.append({"input_ids": [token_id for token_id, _ in tokens], "assistant_mask": mask})
        return rows

    def end_token_ids(self, eos_token_id: int | Sequence[int] | None = None) -> list[int]:
        """Return the tokens at which a turn ends, in ascending order: the tokenizer's own and others.

        Args:
            eos_token_id (`int` or `Sequence[int]`, *optional*):
                As for [`~ToolWeaverTokenizer.encode_for_training`].
        """
        ends = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or ())
        return sorted({*ends, self.eos_token_id} - {None})

    def split_thought(self, text: str) -> tuple[str, str]:
        """Split what the model wrote in a turn into its thought and the rest, each without control tokens.

        Args:
            text (`str`): The turn, decoded with its special tokens.
        """
        thought, rest = self._writer("agent").read(text)
        for name in self._special_contents:
            thought, rest = thought.replace(name, ""), rest.replace(name, "")
        return thought.strip(), rest.strip()

    def _writer(self, task: str, eos_token_id: int | Sequence[int] | None = None) -> ConversationWriter:
        template = self.chat_template
        if isinstance(template, dict):
            name = "tool_use" if task != "chat" and "tool_use" in template else "default"
            template = template.get(name) or next(iter(template.values()))
        ends = tuple(self.end_token_ids(eos_token_id))
        key = (template, ends, task == "retrieval")
        if key not in self._writers:
            self._writers[key] = ConversationWriter(
                partial(self._render, template, task),
                partial(self._find_end, ends),
                self.eos_token or "",
                thinks=task != "retrieval",
            )
        return self._writers[key]

    def _render(self, template: str, task: str, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        # Templates of hybrid reasoning models close the thought then; others ignore the argument.
        kwargs = {"enable_thinking": False} if task == "retrieval" else {}
        return self.apply_chat_template(
            messages,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **kwargs,
        )

    def _find_end(self, ends: tuple[int, ...], text: str, or_control: bool) -> int | None:
        """Return how much of a text that follows a turn ends the turn; `None` if it begins with no such token."""
        control = None
        for token_id, start, end in self._spans(text) if text else ():
            if token_id in ends:
                return end
            if token_id in self._control_ids:
                control = control or end
            elif text[start:end].strip():
                break
        return control if or_control else None

    def _hide_data(self, messages: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
        """Put marks in place of contents of users and tools that spell control tokens; return these contents, too."""
        mark = "\ue000"  # a private character, repeated until no message holds it
        while any(mark in message["content"] + (message.get("reasoning_content") or "") for message in messages):
            mark += "\ue000"
        shown, data = [], [mark]
        for message in messages:
            message = dict(message)
            if message["role"] in ("user", "tool") and self._has_control(message["content"]):
                data.append(message["content"])
                message["content"] = f"{mark}{len(data) - 1}\ue001"
            shown.append(message)
        return shown, data

    def _encode_text(self, text: str, data: list[str], cuts: Sequence[int] = ()) -> list[tuple[int, int]]:
        """Tokenize a rendered text, with the data that was hidden in it; return for each token where it starts."""
        tokens: list[tuple[int, int]] = []
        position = 0
        for i, piece in enumerate(re.split(f"{data[0]}(\\d+)\ue001", text)):
            if i % 2:
                tokens += [(token_id, position) for token_id in self.encode_data(data[int(piece)])]
                position += len(data[0]) + len(piece) + 1
            else:
                spans = self._spans_cut(piece, [cut - position for cut in cuts])
                tokens += [(token_id, position + start) for token_id, start, _ in spans]
                position += len(piece)
        return tokens

    def split_tokens(self, token_ids: Iterable[int], share: float, generator: random.Random) -> list[int]:
        """Write some tokens as shorter ones, as BPE-dropout (arXiv 1910.13267) does, but by a seed.

        Args:
            token_ids (`Iterable[int]`):
                Tokens of a text. Control tokens among them stay whole.
            share (`float`):
                Fraction of the tokens to split, each at a random place.
            generator (`random.Random`):
                What draws them.
        """
        model, split = self._plain_backend.model, []
        for token_id in token_ids:
            token = self.backend_tokenizer.id_to_token(token_id)
            if token_id in self._control_ids or len(token) < 2 or generator.random() >= share:
                split.append(token_id)
            else:
                cut = generator.randrange(1, len(token))
                split += [piece.id for part in (token[:cut], token[cut:]) for piece in model.tokenize(part)]
        return split

    def _has_control(self, text: str) -> bool:
        """Whether text would be read as more than text."""
        return any(i in self._control_ids for i, *_ in self._spans(text))

    def _spans_cut(self, text: str, cuts: Iterable[int]) -> list[tuple[int, int, int]]:
        """Tokenize text as [`_spans`] does, but without a token across one of the cuts."""
        spans = self._spans(text) if text else []
        crossed = next((cut for cut in cuts if any(start < cut < end for _, start, end in spans)), None)
        if crossed is None:
            return spans
        rest = self._spans_cut(text[crossed:], [cut - crossed for cut in cuts])
        return self._spans_cut(text[:crossed], cuts) + [(i, s + crossed, e + crossed) for i, s, e in rest]

    def _save_pretrained(
        self,
        save_directory: str | os.PathLike,
        file_names: tuple[str, ...],
        legacy_format: bool | None = None,
        filename_prefix: str | None = None,
    ) -> tuple[str, ...]:
        file_names = super()._save_pretrained(save_directory, file_names, legacy_format, filename_prefix)
        path = os.path.join(save_directory, (filename_prefix + "-" if filename_prefix else "") + TOOL_CODES_FILE)
        write_tool_codes(self._tool_codes, path)
        return (*file_names, path)


ToolWeaverTokenizer.register_for_auto_class("AutoTokenizer")
