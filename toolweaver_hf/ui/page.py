"""The page, made with Gradio: a query and its tools, an agent's run, and the map."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..agent.loop import ToolAgent
from ..agent.run import AgentRun
from .drawing import draw_header, draw_legend, draw_map, draw_run, draw_tools, draw_tree
from .explorer import ToolExplorer, no_function


if TYPE_CHECKING:
    import gradio as gr


Message = dict[str, Any]

STYLE = Path(__file__).with_name("style.css")
NOTES = {
    "max_steps": "Stopped: the run reached its largest number of turns.",
    "max_tokens": "Stopped: the turn reached its largest number of tokens.",
}


def run_ui(source: str | os.PathLike, port: int | None = None) -> None:
    """Serve the page of an artifact until it is interrupted.

    It listens on this machine alone, unless the environment variable `GRADIO_SERVER_NAME` has another address, as in a
    Space.

    Args:
        source (`str`): A folder, a repository of the Hub, or a catalog's file, as for [`ToolExplorer.open`].
        port (`int`, *optional*): The port. Defaults to the first free one from 7860 on.

    Raises:
        `ValueError`: if `gradio` is not installed, or a file is not valid.
        `OSError`: if there is nothing to open, or the port is in use.
    """
    if find_spec("gradio") is None:
        raise ValueError('the page needs the gradio package: pip install "toolweaver-hf[ui]"')
    title = "/".join(Path(source).parts[-2:])
    page = build_page(ToolExplorer.open(source), title)
    print(f"{title} is shown at {launch_page(page, port)}", flush=True)
    page.block_thread()


def launch_page(page: gr.Blocks, port: int | None = None) -> str:
    """Serve a page in the background and return its address."""
    import gradio as gr

    plain = ("ui-sans-serif", "system-ui", "sans-serif")  # no fonts from another server
    theme = gr.themes.Base(
        primary_hue="emerald", neutral_hue="slate", font=plain, font_mono=("ui-monospace", "Consolas", "monospace")
    )
    _, address, _ = page.launch(
        server_port=port,
        prevent_thread_lock=True,
        theme=theme,
        css_paths=STYLE,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        share=False,
        quiet=True,
    )
    return address


def build_page(explorer: ToolExplorer, title: str) -> gr.Blocks:
    """Make the page.

    Args:
        explorer ([`ToolExplorer`]): What it shows.
        title (`str`): Its heading.

    Returns:
        `gradio.Blocks`
    """
    import gradio as gr

    # The model serves one visitor at a time.
    shared: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model", "api_visibility": "private"}

    def find(query: str) -> tuple[str, str, str]:
        if not query.strip():
            return "", "", draw_map(explorer)
        found = explorer.explain(query)
        return draw_tree(found, explorer), draw_tools(found, explorer.measures), draw_map(explorer, found)

    with gr.Blocks(title=f"{title} · ToolWeaver", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(draw_header(title, explorer))
        with gr.Tab("Find tools"):
            query = gr.Textbox(
                label="Query",
                placeholder="What do you want to do?",
                submit_btn="Find tools",
                max_lines=3,
                elem_id="query",
            )
            gr.HTML(draw_legend(explorer.measures))
            tree = gr.HTML(elem_id="tree")
            tools = gr.HTML(elem_id="tools")
        with gr.Tab("Agent"):
            _add_agent(explorer, shared)
        with gr.Tab("Map"):
            places = gr.HTML(draw_map(explorer), elem_id="map")
        query.submit(find, query, [tree, tools, places], **shared)
    return page


def _add_agent(explorer: ToolExplorer, shared: Mapping[str, Any]) -> None:
    import gradio as gr

    agent = explorer.agent
    if agent is None:
        gr.HTML(
            '<p class="tw-note">There is no agent here: open a model that was aligned with trajectories '
            "(<code>toolweaver sft --stages trajectory</code>).</p>"
        )
        return

    def ask(messages: list[Message]) -> gr.Textbox:
        tool_id = waits_for(agent, messages)
        if tool_id is None:
            return gr.Textbox(label="Message", placeholder="Ask the agent to do something")
        return gr.Textbox(label=f"Result of {tool_id}", placeholder="Text or JSON")

    def talk(text: str, messages: list[Message]) -> Iterator[tuple[Any, ...]]:
        for so_far, draft, note in converse(agent, messages, text):
            yield so_far, draw_run(so_far, explorer, draft, note)

    run = gr.HTML(draw_run([], explorer), elem_id="run")
    messages = gr.State([])
    text = gr.Textbox(
        label="Message", placeholder="Ask the agent to do something", submit_btn="Send", max_lines=6, elem_id="message"
    )
    again = gr.Button("New conversation", size="sm")
    private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    said = gr.State("")
    sent = text.submit(lambda text: (text, ""), text, [said, text], **private)
    answered = sent.then(talk, [said, messages], [messages, run], **shared, show_progress="minimal")
    answered.then(ask, messages, text, **private)
    again.click(
        lambda: ([], draw_run([], explorer), ask([])), None, [messages, run, text], cancels=[answered], **private
    )


def waits_for(agent: ToolAgent, messages: list[Message]) -> str | None:
    """Return the tool whose result the user is asked for: the last one called, if it has no function."""
    calls = messages[-1].get("tool_calls") if messages else None
    tool_id = calls[0]["function"]["name"] if calls else None
    return tool_id if tool_id is not None and agent.functions[tool_id] is no_function else None


def converse(agent: ToolAgent, messages: list[Message], text: str) -> Iterator[tuple[list[Message], str, str]]:
    """Go on with a conversation until the agent has answered, or has called a tool that has no function.

    Args:
        agent ([`ToolAgent`]): The agent.
        messages (`list[dict]`): The conversation so far.
        text (`str`): What the user says or, where a tool waits for it, the tool's result.

    Yields:
        `tuple`: the messages, the text of the turn that is being generated, and a note for the user.
    """
    if not text.strip():
        yield messages, "", ""
        return
    messages = [*messages, {"role": "user" if waits_for(agent, messages) is None else "tool", "content": text}]
    yield messages, "", ""
    run, draft = AgentRun(), ""
    events = agent.stream(messages, run, stream_tokens=True)
    next(events)  # the message that is there already
    for event in events:
        if isinstance(event, str):
            draft += event
        else:
            messages, draft = [*messages, event], ""
        tool_id = waits_for(agent, messages)
        if tool_id is not None:
            yield messages, "", f"{tool_id} has no function here. What is its result?"
            return
        yield messages, draft, ""
    yield messages, "", NOTES.get(run.stop_reason, "")
