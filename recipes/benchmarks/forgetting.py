"""Measure what alignment costs a language model: perplexity on plain text before and after (ToolWeaver, table 3).

```bash
python recipes/benchmarks/forgetting.py --model HuggingFaceTB/SmolLM2-135M-Instruct --codes_dir out/codes \
    --queries queries.train.jsonl --replay chats.jsonl --text english.txt --max_steps 100 --output_dir out/forgetting
```

Codes and atomic tokens (ToolGen) are measured in the same way: first with untrained new embeddings, for each
initialization; then after a short alignment, once of LoRA adapters and the new embeddings with replay, once of all
weights without. The text must not be among the training data. With `--lm_eval_tasks` and lm-eval installed, few-shot
accuracy is measured as well. Run the same command again to resume an interrupted run.
"""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from toolweaver_hf.cli import parse_arguments, run_command
from toolweaver_hf.recipes import sft


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


RESULTS_FILE = "benchmark_forgetting.json"
RESULTS_VERSION = 1  # its schema_version
INITIALIZATIONS = {
    "codes": ("codebook", "mean_description", "random"),
    "atomic tokens": ("mean_description", "random"),
}


@dataclass
class ForgettingArguments:
    """What to measure.

    Args:
        model (`str`):
            The base model.
        codes_dir (`str`):
            Output folder of `recipes/tokenize_tools.py`.
        queries (`str`):
            Training queries.
        text (`str`):
            File of plain text to measure the perplexity on.
        replay (`str`):
            General conversations, of other texts than `text`.
        output_dir (`str`):
            Folder for the trained models and `benchmark_forgetting.json`.
        qrels (`str`, *optional*):
            The relevance file of BEIR queries.
        num_tokens (`int`, *optional*, defaults to 65536):
            Tokens of the text to measure on, from its beginning.
        window (`int`, *optional*, defaults to 512):
            Tokens that the model sees at once.
        max_steps (`int`, *optional*, defaults to 200):
            Training steps of each run.
        batch_size (`int`, *optional*, defaults to 16):
            Rows of a step.
        learning_rate (`float`, *optional*, defaults to 5e-4):
            Peak learning rate of each run.
        replay_weight (`float`, *optional*, defaults to 1):
            How often the replayed rows are seen in an epoch.
        lm_eval_tasks (`list[str]`, *optional*):
            Tasks of lm-eval, such as `hellaswag`.
        num_fewshot (`int`, *optional*, defaults to 5):
            Examples before each of their questions.
        lm_eval_limit (`int`, *optional*):
            Only the first so many questions of a task.
        bf16 (`bool`, *optional*, defaults to `False`):
            Whether to train in bf16; perplexity is measured in fp32.
        seed (`int`, *optional*, defaults to 0):
            Seed of the training.
    """

    model: str = field(metadata={"help": "The base model."})
    codes_dir: str = field(metadata={"help": "Output folder of recipes/tokenize_tools.py."})
    queries: str = field(metadata={"help": "Training queries (JSONL)."})
    text: str = field(metadata={"help": "File of plain text."})
    replay: str = field(metadata={"help": "General conversations (JSONL)."})
    output_dir: str = field(metadata={"help": "Folder for the models and the results."})
    qrels: str | None = field(default=None, metadata={"help": "Relevance file (TSV) of BEIR queries."})
    num_tokens: int = field(default=65536, metadata={"help": "Tokens of the text to measure on."})
    window: int = field(default=512, metadata={"help": "Tokens that the model sees at once."})
    max_steps: int = field(default=200, metadata={"help": "Training steps of each run."})
    batch_size: int = field(default=16, metadata={"help": "Rows of a step."})
    learning_rate: float = field(default=5e-4, metadata={"help": "Peak learning rate of each run."})
    replay_weight: float = field(default=1.0, metadata={"help": "How often replayed rows are seen in an epoch."})
    lm_eval_tasks: list[str] | None = field(default=None, metadata={"help": "Tasks of lm-eval."})
    num_fewshot: int = field(default=5, metadata={"help": "Examples before each of their questions."})
    lm_eval_limit: int | None = field(default=None, metadata={"help": "Only the first so many questions of a task."})
    bf16: bool = field(default=False, metadata={"help": "Whether to train in bf16."})
    seed: int = field(default=0, metadata={"help": "Seed of the training."})


