"""Pictures and lists of the page, as HTML and SVG. Every text of a tool, a query or a model is escaped."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from ..data.catalog import Tool
from .explorer import Branch, Explanation, FoundTool, ToolExplorer


ROW_HEIGHT, BOX_HEIGHT = 60, 48
TREE_WIDTH, ROOT_WIDTH, HEAD_HEIGHT = 930, 64, 34
MAP_SIZE = 640
MAX_DOTS = 4000
"""Of more tools, a map shows some and those that were found."""


def draw_header(title: str, explorer: ToolExplorer) -> str:
    """Say what was opened, and how its tools are ranked."""
    facts = [f"{len(explorer.tools):,} tools"]
    if explorer.codes is not None:
        facts.append(f"codebooks {' × '.join(map(str, explorer.codes.codebook_sizes))}")
    if explorer.measures == ("model", "expert", "product"):
        weight = explorer.retriever.text_expert.model_weight
        facts.append(f"product = model<sup>{weight:.2g}</sup> × text expert, normalized")
    else:
        facts.append("ranked by the model's codes" if "model" in explorer.measures else "search without a model")
    return f'<div class="tw-header"><h1>{escape(title)}</h1><p>{" · ".join(facts)}</p></div>'


def draw_legend(measures: Sequence[str]) -> str:
    """Name the colors of the measures."""
    keys = (f'<span><i class="tw-{name}"></i>{_said(name)}</span>' for name in measures)
    return f'<div class="tw-legend">{"".join(keys)}</div>'


def draw_tree(explanation: Explanation, explorer: ToolExplorer) -> str:
    """Draw the probable part of the code tree, level by level from left to right."""
    levels, measures = explanation.levels, explorer.measures
    if not levels:
        return (
            '<p class="tw-note">These tools have no codes, so there is no tree: <code>toolweaver tokenize</code> learns '
            "them.</p>"
        )
    rows = _rows(levels)
    height = HEAD_HEIGHT + ROW_HEIGHT * (1 + max((row for level in rows for row in level), default=0))
    box = min(320.0, max(196.0, (TREE_WIDTH - ROOT_WIDTH - 80 * (len(levels) - 1)) / len(levels)))
    gap = min(150.0, max(64.0, (TREE_WIDTH - ROOT_WIDTH - box * len(levels)) / max(1, len(levels) - 1)))
    lefts = [ROOT_WIDTH + level * (box + gap) for level in range(len(levels))]
    width = lefts[-1] + box + 2
    middles = [[HEAD_HEIGHT + ROW_HEIGHT * (row + 0.5) for row in level] for level in rows]
    root = middles[0][0] if middles[0] else HEAD_HEIGHT + ROW_HEIGHT / 2
    parts = [f'<text class="tw-axis" x="0" y="14">query</text><circle class="tw-root" cx="14" cy="{root:.1f}" r="8"/>']
    for level, (branches, size) in enumerate(zip(levels, explorer.codes.codebook_sizes, strict=True)):
        edges, boxes = [], []
        for branch, y in zip(branches, middles[level], strict=True):
            x, start = (lefts[level - 1] + box, middles[level - 1][branch.parent]) if level else (22, root)
            edges.append(_draw_edge(x, start, lefts[level], y, branch.probabilities[-1]))
            boxes.append(_draw_branch(branch, measures, lefts[level], y - BOX_HEIGHT / 2, box))
        parts.append(
            f'<g class="tw-level" style="animation-delay:{0.15 + 0.45 * level:.2f}s">'
            f'<text class="tw-axis" x="{lefts[level]:.0f}" y="14">level {level + 1} · {size:,} codes</text>'
            f"{''.join(edges)}{''.join(boxes)}</g>"
        )
    return (
        f'<div class="tw-tree"><svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="The code tree" '
        f'style="width:{width:.0f}px;height:{height:.0f}px">{"".join(parts)}</svg></div>'
    )


def _draw_edge(x: float, y: float, to_x: float, to_y: float, share: float) -> str:
    bend = (x + to_x) / 2
    return (
        f'<path class="tw-edge" d="M{x:.1f},{y:.1f} C{bend:.1f},{y:.1f} {bend:.1f},{to_y:.1f} {to_x:.1f},{to_y:.1f}" '
        f'stroke-width="{1 + 6 * share:.2f}" stroke-opacity="{0.2 + 0.8 * share:.2f}"/>'
    )


def _rows(levels: Sequence[Sequence[Branch]]) -> list[list[float]]:
    """Lay a tree out: a branch without children takes a row, one with children lies between them."""
    children: list[list[list[int]]] = [[[] for _ in level] for level in levels]
    for level in range(1, len(levels)):
        for place, branch in enumerate(levels[level]):
            children[level - 1][branch.parent].append(place)
    rows = [[0.0] * len(level) for level in levels]
    used = 0

    def lay_out(level: int, place: int) -> float:
        nonlocal used
        below = [lay_out(level + 1, child) for child in children[level][place]]
        if not below:
            below, used = [used], used + 1
        rows[level][place] = (below[0] + below[-1]) / 2
        return rows[level][place]

    for place in range(len(levels[0])):
        lay_out(0, place)
    return rows


def _draw_branch(branch: Branch, measures: Sequence[str], x: float, y: float, width: float) -> str:
    share = branch.probabilities[-1]
    beside = "" if branch.num_tools == 1 else f" · {branch.num_tools} tools"
    room = int((width - 22) / 6.7) - len(branch.token) - len(beside)
    label = escape(_shortened(branch.label, room) + beside)
    said = ", ".join(f"{_said(m)} {_percent(p)}" for m, p in zip(measures, branch.probabilities, strict=True))
    title = escape(f"{branch.token} {branch.label}, {branch.num_tools} tools: {said}")
    cell = (width - 20 + 8) / len(measures)
    bars = []
    for i, (measure, probability) in enumerate(zip(measures, branch.probabilities, strict=True)):
        left = x + 10 + i * cell
        bars.append(
            f'<text class="tw-number tw-text-{measure}" x="{left:.1f}" y="{y + 33:.1f}">{_percent(probability)}</text>'
            f'<rect class="tw-track" x="{left:.1f}" y="{y + 37:.1f}" width="{cell - 8:.1f}" height="4" rx="2"/>'
            f'<rect class="tw-fill-{measure}" x="{left:.1f}" y="{y + 37:.1f}" '
            f'width="{max(0.0, (cell - 8) * min(1.0, probability)):.1f}" height="4" rx="2"/>'
        )
    return (
        f'<g class="tw-node"><title>{title}</title>'
        f'<rect class="tw-box" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{BOX_HEIGHT}" rx="9"/>'
        f'<rect class="tw-glow" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{BOX_HEIGHT}" rx="9" '
        f'fill-opacity="{0.28 * share:.3f}" stroke-opacity="{min(1, 0.12 + share):.2f}"/>'
        f'<text class="tw-label" x="{x + 10:.1f}" y="{y + 17:.1f}"><tspan class="tw-token">{escape(branch.token)}</tspan> '
        f"{label}</text>{''.join(bars)}</g>"
    )


def draw_tools(explanation: Explanation, measures: Sequence[str]) -> str:
    """List the ranked tools, each with its schema to unfold."""
    if not explanation.tools:
        return '<p class="tw-note">No tool was found.</p>'
    items = (_draw_tool(rank, found, measures) for rank, found in enumerate(explanation.tools, 1))
    return f'<div class="tw-tools">{"".join(items)}</div>'


def _draw_tool(rank: int, found: FoundTool, measures: Sequence[str]) -> str:
    tool = found.tool
    bars = "".join(
        f'<span class="tw-bar" title="{_said(measure)}"><i class="tw-{measure}" style="width:{100 * min(1, p):.1f}%"></i>'
        f"<b>{_percent(p)}</b></span>"
        for measure, p in zip(measures, found.probabilities, strict=True)
    )
    code = "" if found.code is None else f'<code class="tw-code">{escape(found.code)}</code>'
    return (
        f'<details class="tw-tool"><summary><span class="tw-rank">{rank}</span><span class="tw-main">'
        f'<span class="tw-name"><strong>{escape(tool.name)}</strong>{code}</span>'
        f'<span class="tw-about">{escape(_shortened(tool.description, 160))}</span>'
        f'<span class="tw-arguments">{_draw_arguments(tool)}</span></span>'
        f'<span class="tw-bars">{bars}</span></summary>{_draw_schema(tool)}</details>'
    )


def _draw_arguments(tool: Tool) -> str:
    required = tool.parameters.get("required")
    required = required if isinstance(required, list) else []
    names = [
        f'<span class="{"tw-required" if name in required else ""}">{escape(_shortened(name, 30))}</span>'
        for name in tool.parameters.get("properties", {})
    ]
    more = [f"<span>+{len(names) - 6}</span>"] if len(names) > 6 else []
    return "".join(names[:6] + more) or "<span>no arguments</span>"


def _draw_schema(tool: Tool) -> str:
    schema = json.dumps(tool.parameters, indent=2, ensure_ascii=False)
    about = f"<p>{escape(tool.description)}</p>" if len(tool.description) > 160 else ""
    identity = f"<p>id <code>{escape(tool.id)}</code>{' · ' + escape(tool.category) if tool.category else ''}</p>"
    return f'<div class="tw-schema">{about}{identity}<pre>{escape(schema)}</pre></div>'


def draw_map(explorer: ToolExplorer, explanation: Explanation | None = None) -> str:
    """Draw the tools by meaning, colored by their first code, with the query and what it found."""
    if explorer.positions is None:
        return '<p class="tw-note">There are no embeddings to place the tools by.</p>'
    places = 24 + (MAP_SIZE - 48) * np.stack([explorer.positions[:, 0], 1 - explorer.positions[:, 1]], axis=1)
    hues = _hues(explorer)
    row_of_tool = {tool.id: row for row, tool in enumerate(explorer.tools)}
    dots = []
    for row in range(0, len(places), -(-len(places) // MAX_DOTS)):
        (x, y), tool = places[row], explorer.tools[row]
        title = escape(f"{tool.name} {explorer.code_of(tool.id) or ''}\n{_shortened(tool.description, 120)}")
        dots.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{_color(hues, explorer.groups[row])}"><title>{title}</title></circle>'
        )
    found = ""
    if explanation is not None:
        rows = [row_of_tool[one.tool.id] for one in explanation.tools]
        found = _draw_found(explanation, [tuple(places[row]) for row in rows])
    names = _draw_names(explorer, places) if explanation is None else ""
    faded = " tw-faded" if explanation is not None else ""
    return (
        f'<div class="tw-map"><svg viewBox="0 0 {MAP_SIZE} {MAP_SIZE}" role="img" aria-label="Map of the tools">'
        f'<g class="tw-dots{faded}">{"".join(dots)}</g>{names}{found}</svg></div>'
    )


def _draw_found(explanation: Explanation, places: Sequence[tuple[float, float]]) -> str:
    lines, rings, names = [], [], []
    for (x, y), one in zip(places, explanation.tools, strict=True):
        share = one.probabilities[-1]
        if explanation.place is not None:
            qx, qy = _on_map(explanation.place)
            lines.append(
                f'<line class="tw-edge" x1="{qx:.1f}" y1="{qy:.1f}" x2="{x:.1f}" y2="{y:.1f}" '
                f'stroke-width="{1 + 3 * share:.2f}" stroke-opacity="{0.15 + 0.85 * share:.2f}"/>'
            )
        rings.append(f'<circle class="tw-ring" cx="{x:.1f}" cy="{y:.1f}" r="{6 + 8 * share**0.5:.1f}"/>')
        if share >= 0.0005:
            names.append((x, y - 12 - 8 * share**0.5, f"{one.tool.name} {_percent(share)}"))
    query = ""
    if explanation.place is not None:
        x, y = _on_map(explanation.place)
        query = f'<path class="tw-query" d="M{x},{y - 9} L{x + 9},{y} L{x},{y + 9} L{x - 9},{y} Z"/>'
        names.insert(0, (x, y - 14, "query"))
    return f"{''.join(lines)}{''.join(rings)}{query}{_draw_texts(names)}"


def _on_map(place: tuple[float, float]) -> tuple[float, float]:
    return 24 + (MAP_SIZE - 48) * place[0], 24 + (MAP_SIZE - 48) * (1 - place[1])


def _draw_names(explorer: ToolExplorer, places: np.ndarray) -> str:
    """Write the categories of the tools where most of them lie; without categories, a tool of each large group."""
    groups: dict[str, list[int]] = {}
    for row, tool in enumerate(explorer.tools):
        groups.setdefault(tool.category or f"{explorer.groups[row]}", []).append(row)
    names = []
    for group, rows in sorted(groups.items(), key=lambda one: -len(one[1]))[:14]:
        x, y = np.median(places[rows], axis=0)
        names.append((x, y, group if explorer.tools[rows[0]].category else explorer.tools[rows[0]].name))
    return _draw_texts(names, "tw-region")


def _draw_texts(texts: Sequence[tuple[float, float, str]], css_class: str = "tw-place") -> str:
    """Write texts around places, those first that come first; one that would cover another is left out."""
    written: list[tuple[float, float, float]] = []
    parts = []
    for x, y, text in texts:
        text = _shortened(text, 34)
        half = 3.8 * len(text)
        x = min(max(x, half + 4), MAP_SIZE - half - 4)
        y = max(y, 14)
        if all(abs(x - a) > half + b or abs(y - c) > 15 for a, c, b in written):
            written.append((x, y, half))
            parts.append(f'<text class="{css_class}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>')
    return "".join(parts)


def _hues(explorer: ToolExplorer) -> Mapping[int, float]:
    """Give the first codes hues by the direction in which their tools lie, so that neighbors are alike."""
    groups = [int(group) for group in np.unique(explorer.groups) if group >= 0]
    centers = [explorer.positions[explorer.groups == group].mean(0) - 0.5 for group in groups]
    angles = [float(np.arctan2(y, x)) for x, y in centers]
    order = np.argsort(angles, kind="stable").tolist()
    return {groups[place]: 360 * rank / len(groups) for rank, place in enumerate(order)}


def _color(hues: Mapping[int, float], group: int) -> str:
    return f"hsl({hues[int(group)]:.0f} 62% 52%)" if int(group) in hues else "hsl(215 12% 60%)"


def draw_run(messages: Sequence[Mapping[str, Any]], explorer: ToolExplorer, draft: str = "", note: str = "") -> str:
    """Draw a conversation turn by turn: thoughts, calls with their codes and arguments, results, answers.

    Args:
        messages (`Sequence[Mapping]`): The conversation.
        explorer ([`ToolExplorer`]): Knows the tools' codes.
        draft (`str`, *optional*): What the agent has generated of its next turn.
        note (`str`, *optional*): A line below.
    """
    parts = []
    for message in messages:
        if message["role"] == "user":
            parts.append(f'<div class="tw-turn tw-user"><span>you</span><p>{escape(message["content"])}</p></div>')
        elif message["role"] == "tool":
            parts.append(
                f'<div class="tw-turn tw-result"><span>result</span><pre>{escape(_pretty(message["content"]))}</pre></div>'
            )
        elif message["role"] == "assistant":
            parts.append(_draw_assistant(message, explorer))
    if draft:
        parts.append(f'<div class="tw-turn tw-draft"><span>agent</span><p>{escape(draft)}</p></div>')
    if note:
        parts.append(f'<p class="tw-note">{escape(note)}</p>')
    return f'<div class="tw-run">{"".join(parts)}</div>'


def _draw_assistant(message: Mapping[str, Any], explorer: ToolExplorer) -> str:
    said = [message.get("reasoning_content"), message.get("content")]
    calls = message.get("tool_calls") or ()
    kind = "thought" if calls else "answer"
    parts = [f"<p>{escape(text)}</p>" for text in said if text]
    for call in calls:
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        code = explorer.code_of(name)
        parts.append(
            f'<div class="tw-call"><strong>{escape(name)}</strong>'
            f"{'' if code is None else f'<code class=tw-code>{escape(code)}</code>'}"
            f"<pre>{escape(json.dumps(arguments, indent=2, ensure_ascii=False))}</pre></div>"
        )
    return f'<div class="tw-turn tw-{kind}"><span>{"agent" if calls else "answer"}</span>{"".join(parts)}</div>'


def _pretty(text: str) -> str:
    try:
        return json.dumps(json.loads(text), indent=2, ensure_ascii=False)
    except (ValueError, RecursionError):
        return text


def _said(measure: str) -> str:
    return "text expert" if measure == "expert" else measure


def _percent(probability: float) -> str:
    if probability <= 0:
        return "–"
    return f"{100 * probability:.0f}%" if 0.0995 <= probability < 0.995 else f"{100 * probability:.1f}%"


def _shortened(text: str, length: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: max(1, length - 1)].rstrip() + "…"
