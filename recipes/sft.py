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

import os
import random
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate.logging import get_logger
from datasets import concatenate_datasets
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.trainer import TRAINING_ARGS_NAME
from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser, get_peft_config

from toolweaver_hf.catalog import ToolCatalog
from toolweaver_hf.cli import run
from toolweaver_hf.codes import ToolCodes
from toolweaver_hf.data import (
    leave_out_words,
    load_queries,
    load_trajectories,
    memorization_rows,
    retrieval_rows,
    tokenize_rows,
    trajectory_rows,
)
from toolweaver_hf.embedding_init import initialize_code_embeddings
from toolweaver_hf.modeling_rqvae import RQVAEModel
from toolweaver_hf.tokenization_toolweaver import ToolWeaverTokenizer


logger = get_logger(__name__)

STAGES = ("memorization", "retrieval", "trajectory")


@dataclass
class AlignmentArguments:
    """What to align the model with.

    Args:
        codes_dir (`str`):
            Output folder of `recipes/tokenize_tools.py`: catalogue, codes and, for the embedding initialization
            `codebook`, the RQ-VAE.
        stages (`list[str]`, *optional*, defaults to `["retrieval"]`):
            Kinds of rows to train on, mixed: `memorization` (document -> code), `retrieval` (query -> code),
            `trajectory` (whole trajectories).
        queries (`str`, *optional*):
            Training queries for `retrieval`: JSONL with `id`, `text`, `tools`, or a BEIR queries file.
        qrels (`str`, *optional*):
            The relevance file of BEIR queries.
        trajectories (`str`, *optional*):
            Training trajectories for `trajectory`: JSONL with `messages`.
        embedding_init (`str`, *optional*, defaults to `"codebook"`):
            Where the embeddings of a base model's new tokens come from: `codebook`, `mean_description` or `random`.
        augmentations (`int`, *optional*, defaults to 0):
            Noisy copies of each memorization and retrieval row, with words and tokenizer merges left out at random.
            They keep a small model from learning few queries by heart.
    """

    codes_dir: str = field(metadata={"help": "Output folder of recipes/tokenize_tools.py."})
    stages: list[str] = field(
        default_factory=lambda: ["retrieval"],
        metadata={"help": "Kinds of rows to train on, mixed.", "choices": STAGES},
    )
    queries: str | None = field(default=None, metadata={"help": "Training queries (JSONL)."})
    qrels: str | None = field(default=None, metadata={"help": "Relevance file (TSV) of BEIR queries."})
    trajectories: str | None = field(default=None, metadata={"help": "Training trajectories (JSONL)."})
    embedding_init: str = field(
        default="codebook",
        metadata={
            "help": "Initialization of a base model's new tokens.",
            "choices": ["codebook", "mean_description", "random"],
        },
    )
    augmentations: int = field(default=0, metadata={"help": "Noisy copies of each memorization and retrieval row."})

    def __post_init__(self):
        if "retrieval" in self.stages and not self.queries:
            raise ValueError("the stage 'retrieval' needs --queries")
        if "trajectory" in self.stages and not self.trajectories:
            raise ValueError("the stage 'trajectory' needs --trajectories")


@dataclass
class AlignmentTrainingArguments(SFTConfig):
    """[`SFTConfig`] that leaves out on a machine without a GPU what only a GPU can do."""

    activation_checkpointing: bool | None = field(
        default=True, metadata={"help": "Whether to compute activations again to save memory."}
    )

    def __post_init__(self):
        if not torch.cuda.is_available():
            self.dataloader_pin_memory = False
            if self.bf16 is None:
                self.bf16 = False
        super().__post_init__()


