"""Training of an RQ-VAE: a `Trainer` that alternates between code assignment and weight updates."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import scipy.sparse
import torch
from accelerate.utils import broadcast
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..modeling_rqvae import LOSSES, RQVAEModel
from .assignment import CHUNK_SIZE, assign_codes, check_capacity, encode_tools
from .cousage import unit_degree
from .measures import nearest_codes, reconstruction_loss
from .start import SAMPLE_SIZE, revive_codes, start_model


ASSIGNMENTS = 54  # number of code assignments, in the first nine tenths of the training
CODES_FILE = "codes.safetensors"  # the current codes, in a checkpoint


@dataclass
class RQVAETrainingArguments(TrainingArguments):
    """[`TrainingArguments`] with defaults for an RQ-VAE. `output_dir` is the folder for all results.

    Args:
        max_steps (`int`, *optional*):
            Number of training steps. Defaults to as many as there are tools, but 600 at least and 3000 at most.
        early_stopping_patience (`int`, *optional*):
            Stop after as many evaluations without fewer collisions or a better reconstruction. Evaluations are every
            `eval_steps`, or every `logging_steps` where these are not given.
    """

    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Evaluations without fewer collisions or a better reconstruction."}
    )
    learning_rate: float = field(default=1e-2, metadata={"help": "The peak learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "The learning rate's schedule."})
    max_steps: int = field(default=-1, metadata={"help": "Number of training steps, if not by the catalog's size."})
    per_device_train_batch_size: int = field(default=1024, metadata={"help": "Tools in a step, for each device."})
    logging_steps: float = field(default=100, metadata={"help": "Steps between two reports of the losses."})
    save_strategy: str = field(default="no", metadata={"help": "When checkpoints are written."})
    dataloader_pin_memory: bool = field(default=False, metadata={"help": "Whether to pin the batches' memory."})
    report_to: str | None = field(default="none", metadata={"help": "Where the losses are reported to."})

    def __post_init__(self):
        if self.early_stopping_patience is not None and self.eval_strategy == "no":
            self.eval_strategy = "steps"
        # Without this, the processes of `accelerate launch` on a machine without a GPU would not find each other.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        super().__post_init__()


class _ToolIndices(Dataset):
    """Dataset of the tools' row numbers; their embeddings stay on the device."""

    def __init__(self, num_tools: int):
        self.num_tools = num_tools

    def __len__(self) -> int:
        return self.num_tools

    def __getitem__(self, index: int) -> int:
        return index

    def __getitems__(self, indices: list[int]) -> list[int]:
        return indices


def _collate(indices: list[int]) -> dict[str, torch.LongTensor]:
    return {"index": torch.tensor(indices)}


