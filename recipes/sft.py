"""Generative alignment: teach a causal language model to choose tools by their codes (ToolWeaver, section 3.2).

```bash
accelerate launch recipes/sft.py --config recipes/configs/smollm2_135m.yaml
```

or, argument by argument,

```bash
accelerate launch recipes/sft.py \
    --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \
    --codes_dir out/codes \
    --stages memorization retrieval \
    --queries my_queries.jsonl \
    --learning_rate 1e-3 \
    --output_dir out/retrieval
```

The next stage starts from the last one's output: `--model_name_or_path out/retrieval --stages trajectory --trajectories
my_trajectories.jsonl --output_dir out/agent`.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from toolweaver_hf.cli import parse_arguments, run_command


if TYPE_CHECKING:
    from collections.abc import Sequence

    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedModel
    from trl import ModelConfig

    from toolweaver_hf.alignment.trainer import AlignmentTrainer, AlignmentTrainingArguments
    from toolweaver_hf.codes.tool_codes import ToolCodes
    from toolweaver_hf.data.catalog import ToolCatalog
    from toolweaver_hf.data.queries import Query
    from toolweaver_hf.text_expert import TextExpert
    from toolweaver_hf.tokenization_toolweaver import ToolWeaverTokenizer


STAGES = ("memorization", "retrieval", "trajectory", "replay")


@dataclass
class AlignmentArguments:
    """What to align the model with.

    Args:
        codes_dir (`str`):
            Output folder of `recipes/tokenize_tools.py`: catalog, codes and, for the embedding initialization
            `codebook`, the RQ-VAE.
        stages (`list[str]`, *optional*, defaults to `["retrieval"]`):
            Kinds of rows to train on, mixed: `memorization` (document -> code), `retrieval` (query -> code),
            `trajectory` (whole trajectories), `replay` (general chat, against forgetting).
        stage_weights (`list[float]`, *optional*):
            For each stage how often its rows are seen in an epoch: 2 is twice, 0.5 is half of them. Defaults to once.
        queries (`str`, *optional*):
            Training queries for `retrieval`: JSONL with `id`, `text`, `tools`, or a BEIR queries file, or ToolGen's
            rows for memorization or retrieval.
        qrels (`str`, *optional*):
            The relevance file of BEIR queries.
        trajectories (`str`, *optional*):
            Training trajectories for `trajectory`: JSONL with `messages`, or with ShareGPT's `conversations`.
        replay (`str`, *optional*):
            Conversations for `replay`, of the same formats.
        eval_queries (`str`, *optional*):
            Queries for the evaluations while training: their loss, and nDCG by constrained beam search.
        eval_qrels (`str`, *optional*):
            The relevance file of BEIR queries.
        max_eval_queries (`int`, *optional*, defaults to 200):
            How many of them to use.
        early_stopping_patience (`int`, *optional*):
            Evaluations without a better `metric_for_best_model` after which training stops.
        embedding_init (`str`, *optional*, defaults to `"codebook"`):
            Where the embeddings of a base model's new tokens come from: `codebook`, `mean_description` or `random`.
        guided (`bool`, *optional*, defaults to `True`):
            Whether to save a text expert with the model, which guides decoding and finds tools that are added later.
            With `eval_queries` its weights are fitted on them at the end.
        text_encoder (`str`, *optional*):
            The text expert's sentence-transformers model. Defaults to all-MiniLM-L6-v2.
        embedding_multiple (`int`, *optional*, defaults to 64):
            The embeddings of a base model are padded to a multiple of so many rows.
        augmentations (`int`, *optional*, defaults to 0):
            Noisy copies of each memorization and retrieval row, with words left out and tokens split at random.
            They keep a small model from learning few queries by heart.
        max_bad_rows (`float`, *optional*, defaults to 0.01):
            Fraction of a stage's rows that may be left out because they cannot be learned, such as one that calls a
            tool without a code. The first five are named. Where there are more, the run stops.
    """

    codes_dir: str = field(metadata={"help": "Output folder of recipes/tokenize_tools.py."})
    stages: list[str] = field(
        default_factory=lambda: ["retrieval"],
        metadata={"help": "Kinds of rows to train on, mixed.", "choices": STAGES},
    )
    stage_weights: list[float] | None = field(
        default=None, metadata={"help": "For each stage how often its rows are seen in an epoch."}
    )
    queries: str | None = field(default=None, metadata={"help": "Training queries (JSONL)."})
    qrels: str | None = field(default=None, metadata={"help": "Relevance file (TSV) of BEIR queries."})
    trajectories: str | None = field(default=None, metadata={"help": "Training trajectories (JSONL)."})
    replay: str | None = field(default=None, metadata={"help": "General conversations (JSONL)."})
    eval_queries: str | None = field(default=None, metadata={"help": "Queries to evaluate on while training."})
    eval_qrels: str | None = field(default=None, metadata={"help": "Relevance file (TSV) of BEIR queries."})
    max_eval_queries: int = field(default=200, metadata={"help": "How many queries to evaluate on."})
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Evaluations without a better metric after which training stops."}
    )
    embedding_init: str = field(
        default="codebook",
        metadata={
            "help": "Initialization of a base model's new tokens.",
            "choices": ["codebook", "mean_description", "random"],
        },
    )
    guided: bool = field(
        default=True, metadata={"help": "Whether to save a text expert with the model, which guides decoding."}
    )
    text_encoder: str | None = field(
        default=None, metadata={"help": "The text expert's sentence-transformers model (default: all-MiniLM-L6-v2)."}
    )
    embedding_multiple: int = field(
        default=64, metadata={"help": "Pad the embeddings of a base model to a multiple of so many rows."}
    )
    augmentations: int = field(default=0, metadata={"help": "Noisy copies of each memorization and retrieval row."})
    max_bad_rows: float = field(
        default=0.01, metadata={"help": "Fraction of rows that may be left out because they cannot be learned."}
    )

    def __post_init__(self):
        for stage in self.stages:
            needed = {"retrieval": "queries", "trajectory": "trajectories", "replay": "replay"}.get(stage)
            if needed and not getattr(self, needed):
                raise ValueError(f"the stage {stage!r} needs --{needed}")
        if self.stage_weights is not None and len(self.stage_weights) != len(self.stages):
            raise ValueError(f"--stage_weights needs {len(self.stages)} numbers, one for each stage")


def load_model_and_tokenizer(
    args: AlignmentArguments,
    training_args: AlignmentTrainingArguments,
    model_args: ModelConfig,
    catalog: ToolCatalog,
) -> tuple[PreTrainedModel | PeftModel, ToolWeaverTokenizer]:
    """Load an aligned model as it is; give a base model the code tokens and their embeddings."""
    from peft import prepare_model_for_kbit_training
    from transformers import AutoTokenizer, GgufConfig
    from transformers.utils import cached_file
    from transformers.utils.peft_utils import find_adapter_config_file
    from trl import get_quantization_config

    from toolweaver_hf.adapter import describe_base, load_adapter, load_model, merge_adapter
    from toolweaver_hf.alignment.embedding_init import initialize_code_embeddings
    from toolweaver_hf.codes.tool_codes import ToolCodes
    from toolweaver_hf.modeling_rqvae import RQVAEModel
    from toolweaver_hf.tokenization_toolweaver import ToolWeaverTokenizer
    from toolweaver_hf.tool_codes_file import TOOL_CODES_FILE

    codes = ToolCodes.from_pretrained(args.codes_dir)
    changes = codes.compare(catalog)
    if any(changes):
        raise ValueError(
            f"the catalog in {args.codes_dir} is not the one that its codes were learned for: "
            + "; ".join(f"{kind}: {', '.join(ids[:5])}" for kind, ids in changes._asdict().items() if ids)
        )
    name, revision = model_args.model_name_or_path, model_args.model_revision
    kwargs = {
        "dtype": model_args.dtype,
        "attn_implementation": model_args.attn_implementation,
        "trust_remote_code": training_args.trust_remote_code,
        "use_safetensors": True,  # no pickle is opened
        **(training_args.model_init_kwargs or {}),
    }
    quantization = get_quantization_config(model_args)
    if quantization is not None:
        if not model_args.use_peft:
            raise ValueError("--load_in_4bit and --load_in_8bit train LoRA on a quantized base: add --use_peft")
        kwargs["quantization_config"] = quantization
    gguf_file = kwargs.get("gguf_file")
    if name.endswith(".gguf"):
        raise ValueError(
            f"--model_name_or_path {name}: give the folder or repository of a GGUF file, and its name as "
            f'--model_init_kwargs \'{{"gguf_file": "{os.path.basename(name)}"}}\''
        )
    if gguf_file is not None:
        if model_args.use_peft:
            raise ValueError(
                "an adapter does not name the GGUF file of its base: convert that to safetensors for LoRA"
            )
        kwargs["quantization_config"] = GgufConfig(dequantize=True)  # to plain weights, which can be trained and saved
    if find_adapter_config_file(name, revision=revision):
        # The last stage's adapter is trained on; without LoRA in this stage it becomes part of the weights.
        model = load_adapter(name, {"revision": revision}, kwargs, is_trainable=model_args.use_peft)
        if not model_args.use_peft:
            model = merge_adapter(model).requires_grad_(True)
    else:
        model = load_model(name, revision=revision, **kwargs)
        if model_args.use_peft:
            model.adapter_base = describe_base(model, name, revision)
        if quantization is not None:
            prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # the trainer does that

    template = read_chat_template(training_args.chat_template_path)
    if cached_file(name, TOOL_CODES_FILE, revision=revision, _raise_exceptions_for_missing_entries=False):
        check_codes(name, codes, args.codes_dir, revision)
        # A catalog that changed since is taken in: codes of added tools are made of tokens that the model has.
        tokenizer = ToolWeaverTokenizer.from_pretrained(name, revision=revision, tool_codes=codes.to_dict())
        if template is not None:
            tokenizer.chat_template = template
        return model, tokenizer
    base = AutoTokenizer.from_pretrained(
        name, revision=revision, trust_remote_code=training_args.trust_remote_code, gguf_file=gguf_file
    )
    if template is not None:
        base.chat_template = template
    tokenizer = ToolWeaverTokenizer.from_base(base, codes)
    # Codes of another origin than the RQ-VAE, such as one token a tool, have no codebook to start from.
    codebooks = RQVAEModel.from_pretrained(args.codes_dir).codebooks() if args.embedding_init == "codebook" else None
    initialize_code_embeddings(
        model,
        tokenizer,
        codebooks,
        method=args.embedding_init,
        catalog=catalog,
        seed=training_args.seed,
        pad_to_multiple_of=args.embedding_multiple,
    )
    return model, tokenizer


def read_chat_template(path: str | None) -> str | None:
    """Read the chat template that is to replace the base's."""
    if path is None:
        return None
    if not Path(path).is_file():
        raise ValueError(f"--chat_template_path must be a file that holds a Jinja template, not {path!r}")
    return Path(path).read_text(encoding="utf-8")


