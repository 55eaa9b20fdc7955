"""Small tokenizers with the normalizers, pre-tokenizers, decoders and chat templates of real model families."""

import re
from functools import cache
from pathlib import Path

import trl
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from toolweaver_hf.demo import DEMO_FOLDER


CHATML = (
    "{% for message in messages %}{% if loop.first and message.role != 'system' %}"
    "{{ '<|im_start|>system\nBe helpful.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Lists tools, marks generations, and rewrites earlier turns: only the last turn shows that nothing was thought.
THINKING = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' %}{% if loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
HEADERS = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start|>' + message.role + '<|end|>\n\n' }}"
    "{{ message.content | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)
TURNS = (
    "{{ bos_token }}{% for message in messages %}{% if message.role not in ['user', 'assistant'] %}"
    "{{ raise_exception('no such role') }}{% endif %}"
    "{{ '<turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' }}"
    "{{ message.content | trim + '</turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"
)
INST = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}"
    "{{ '[INST] ' + message.content + ' [/INST]' }}{% elif message.role == 'assistant' %}"
    "{{ ' ' + message.content + eos_token }}{% else %}{{ raise_exception('no such role') }}{% endif %}{% endfor %}"
)
LLAMA3_REGEX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2_REGEX = LLAMA3_REGEX.replace(r"\p{N}{1,3}", r"\p{N}")
FAMILIES = ("gpt2", "gpt2_prefix", "smollm2", "llama3", "qwen3", "llama2", "mistral", "gemma")

TEMPLATES_FOLDER = Path(trl.__file__).parent / "chat_templates"
TRL_TEMPLATES = tuple(sorted(f"trl/{path.stem}" for path in TEMPLATES_FOLDER.glob("*.jinja")))
"""The chat templates of models, of which TRL has copies, and its own variants of them for training."""
MARKER = re.compile(
    r"<\|[\w.-]+\|?>|<\w+\|>|<｜[^｜<>{}]+｜>|</?(?:think|tool_call|tool_response|start_of_turn|end_of_turn"
    r"|end_of_utterance|sop)>|\[gMASK\]|\[/?INST\]"
)
# The tokens at which the models of a template stop, the tokenizer's own first
STOPS = {
    "cohere": ["<|END_OF_TURN_TOKEN|>"],
    "deepseek": ["<｜end▁of▁sentence｜>"],
    "diffusion_gemma": ["<turn|>"],
    "gemma4": ["<turn|>"],
    "gemma": ["<eos>", "<end_of_turn>"],
    "glm4moe": ["<|endoftext|>", "<|user|>", "<|observation|>"],
    "gptoss": ["<|return|>", "<|endoftext|>", "<|call|>"],
    "idefics3": ["<end_of_utterance>"],
    "llama3": ["<|eot_id|>"],
    "llava_next": ["</s>"],
    "muse": ["<|eot|>"],
    "phi3": ["<|endoftext|>", "<|end|>", "<|assistant|>"],
    "smolvlm": ["<end_of_utterance>"],
    "": ["<|im_end|>", "<|endoftext|>"],
}


@cache
def _trained(byte_level: bool) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges that BPE learns from the demo's documents."""
    backend = Tokenizer(models.BPE())
    if byte_level:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        alphabet = []
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator((DEMO_FOLDER / "catalog.jsonl").read_text(encoding="utf-8").splitlines(), trainer)
    model = __import__("json").loads(backend.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def _backend(byte_level: bool, special: list[str], **kwargs) -> Tokenizer:
    vocab, merges = _trained(byte_level)
    tokens = special + ([] if byte_level else [f"<0x{byte:02X}>" for byte in range(256)])
    vocab = {token: i for i, token in enumerate(tokens + list(vocab))}
    if not byte_level:
        kwargs |= {"byte_fallback": True, "fuse_unk": True, "unk_token": special[0]}
    backend = Tokenizer(models.BPE(vocab, merges, **kwargs))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return backend


def _byte_level(backend: Tokenizer, regex: str | None = None, add_prefix_space: bool = False) -> None:
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    if regex is not None:
        split = pre_tokenizers.Split(Regex(regex), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()


def _with_bos(backend: Tokenizer, bos: str) -> None:
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, backend.token_to_id(bos))]
    )


def stop_tokens(family: str) -> list[str]:
    """The tokens at which a model of the family stops, as its `generation_config` has them."""
    if family in TRL_TEMPLATES:
        return next(tokens for prefix, tokens in STOPS.items() if family.startswith(f"trl/{prefix}"))
    return [build(family).eos_token]


def build(family: str) -> PreTrainedTokenizerFast:
    """Build the tokenizer of a family, or one for a chat template of TRL with the special tokens that it has."""
    if family in TRL_TEMPLATES:
        template = (TEMPLATES_FOLDER / f"{family.removeprefix('trl/')}.jinja").read_text(encoding="utf-8")
        stops = stop_tokens(family)
        backend = _backend(True, [*dict.fromkeys(["<|bos|>", *stops, *MARKER.findall(template)])])
        _byte_level(backend, QWEN2_REGEX)
        return PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<|bos|>", eos_token=stops[0], chat_template=template
        )
    if family in ("gpt2", "gpt2_prefix"):
        backend = _backend(True, ["<|endoftext|>"])
        _byte_level(backend, add_prefix_space=family == "gpt2_prefix")
        backend.post_processor = processors.ByteLevel(trim_offsets=True)
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            bos_token="<|endoftext|>",
            eos_token="<|endoftext|>",
            unk_token="<|endoftext|>",
        )
    if family == "smollm2":
        backend = _backend(True, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
        _byte_level(backend)
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), backend.pre_tokenizer])
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            bos_token="<|im_start|>",
            eos_token="<|im_end|>",
            pad_token="<|im_end|>",
            chat_template=CHATML,
        )
    if family == "llama3":
        backend = _backend(True, ["<|begin|>", "<|eot|>", "<|start|>", "<|end|>"], ignore_merges=True)
        _byte_level(backend, LLAMA3_REGEX)
        _with_bos(backend, "<|begin|>")
        return PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<|begin|>", eos_token="<|eot|>", chat_template=HEADERS
        )
    if family == "qwen3":
        backend = _backend(True, [])
        backend.normalizer = normalizers.NFC()
        _byte_level(backend, QWEN2_REGEX)
        backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
        backend.add_tokens([AddedToken(t, normalized=False) for t in ("<think>", "</think>", "<tool_call>")])
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
        return PreTrainedTokenizerFast(
            tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=THINKING
        )
    special = ["<unk>", "<s>", "</s>"] + (["<turn>", "</turn>"] if family == "gemma" else [])
    backend = _backend(False, special)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if family == "llama2":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    elif family == "mistral":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    elif family == "gemma":
        backend.normalizer = normalizers.Replace(" ", "▁")
        backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        backend.decoder = decoders.Sequence(steps)
        backend.add_tokens([AddedToken(token, normalized=False) for token in ("\n\n", "▁▁", "<table>")])
    _with_bos(backend, "<s>")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</turn>" if family == "gemma" else "</s>",
        unk_token="<unk>",
        chat_template=TURNS if family == "gemma" else INST,
    )
