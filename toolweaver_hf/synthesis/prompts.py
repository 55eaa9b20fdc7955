"""What a language model is asked, so that it writes what people would ask for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..data.catalog import Tool
from ..text_expert import spell_out


PROMPT_VERSION = 2
MAX_DOCUMENT_CHARS = 500
"""How much of a tool's document is shown: what it does comes first, and a small model loses the thread of more."""

INSTRUCTIONS = """\
You write what people type to an assistant. You are shown a tool. Write one message of somebody who needs it but has \
never heard of it: name the need and made-up concrete details, never the tool."""
SET_INSTRUCTIONS = """\
You write what people type to an assistant. You are shown several tools. Write one message of somebody whose errand \
needs every one of them but who has never heard of them: name the needs and made-up concrete details, never the tools."""


class Style(NamedTuple):
    """A way to ask: the tier of how vague it is, and how a model is told of it."""

    tier: str
    request: str


STYLES = {
    "request": Style("paraphrase", "a plain request with concrete details"),
    "vague": Style("vague need", "only the situation, without saying what is to be done"),
    "keywords": Style("exact words", "a few words, as typed into a search box"),
    "casual": Style("paraphrase", "casual, lower case, in other words than the tool's"),
}
"""The styles by name. A tool's queries take turns through them."""

# Three examples of each style: tools that hardly any catalog has, so that their words do not leak into its queries.
EXAMPLES = (
    (
        "Travel. convert_money: Convert an amount from one currency to another. Parameters: amount, from, to.",
        {
            "request": "How many euros do I get for 250 Swiss francs?",
            "vague": "The hotel in Zurich wants 250 francs and I only have euros on me.",
            "keywords": "250 CHF in EUR",
            "casual": "whats 250 swiss francs worth over here",
        },
    ),
    (
        "street_noise: Measure how loud a street is by day and by night. Parameters: street, city.",
        {
            "request": "Is Elm Street in Leeds quiet enough at night to sleep with the window open?",
            "vague": "We might move to Elm Street in Leeds, but our baby wakes up from every car.",
            "keywords": "noise at night Elm Street Leeds",
            "casual": "hey, will traffic keep me awake on elm street, leeds?",
        },
    ),
    (
        "Kitchen. find_recipe: Find dishes that use up given ingredients. Parameters: ingredients, max_minutes.",
        {
            "request": "What can I cook from eggs, spinach and leftover rice in half an hour?",
            "vague": "There are only eggs, spinach and old rice in the fridge and my guests come at seven.",
            "keywords": "dishes with eggs spinach rice",
            "casual": "got eggs, spinach and some rice, ideas for dinner?",
        },
    ),
)
SET_EXAMPLES = (
    (
        [EXAMPLES[0][0], "hotel_search: Find a free hotel room. Parameters: city, nights."],
        {
            "request": "Find me a hotel in Zurich for two nights and tell me what 400 euros are in francs.",
            "vague": "I'll be in Zurich for two nights with 400 euros in my pocket and nowhere to stay.",
            "keywords": "hotel Zurich 2 nights, 400 EUR in CHF",
            "casual": "need somewhere to sleep in zurich for 2 nights, and whats 400 euros in francs?",
        },
    ),
    (
        [EXAMPLES[1][0], "find_flat: Search flats for rent. Parameters: city, max_rent."],
        {
            "request": "Which flats in Leeds are under 900 pounds, and is Elm Street quiet at night?",
            "vague": "We have 900 pounds a month for Leeds, maybe on Elm Street, but our baby wakes up from every car.",
            "keywords": "flats Leeds under 900, noise Elm Street",
            "casual": "looking for a place in leeds, 900 tops, is elm street loud?",
        },
    ),
    (
        [EXAMPLES[2][0], "set_timer: Ring after some minutes. Parameters: minutes."],
        {
            "request": "What can I make from eggs and spinach? And let it ring in 25 minutes.",
            "vague": "Eggs and spinach is all I have, and I always forget what is on the stove after 25 minutes.",
            "keywords": "dish eggs spinach, alarm 25 minutes",
            "casual": "dinner from eggs and spinach pls, and ping me in 25 min",
        },
    ),
)


def query_messages(tools: Sequence[Tool], style: str) -> list[dict[str, str]]:
    """Return the conversation that asks for one query.

    Args:
        tools (`Sequence[Tool]`): The tools that the query is to need, one or several.
        style (`str`): One of [`STYLES`].

    Returns:
        `list[dict]`: the instructions, three examples and the tools, of which only the last message differs from tool
        to tool.
    """
    messages = [{"role": "system", "content": SET_INSTRUCTIONS if len(tools) > 1 else INSTRUCTIONS}]
    examples = SET_EXAMPLES if len(tools) > 1 else [([document], texts) for document, texts in EXAMPLES]
    for documents, texts in examples:
        messages.append({"role": "user", "content": _question(documents, style)})
        messages.append({"role": "assistant", "content": texts[style]})
    messages.append({"role": "user", "content": _question([_shown(tool) for tool in tools], style)})
    return messages


def _shown(tool: Tool) -> str:
    """Return a tool's document with the words of its name, without its server's: small models repeat an identifier, and
    lose the thread of one that is no word."""
    return tool.document.replace(tool.name, spell_out(tool.name.rpartition(".")[2]), 1)


def _question(documents: Sequence[str], style: str) -> str:
    shown = "\n".join(f"Tool: {document[:MAX_DOCUMENT_CHARS]}" for document in documents)
    return f"{shown}\nMessage ({STYLES[style].request}):"