def check_codes(folder: str, codes: ToolCodes, codes_dir: str, revision: str | None = None) -> None:
    """Make sure that a model or checkpoint was aligned with these codes, but for tools added or removed since.

    Raises:
        `ValueError`: naming the tools whose codes differ.
    """
    from toolweaver_hf.codes.tool_codes import ToolCodes

    aligned = ToolCodes.from_pretrained(folder, revision=revision)
    differing = [i for i, code in aligned.items() if (code != codes[i] if i in codes else code not in codes.retired)]
    if aligned.codebook_sizes != codes.codebook_sizes or differing:
        raise ValueError(
            f"{folder} was aligned with other codes than those in {codes_dir} "
            f"({', '.join(differing[:5])} differ); give the folder of its codes, or start from the base model"
        )


def load_rows(
    args: AlignmentArguments,
    catalog: ToolCatalog,
    tokenizer: ToolWeaverTokenizer,
    max_length: int | None,
    seed: int,
    shared_prompts: bool = False,
    eos_token_id: int | list[int] | None = None,
) -> tuple[Dataset, list[tuple[str, Sequence[str]]]]:
    """Build the rows of every stage: conversations, then tokens with the loss on the turns to learn.

    Returns:
        `tuple[Dataset, list[tuple[str, Sequence[str]]]]`: the rows, and what queries and trajectories ask with the ids
        of the tools that they call for. (A document alone does not teach a model when to call its tool.)

    Raises:
        `ValueError`: naming the first five of the rows that cannot be learned, if they are more than
            `args.max_bad_rows` of a stage.
    """
    from accelerate.logging import get_logger
    from datasets import concatenate_datasets

    from toolweaver_hf.alignment.rows import (
        drop_words,
        memorization_rows,
        repeat_rows,
        replay_rows,
        retrieval_rows,
        share_prompts,
        tokenize_rows,
        trajectory_rows,
    )
    from toolweaver_hf.data.queries import load_queries
    from toolweaver_hf.data.trajectories import asked_in_trajectories, load_trajectories

    logger = get_logger(__name__)
    generator = random.Random(seed)
    datasets, asked = [], []
    for stage, weight in zip(args.stages, args.stage_weights or [1.0] * len(args.stages), strict=True):
        bad_rows: list[str] = []
        if stage == "memorization":
            rows = memorization_rows(catalog, tokenizer)
        elif stage == "retrieval":
            queries = load_queries(args.queries, args.qrels, bad_rows)
            asked += [(query.text, query.tools) for query in queries]
            rows = retrieval_rows(queries, tokenizer, bad_rows)
        elif stage == "trajectory":
            trajectories = load_trajectories(args.trajectories, bad_rows)
            asked += asked_in_trajectories(trajectories)
            rows = trajectory_rows(trajectories, tokenizer, bad_rows)
        else:
            rows = replay_rows(load_trajectories(args.replay, bad_rows), tokenizer, bad_rows)
        num_rows = len(rows) + len(bad_rows)
        encode = partial(
            tokenize_rows,
            tokenizer=tokenizer,
            max_length=max_length,
            eos_token_id=eos_token_id,
        )
        dataset, too_long = encode(rows, bad_rows=bad_rows)
        if bad_rows:
            named = "".join(f"\n  {bad_row}" for bad_row in bad_rows[:5])
            counted = f"{stage}: {len(bad_rows)} of {num_rows} rows cannot be learned"
            if len(bad_rows) > args.max_bad_rows * num_rows:
                raise ValueError(f"{counted}, more than --max_bad_rows {args.max_bad_rows:g} allows, such as{named}")
            logger.warning(f"{counted} and are left out, such as{named}")
        if too_long:
            logger.warning(f"{stage}: {too_long} of {len(rows)} rows have more than {max_length} tokens: left out")
        if stage in ("memorization", "retrieval") and args.augmentations:
            noisy = [drop_words(row, generator) for _ in range(args.augmentations) for row in rows]
            noisy, _ = encode(noisy, split_share=0.22, seed=seed, bad_rows=[])
            dataset = concatenate_datasets([dataset, noisy])
        if stage == "retrieval" and shared_prompts:
            dataset = share_prompts(dataset)
        datasets.append(repeat_rows(dataset, weight, seed))
        logger.info(f"{stage}: {len(datasets[-1])} rows an epoch")
    dataset = concatenate_datasets(datasets)
    if len(dataset) == 0:
        raise ValueError(f"no row to train on fits in --max_length {max_length}")
    return dataset, asked