def load_windows(args: ForgettingArguments) -> torch.Tensor:
    """Tokenize the text and cut it into rows of `window` tokens."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = Path(args.text).read_text(encoding="utf-8")[: 16 * args.num_tokens]  # a token has far fewer characters
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][: args.num_tokens]
    if len(ids) < args.window:
        raise ValueError(f"{args.text} has {len(ids)} tokens, fewer than the {args.window} of one window")
    return torch.tensor(ids[: len(ids) // args.window * args.window]).view(-1, args.window)


def perplexity(model: PreTrainedModel, windows: torch.Tensor) -> float:
    """Compute the perplexity of a text over the model's whole vocabulary, new tokens and all.

    Args:
        model ([`PreTrainedModel`]): The model.
        windows (`torch.LongTensor` of shape `(num_windows, window)`): The text; the first token of each is given.
    """
    import torch
    from torch.nn.functional import cross_entropy

    model.eval()
    total = 0.0
    with torch.inference_mode():
        for window in windows.to(model.device):
            logits = model(input_ids=window[None], use_cache=False).logits[0, :-1].float()
            total += cross_entropy(logits, window[1:], reduction="sum").item()
    return math.exp(total / (len(windows) * (windows.shape[1] - 1)))


def few_shot(model: PreTrainedModel, tokenizer, args: ForgettingArguments) -> dict[str, float]:
    """Return the accuracy on each of lm-eval's tasks."""
    if not args.lm_eval_tasks:
        return {}
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        raise ImportError("--lm_eval_tasks needs lm-eval: pip install lm-eval") from None
    evaluated = simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=args.batch_size),
        tasks=args.lm_eval_tasks,
        num_fewshot=args.num_fewshot,
        limit=args.lm_eval_limit,
        bootstrap_iters=0,
    )
    return {task: measured["acc,none"] for task, measured in evaluated["results"].items()}


def align(args: ForgettingArguments, codes_dir: Path, embedding_init: str, with_care: bool, output_dir: Path) -> None:
    """Align the model: adapters and new rows with replay, or all weights without it."""
    from trl import ModelConfig

    from toolweaver_hf.alignment.trainer import AlignmentTrainingArguments

    stages = ["retrieval", "replay"] if with_care else ["retrieval"]
    sft.main(
        sft.AlignmentArguments(
            codes_dir=str(codes_dir),
            stages=stages,
            stage_weights=[1.0, args.replay_weight][: len(stages)],
            queries=args.queries,
            qrels=args.qrels,
            replay=args.replay,
            embedding_init=embedding_init,
        ),
        AlignmentTrainingArguments(
            output_dir=str(output_dir),
            max_steps=args.max_steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            train_sampling_strategy="group_by_length",
            max_length=args.window,
            activation_checkpointing=False,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            bf16=args.bf16,
            seed=args.seed,
        ),
        ModelConfig(model_name_or_path=args.model, use_peft=with_care, lora_r=32, lora_alpha=64),
    )


