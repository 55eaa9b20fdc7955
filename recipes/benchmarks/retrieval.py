"""Compare ToolWeaver with its baselines on one catalog and one split (as the paper's Tables 1 and 6).

```bash
python recipes/benchmarks/retrieval.py --catalog tools.jsonl --train_queries train.jsonl --test_queries test.jsonl \
    --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct --num_train_epochs 2 --output_dir out/benchmark
```

Every identifier has the same base model, rows and budget; without `--model_name_or_path` the base is the quick start's
small Llama with random weights. The output folder is a run as `toolweaver evaluate` writes it, so `toolweaver compare`
puts the methods of several calls together.

With `--held_out_tools 0.1` a tenth of the tools, with their documents and queries, is held out of all training and gets
codes afterwards. Queries that need held-out tools are the group `new`, in which only these tools count as relevant; the
group `known` has all other queries. A model is measured without further training, after training on the new tools'
documents, and after training on as many rows of which half are queries of the known tools.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from toolweaver_hf.cli import parse_arguments, run_command
from toolweaver_hf.data.catalog import CATALOG_FILE, ToolCatalog
from toolweaver_hf.files import write_text
from toolweaver_hf.recipes import sft, tokenize_tools


if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from trl import ModelConfig

    from toolweaver_hf.alignment.trainer import AlignmentTrainingArguments
    from toolweaver_hf.codes.tool_codes import ToolCodes
    from toolweaver_hf.data.queries import Query
    from toolweaver_hf.retrieval import RetrievedTool


NAMES = {
    "toolweaver": "ToolWeaver",
    "no_collaboration": "ToolWeaver, no collaborative weight",
    "random_embeddings": "ToolWeaver, random embeddings",
    "toolgen": "atomic tokens (ToolGen)",
    "numeric": "numeric codes",
    "random_codes": "random codes",
    "bm25": "BM25",
    "dense": "dense, zero-shot",
    "dense_tuned": "dense, fine-tuned",
    "search": "BM25 + dense",
    "memory": "BM25 + dense + known queries",
}
LEARNED_CODES = ("toolweaver", "no_collaboration", "random_embeddings")
OTHER_CODES = ("toolgen", "numeric", "random_codes")
SUPPORT_NEW_TOOLS = ("toolweaver", "no_collaboration", "bm25", "dense", "dense_tuned", "search", "memory")
TOP_K = 10


@dataclass
class BenchmarkArguments:
    """What to compare.

    Args:
        catalog (`str`):
            The tools, in any format that [`ToolCatalog.from_file`] reads.
        train_queries, test_queries (`str`):
            The split, in any format that [`~data.queries.load_queries`] reads.
        train_qrels, test_qrels (`str`, *optional*):
            The relevance files of BEIR queries.
        methods (`list[str]`, *optional*):
            What to measure; the first one is what the others are compared with. Defaults to all.
        encoder (`str`, *optional*):
            sentence-transformers model of the tools' documents and of the dense rivals.
        codebook_sizes (`list[int]`, *optional*):
            Codes of each level. Defaults to what `recipes/tokenize_tools.py` takes.
        tokenization_steps (`int`, *optional*):
            Training steps of an RQ-VAE. Defaults to what `recipes/tokenize_tools.py` takes.
        stages (`list[str]`, *optional*, defaults to `["memorization", "retrieval"]`):
            What a model learns, see `recipes/sft.py`.
        augmentations (`int`, *optional*, defaults to 0):
            Noisy copies of each row, see `recipes/sft.py`.
        encoder_learning_rate (`float`, *optional*, defaults to 2e-5):
            Of the fine-tuned encoder. Its epochs and its batch size are those of the models.
        encoder_max_steps (`int`, *optional*, defaults to -1):
            Training steps of the fine-tuned encoder, in place of epochs.
        held_out_tools (`float`, *optional*, defaults to 0):
            Share of the tools that are added after the training.
        guidance_queries (`int`, *optional*, defaults to 100):
            Training queries that are held out of training, to fit the weights of guided decoding on; the same for every
            method that has any.
        document_epochs (`float`, *optional*, defaults to 10):
            Passes over the documents of these tools; half of them where known queries are mixed in.
    """

    catalog: str = field(metadata={"help": "The catalog of tools."})
    train_queries: str = field(metadata={"help": "Training queries."})
    test_queries: str = field(metadata={"help": "Test queries."})
    train_qrels: str | None = field(default=None, metadata={"help": "Relevance file of BEIR training queries."})
    test_qrels: str | None = field(default=None, metadata={"help": "Relevance file of BEIR test queries."})
    methods: list[str] = field(
        default_factory=lambda: list(NAMES), metadata={"help": "What to measure.", "choices": list(NAMES)}
    )
    encoder: str | None = field(default=None, metadata={"help": "sentence-transformers model."})
    codebook_sizes: list[int] | None = field(default=None, metadata={"help": "Codes of each level."})
    tokenization_steps: int = field(default=-1, metadata={"help": "Training steps of an RQ-VAE."})
    stages: list[str] = field(
        default_factory=lambda: ["memorization", "retrieval"],
        metadata={"help": "What a model learns.", "choices": ["memorization", "retrieval"]},
    )
    augmentations: int = field(default=0, metadata={"help": "Noisy copies of each row."})
    encoder_learning_rate: float = field(default=2e-5, metadata={"help": "Of the fine-tuned encoder."})
    encoder_max_steps: int = field(default=-1, metadata={"help": "Steps of the fine-tuned encoder."})
    held_out_tools: float = field(default=0.0, metadata={"help": "Share of the tools that are added later."})
    guidance_queries: int = field(
        default=100, metadata={"help": "Training queries held out to fit the weights of guided decoding on."}
    )
    document_epochs: float = field(default=10, metadata={"help": "Passes over the documents of these tools."})

    def __post_init__(self):
        closed = [method for method in self.methods if method not in SUPPORT_NEW_TOOLS]
        if self.held_out_tools and closed:
            raise ValueError(
                f"{', '.join(closed)} cannot take tools in later: with --held_out_tools choose --methods among "
                f"{', '.join(SUPPORT_NEW_TOOLS)}"
            )
        if not 0 <= self.held_out_tools < 1:
            raise ValueError(
                f"--held_out_tools is a share of the tools, at least 0 and below 1, not {self.held_out_tools}"
            )


def load_split(
    args: BenchmarkArguments, seed: int
) -> tuple[ToolCatalog, ToolCatalog | None, list[Query], list[Query]]:
    """Return the tools to learn, those to add later if any, the training and the test queries."""
    from toolweaver_hf.data.queries import load_queries
    from toolweaver_hf.evaluation.rankings import check_ground_truth

    catalog = ToolCatalog.from_file(args.catalog)
    train = load_queries(args.train_queries, args.train_qrels)
    test = load_queries(args.test_queries, args.test_qrels)
    check_ground_truth(test, catalog.ids, args.catalog)
    unknown = sorted({tool for query in train for tool in query.tools if tool not in catalog})
    if unknown:
        raise ValueError(f"{args.train_queries} names tools that {args.catalog} lacks: {', '.join(unknown[:5])}")
    held_out = set(random.Random(seed).sample(catalog.ids, round(args.held_out_tools * len(catalog))))
    if not held_out:
        return catalog, None, train, test
    train = [query for query in train if held_out.isdisjoint(query.tools)]
    test = [
        replace(query, group="known")
        if held_out.isdisjoint(query.tools)
        else replace(query, group="new", tools=tuple(tool for tool in query.tools if tool in held_out))
        for query in test
    ]
    known = ToolCatalog(tool for tool in catalog if tool.id not in held_out)
    return known, ToolCatalog(tool for tool in catalog if tool.id in held_out), train, test


def write_queries(path: Path, queries: Sequence[Query]) -> None:
    rows = ({"id": query.id, "text": query.text, "tools": query.tools} for query in queries)
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


class Benchmark:
    """The methods on one split. `folder` holds what they share, with a subfolder for each method."""

    def __init__(
        self,
        args: BenchmarkArguments,
        training_args: AlignmentTrainingArguments,
        model_args: ModelConfig,
    ):
        from transformers import set_seed

        from toolweaver_hf.codes.assignment import check_capacity
        from toolweaver_hf.demo.small_llama import build_small_llama
        from toolweaver_hf.text_expert import default_encoder

        self.args, self.training_args, self.model_args = args, training_args, model_args
        self.seed, self.folder = training_args.seed, Path(training_args.output_dir)
        self.encoder = args.encoder or default_encoder()
        self.catalog, self.new, self.train, self.test = load_split(args, self.seed)
        self.everything = ToolCatalog([*self.catalog, *(self.new or ())])
        self.codebook_sizes = args.codebook_sizes or tokenize_tools.default_codebook_sizes(len(self.everything))
        check_capacity(len(self.everything), self.codebook_sizes)
        shuffled = random.Random(self.seed).sample(self.train, len(self.train))
        num_held_out = min(args.guidance_queries, len(shuffled) // 5)
        self.validation, self.train = shuffled[:num_held_out], shuffled[num_held_out:]

        self.folder.mkdir(parents=True, exist_ok=True)
        self.catalog.save_pretrained(self.folder)
        write_queries(self.folder / "queries.train.jsonl", self.train)
        write_queries(self.folder / "queries.validation.jsonl", self.validation)
        self.base = model_args.model_name_or_path
        if self.base is None:
            set_seed(self.seed)
            self.base = str(self.folder / "base")
            build_small_llama(self.catalog.documents + [query.text for query in self.train], Path(self.base))

    def rankings(self, method: str) -> dict[str, list[list[RetrievedTool]]]:
        """Train a method and rank all tools for the test queries; a model is ranked guided and by its codes alone."""
        from toolweaver_hf.alignment.guidance import fit_guidance
        from toolweaver_hf.data.queries import Query
        from toolweaver_hf.evaluation.baselines import BM25Retriever, DenseRetriever
        from toolweaver_hf.retrieval import ToolRetriever
        from toolweaver_hf.text_expert import fast_dtype
        from toolweaver_hf.tokenization_toolweaver import ToolWeaverTokenizer

        name, texts = NAMES[method], [query.text for query in self.test]
        if method == "bm25":
            return {name: BM25Retriever(self.everything)(texts, top_k=TOP_K)}
        if method == "dense":
            return {name: DenseRetriever(self.everything, self.encoder)(texts, top_k=TOP_K)}
        if method == "dense_tuned":
            return {name: DenseRetriever(self.everything, self.tune_encoder())(texts, top_k=TOP_K)}
        if method in ("search", "memory"):
            retriever = ToolRetriever.from_catalog(self.catalog, self.encoder, cache_dir=self.folder)
            if method == "memory":
                retriever.text_expert.remember(*zip(*((q.text, q.tools) for q in self.train), strict=True))
            if self.validation:
                fit_guidance(retriever, self.validation)
            retriever.add(self.new or ())
            return {name: retriever(texts, top_k=TOP_K)}

        codes_dir, model_dir = self.folder / method / "codes", self.folder / method / "model"
        self.make_codes(method, codes_dir)
        queries = self.folder / "queries.train.jsonl"
        self.align(self.base, codes_dir, queries, self.args.stages, self.training_args, model_dir)
        guided = ToolRetriever.from_pretrained(model_dir, dtype=fast_dtype())
        guided.add(self.new or ())
        rankings = {name: guided(texts, top_k=TOP_K)}
        alone = f"{name}, codes alone"
        if self.new is None:
            return rankings | {alone: ToolRetriever(guided.model, guided.tokenizer)(texts, top_k=TOP_K)}

        # New tools: codes of tokens that the model knows; then their documents, alone and with queries of known tools
        codes = self.add_tools(codes_dir)
        tokenizer = ToolWeaverTokenizer.from_pretrained(model_dir, tool_codes=codes.to_dict())
        rankings[alone] = ToolRetriever(guided.model, tokenizer)(texts, top_k=TOP_K)
        documents = [Query(f"document of {tool.id}", tool.document, (tool.id,)) for tool in self.new]
        replayed = random.Random(self.seed).sample(self.train, min(len(documents), len(self.train)))
        learned = {
            "documents": (f"{alone}, documents learned", documents, self.args.document_epochs),
            "replay": (f"{alone}, documents and known queries", documents + replayed, self.args.document_epochs / 2),
        }
        for folder, (title, rows, num_epochs) in learned.items():
            queries, learned_dir = self.folder / method / f"{folder}.jsonl", self.folder / method / folder
            write_queries(queries, rows)
            budget = replace(self.training_args, num_train_epochs=num_epochs, max_steps=-1)
            self.align(str(model_dir), codes_dir, queries, ["retrieval"], budget, learned_dir)
            rankings[title] = ToolRetriever.from_pretrained(learned_dir, guided=False, dtype=fast_dtype())(
                texts, top_k=TOP_K
            )
        return rankings

    def make_codes(self, method: str, codes_dir: Path) -> None:
        """Write a method's codes as `recipes/sft.py` takes them."""
        import numpy as np
        from safetensors.numpy import save_file

        from toolweaver_hf.codes.embeddings import EMBEDDINGS_FILE, embed_catalog
        from toolweaver_hf.codes.trainer import RQVAETrainingArguments
        from toolweaver_hf.evaluation.baselines import atomic_codes, numeric_codes, random_codes

        codes_dir.mkdir(parents=True, exist_ok=True)
        if method in OTHER_CODES:
            codes = {
                "toolgen": atomic_codes,
                "numeric": numeric_codes,
                "random_codes": lambda catalog: random_codes(catalog, self.codebook_sizes, self.seed),
            }[method](self.catalog)
            codes.save_pretrained(codes_dir)
            self.catalog.save_pretrained(codes_dir)
            return
        # The tokenization takes the embeddings that it finds beside the codes.
        encoder, embeddings = self.encoder, embed_catalog(self.catalog, self.encoder, cache_dir=self.folder)
        if method == "random_embeddings":
            encoder = "random"
            embeddings = np.random.default_rng(self.seed).standard_normal(embeddings.shape, dtype=np.float32)
            embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
        key = {"encoder": encoder, "catalog": self.catalog.checksum}
        save_file({"embeddings": embeddings}, codes_dir / EMBEDDINGS_FILE, metadata=key)
        tokenize_tools.main(
            tokenize_tools.TokenizationArguments(
                catalog=str(self.folder / CATALOG_FILE),
                queries=str(self.folder / "queries.train.jsonl"),
                encoder=encoder,
                codebook_sizes=self.codebook_sizes,
                collaborative_weight=0.0 if method == "no_collaboration" else 1.0,
            ),
            RQVAETrainingArguments(
                output_dir=str(codes_dir),
                max_steps=self.args.tokenization_steps,
                seed=self.seed,
                disable_tqdm=self.training_args.disable_tqdm,
            ),
        )

    def add_tools(self, codes_dir: Path) -> ToolCodes:
        """Give the new tools codes, and take them and their codes into the folder of the codes."""
        from toolweaver_hf.codes.embeddings import embed_catalog
        from toolweaver_hf.codes.tool_codes import ToolCodes
        from toolweaver_hf.modeling_rqvae import RQVAEModel

        codes = ToolCodes.from_pretrained(codes_dir)
        embeddings = embed_catalog(self.new, self.encoder)
        codes.add([*self.new], RQVAEModel.from_pretrained(codes_dir), embeddings)
        codes.save_pretrained(codes_dir)
        self.everything.save_pretrained(codes_dir)
        return codes

    def align(
        self,
        base: str,
        codes_dir: Path,
        queries: Path,
        stages: list[str],
        budget: AlignmentTrainingArguments,
        output_dir: Path,
    ) -> None:
        """Align a model with codes."""
        learned = (codes_dir / "config.json").exists()
        # Made anew, these settle the precision, which the tokenization has in its own way
        training_args = replace(budget, output_dir=str(output_dir))
        sft.main(
            sft.AlignmentArguments(
                codes_dir=str(codes_dir),
                stages=stages,
                queries=str(queries),
                embedding_init="codebook" if learned else "mean_description",
                augmentations=self.args.augmentations,
                text_encoder=self.encoder,
                eval_queries=str(self.folder / "queries.validation.jsonl") if self.validation else None,
            ),
            training_args,
            replace(self.model_args, model_name_or_path=base),
        )

    def tune_encoder(self) -> SentenceTransformer:
        """Fine-tune the encoder on the pairs of query and tool that the models are trained on."""
        from sentence_transformers import SentenceTransformerTrainingArguments

        from toolweaver_hf.evaluation.baselines import fine_tune_encoder

        args = SentenceTransformerTrainingArguments(
            output_dir=str(self.folder / "dense_tuned"),
            learning_rate=self.args.encoder_learning_rate,
            max_steps=self.args.encoder_max_steps,
            num_train_epochs=self.training_args.num_train_epochs,
            per_device_train_batch_size=self.training_args.per_device_train_batch_size,
            warmup_steps=0.1,
            batch_sampler="no_duplicates",
            bf16=self.training_args.bf16,
            use_cpu=self.training_args.use_cpu,
            dataloader_pin_memory=self.training_args.dataloader_pin_memory,
            disable_tqdm=self.training_args.disable_tqdm,
            save_strategy="no",
            report_to="none",
            seed=self.seed,
        )
        encoder = fine_tune_encoder(self.encoder, self.catalog, self.train, args)
        encoder.save_pretrained(args.output_dir)
        return encoder


def main(args: BenchmarkArguments, training_args: AlignmentTrainingArguments, model_args: ModelConfig) -> dict:
    """Measure every method, print the tables and return the content of `metrics.json`."""
    from toolweaver_hf.evaluation.runs import save_run, tables

    benchmark = Benchmark(args, training_args, model_args)
    config = asdict(args) | {"training": training_args.to_dict(), "model": asdict(model_args)}
    rankings: dict[str, list[list[RetrievedTool]]] = {}
    metrics = {}
    for method in args.methods:
        print(f"\n{NAMES[method]}", flush=True)
        rankings |= benchmark.rankings(method)
        # Written after each, so that what was measured is kept where a later one fails
        metrics = save_run(
            benchmark.folder,
            benchmark.test,
            rankings,
            benchmark.everything.ids,
            json.loads(json.dumps(config, default=str)),
            Path(args.test_queries).name,
            benchmark.seed,
        )
    print(f"\n{tables(metrics)}", end="")
    return metrics


def cli(argv: list[str] | None = None) -> None:
    main(*parse_arguments(argv, BenchmarkArguments, sft.training_arguments))


if __name__ == "__main__":
    run_command(cli)