class AlignmentTrainer(SFTTrainer):
    """[`SFTTrainer`] that is quick on a CPU, where TRL applies the output embeddings to tokens without a loss, too."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if inputs["input_ids"].device.type != "cpu" or return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"][:, 1:]
        columns = (labels != -100).any(0).nonzero().flatten()
        logits = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            logits_to_keep=columns,
            use_cache=False,
        ).logits
        labels = labels[:, columns]
        loss = cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
        if num_items_in_batch is None:
            return loss / (labels != -100).sum()
        return loss / num_items_in_batch * self.accelerator.num_processes  # the gradients' mean is taken over these


def load_model_and_tokenizer(
    args: AlignmentArguments,
    training_args: AlignmentTrainingArguments,
    model_args: ModelConfig,
    catalog: ToolCatalog,
):
    """Load an aligned model as it is; give a base model the code tokens and their embeddings."""
    codes = ToolCodes.from_pretrained(args.codes_dir)
    model = AutoModelForCausalLM.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        dtype=model_args.dtype,
        attn_implementation=model_args.attn_implementation,
        trust_remote_code=training_args.trust_remote_code,
    )
    if os.path.exists(os.path.join(model_args.model_name_or_path, "tool_codes.json")):
        tokenizer = ToolWeaverTokenizer.from_pretrained(model_args.model_name_or_path)
        if tokenizer.tool_codes != {tool_id: codes[tool_id] for tool_id in codes.ids}:
            raise ValueError(
                f"{model_args.model_name_or_path} was aligned with other codes than those in {args.codes_dir}; give "
                "the folder of its codes, or start from the base model"
            )
        return model, tokenizer
    base = AutoTokenizer.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        trust_remote_code=training_args.trust_remote_code,
    )
    tokenizer = ToolWeaverTokenizer.from_base(base, codes)
    # Codes of another origin than the RQ-VAE, such as one token a tool, have no codebook to start from.
    codebooks = RQVAEModel.from_pretrained(args.codes_dir).codebooks() if args.embedding_init == "codebook" else None
    initialize_code_embeddings(
        model, tokenizer, codebooks, method=args.embedding_init, catalog=catalog, seed=training_args.seed
    )
    return model, tokenizer


def main(args: AlignmentArguments, training_args: AlignmentTrainingArguments, model_args: ModelConfig) -> None:
    """Align a model and save it with its tokenizer and catalogue in `training_args.output_dir`."""
    set_seed(training_args.seed)
    catalog = ToolCatalog.from_file(os.path.join(args.codes_dir, "catalog.jsonl"))
    model, tokenizer = load_model_and_tokenizer(args, training_args, model_args, catalog)

    # The rows: conversations, then tokens with the loss on the assistant's turns
    rows = []
    if "memorization" in args.stages:
        rows += memorization_rows(catalog, tokenizer)
    if "retrieval" in args.stages:
        rows += retrieval_rows(load_queries(args.queries, args.qrels), tokenizer)
    generator = random.Random(training_args.seed)
    noisy_rows = [leave_out_words(row, generator) for _ in range(args.augmentations) for row in rows]
    if "trajectory" in args.stages:
        rows += trajectory_rows(load_trajectories(args.trajectories), tokenizer)
    dataset, too_long = tokenize_rows(rows, tokenizer, training_args.max_length)
    if noisy_rows:
        noisy, _ = tokenize_rows(noisy_rows, tokenizer, training_args.max_length, bpe_dropout=0.15)
        dataset = concatenate_datasets([dataset, noisy])
    if too_long:
        logger.warning(f"{too_long} of {len(rows)} rows have more than {training_args.max_length} tokens: left out")
    if len(dataset) == 0:
        raise ValueError(f"no row to train on fits in --max_length {training_args.max_length}")

    # With LoRA, the rows of the code tokens are trained beside the adapters, and no other embedding
    peft_config = get_peft_config(model_args)
    if peft_config is not None:
        peft_config.trainable_token_indices = tokenizer.code_token_ids

    trainer = AlignmentTrainer(
        model=model, args=training_args, train_dataset=dataset, processing_class=tokenizer, peft_config=peft_config
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)

    # The folder holds all that retrieval and the agent need
    trainer.save_model(training_args.output_dir)
    if trainer.is_world_process_zero():
        tokenizer.save_pretrained(training_args.output_dir)
        catalog.to_jsonl(os.path.join(training_args.output_dir, "catalog.jsonl"))
        # Trainer pickles its arguments beside the model; nothing here reads them, and nobody should load a pickle.
        Path(training_args.output_dir, TRAINING_ARGS_NAME).unlink(missing_ok=True)
    trainer.accelerator.print(f"Aligned model saved in {training_args.output_dir}")
    if training_args.push_to_hub:
        trainer.push_to_hub()


def cli(argv: list[str] | None = None) -> None:
    main(*TrlParser((AlignmentArguments, AlignmentTrainingArguments, ModelConfig)).parse_args_and_config(argv))


if __name__ == "__main__":
    run(cli)
