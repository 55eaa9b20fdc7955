"""The `toolweaver` command: a sub-command for every step.

Help comes at once: neither this file nor the top of a recipe imports torch or transformers.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Iterable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any


def run_command(command: Callable[[], None]) -> None:
    """Run a command; bad input (`ValueError`, `OSError`) ends it with one line on stderr and exit status 2."""
    try:
        command()
    except (ValueError, OSError) as error:
        from transformers.utils import logging

        logging.get_logger(__name__).debug("the error's origin", exc_info=True)
        print(f"toolweaver: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def parse_arguments(
    argv: list[str] | None, arguments: Any, load_more: Callable[[], Iterable[Any]] = tuple
) -> tuple[Any, ...]:
    """Parse a recipe's command line, and the YAML file that its `--config` names, with [`~trl.TrlParser`].

    Args:
        argv (`list[str]`, *optional*): The command line. Defaults to `sys.argv[1:]`.
        arguments (`type`): The dataclass of the recipe's own arguments. `--help` shows these.
        load_more (`Callable`, *optional*):
            Imports and returns the other dataclasses, such as [`~trl.SFTConfig`]. `--help_all` shows theirs too.

    Returns:
        `tuple`: an instance of each dataclass.

    Raises:
        `ValueError`: for a configuration that is neither a file nor one of the package's.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if "-h" in argv or "--help" in argv:
        more = "" if load_more is tuple else "--help_all shows those of training, such as --output_dir, as well."
        _help_parser(arguments, more).print_help()
        sys.exit()
    from trl import TrlParser

    parser = TrlParser((arguments, *load_more()))
    if "--help_all" in argv:
        parser.print_help()
        sys.exit()
    # As two words, which TRL expects
    argv = [word for arg in argv for word in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
    if "--config" in argv[:-1]:
        place = argv.index("--config") + 1
        argv[place] = str(find_config(argv[place]))
    return parser.parse_args_and_config(argv)


def find_config(name: str) -> Path:
    """Return the configuration file of this path or, where there is none, the package's of this name.

    Raises:
        `ValueError`: if there is neither.
    """
    path, folder = Path(name), Path(importlib.import_module("toolweaver_hf.recipes").__path__[0], "configs")
    if path.is_file():
        return path
    packaged = {file.stem: file for file in sorted(folder.glob("*.yaml"))}
    if name not in packaged:
        raise ValueError(f"--config {name}: there is no such file, and the package has {', '.join(packaged)}")
    return packaged[name]


def _help_parser(arguments: type, epilog: str) -> argparse.ArgumentParser:
    """Return a parser that says of a dataclass's arguments what TRL's would, without the time to import TRL."""
    description = (sys.modules[arguments.__module__].__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(
        formatter_class=argparse.ArgumentDefaultsHelpFormatter, description=description, epilog=epilog
    )
    parser.add_argument("--config", help="YAML file of arguments, or the name of one of the package's")
    for field in fields(arguments):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        parser.add_argument(
            f"--{field.name}",
            help=field.metadata["help"],
            required=default is MISSING,
            default=None if default is MISSING else default,
            choices=field.metadata.get("choices"),
            nargs="+" if "list" in str(field.type) else "?" if "bool" in str(field.type) else None,
        )
    return parser


def _recipe(name: str) -> Callable[[list[str]], None]:
    return lambda argv: importlib.import_module(f"toolweaver_hf.recipes.{name}").cli(argv)


def _inspect(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description="Draw a report of learned codes: report.png and report.json. Without their folder, tell what is read "
        "of a catalog: tools, arguments, and what was left out or changed, and why."
    )
    parser.add_argument("folder", nargs="?", help="output folder of `toolweaver tokenize`")
    parser.add_argument("--catalog", help="a catalog; with a folder, tell which of its tools are new, changed or gone")
    parser.add_argument("--encoder", help="folder of an encoder, to count the documents that are too long for it")
    args = parser.parse_args(argv)
    if args.folder is None and args.catalog is None:
        parser.error("give the folder of learned codes, a --catalog, or both")
    if args.folder is None:
        from .data.report import print_catalog_report

        print_catalog_report(args.catalog, args.encoder)
        return
    from .codes.report import print_report

    print_report(args.folder, args.catalog)


def _gateway(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description="Serve the tools of many MCP servers as two, find_tools and call_tool, on standard input and output."
    )
    parser.add_argument("config", help="the servers: an mcp.json as Claude Desktop, Cursor and VS Code have it")
    parser.add_argument("--model", help="an aligned model that finds the tools (default: search by words and meaning)")
    parser.add_argument("--encoder", help="sentence-transformers model of the search (default: a small one)")
    parser.add_argument("--port", type=int, help="serve by streamable HTTP at this port instead")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    parser.add_argument("--allow", nargs="+", default=["*"], metavar="TOOL", help="only these tools, such as 'git.*'")
    parser.add_argument("--direct", nargs="+", default=[], metavar="TOOL", help="tools to list as they are, too")
    parser.add_argument("--time-limit", type=float, default=60.0, help="seconds for a call (default: 60)")
    parser.add_argument("--pin", action="store_true", help="hold back tools that changed since they were approved")
    parser.add_argument("--approve", action="store_true", help="approve all tools as they are now, and end")
    parser.add_argument("--log", metavar="FOLDER", help="write queries, calls and outcomes there as trajectories")
    parser.add_argument(
        "--redact", action="store_true", help="leave the values of arguments and the results out of the log"
    )
    parser.add_argument("--cache-dir", help="folder for approvals and embeddings (default: ~/.cache/toolweaver)")
    args = parser.parse_args(argv)
    from .agent.run_gateway import run_gateway

    run_gateway(**vars(args))


def _ui(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description="Show in the browser how tools are found: the code tree of a query, the ranked tools, a run of the "
        "agent, and a map of the tools."
    )
    parser.add_argument(
        "source", help="a model, learned codes or a catalog: a folder, a repository of the Hub, a file"
    )
    parser.add_argument("--port", type=int, help="port on this machine (default: the first free one from 7860 on)")
    args = parser.parse_args(argv)
    from .ui.page import run_ui

    run_ui(args.source, args.port)


def _serve_tools(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description="Serve recorded and simulated answers of tools over MCP.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--catalog", required=True, help="the catalog's file")
    parser.add_argument("--recordings", help="recorded answers (JSONL), to which a model's are added")
    parser.add_argument("--trajectories", help="trajectories whose observations are recorded answers, too")
    parser.add_argument("--model", help="chat model that makes up what is not recorded, in place of the schemas")
    parser.add_argument("--url", help="OpenAI-compatible endpoint of the model, by default OpenAI's")
    parser.add_argument("--seed", type=int, default=0, help="seed of what is made up")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8765, help="port to listen on")
    args = parser.parse_args(argv)
    from .evaluation.simulated_tools import serve_tools

    serve_tools(**vars(args))


def _compare(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description="Compare runs of `toolweaver evaluate` on the same queries with the first of them."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folder of a run")
    parser.add_argument("--output_dir", help="folder for metrics.json, results.md and results.png")
    args = parser.parse_args(argv)
    from .evaluation.runs import print_comparison

    print_comparison(args.runs, args.output_dir)


def _push(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Push codes, an aligned model, a tokenizer or a dataset to the Hub.")
    parser.add_argument("folder", help="the folder to push")
    parser.add_argument("repo_id", help="the repository, user/name; it is made where it does not exist")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--revision", help="branch to push to")
    parser.add_argument("--token", help="token to authenticate with (default: the one of `hf auth login`)")
    parser.add_argument("--commit-message", help="first line of the commit")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    parser.add_argument("--license", help="for the card: identifier of the license")
    parser.add_argument("--datasets", nargs="+", help="for the card: datasets that the model was trained on")
    parser.add_argument(
        "--space", action="store_true", help="also push a Space of this name that shows it in the browser"
    )
    args = parser.parse_args(argv)
    if args.space and (args.revision or args.create_pr):
        parser.error("--space shows what is on the main branch: push without --revision and --create-pr")
    from .hub.artifacts import push_folder

    options = vars(args)
    space = options.pop("space")
    commit = push_folder(**options)
    print(f"Pushed: {commit.pr_url or commit.commit_url}")
    if space:
        from .hub.space import push_space

        repository = commit.repo_url
        shown = push_space(
            repository.repo_id,
            dataset=repository.repo_type == "dataset",
            private=args.private,
            token=args.token,
            license=args.license,
        )
        print(f"Pushed: {shown.commit_url}")


COMMANDS = {
    "quickstart": (_recipe("quickstart"), "run the whole method on the demo catalog, or on your own data"),
    "align": (_recipe("align"), "go from a catalog to an aligned model in one command"),
    "queries": (_recipe("queries"), "write training queries for a catalog that has none"),
    "tokenize": (_recipe("tokenize_tools"), "learn the codes of a catalog's tools"),
    "inspect": (_inspect, "tell what is read of a catalog, or draw a report of learned codes"),
    "sft": (_recipe("sft"), "align a language model with the codes"),
    "fit-guidance": (_recipe("fit_guidance"), "fit the weights of guided decoding on held-out queries"),
    "evaluate": (_recipe("evaluate"), "measure retrieval next to BM25 and a dense encoder"),
    "evaluate-agent": (_recipe("evaluate_agent"), "measure what an agent does, with a judge or without"),
    "gateway": (_gateway, "serve the tools of many MCP servers as two that find and call them"),
    "serve-tools": (_serve_tools, "serve recorded and simulated answers of tools over MCP"),
    "ui": (_ui, "show in the browser how tools are found and what the agent does"),
    "compare": (_compare, "put the evaluations of several models in one table"),
    "push": (_push, "push what a step has made to the Hugging Face Hub, with its card"),
}


def main(argv: list[str] | None = None) -> None:
    """Hand the arguments on to the sub-command that is named first."""
    parser = argparse.ArgumentParser(
        prog="toolweaver",
        description="Hierarchical tool codes for large language models.",
        epilog="commands:\n"
        + "\n".join(f"  {name:<16}{text}" for name, (_, text) in COMMANDS.items())
        + "\n\n'toolweaver COMMAND --help' shows the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="what to do")
    parser.add_argument("options", nargs=argparse.REMAINDER, metavar="...", help="options of the command")
    args = parser.parse_args(argv)
    sys.argv[0] = f"toolweaver {args.command}"  # the name that the command's own usage message shows
    command, _ = COMMANDS[args.command]
    run_command(lambda: command(args.options))


if __name__ == "__main__":
    main()