class _FullBatches(Sampler[int]):
    """A permutation of the tools per epoch, padded from its start to a multiple of the global batch size.

    Every step then sees equally many tools, and the same tools for any number of processes.
    """

    def __init__(self, num_tools: int, batch_size: int, seed: int):
        self.num_tools, self.batch_size, self.seed = num_tools, batch_size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.num_tools // self.batch_size) * self.batch_size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(_seed(self.seed, self.epoch))
        order = torch.randperm(self.num_tools, generator=generator)
        return iter(order.repeat(-(-len(self) // self.num_tools))[: len(self)].tolist())


def _seed(seed: int, step: int) -> int:
    return (seed * 1_000_003 + step) % (1 << 63)


class RQVAETrainer(Trainer):
    """[`Trainer`] of an [`RQVAEModel`].

    Training starts from the linear solution: encoder and decoder project on the embeddings' principal axes, and the
    codebooks are initialized by k-means on the residuals of each level. Then two phases alternate. In the first,
    [`assign_codes`] assigns a unique code to every tool, with respect to the co-usage graph, and unused codes are
    revived. In the second, encoder, codebooks and decoder are trained on these codes. In the last tenth of the
    training the codes are fixed, so that decoder and encoder fit the final codes.

    This implements the paper's uniform mapping of the last level and its collaborative regularization (section 3.1),
    on the whole catalog and graph instead of one batch.

    Batches and random draws depend only on the seed and the step. A resumed or distributed run takes the same steps as
    an uninterrupted run in one process with the same global batch size. A step never synchronizes with the device.

    [`~RQVAETrainer.evaluate`] measures the codes of the whole catalog.

    Args:
        model ([`RQVAEModel`]):
            The model to train.
        args ([`TrainingArguments`]):
            Training arguments.
        embeddings (`np.ndarray` or `torch.Tensor` of shape `(num_tools, input_dim)`):
            The tools' embeddings.
        cousage (`scipy.sparse.csr_array` of shape `(num_tools, num_tools)`, *optional*):
            The co-usage graph. Each step draws one neighbor per tool of its batch, so its cost does not grow with the
            number of edges.
        kwargs:
            Passed on to [`Trainer`].

    Attributes:
        codes (`torch.LongTensor` of shape `(num_tools, num_levels)`): The tools' codes, all distinct, once training
            has begun.

    Raises:
        `ValueError`: if an embedding is not finite, there are more tools than codes, or the shapes do not match.
    """

    def __init__(
        self,
        model: RQVAEModel,
        args: TrainingArguments,
        embeddings: np.ndarray | torch.Tensor,
        cousage: scipy.sparse.csr_array | None = None,
        **kwargs,
    ):
        embeddings = torch.as_tensor(embeddings, dtype=torch.float32)
        num_tools = len(embeddings)
        if embeddings.ndim != 2 or embeddings.shape[1] != model.config.input_dim or not num_tools:
            raise ValueError(
                f"embeddings must have the shape (num_tools, {model.config.input_dim}), not {tuple(embeddings.shape)}"
            )
        check_capacity(num_tools, model.config.codebook_sizes)
        broken = ~torch.isfinite(embeddings.sum(1))
        if broken.any():
            raise ValueError(f"the embedding of the tool in row {int(broken.nonzero()[0])} holds NaN or infinity")
        if cousage is not None and cousage.shape != (num_tools, num_tools):
            raise ValueError(f"cousage must have the shape {(num_tools, num_tools)}, not {cousage.shape}")
        model.mean.copy_(embeddings.mean(0))
        variance = sum(float((rows - model.mean).square().sum()) for rows in embeddings.split(CHUNK_SIZE))
        model.scale.fill_(max((variance / embeddings.numel()) ** 0.5, 1e-6))

        args.remove_unused_columns = False  # a batch holds row numbers only
        args.logging_nan_inf_filter = False  # the filter would synchronize with the device in every step
        # A batch larger than the catalog would repeat tools.
        args.per_device_train_batch_size = min(args.per_device_train_batch_size, -(-num_tools // args.world_size))
        tools = _ToolIndices(num_tools)
        super().__init__(
            model=model, args=args, train_dataset=tools, eval_dataset=tools, data_collator=_collate, **kwargs
        )
        self.embeddings = embeddings.to(args.device)
        self.codes: torch.LongTensor | None = None
        self.cousage_weights = self.neighbors = None
        if cousage is not None and cousage.nnz and model.config.collaborative_weight > 0:
            graph = unit_degree(cousage)
            self.cousage_weights, self.neighbors = (
                model.config.collaborative_weight * graph,
                _Neighbors(graph, args.device),
            )
        self._generator = torch.Generator(args.device)
        self._sums: dict[str, torch.Tensor] = {}
        self._steps_summed = 0
        self.add_callback(_CodebookCallback(self))

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        batch_size = self.args.train_batch_size * self.args.world_size
        return _FullBatches(len(self.embeddings), batch_size, self.args.seed)

    def train(self, *args, **kwargs):
        # Near-certain codes give denormal gradients, which are many times slower on a CPU.
        torch.set_flush_denormal(True)
        try:
            return super().train(*args, **kwargs)
        finally:
            torch.set_flush_denormal(False)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        index = inputs["index"]
        neighbor_codes, weights = None, None
        if self.neighbors is not None:
            # Draw for the global batch; each process takes its part.
            self._generator.manual_seed(_seed(self.args.seed, self.state.global_step))
            shape = (self.args.world_size, len(index))
            draws = torch.rand(shape, dtype=torch.float64, device=index.device, generator=self._generator)
            neighbors, weights = self.neighbors.draw(index, draws[self.args.process_index])
            neighbor_codes = self.codes[neighbors]
        output = model(self.embeddings[index], neighbor_codes, weights, codes=self.codes[index])
        for name in LOSSES:
            value = getattr(output, name)
            if value is not None:
                self._sums[name] = self._sums.get(name, 0) + value.detach()
        self._steps_summed += 1
        return (output.loss, output) if return_outputs else output.loss

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if self._sums:
            means = {
                name: float(self.accelerator.reduce(total, "mean")) / self._steps_summed
                for name, total in self._sums.items()
            }
            self._sums, self._steps_summed = {}, 0
            logs = logs | means
        super().log(logs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        super()._save(output_dir, state_dict)
        if self.codes is not None:
            save_file({"codes": self.codes}, os.path.join(output_dir or self.args.output_dir, CODES_FILE))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.codes = load_file(os.path.join(resume_from_checkpoint, CODES_FILE))["codes"].to(self.args.device)

    @torch.no_grad()
    def assign(self, start: bool = False) -> None:
        """Assign codes with the current weights.

        Args:
            start (`bool`, *optional*, defaults to `False`): Whether to initialize weights and codes. Otherwise unused
                codes are revived.
        """
        model = self.accelerator.unwrap_model(self.model)
        generator = torch.Generator().manual_seed(_seed(self.args.seed, self.state.global_step))
        codes = start_model(model, self.embeddings, generator, self.cousage_weights) if start else self.codes
        latents = encode_tools(model, self.embeddings)
        if not start:
            sample = torch.randperm(len(latents), generator=generator)[:SAMPLE_SIZE].to(self.args.device)
            revive_codes(model, latents[sample], codes[sample], generator)
        codes = assign_codes(latents, model.codebooks(), None, self.cousage_weights, codes.cpu().numpy())
        self.codes = torch.from_numpy(codes).to(self.args.device)
        if self.args.world_size > 1:  # all processes continue with the model and codes of the first
            broadcast([*model.state_dict().values(), self.codes])

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Measure the codes of the whole catalog.

        Returns:
            `dict[str, float]`: `eval_reconstruction_loss` of the assigned codes, or of the nearest ones before
            training; `eval_collision_rate`, one minus the number of distinct nearest codes per tool;
            `eval_codebook_use`, the smallest share of used codes of any level.
        """
        model = self.accelerator.unwrap_model(self.model)
        was_training = model.training
        model.eval()
        found = nearest_codes(model, encode_tools(model, self.embeddings))
        loss = reconstruction_loss(model, self.embeddings, found if self.codes is None else self.codes)
        model.train(was_training)
        num_tools = len(self.embeddings)
        codes = found.cpu().numpy()
        sizes = model.config.codebook_sizes
        metrics = {
            "reconstruction_loss": loss,
            "collision_rate": 1 - len(np.unique(codes, axis=0)) / num_tools,
            "codebook_use": min(len(np.unique(c)) / size for c, size in zip(codes.T, sizes, strict=True)),
        }
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class _Neighbors:
    """Samples a co-used tool for each tool, with probability proportional to the edge weight.

    The weight of a pair is the degree of its tool, 1 on average ([`~codes.cousage.unit_degree`]), so that the weighted
    mean over a batch estimates the graph Laplacian's quadratic form up to a constant.
    """

    def __init__(self, graph: scipy.sparse.csr_array, device: torch.device):
        self.indices = torch.from_numpy(graph.indices.astype(np.int64)).to(device)
        # One cumulative sum over all edges; those of tool i lie between start[i] and start[i + 1].
        cumulative = np.concatenate([[0.0], np.cumsum(graph.data, dtype=np.float64)])
        self.cumulative = torch.from_numpy(cumulative[1:]).to(device)
        self.start = torch.from_numpy(cumulative[graph.indptr]).to(device)

    def draw(self, index: torch.LongTensor, draws: torch.Tensor) -> tuple[torch.LongTensor, torch.Tensor]:
        """Return a neighbor of each tool and the weight of the pair.

        Args:
            index (`torch.LongTensor` of shape `(batch_size,)`): The tools.
            draws (`torch.Tensor` of shape `(batch_size,)`): Uniform random numbers in [0, 1).
        """
        start, end = self.start[index], self.start[index + 1]
        edge = torch.searchsorted(self.cumulative, start + (end - start) * draws, right=True)
        return self.indices[edge.clamp(max=len(self.indices) - 1)], (end - start).float()


class _CodebookCallback(TrainerCallback):
    """Initializes the model before the first step, and assigns codes until the last tenth of the training."""

    def __init__(self, trainer: RQVAETrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.trainer.assign(start=True)

    def on_step_end(self, args, state, control, **kwargs):
        last = state.max_steps * 9 // 10
        if state.global_step <= last and state.global_step % -(-last // ASSIGNMENTS) == 0:
            self.trainer.assign()


class CodesEarlyStoppingCallback(TrainerCallback, ExportableState):
    """Stops the training when neither the collisions nor the reconstruction improve.

    Args:
        patience (`int`, *optional*, defaults to 5):
            Number of consecutive evaluations without an improvement of either before training stops.
        threshold (`float`, *optional*, defaults to 0.001):
            Smallest decrease of a measure (a share of the tools, or of the variance) that counts as an improvement.
    """

    def __init__(self, patience: int = 5, threshold: float = 0.001):
        if patience < 1:
            raise ValueError(f"patience must be at least 1, not {patience}")
        self.patience, self.threshold = patience, threshold
        self.best: dict[str, float] = {}
        self.waited = 0

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        improved = False
        for name in ("eval_collision_rate", "eval_reconstruction_loss"):
            best = self.best.get(name)
            if best is None or metrics[name] < best - self.threshold:
                self.best[name] = metrics[name]
                improved = True
        self.waited = 0 if improved else self.waited + 1
        if self.waited >= self.patience:
            control.should_training_stop = True

    def state(self) -> dict:
        return {
            "args": {"patience": self.patience, "threshold": self.threshold},
            "attributes": {"best": self.best, "waited": self.waited},
        }