def main(args: ForgettingArguments) -> dict[str, dict[str, float]]:
    """Measure the base model and each variant, print a table, and return the measures by row."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from toolweaver_hf.alignment.embedding_init import initialize_code_embeddings
    from toolweaver_hf.alignment.record import TRAINING_FILE, TRAINING_VERSION
    from toolweaver_hf.codes.tool_codes import ToolCodes
    from toolweaver_hf.data.catalog import ToolCatalog
    from toolweaver_hf.evaluation.baselines import atomic_codes
    from toolweaver_hf.evaluation.runs import describe_run
    from toolweaver_hf.files import read_json, write_json
    from toolweaver_hf.loading import load_aligned_model
    from toolweaver_hf.modeling_rqvae import RQVAEModel
    from toolweaver_hf.tokenization_toolweaver import ToolWeaverTokenizer

    windows = load_windows(args)
    output = Path(args.output_dir)
    catalog = ToolCatalog.from_pretrained(args.codes_dir, repo_type="model")
    folders = {"codes": Path(args.codes_dir), "atomic tokens": output / "atomic"}
    atomic_codes(catalog).save_pretrained(folders["atomic tokens"])
    catalog.save_pretrained(folders["atomic tokens"])

    path = output / RESULTS_FILE
    config = asdict(args)
    done = read_json(path, RESULTS_VERSION) if path.exists() else {}
    resumed = done.get("config") == config
    results: dict[str, dict[str, float]] = done["results"] if resumed else {}

    loading = {"dtype": torch.float32, "device_map": "auto"}
    base = AutoModelForCausalLM.from_pretrained(args.model, **loading)
    num_rows = base.get_input_embeddings().num_embeddings
    base_tokenizer = AutoTokenizer.from_pretrained(args.model)

    def measure(name: str, model: PreTrainedModel, tokenizer, **others: float) -> None:
        value = perplexity(model, windows)
        ratio = value / results["base"]["perplexity"] if results else 1.0
        results[name] = {"perplexity": value, "of the base": ratio, **few_shot(model, tokenizer, args), **others}
        print(f"{name}: " + ", ".join(f"{key} {value:.3f}" for key, value in results[name].items()), flush=True)
        document = {**describe_run(config), "tokens": windows.numel(), "results": results}
        write_json(path, document, RESULTS_VERSION)

    if "base" not in results:
        measure("base", base, base_tokenizer)
    for identifiers, folder in folders.items():
        tokenizer = ToolWeaverTokenizer.from_base(base_tokenizer, ToolCodes.from_pretrained(folder))
        codebooks = RQVAEModel.from_pretrained(folder).codebooks() if identifiers == "codes" else None
        for method in INITIALIZATIONS[identifiers]:
            name = f"{identifiers}, untrained rows ({method})"
            if name not in results:
                initialize_code_embeddings(base, tokenizer, codebooks, method, catalog, args.seed)
                measure(name, base, tokenizer)
        base.resize_token_embeddings(num_rows)
    del base

    for with_care, regime in ((True, "LoRA, new rows, replay"), (False, "all weights, no replay")):
        for identifiers, folder in folders.items():
            name = f"{identifiers}, {regime}"
            trained = output / f"{identifiers} {'lora' if with_care else 'full'}".replace(" ", "-")
            if name in results:
                continue
            if not (resumed and (trained / TRAINING_FILE).exists()):
                align(args, folder, INITIALIZATIONS[identifiers][0], with_care, trained)
            loss = read_json(trained / TRAINING_FILE, TRAINING_VERSION)["runs"][-1]["training_loss"]
            tokenizer = ToolWeaverTokenizer.from_pretrained(trained)
            measure(name, load_aligned_model(trained, **loading), tokenizer, **{"training loss": loss})

    columns = list(dict.fromkeys(column for row in results.values() for column in row))
    print(f"\n{windows.numel():,} tokens of {os.path.basename(args.text)}\n\n| | {' | '.join(columns)} |")
    print("|---|" + "---:|" * len(columns))
    for name, row in results.items():
        print(f"| {name} | {' | '.join(f'{row[c]:.3f}' if c in row else '' for c in columns)} |")
    return results


def cli(argv: list[str] | None = None) -> None:
    main(*parse_arguments(argv, ForgettingArguments))


if __name__ == "__main__":
    run_command(cli)
