"""Evaluate an agent on tasks: its calls and, by a judge, its pass rate and win rate (SoPR and SoWR).

```bash
python recipes/evaluate_agent.py --model out/agent --tasks trajectories.test.jsonl
```

The same command continues an interrupted run. A model that was trained anew needs another `--output_dir`.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolweaver_hf.cli import parse_arguments, run_command


if TYPE_CHECKING:
    from toolweaver_hf.agent.run import AgentRun
    from toolweaver_hf.data.catalog import ToolCatalog
    from toolweaver_hf.evaluation.tasks import AgentTask


AGENT_METRICS_VERSION = 1  # schema_version of the agent's metrics.json


@dataclass
class AgentEvaluationArguments:
    """What to evaluate.

    Args:
        tasks (`str`):
            The tasks: ground-truth trajectories, Seal-Tools' rows, or queries with their tools.
        model (`str`, *optional*):
            Output folder of `recipes/sft.py`, or a Hub repository.
        runs (`str`, *optional*):
            Runs of any agent in place of a model: trajectories with the ids of the tasks.
        reference (`str`, *optional*):
            Another agent's runs of the tasks, for the win rate.
        catalog (`str`, *optional*):
            The catalog's file. Defaults to the model's.
        recordings (`str`, *optional*):
            JSONL file of recorded answers of tools ([`SimulatedTools`]). Other calls are answered as in the tasks'
            trajectories, by the demo's functions, or by simulation.
        simulator_model (`str`, *optional*):
            Chat model that simulates answers without a record.
        judge_model (`str`, *optional*):
            Chat model that judges. Without one, runs are checked against the ground truth; tasks that are queries with
            tools alone are not judged.
        url (`str`, *optional*):
            OpenAI-compatible endpoint of these models, OpenAI's by default; its key is the environment's
            `OPENAI_API_KEY`.
        votes (`int`, *optional*, defaults to 3):
            Number of judgments per run.
        prices (`list[float]`, *optional*):
            Prices of a million prompt tokens and a million completion tokens of the judge.
        max_tasks (`int`, *optional*):
            Number of tasks to run, from the first. Defaults to all.
        max_steps (`int`, *optional*, defaults to 5):
            Maximum number of turns of the agent per task.
        seed (`int`, *optional*, defaults to 0):
            Seed of simulated answers.
        output_dir (`str`, *optional*):
            Folder for the run. Defaults to `agent_evaluation` in the model's folder.
    """

    tasks: str = field(metadata={"help": "Ground-truth trajectories, Seal-Tools' rows, or queries."})
    model: str | None = field(default=None, metadata={"help": "Folder of an aligned model."})
    runs: str | None = field(default=None, metadata={"help": "In place of a model, runs of any agent (JSONL)."})
    reference: str | None = field(default=None, metadata={"help": "Another agent's runs, for the win rate (JSONL)."})
    catalog: str | None = field(default=None, metadata={"help": "The catalog's file; the model's by default."})
    recordings: str | None = field(default=None, metadata={"help": "Recorded answers of tools (JSONL)."})
    simulator_model: str | None = field(default=None, metadata={"help": "Chat model that simulates other answers."})
    judge_model: str | None = field(default=None, metadata={"help": "Chat model that judges."})
    url: str = field(default="https://api.openai.com/v1", metadata={"help": "OpenAI-compatible endpoint of both."})
    votes: int = field(default=3, metadata={"help": "Judgments per run."})
    prices: list[float] | None = field(
        default=None, metadata={"help": "Cost of a million prompt and a million completion tokens of the judge."}
    )
    max_tasks: int | None = field(default=None, metadata={"help": "Number of tasks to run."})
    max_steps: int = field(default=5, metadata={"help": "Maximum number of turns per task."})
    seed: int = field(default=0, metadata={"help": "Seed of simulated answers."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder for the run."})

    def __post_init__(self):
        if (self.model is None) == (self.runs is None):
            raise ValueError("give either --model or --runs")
        if self.model is None and self.catalog is None:
            raise ValueError("--runs needs --catalog, the tools with their schemas")
        if self.output_dir is None:
            if self.model is None or not os.path.isdir(self.model):
                raise ValueError("--output_dir is needed where there is no folder of a model")
            self.output_dir = os.path.join(self.model, "agent_evaluation")
        if self.prices is not None and len(self.prices) != 2:
            raise ValueError("--prices needs two numbers: for prompt tokens and for completion tokens")
        if self.votes < 1:
            raise ValueError("--votes must be at least 1")


def model_version(model: str) -> str:
    """Name a model and its version: of a folder the digest of what its agent depends on, on the Hub the commit.

    Raises:
        `OSError`: if the Hub cannot be reached or has no such model.
    """
    from transformers.utils import cached_file
    from transformers.utils.hub import extract_commit_hash

    from toolweaver_hf.data.catalog import CATALOG_FILE
    from toolweaver_hf.text_expert import TEXT_EXPERT_FILE
    from toolweaver_hf.tool_codes_file import TOOL_CODES_FILE

    if not os.path.isdir(model):
        commit = extract_commit_hash(cached_file(model, TOOL_CODES_FILE), None)
        return f"{model} {commit}"
    digest = hashlib.sha256()
    for path in sorted(Path(model).iterdir()):
        if path.suffix == ".safetensors" or path.name in (CATALOG_FILE, TEXT_EXPERT_FILE, TOOL_CODES_FILE):
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"{os.path.basename(os.path.abspath(model))} {digest.hexdigest()[:16]}"


def check_settings(args: AgentEvaluationArguments, path: Path) -> dict[str, Any]:
    """Save and return the settings that results depend on; raise an error if an interrupted run had other settings."""
    from toolweaver_hf.evaluation.runs import RUN_VERSION, describe_run
    from toolweaver_hf.files import local_file, read_json, write_json

    settings = asdict(args)
    for name in ("tasks", "runs", "reference", "catalog"):
        if settings[name] is not None:
            content = Path(local_file(settings[name])).read_bytes()
            settings[name] = f"{os.path.basename(settings[name])} {hashlib.sha256(content).hexdigest()[:16]}"
    if args.model is not None:
        settings["model"] = model_version(args.model)
    if path.exists():
        before = read_json(path, RUN_VERSION)["config"]
        before["reference"] = before.get("reference") or settings["reference"]  # may be added later, or left out
        settings["reference"] = settings["reference"] or before["reference"]
        free = ("votes", "prices", "max_tasks", "output_dir", "url")  # changing these keeps the results so far valid
        changed = [name for name, value in settings.items() if name not in free and before.get(name) != value]
        if changed:
            raise ValueError(
                f"{path.parent} holds a run with other settings ({', '.join(changed)}): choose another --output_dir"
            )
    write_json(path, describe_run(settings), RUN_VERSION)
    return settings


def run_agent(
    args: AgentEvaluationArguments, catalog: ToolCatalog, tasks: list[AgentTask], path: Path
) -> dict[str, AgentRun]:
    """Run the model on the tasks without a run in the file `path`; append each run at once."""
    from tqdm.auto import tqdm

    from toolweaver_hf.agent.loop import ToolAgent
    from toolweaver_hf.data.trajectories import load_trajectories
    from toolweaver_hf.demo import demo_functions
    from toolweaver_hf.evaluation.chat_endpoint import ChatEndpoint
    from toolweaver_hf.evaluation.simulated_tools import SimulatedTools
    from toolweaver_hf.evaluation.tasks import load_agent_runs
    from toolweaver_hf.files import truncate_partial_line
    from toolweaver_hf.text_expert import fast_dtype

    truncate_partial_line(path)
    done = load_agent_runs(path) if path.exists() and path.stat().st_size else {}
    missing = [task for task in tasks if task.id not in done]
    if not missing:
        return done
    endpoint = ChatEndpoint(args.simulator_model, args.url) if args.simulator_model else None
    tools = SimulatedTools(catalog, args.recordings, demo_functions(catalog), endpoint, args.seed)
    if tasks[0].calls is not None:
        tools.record_trajectories(load_trajectories(args.tasks))
    agent = ToolAgent.from_pretrained(args.model, tools, catalog=catalog, dtype=fast_dtype(), max_steps=args.max_steps)
    with open(path, "a", encoding="utf-8") as file:
        for task in tqdm(missing, "Running the agent"):
            done[task.id] = outcome = agent(task.messages)
            row = {"id": task.id, "messages": outcome.messages, "stop_reason": outcome.stop_reason}
            file.write(json.dumps(row | {"num_new_tokens": outcome.num_new_tokens}, ensure_ascii=False) + "\n")
            file.flush()
    return done


def main(args: AgentEvaluationArguments) -> dict[str, float]:
    """Run, measure and judge; print a table, write `metrics.json` and return the measures."""
    from toolweaver_hf.data.catalog import ToolCatalog
    from toolweaver_hf.evaluation.chat_endpoint import ChatEndpoint
    from toolweaver_hf.evaluation.judges import (
        AnswerChecker,
        ChatJudge,
        judge_pairs,
        judge_runs,
        pass_rate,
        token_counts,
        win_rate,
    )
    from toolweaver_hf.evaluation.runs import RUN_FILE, RUN_VERSION, describe_run
    from toolweaver_hf.evaluation.tasks import evaluate_runs, load_agent_runs, load_tasks
    from toolweaver_hf.files import write_json

    tasks = load_tasks(args.tasks)[: args.max_tasks]
    catalog = (
        ToolCatalog.from_file(args.catalog)
        if args.catalog
        else ToolCatalog.from_pretrained(args.model, repo_type="model")
    )
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    settings = check_settings(args, output / RUN_FILE)
    runs = load_agent_runs(args.runs) if args.runs else run_agent(args, catalog, tasks, output / "runs.jsonl")
    measures = evaluate_runs(tasks, runs, catalog)

    judge, votes = AnswerChecker(), 1  # deterministic, so one vote is enough
    if args.judge_model:
        judge, votes = ChatJudge(ChatEndpoint(args.judge_model, args.url)), args.votes
    asked = []
    if args.judge_model or all(task.calls is not None for task in tasks):  # queries alone have no ground-truth calls
        asked = verdicts = judge_runs(judge, tasks, runs, votes, output / "verdicts.jsonl")
        measures |= pass_rate(verdicts)
        if args.reference:
            references = load_agent_runs(args.reference)
            theirs = judge_runs(judge, tasks, references, votes, output / "reference_verdicts.jsonl")
            pairs = (runs, references, verdicts, theirs)
            preferences = judge_pairs(judge, tasks, *pairs, votes, output / "preferences.jsonl")
            measures |= win_rate(preferences)
            asked = [*verdicts, *theirs, *preferences]
    tokens = token_counts(asked)
    if args.prices:
        tokens["cost"] = sum(price * count / 1e6 for price, count in zip(args.prices, tokens.values(), strict=True))

    print(
        f"\n{os.path.basename(args.tasks)}, {votes} {'votes' if votes > 1 else 'vote'} a run\n\n| measure | |\n|---|---:|"
    )
    for name, value in measures.items():
        print(f"| {name} | {value:,} |" if isinstance(value, int) else f"| {name} | {value:.3f} |")
    if args.judge_model:
        print(f"\nthe judge: {', '.join(f'{name} {value:,}' for name, value in tokens.items())}")
    document = {"tasks": os.path.basename(args.tasks), "votes": votes, "measures": measures, "judge": tokens}
    write_json(output / "metrics.json", document, AGENT_METRICS_VERSION)
    write_json(output / RUN_FILE, describe_run(settings), RUN_VERSION)  # with the time at the end
    return measures


def cli(argv: list[str] | None = None) -> None:
    main(*parse_arguments(argv, AgentEvaluationArguments))


if __name__ == "__main__":
    run_command(cli)