def load_eval_queries(args: AlignmentArguments, seed: int) -> list[Query]:
    """Read the validation queries, a sample of them where there are many."""
    from toolweaver_hf.data.queries import load_queries

    if args.eval_queries is None:
        return []
    queries = load_queries(args.eval_queries, args.eval_qrels)
    return random.Random(seed).sample(queries, min(args.max_eval_queries, len(queries)))


def load_text_expert(
    args: AlignmentArguments,
    catalog: ToolCatalog,
    model_args: ModelConfig,
    asked: list[tuple[str, Sequence[str]]],
    seed: int,
) -> TextExpert:
    """Embed the tools' documents and the queries, before the training, so that an encoder that is missing shows at
    once."""
    from transformers.utils import cached_file

    from toolweaver_hf.text_expert import TEXT_EXPERT_FILE, TextExpert

    name, hub_kwargs = model_args.model_name_or_path, {"revision": model_args.model_revision}
    learned = {tool_id for _, tools in asked for tool_id in tools if tool_id in catalog}
    expert = TextExpert(catalog.ids, catalog.documents, args.text_encoder, learned=learned)
    expert.embed(args.codes_dir if os.path.isdir(args.codes_dir) else None, show_progress_bar=True)
    if cached_file(name, TEXT_EXPERT_FILE, _raise_exceptions_for_missing_entries=False, **hub_kwargs):
        expert.take_over(TextExpert.from_pretrained(name, **hub_kwargs))
    expert.remember(*zip(*asked, strict=True) if asked else ([], []), seed=seed, keep=True)
    return expert


