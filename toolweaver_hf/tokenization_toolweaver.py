"""`ToolWeaverTokenizer`: a fast base tokenizer whose vocabulary also holds the tokens of the tools' codes."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2.exceptions import TemplateError
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .tool_codes_file import TOOL_CODES_FILE, check_tool_codes, code_tokens, write_tool_codes


if TYPE_CHECKING:
    from .trie import CodeTrie

# A conversation for base models that come without a chat template; it needs no token that the base lacks.
DEFAULT_CHAT_TEMPLATE = (
    "{%- if bos_token -%}{{ bos_token }}{%- endif -%}"
    "{%- for message in messages -%}{{ message.role + '\\n' + message.content + eos_token + '\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'assistant\\n' }}{%- endif -%}"
)
# Put before a template that knows no tool role: observations are shown to it as messages of the user.
TOOL_ROLE_TEMPLATE = (
    "{%- set ns = namespace(messages=[]) -%}{%- for message in messages -%}"
    "{%- set ns.messages = ns.messages + [{'role': 'user', 'content': message.content} if message.role == 'tool'"
    " else message] -%}{%- endfor -%}{%- set messages = ns.messages -%}"
)
# Put before a template that knows no system role: the system's text opens the first message of the user.
SYSTEM_ROLE_TEMPLATE = (
    "{%- if messages[0].role == 'system' -%}{%- set messages = [{'role': messages[1].role, 'content':"
    " messages[0].content + '\\n\\n' + messages[1].content}] + messages[2:] -%}{%- endif -%}"
)


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

        The base's chat template is kept. Where it has none, a plain one is given; where it cannot render the `tool`
        or the `system` role, a few lines are put before it that write these messages as the user's.

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
        if tokenizer.chat_template is None:
            tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
        if not tokenizer._renders("user", "assistant", "tool"):
            tokenizer.chat_template = TOOL_ROLE_TEMPLATE + tokenizer.chat_template
        if not tokenizer._renders("system", "user"):
            tokenizer.chat_template = SYSTEM_ROLE_TEMPLATE + tokenizer.chat_template
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

    def _renders(self, *roles: str) -> bool:
        """Whether the chat template shows the content of messages of these roles, in this order."""
        contents = [f"content-of-{role}" for role in roles]
        messages = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=True)]
        try:
            rendered = self.apply_chat_template(messages, tokenize=False)
        except Exception:  # whatever a template raises for a role that it does not know
            return False
        return all(content in rendered for content in contents)

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

    def _spans(self, text: str, as_data: bool = False) -> list[tuple[int, int, int]]:
        """Tokenize text; return for each token its id, and where it starts and ends in the text."""
        backend = self._data_backend if as_data else self._plain_backend
        encoding = backend.encode(text, add_special_tokens=False)
        return [(i, start, end) for i, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)]

    def _add_tokens(self, new_tokens: list[str | AddedToken], special_tokens: bool = False) -> int:
        for name in ("_plain_backend", "_data_backend", "_control_ids"):
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
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False
    ) -> dict[str, list[int]]:
        """Tokenize a conversation by the chat template, and mark what is to be learned in it.

        The ids are those of the rendered text, as `apply_chat_template` gives them, with two exceptions. What users
        and tools say is never read as a control token: where it holds the spelling of one, it is tokenized by
        [`~ToolWeaverTokenizer.encode_data`]. And no token reaches from the prompt into a turn that is learned, since
        none can when the turn is generated.

        Args:
            messages (`Sequence[Mapping[str, Any]]`):
                Messages with a `role` and a plain `content`, and optionally a `loss`: whether to learn the message.
                Without it the assistant's messages are learned and no others.
            add_generation_prompt (`bool`, *optional*, defaults to `False`):
                Whether to open the assistant's next turn at the end. Nothing is marked then.

        Returns:
            `dict[str, list[int]]`: `input_ids`, and `assistant_mask` with a 1 for every token of the contents that
            are to be learned and of the ends of their turns.

        Raises:
            `ValueError`: if the template writes a conversation differently once it goes on, so that the turns to
            learn cannot be told from the rest.
        """
        mark = "\ue000"  # a private character, repeated until no message holds it
        while any(mark in message["content"] for message in messages):
            mark += "\ue000"
        shown, data = [], []
        for message in messages:
            message = dict(message)
            if message["role"] in ("user", "tool") and self._has_control(message["content"]):
                data.append(message["content"])
                message["content"] = f"{mark}{len(data) - 1}\ue001"
            shown.append(message)
        text = self._render(shown, add_generation_prompt)
        learned = [] if add_generation_prompt else self._learned_spans(shown, text)
        cuts = [cut for span in learned for cut in span]
        input_ids: list[int] = []
        mask: list[int] = []
        position = 0
        for i, piece in enumerate(re.split(f"{mark}(\\d+)\ue001", text)):
            if i % 2:
                spans = [(token_id, 0, 0) for token_id in self.encode_data(data[int(piece)])]
                length = len(mark) + len(piece) + 1
            else:
                spans = self._spans_cut(piece, [cut - position for cut in cuts])
                length = len(piece)
            for token_id, start, _ in spans:
                input_ids.append(token_id)
                mask.append(int(any(first <= position + start < last for first, last in learned)))
            position += length
        return {"input_ids": input_ids, "assistant_mask": mask}

    def encode_query(self, query: str) -> list[int]:
        """Tokenize what a user says as the prompt that a code follows at once.

        Where the chat template sets something between the opening of the assistant's turn and its text, such as a
        space, the prompt holds that, too.
        """
        code = self.code_token_ids[0]
        answer = {"role": "assistant", "content": self.convert_ids_to_tokens(code), "loss": False}
        input_ids = self.encode_conversation([{"role": "user", "content": query}, answer])["input_ids"]
        return input_ids[: input_ids.index(code)]

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

    def _render(self, messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        # Templates of hybrid reasoning models add their "no thinking" marker; others ignore the argument.
        return self.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, enable_thinking=False
        )

    def _learned_spans(self, messages: list[dict[str, Any]], text: str) -> list[tuple[int, int]]:
        """Where in the rendered text the messages to learn start and end."""
        spans = []
        for i, message in enumerate(messages):
            is_assistant = message["role"] == "assistant"
            if message.get("loss", is_assistant):
                start = self._render(messages[:i], add_generation_prompt=is_assistant) if i else ""
                end = text if i + 1 == len(messages) else self._render(messages[: i + 1])
                if not (end.startswith(start) and text.startswith(end)):
                    raise ValueError(
                        "the chat template changes earlier messages of a conversation when it goes on, so the turns "
                        "to learn cannot be marked: set a template that appends each message"
                    )
                spans.append((len(start), len(start) + len(end[len(start) :].rstrip())))
        return spans

    def _spans_cut(self, text: str, cuts: Iterable[int]) -> list[tuple[int, int, int]]:
        """Tokenize text as [`_spans`] does, but without a token across one of the cuts."""
        spans = self._spans(text) if text else []
        crossed = next((cut for cut in cuts if any(start < cut < end for _, start, end in spans)), None)
        if crossed is None:
            return spans
        rest = self._spans_cut(text[crossed:], [cut - crossed for cut in cuts])
        return self._spans_cut(text[:crossed], cuts) + [(i, s + crossed, e + crossed) for i, s, e in rest]

    @cached_property
    def appends_messages(self) -> bool:
        """`bool`: Whether the chat template leaves a conversation as it is when it goes on.

        Where it does not, as with models whose earlier thoughts are dropped, only the last turn of a conversation
        can be learned as it will be generated.
        """
        messages = [{"role": role, "content": f"a {role}"} for role in ("user", "assistant", "tool", "assistant")]
        try:
            self._learned_spans(messages, self._render(messages))
        except ValueError:
            return False
        return True

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
