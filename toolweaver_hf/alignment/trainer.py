"""`AlignmentTrainer`: TRL's `SFTTrainer` for models that write codes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftModel
from peft.utils import TrainableTokensWrapper
from torch.nn.functional import cross_entropy, linear, pad
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ..adapter import BASE_MODEL_FILE, BASE_MODEL_VERSION, keep_embedding
from ..cache import can_share_prompts, can_use_cache
from ..data.queries import Query
from ..files import write_json
from ..retrieval import ToolRetriever
from ..text_expert import fast_dtype
from .checkpoints import load_weights
from .lora import check_shared_weights


CODE_START_WEIGHT = 8.0
"""What the first token of a code counts for in a trajectory's loss: it alone among some fifty tokens of a turn decides
that a tool is called, and it is spread over as many tokens as the first codebook has codes."""
MAX_PACKED_LENGTH = 384
"""How many tokens training rows side by side have, roughly: with more, attention among them costs what they share."""
# What SFTConfig says of data that is not tokenized yet
IGNORED_ARGUMENTS = ("dataset_text_field", "completion_only_loss", "assistant_only_loss", "eos_token")


@dataclass
class AlignmentTrainingArguments(SFTConfig):
    """[`SFTConfig`] that selects the best checkpoint by retrieval, and computes in bf16 where the device is fast at it.

    Args:
        embedding_learning_rate (`float`, *optional*):
            The peak learning rate of the embeddings and the output head, or of LoRA's rows of the code tokens.
            Defaults to `learning_rate`.
        constrained_loss (`bool`, *optional*, defaults to `True`):
            Whether the loss of a code's tokens is the cross-entropy among those that constrained decoding leaves, and
            the first token of a code in a trajectory counts for eight. With `False` it is that over the whole
            vocabulary, as ToolGen and the paper train.
    """

    embedding_learning_rate: float | None = field(
        default=None, metadata={"help": "The peak learning rate of the embeddings, where it is one of their own."}
    )
    constrained_loss: bool = field(
        default=True, metadata={"help": "Whether a code's tokens compete with those alone that go on to a tool."}
    )
    train_sampling_strategy: str = field(
        default="group_by_length",
        metadata={
            "help": "Sampler for training: rows of like length share a batch, so that little of it is padding.",
            "choices": ["random", "sequential", "group_by_length", "batch_rebalance"],
        },
    )
    activation_checkpointing: bool | None = field(
        default=True, metadata={"help": "Whether to compute activations again to save memory."}
    )

    def __post_init__(self):
        if not torch.accelerator.is_available():
            self.use_cpu = True
            self.dataloader_pin_memory = False
        if self.bf16 is None:
            self.bf16 = not self.fp16 and fast_dtype() == torch.bfloat16
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "nDCG@1"
        if self.packing and self.packing_strategy == "wrapped":
            raise ValueError("packing_strategy 'wrapped' cuts rows, and the codes in them; take 'bfd'")
        if self.constrained_loss and (self.loss_type != "nll" or self.label_smoothing_factor):
            raise ValueError(
                "--loss_type and --label_smoothing_factor change a loss over the whole vocabulary, and the constrained "
                "loss is another one; leave them out, or give --constrained_loss false"
            )
        ignored = [
            name for name in IGNORED_ARGUMENTS if getattr(self, name) != SFTConfig.__dataclass_fields__[name].default
        ]
        if ignored:
            raise ValueError(
                f"these arguments prepare TRL's data sets, and rows are tokenized already: {', '.join(ignored)}"
            )
        super().__post_init__()


@dataclass
class SharedPromptCollator(DataCollatorForLanguageModeling):
    """Puts rows side by side in rows that hold what all of them begin with once, such as the system's message.

    So this is computed once, and little is padding; loss and gradient stay the same. Answers of one prompt (see
    [`~alignment.rows.share_prompts`]) see it and themselves alone, and rows see no other row.

    The batch has `position_ids` of shape `(batch_size, length)`, which go on from what is shared in every row and answer,
    and a boolean `attention_mask` of shape `(batch_size, 1, length, length)`, `True` where a token sees another.

    Args:
        max_packed_length (`int`, *optional*, defaults to 0):
            How many tokens rows side by side may have, roughly: the more, the more attention is computed in vain. With
            0 every row stays alone.
    """

    max_packed_length: int = 0

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        lengths = [example.pop("seq_lengths", None) or [len(example["input_ids"])] for example in examples]
        prefix = self._shared_length(examples, lengths)
        sizes = [len(example["input_ids"]) - prefix for example in examples]
        fewest = math.ceil(sum(sizes) / max(self.max_packed_length - prefix, 1))
        packs: list[list[int]] = [[] for _ in range(min(fewest, len(examples)))]
        filled = [0] * len(packs)
        for i in sorted(range(len(examples)), key=lambda i: -sizes[i]):  # the longest first, so that all get as many
            pack = filled.index(min(filled))
            packs[pack].append(i)
            filled[pack] += sizes[i]
        if len(packs) * (prefix + max(filled)) >= len(examples) * (prefix + max(sizes)):
            prefix, packs = 0, [[i] for i in range(len(examples))]
            if all(len(parts) == 1 for parts in lengths):
                return super().torch_call(examples)

        rows, marks = [], []  # of each token: its row, its part of the row, its position; row -1 is seen by all
        for pack in packs:
            first = examples[pack[0]]
            row = {name: list(first[name][:prefix]) for name in ("input_ids", "labels")}
            mark = [(-1, 0, position) for position in range(prefix)]
            for i in pack:
                prompt, *answers = lengths[i]
                row["input_ids"] += examples[i]["input_ids"][prefix:]
                row["labels"] += [-100, *examples[i]["labels"][prefix + 1 :]]  # nothing is predicted from another row
                mark += [(i, 0, position) for position in range(prefix, prompt)]
                for part, length in enumerate(answers, start=1):
                    mark += [(i, part, position) for position in range(prompt, prompt + length)]
            rows.append(row)
            marks.append(mark)
        batch = super().torch_call(rows)
        width = batch["input_ids"].shape[1]
        table = torch.tensor([mark + [(-2, 0, 0)] * (width - len(mark)) for mark in marks])
        row, part, positions = table.unbind(2)
        same_row, same_part = (value[:, None] == value[:, :, None] for value in (row, part))
        seen = ((row[:, None] == -1) | same_row & ((part[:, None] == 0) | same_part)).tril()
        padding = row == -2
        seen[padding] = False
        seen[:, :, 0] |= padding  # it has to see something, or its attention is NaN
        return batch | {"attention_mask": seen[:, None], "position_ids": positions}

    def _shared_length(self, examples: list[dict[str, Any]], lengths: list[list[int]]) -> int:
        """How many tokens all rows begin with, before the one that the first label is predicted from."""
        ends = [
            min(parts[0] - 1, next(i for i, label in enumerate([*example["labels"], 0]) if label != -100) - 1)
            for example, parts in zip(examples, lengths, strict=True)
        ]
        alike = zip(
            *(example["input_ids"][: max(end, 0)] for example, end in zip(examples, ends, strict=True)), strict=False
        )
        return sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, alike))


def _as_text(token_ids: Sequence[int]) -> str:
    """Write token ids as a text in which a part is found as it is in a list."""
    return f" {' '.join(map(str, token_ids))} "


class ShuffledBatchSampler(Sampler[int]):
    """Shuffles the batches of a [`LengthGroupedSampler`], and draws from a seed, which differs by epoch.

    By itself it sorts each quarter of an epoch by length. Where the length tells what is to be learned, as whether a
    trajectory has a second call, a model would end with what the shortest rows teach. It also draws from PyTorch's
    global generator: a resumed run has that in another state, and so would repeat some rows of the epoch and leave out
    others; so have processes whose dropout drew differently many numbers.

    Args:
        sampler ([`LengthGroupedSampler`]): The sampler.
        batch_size (`int`): How many rows a training step takes, on all processes.
        seed (`Callable`): Returns the seed of the epoch.
    """

    def __init__(self, sampler: LengthGroupedSampler, batch_size: int, seed: Callable[[], int]):
        self.sampler, self.batch_size, self.seed = sampler, batch_size, seed

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        generator = self.sampler.generator = torch.Generator().manual_seed(self.seed())
        order, size = list(self.sampler), self.batch_size
        whole = len(order) // size
        # The longest rows stay first, so that memory runs out at once or never; a batch that is not full stays last.
        batches = [0, *(1 + torch.randperm(max(whole - 1, 0), generator=generator)).tolist(), whole]
        return chain.from_iterable(order[i * size : (i + 1) * size] for i in dict.fromkeys(batches))


class AlignmentTrainer(SFTTrainer):
    """
    [`SFTTrainer`] for rows of `id`, `input_ids` and `labels`, as [`~alignment.rows.tokenize_rows`] makes them.

    The loss of a token is the cross-entropy among those that constrained decoding leaves to choose from: inside a code
    the ones that go on to a tool, and all of the vocabulary in free text. An answer that is codes and nothing else, as
    retrieval gives it, is a code from its first token on, and behind a code goes on with another one or ends. So nothing
    is spent on telling codes from text or tools from codes that none has, which decoding knows, and rows of the
    vocabulary that cannot be chosen do not move. In a trajectory the first token of a code, which decides that a tool
    is called, counts for eight.
    (With `constrained_loss=False` it is the cross-entropy over the whole vocabulary everywhere.) Rows of the embeddings
    beyond the tokenizer's tokens are in no loss. A mixture of experts adds its auxiliary loss.

    It measures retrieval while it trains, stops at a loss that is not finite with the ids of the rows that gave it,
    and saves of a LoRA model the adapter alone.

    Args:
        eval_queries (`Sequence[Query]`, *optional*):
            Queries to retrieve tools for in every evaluation, by constrained beam search.
        compute_retrieval_metrics (`Callable`, *optional*):
            Given these queries and their rankings, returns measures for the log, such as
            [`~evaluation.rankings.ranking_metrics`]. Needed with `eval_queries`.
        kwargs:
            As for [`SFTTrainer`].
    """

    def __init__(
        self,
        *args,
        eval_queries: Sequence[Query] | None = None,
        compute_retrieval_metrics: Callable[..., dict[str, float]] | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        if isinstance(self.model, PeftModel):
            check_shared_weights(self.model)
            keep_embedding(self.model)
        self.eval_queries = list(eval_queries or ())
        self.compute_retrieval_metrics = compute_retrieval_metrics
        self.trie = self.processing_class.trie.to(self.args.device)
        ends = self.processing_class.end_token_ids(self.model.generation_config.eos_token_id)
        self._end_ids = torch.tensor(ends, device=self.args.device)
        self._answer_ids = torch.tensor([*self.processing_class.code_token_ids, *ends], device=self.args.device)
        self._answer_place = torch.zeros(len(self.processing_class), dtype=torch.long, device=self.args.device)
        self._answer_place[self._answer_ids] = torch.arange(len(self._answer_ids), device=self.args.device)
        # No process holds the whole of a sharded model, and bitsandbytes rounds on a CPU what was called to predict.
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if not (sharded or getattr(self.model, "is_quantized", False)):
            can_use_cache(self.model.eval())  # refuses what is no causal language model, before it is trained
        if not self.padding_free:
            # Not by the padding token: at its row of zeros the gradient of an untrained Gemma 3n is infinite.
            padding = {"pad_token_id": self.processing_class.code_token_ids[0]}
            self.data_collator = SharedPromptCollator(**(vars(self.data_collator) | padding))
            if can_share_prompts(self.accelerator.unwrap_model(self.model)):
                self.train_collator = replace(self.data_collator, max_packed_length=MAX_PACKED_LENGTH)
        if isinstance(self.model, PeftModel):
            # The code tokens' rows are in the adapter; PEFT would add the whole matrix, since it has grown.
            self.model.save_pretrained = partial(self.model.save_pretrained, save_embedding_layers=False)
            for name, weight in self.model.named_parameters():
                if weight.requires_grad and "trainable_tokens" in name:
                    weight.data = weight.data.float()  # TRL rounds all that is trained beside a quantized base
            # TRL's loss on a GPU reads it, and PEFT's wrapper of a head with trained rows does not pass it on.
            head = self.model.get_output_embeddings()
            if isinstance(head, TrainableTokensWrapper):
                head.__dict__["bias"] = head.token_adapter.get_base_layer().bias

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if isinstance(self.model, PeftModel) and hasattr(self.model.get_base_model(), "adapter_base"):
            file = Path(output_dir or self.args.output_dir, BASE_MODEL_FILE)
            write_json(file, self.model.get_base_model().adapter_base, BASE_MODEL_VERSION)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int] | None:
        sampler = super()._get_train_sampler(train_dataset)
        if not isinstance(sampler, LengthGroupedSampler):
            return sampler
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        step = sampler.batch_size * self.args.world_size
        return ShuffledBatchSampler(sampler, step, lambda: seed + int(self.state.epoch or 0))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        model = self.model if model is None else model
        if isinstance(model, PeftModel) or self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_weights(model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if isinstance(self.model, PeftModel) or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            load_weights(self.model, self.state.best_model_checkpoint)

    def get_train_dataloader(self):
        """Return the rows of training side by side; an evaluation counts its rows."""
        one_by_one, self.data_collator = self.data_collator, getattr(self, "train_collator", self.data_collator)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = one_by_one

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        learning_rate = self.args.embedding_learning_rate
        if learning_rate is not None:
            whole = self.accelerator.unwrap_model(self.model if model is None else model)
            modules = (whole.get_input_embeddings(), whole.get_output_embeddings())
            embeddings = {id(weight) for module in modules for weight in module.parameters()}
            for group in list(optimizer.param_groups):
                moved = [weight for weight in group["params"] if id(weight) in embeddings]
                if moved:
                    group["params"] = [weight for weight in group["params"] if id(weight) not in embeddings]
                    optimizer.add_param_group({**group, "params": moved, "lr": learning_rate})
            optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        tokens = self._total_train_tokens
        if self.args.loss_type != "nll" or self.args.label_smoothing_factor:
            outputs = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # TRL's own losses
            loss = outputs[0] if return_outputs else outputs
        else:
            loss = outputs = self._constrained_loss(model, inputs, num_items_in_batch)
            if return_outputs:  # in evaluation, where measures of one's own alone need the logits
                outputs = (loss, {} if self.compute_metrics is None else model(**inputs, use_cache=False))
        if model.training:
            self._total_train_tokens = tokens + self._count_tokens(inputs)
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        if not torch.isfinite(loss):
            raise ValueError(
                f"the loss became {loss.item()} in step {self.state.global_step + 1}, on the rows "
                f"{', '.join(self._row_ids(inputs))}; lower the learning rate, or look at these rows"
            )
        return outputs

    def _constrained_loss(self, model, inputs: dict[str, Any], num_items_in_batch) -> torch.Tensor:
        """The loss among what decoding leaves, by way of the output embeddings of the tokens with a label alone."""
        labels = inputs["labels"]
        keep = labels[:, 1:] != -100
        nodes, may_end = self._decoding_nodes(labels)
        nodes, may_end, labels = nodes[:, 1:][keep], may_end[:, 1:][keep], labels[:, 1:][keep]
        head = self.accelerator.unwrap_model(model).get_output_embeddings()
        free, bound = nodes < 0, nodes >= 0
        codes_alone = not free.any() and type(head) is torch.nn.Linear and "forward" not in vars(head)
        if codes_alone:  # the rows of the code tokens and the ends are all that is looked at
            bias = None if head.bias is None else head.bias[self._answer_ids]
            head.forward = lambda hidden: linear(hidden, head.weight[self._answer_ids], bias)
        hook = head.register_forward_pre_hook(lambda module, args: (args[0][:, :-1][keep],))
        try:
            others = {name: value for name, value in inputs.items() if name != "labels"}
            if self.aux_loss_enabled:
                others["output_router_logits"] = True
            output = model(**others, use_cache=False)
        finally:
            hook.remove()
            if codes_alone:
                del head.forward
        logits = output.logits
        tokens, present = self.trie.children(nodes[bound], max(self.trie.max_children))
        tokens = torch.cat([tokens, self._end_ids.expand(len(tokens), -1)], dim=1)
        present = torch.cat([present, may_end[bound, None].expand(-1, len(self._end_ids))], dim=1)
        columns = self._answer_place[tokens] if codes_alone else tokens
        choices = logits[bound].gather(1, torch.where(present, columns, 0)).float()
        choices = choices.masked_fill(~present, -torch.inf)
        place = ((tokens == labels[bound, None]) & present).int().argmax(1)
        loss = cross_entropy(choices, place, reduction="sum")
        logits = logits[:, : len(self.processing_class)]  # the rest is padding of the matrix
        told = cross_entropy(logits[free].float(), labels[free], reduction="none")
        begin, size = self.processing_class.level_offsets[0], self.processing_class.codebook_sizes[0]
        begins = self.args.constrained_loss & (labels[free] >= begin) & (labels[free] < begin + size)
        loss = loss + (told * torch.where(begins, CODE_START_WEIGHT, 1.0)).sum()
        if num_items_in_batch is None:
            loss = loss / keep.sum().clamp(min=1)
        else:
            if self.args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes  # the processes' gradients are averaged
            loss = loss / num_items_in_batch
        # Of a mixture of experts, which balances their load; one of each batch
        if self.aux_loss_enabled and output.aux_loss is not None:
            mode = "train" if model.training else "eval"
            self._metrics[mode]["aux_loss"].append(self.accelerator.gather(output.aux_loss.detach()).mean().item())
            batches = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
            loss = loss + self.router_aux_loss_coef * output.aux_loss / batches
        return loss

    def _decoding_nodes(self, labels: torch.LongTensor) -> tuple[torch.LongTensor, torch.BoolTensor]:
        """Find where in the trie decoding stands before each label, -1 where any token may follow; and where, in an
        answer of codes alone, the answer may end in place of another code."""
        trie, levels = self.trie, self.trie.num_levels
        nodes = torch.full_like(labels, -1)
        if not self.args.constrained_loss:
            return nodes, nodes >= 0
        reached = trie.step(torch.zeros_like(labels), labels)
        begins = reached >= 0
        codes = begins
        for _ in range(levels - 1):
            before = pad(reached, (1, 0), value=-1)[:, :-1]
            reached = trie.step(before, labels)
            nodes = torch.where(reached >= 0, before, nodes)
            codes = codes | (reached >= 0)
        learned = labels != -100
        ends = torch.isin(labels, self._end_ids)
        first = learned & ~pad(learned, (1, 0))[:, :-1]
        turns = first.cumsum(1)
        text = pad(torch.zeros_like(turns), (0, 1)).scatter_add(1, turns, (learned & ~codes & ~ends).long())
        between = learned & (text.gather(1, turns) == 0) & (begins | ends & ~first)
        nodes[between] = 0
        return nodes, between & ~first

    def _count_tokens(self, inputs: dict[str, Any]) -> int:
        """Count the tokens of a batch on all processes. TRL takes every entry of a mask for one."""
        if "attention_mask" not in inputs:
            count = torch.tensor(inputs["input_ids"].shape[1], device=self.args.device)  # padding-free
        elif inputs["attention_mask"].ndim == 4:
            count = inputs["attention_mask"].diagonal(dim1=2, dim2=3).sum()
        else:
            count = inputs["attention_mask"].sum()
        return self.accelerator.gather_for_metrics(count).sum().item()

    def _row_ids(self, inputs: dict[str, Any]) -> list[str]:
        """Find the ids of the rows that a batch was made of."""
        dataset = self.train_dataset if self.model.training else self.eval_dataset
        mask = inputs.get("attention_mask")
        found = []
        for row, tokens in enumerate(inputs["input_ids"].tolist()):
            shared = length = (
                len(tokens) if mask is None else int((mask[row, 0].diagonal() if mask.ndim == 4 else mask[row]).sum())
            )
            if mask is not None and mask.ndim == 4:  # how many tokens all that follow see
                seen = mask[row, 0, :length, :length].sum(0)
                shared = int((seen == torch.arange(length, 0, -1, device=seen.device)).cumprod(0).sum())
            text = _as_text(tokens[shared:length])
            found += [
                example["id"]
                for example in dataset
                if "id" in example
                and example["input_ids"][:shared] == tokens[:shared]
                and (
                    _as_text(example["input_ids"][shared:]) in text
                    if shared < length
                    else len(example["input_ids"]) == length
                )
            ]
        return found or [self.processing_class.decode(row)[:80] for row in inputs["input_ids"]]

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.eval_queries:
            measured = self._measure_retrieval()
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in measured.items()})
        return output

    def _measure_retrieval(self) -> dict[str, float]:
        # The whole head: where the model is sharded or PEFT wraps it, no part of it can be called alone
        retriever = ToolRetriever(self.model, self.processing_class, full_head=True)
        numbers = list(range(len(self.eval_queries)))
        # Padding gives every process as many queries, so that a sharded model is called by all alike.
        with self.accelerator.split_between_processes(numbers, apply_padding=True) as mine:
            rankings = retriever(
                [self.eval_queries[i].text for i in mine], batch_size=self.args.per_device_eval_batch_size
            )
        found = dict(gather_object(list(zip(mine, rankings, strict=True))))
        return self.compute_retrieval_metrics(self.eval_queries, [found[i] for i in numbers])