def fit_text_expert(text_expert: TextExpert, trainer: AlignmentTrainer, queries: list[Query]) -> None:
    """Fit the weights of guided decoding on the validation queries, and save them with the model."""
    import torch

    from toolweaver_hf.alignment.guidance import fit_guidance
    from toolweaver_hf.retrieval import ToolRetriever

    output_dir = trainer.args.output_dir
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:  # no process holds the whole model
        trainer.accelerator.print(f"Now fit how far to trust the model: toolweaver fit-guidance --model {output_dir}")
    elif trainer.is_world_process_zero():
        model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)  # no longer in bf16
        retriever = ToolRetriever(model, trainer.processing_class, text_expert)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=trainer.args.bf16):
            fitted = fit_guidance(retriever, queries)
        text_expert.save_pretrained(output_dir)
        print("Guidance: " + ", ".join(f"{name} {value}" for name, value in fitted.items()))


def main(args: AlignmentArguments, training_args: AlignmentTrainingArguments, model_args: ModelConfig) -> None:
    """Align a model and save it with its tokenizer and catalog in `training_args.output_dir`."""
    from accelerate.logging import get_logger
    from peft import LoraConfig, PeftModel
    from transformers import EarlyStoppingCallback, set_seed
    from transformers.trainer import TRAINING_ARGS_NAME
    from trl import get_peft_config

    from toolweaver_hf.alignment.checkpoints import check_disk_space, check_writable, last_checkpoint, size_on_disk
    from toolweaver_hf.alignment.lora import linear_layers, trainable_code_rows
    from toolweaver_hf.alignment.record import record_training
    from toolweaver_hf.alignment.rows import retrieval_rows, tokenize_rows
    from toolweaver_hf.alignment.trainer import AlignmentTrainer
    from toolweaver_hf.cache import can_share_prompts
    from toolweaver_hf.codes.tool_codes import ToolCodes
    from toolweaver_hf.data.catalog import ToolCatalog
    from toolweaver_hf.evaluation.rankings import ranking_metrics
    from toolweaver_hf.hub.artifacts import pop_push_arguments, push_folder
    from toolweaver_hf.serving import save_inference_code

    set_seed(training_args.seed)
    catalog = ToolCatalog.from_pretrained(args.codes_dir, repo_type="model")
    checkpoint = training_args.resume_from_checkpoint
    if checkpoint and str(checkpoint).lower() in ("true", "last"):
        checkpoint = last_checkpoint(training_args.output_dir)  # None where there is none yet: from the start
    if checkpoint:
        check_codes(checkpoint, ToolCodes.from_pretrained(args.codes_dir), args.codes_dir)
    model, tokenizer = load_model_and_tokenizer(args, training_args, model_args, catalog)
    # Both are taken into account; the trainer would do so once more
    training_args.chat_template_path = training_args.model_init_kwargs = None

    if training_args.activation_checkpointing and not model.supports_gradient_checkpointing:
        get_logger(__name__).warning(f"{type(model).__name__} keeps all activations: it cannot compute them again")
        training_args.activation_checkpointing = False

    padded = not (training_args.packing or training_args.padding_free)
    shared_prompts = padded and can_share_prompts(model)
    train_dataset, asked = load_rows(
        args,
        catalog,
        tokenizer,
        training_args.max_length,
        training_args.seed,
        shared_prompts=shared_prompts,
        eos_token_id=model.generation_config.eos_token_id,
    )
    text_expert = None
    if args.guided and training_args.process_index == 0:  # which alone saves it
        text_expert = load_text_expert(args, catalog, model_args, asked, training_args.seed)
    eval_queries = load_eval_queries(args, training_args.seed)
    eval_dataset = None
    if eval_queries:
        rows = retrieval_rows(eval_queries, tokenizer)
        eval_dataset, _ = tokenize_rows(rows, tokenizer, eos_token_id=model.generation_config.eos_token_id)
    if not training_args.packing:
        training_args.max_length = None  # no row is longer, so none is to be cut

    check_writable(training_args.output_dir)

    # With LoRA, the rows of the code tokens are trained beside the adapters, and no other embedding
    peft_config = None if isinstance(model, PeftModel) else get_peft_config(model_args)
    if isinstance(peft_config, LoraConfig):
        peft_config.trainable_token_indices = trainable_code_rows(model, tokenizer)
        if peft_config.target_modules is None and peft_config.target_parameters is None:
            peft_config.target_modules = linear_layers(model)
        peft_config.revision = model.adapter_base["revision"]

    push_arguments = pop_push_arguments(training_args)
    trainer = AlignmentTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        eval_queries=eval_queries,
        compute_retrieval_metrics=ranking_metrics,
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    if args.early_stopping_patience is not None:
        trainer.add_callback(EarlyStoppingCallback(args.early_stopping_patience))
    check_disk_space(training_args.output_dir, size_on_disk(trainer.model, training_args))
    trainer.train(resume_from_checkpoint=checkpoint)

    # The folder holds all that retrieval and the agent need
    trainer.save_model(training_args.output_dir)
    if trainer.is_world_process_zero():
        tokenizer.save_pretrained(training_args.output_dir)
        save_inference_code(training_args.output_dir)
        catalog.save_pretrained(training_args.output_dir)
        bits = 4 if model_args.load_in_4bit else 8 if model_args.load_in_8bit else None
        record_training(
            trainer,
            model_args.model_name_or_path,
            stages=args.stages,
            base_revision=getattr(model, "adapter_base", {}).get("revision"),
            base_bits=bits,
        )
        # Trainer pickles its arguments beside the model; nothing here reads them, and nobody should load a pickle.
        Path(training_args.output_dir, TRAINING_ARGS_NAME).unlink(missing_ok=True)
        if text_expert is not None:
            text_expert.save_pretrained(training_args.output_dir)
    known = {text for text, _ in asked}  # queries that are known by heart tell nothing of how far to trust what
    held_out = [query for query in eval_queries if query.text not in known]
    if text_expert is not None and held_out:
        fit_text_expert(text_expert, trainer, held_out)
    trainer.accelerator.print(f"Aligned model saved in {training_args.output_dir}")
    if push_arguments and trainer.is_world_process_zero():
        push_folder(training_args.output_dir, **push_arguments)


def training_arguments() -> tuple[type, ...]:
    """Import the dataclasses of the arguments beside the recipe's own."""
    from trl import ModelConfig

    from toolweaver_hf.alignment.trainer import AlignmentTrainingArguments

    return AlignmentTrainingArguments, ModelConfig


def cli(argv: list[str] | None = None) -> None:
    main(*parse_arguments(argv, AlignmentArguments, training_arguments))


if __name__ == "__main__":
    run_command(cli)
