"""The `toolweaver` command: a sub-command for every step."""

import argparse
import importlib
import sys
from collections.abc import Callable


COMMANDS = {
    "quickstart": (
        "toolweaver_hf.recipes.quickstart",
        "run the whole method on the demo catalog, or on your own data",
    ),
    "tokenize": ("toolweaver_hf.recipes.tokenize_tools", "learn the codes of a catalog's tools"),
    "inspect": ("toolweaver_hf.codes.report", "draw a report of learned codes"),
    "sft": ("toolweaver_hf.recipes.sft", "align a language model with the codes"),
    "evaluate": ("toolweaver_hf.recipes.evaluate", "measure retrieval next to BM25 and a dense encoder"),
    "evaluate-agent": ("toolweaver_hf.recipes.evaluate_agent", "measure what an agent does, with a judge or without"),
    "serve-tools": (
        "toolweaver_hf.evaluation.simulated_tools",
        "serve recorded and simulated answers of tools over MCP",
    ),
    "compare": ("toolweaver_hf.evaluation.runs", "put the evaluations of several models in one table"),
    "push": ("toolweaver_hf.hub.artifacts", "push what a step has made to the Hugging Face Hub, with its card"),
}


def run_command(command: Callable[[], None]) -> None:
    """Run a command; bad input (`ValueError`, `OSError`) ends it with one line on stderr and exit status 2."""
    try:
        command()
    except (ValueError, OSError) as error:
        from transformers.utils import logging

        logging.get_logger(__name__).debug("the error's origin", exc_info=True)
        print(f"toolweaver: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


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
    module = importlib.import_module(COMMANDS[args.command][0])
    run_command(lambda: module.cli(args.options))


if __name__ == "__main__":
    main()
