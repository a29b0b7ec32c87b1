"""Plans as interactive Plotly figures: one layer, a whole step, what lowering changed, a switch between policies.

Never imports torch. The policy switch is part of the figure, so that it works in an exported page without a kernel.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import groupby, zip_longest
from typing import NamedTuple

import pandas as pd
import plotly.graph_objects as go

from hybridlab import boxes, plots, times
from hybridlab.boxes import KIND_LOOKS, PATH_LOOKS, Box, Look
from hybridlab.errors import PlanError
from hybridlab.plan import Op, Plan

ORDER = "in execution order; a narrow box launches nothing (a view)"
SAME = {"unchanged": Look("#F0F0F0", "", "#444444")}
ROOM = 14.0   # boxes of one launch side by side
VIEW = 0.42   # width of a box that launches nothing
GAP = 0.3     # between two modules
SAME_RUN = 1.8  # width of a run of operations that stay as they are
UNIT = 54     # px of a box of one launch
LINE = 50     # px from one line of boxes to the next
HIGH = 560    # px of all strips of a step, if that leaves each between 6 and 36
SHARE = 0.66  # of the width for the step where times stand beside it


@dataclass
class _Cursor:
    """Where the next box goes: lines filled from the left, as words fill them."""

    x: float = 0.0
    line: int = 0

    def make_room(self, width: float) -> None:
        """Start a new line if `width` does not fit on this one."""
        if self.x and self.x + width > ROOM:
            self.new_line()

    def new_line(self) -> None:
        self.x, self.line = 0.0, self.line + 1

    def take(self, width: float) -> float:
        """The left edge of a box of this width; the next one goes to its right."""
        self.make_room(width)
        self.x += width
        return self.x - width


def layer(plan: Plan, caption: str = "", layer: int = 0) -> go.Figure:
    """The operations of one decoder layer in execution order, line by line a module, coloured by kind.

    `caption` is added to what the plan says of itself. Raises `PlanError` for a layer that the plan does not hold.
    """
    found = _layer_ops(plan, layer)
    drawn, labels, lines, cursor = [], [], dict[float, str](), _Cursor(line=-1)
    for section, group in groupby(found, key=lambda op: _inside(op)[0]):
        cursor.new_line()
        lines[-cursor.line] = section
        for part, ops in groupby(group, key=lambda op: _inside(op)[1]):
            block = list(ops)
            cursor.make_room(sum(map(_width, block)))
            for op in block:
                x = cursor.take(_width(op))
                if op is block[0]:
                    labels.append((x, -cursor.line, boxes.fit(part, UNIT * sum(map(_width, block)), boxes.SMALL - 1)))
                drawn.append(Box(op.kind, x, _width(op), -cursor.line, _name(op), boxes.about(op)))
            cursor.x += GAP
    counts = boxes.listed(Counter(op.kind for op in found))
    figure = boxes.frame(f"Layer {layer}, operation by operation", _caption(plan, caption),
                         [f"{ORDER}; operations: {counts}"], LINE * (cursor.line + 1), left=215)
    boxes.draw(figure, drawn, KIND_LOOKS, 0.55)
    boxes.grid(figure, lines, cursor.line)
    figure.update_xaxes(range=[-0.1, ROOM])
    for x, y, text in labels:
        boxes.label(figure, x, y + 0.28, text)
    return figure


def before_after(before: Plan, after: Plan, caption: str = "", layer: int = 0) -> go.Figure:
    """One layer of two plans, one above the other: which operations vanish, appear or change kind.

    Operations that stay as they are, are one box a run. Raises `PlanError` for plans of different steps.
    """
    _require_one_step([before, after])
    columns = list(_aligned(_layer_ops(before, layer), _layer_ops(after, layer)))
    drawn, labels, cursor, last = [], [], _Cursor(), ""
    for column in columns:
        wide = SAME_RUN if column.same else max(map(_width, column.before + column.after))
        x = cursor.take(wide)
        y, module = -3 * cursor.line, "" if column.same else column.module
        labels += [(x, y, boxes.fit(module, 4 * UNIT, boxes.SMALL - 1))] if module not in ("", last) else []
        last = module
        for lane, side in enumerate((column.before, column.after)):
            if column.same:
                drawn.append(Box("unchanged", x, wide, y - lane, f"{len(side)} unchanged", boxes.summary(side)))
            else:
                drawn += [Box(op.kind, x, _width(op), y - lane, _name(op), boxes.about(op)) for op in side]
    notes = [f"before: {boxes.policy(before)}; after: {boxes.policy(after)}; {_outcome(columns)}", ORDER]
    figure = boxes.frame(f"Layer {layer} before and after lowering", _caption(after, caption), notes,
                         LINE * (3 * cursor.line + 2), left=80)
    boxes.draw(figure, drawn, KIND_LOOKS | SAME, 0.7)
    boxes.grid(figure, {-3 * line - lane: word for line in range(cursor.line + 1)
                        for lane, word in enumerate(("before", "after"))}, 3 * cursor.line + 1)
    figure.update_xaxes(range=[-0.1, ROOM])
    for x, y, text in labels:
        boxes.label(figure, x, y + 0.36, text)
    return figure


def step(plan: Plan, caption: str = "") -> go.Figure:
    """The whole step, a strip a layer, coloured by what runs it; a dark line is where a segment begins."""
    rows = _rows(plan)
    figure = boxes.frame("One step, segment by segment", _caption(plan, caption), [_note([plan])],
                         _row_px(rows) * len(rows), left=80)
    _strips(figure, plan, rows, boxes.plot_px(figure))
    _grid(figure, rows)
    return figure


def policies(plans: Mapping[str, Plan], measured: pd.DataFrame | None = None, caption: str = "") -> go.Figure:
    """A button a plan: the step as that policy has it and, beside it, launches and times of each arm.

    `measured`: see `times.Times`; its policies are the keys of `plans`. Raises `PlanError` for no plans, or for plans
    of different steps.
    """
    _require_one_step(list(plans.values()))
    panel = times.Times(measured, list(plans)) if measured is not None else None
    every = {name: _rows(plan) for name, plan in plans.items()}
    longest = max(every.values(), key=lambda rows: (len(rows), max(len(ops) for _, ops in rows)))
    first = next(iter(plans))
    figure = boxes.frame("One step, policy by policy", _caption(plans[first], caption),
                         [_note(list(plans.values())), *([panel.note] if panel else [])],
                         max(_row_px(longest) * len(longest), 240), left=80, above=40, below=75 if panel else 30)
    owners: list[str] = []
    for name, plan in plans.items():
        _strips(figure, plan, every[name], boxes.plot_px(figure) * (SHARE if panel else 1))
        if panel:
            panel.draw(figure, name)
        owners += [name] * (len(figure.data) - len(owners))
    _grid(figure, longest)
    if panel:
        panel.axes(figure, first, SHARE)
    _switch(figure, owners, {name: {"title.subtitle.text": plots.escape(_caption(plan, caption)),
                                    **(panel.layout(name) if panel else {})} for name, plan in plans.items()})
    return figure


def _switch(figure: go.Figure, owners: Sequence[str], layouts: Mapping[str, Mapping[str, object]]) -> None:
    """A row of buttons; each shows the traces that it owns and no other, the first at the beginning."""
    for trace, owner in zip(figure.data, owners, strict=True):
        trace.visible = owner == owners[0]
    figure.update_layout(updatemenus=[{
        "type": "buttons", "direction": "right", "showactive": True, "font": {"size": 12}, "pad": {"b": 30},
        "x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom", "buttons": [
            {"label": plots.escape(name), "method": "update",
             "args": [{"visible": [owner == name for owner in owners]}, dict(layout)]}
            for name, layout in layouts.items()]}])


class _Column(NamedTuple):
    """Operations of two plans that stand above each other: equal ones a run, others one of each at most."""

    before: list[Op]
    after: list[Op]
    same: bool

    @property
    def module(self) -> str:
        return ".".join(filter(None, _inside((self.before or self.after)[0])))


def _aligned(before: Sequence[Op], after: Sequence[Op]) -> Iterator[_Column]:
    """Each operation of both once, in order; one that stays but changes its kind stands above itself."""
    old_places, new_places = ([(op.module, op.op) for op in side] for side in (before, after))
    for tag, i, end, j, stop in SequenceMatcher(None, old_places, new_places, autojunk=False).get_opcodes():
        pairs = zip_longest(before[i:end], after[j:stop])
        for same, group in groupby(pairs, key=lambda two: tag == "equal" and two[0].kind == two[1].kind):
            run = [([old] if old else [], [new] if new else []) for old, new in group]
            if same:
                yield _Column([old for (old,), _ in run], [new for _, (new,) in run], True)
            else:
                yield from (_Column(old, new, False) for old, new in run)


def _outcome(columns: Sequence[_Column]) -> str:
    changed = [column for column in columns if not column.same]
    kinds = sum(old.op == new.op for c in changed for old, new in zip(c.before, c.after, strict=False))
    gone, new = (sum(map(len, side)) - kinds for side in ([c.before for c in changed], [c.after for c in changed]))
    found = {"vanish": gone, "appear": new, "change kind": kinds}
    return f"operations: {boxes.listed({word: count for word, count in found.items() if count}) or 'none differ'}"


def _layer_ops(plan: Plan, layer: int) -> list[Op]:
    found = [op for op in plan.ops if op.layer == layer]
    if not found:
        known = sorted({op.layer for op in plan.ops if op.layer is not None})
        raise PlanError(f"there is no layer {layer}", f"{plan.model} has {len(known)}, counted from 0",
                        f"give 0 to {known[-1]}" if known else "give the plan of a decoder")
    return found


def _inside(op: Op) -> tuple[str, str]:
    """Where in its layer an operation is: ("self_attn", "q_proj"); the layer's own ones are in ("layers.0", "")."""
    parts = op.module.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    section = parts[at + 1] if len(parts) > at + 1 else ".".join(parts[max(at - 1, 0):])
    return section, ".".join(parts[at + 2:])


def _width(op: Op) -> float:
    return 1.0 if op.launches else VIEW


def _name(op: Op) -> str:
    return boxes.fit(boxes.short(op), UNIT * _width(op))


def _require_one_step(plans: Sequence[Plan]) -> None:
    if len({(plan.model, plan.phase, plan.length) for plan in plans}) != 1:
        raise PlanError("these plans are not of one step", "; ".join(map(boxes.describe, plans)) or "there are none",
                        "give plans of one model, phase and length")


def _caption(plan: Plan, caption: str) -> str:
    return boxes.describe(plan) + (f" · {caption}" if caption else "")


def _rows(plan: Plan) -> list[tuple[str, list[Op]]]:
    """The operations in strips: what precedes the layers, each layer, what follows the last one."""
    last = max((i for i, op in enumerate(plan.ops) if op.layer is not None), default=-1)
    rows: list[tuple[str, list[Op]]] = [("input", [])]
    for i, op in enumerate(plan.ops):
        name = "output" if i > last else rows[-1][0] if op.layer is None else f"layer {op.layer}"
        if name != rows[-1][0]:
            rows.append((name, []))
        rows[-1][1].append(op)
    return [row for row in rows if row[1]]


def _row_px(rows: Sequence[object]) -> int:
    return min(36, max(6, HIGH // len(rows)))


def _note(plans: Sequence[Plan]) -> str:
    sizes = sorted({len(plan.ops) for plan in plans})
    count = f"{sizes[0]:,}" + (f" to {sizes[-1]:,}" if len(sizes) > 1 else "")
    return f"{count} operations, each strip from left to right in execution order; hover: why it runs so"


def _strips(figure: go.Figure, plan: Plan, rows: Sequence[tuple[str, list[Op]]], px: float) -> None:
    """What runs each part of each row, where segments begin, and the operations that no graph can hold."""
    scale = px / max(len(ops) for _, ops in rows)
    reasons = {segment.name: segment.reason for segment in plan.segments}
    sizes = Counter(op.segment for op in plan.ops)
    cells, blocked, edges, before = [], [], list[tuple[float, float]](), ""
    for y, (row, ops) in enumerate(rows):
        x = 0
        for (segment, path), group in groupby(ops, key=lambda op: (op.segment, op.path)):
            part = list(group)
            edges += [(x, -y)] if segment != before else []
            hover = [f"<b>{plots.escape(segment)}</b>, runs {path}", *boxes.wrap(reasons.get(segment, "")),
                     f"{row}: {len(part)} of its {sizes[segment]:,} operations", boxes.costs(part)]
            name = segment if segment != before else f"↳ {segment}"  # it goes on from the row above
            room = len(part) * scale - 4 if _row_px(rows) >= boxes.SMALL + 3 else 0
            cells.append(Box(path, x, len(part), -y, boxes.whole(name, room), "<br>".join(hover)))
            x, before = x + len(part), segment
        blocked += [Box(op.kind, x, 1, -y - 0.33, "", boxes.about(op)) for x, op in enumerate(ops)
                    if op.kind == "host-dynamic"]
    boxes.draw(figure, cells, PATH_LOOKS, 0.84)
    boxes.draw(figure, blocked, KIND_LOOKS, 0.3)
    figure.add_scatter(x=[v for x, _ in edges for v in (x, x, None)], mode="lines", name="a segment begins",
                       y=[v for _, y in edges for v in (y - 0.47, y + 0.47, None)], hoverinfo="skip",
                       line={"color": "#000000", "width": 3}, showlegend=True)


def _grid(figure: go.Figure, rows: Sequence[tuple[str, list[Op]]]) -> None:
    every = -(-14 // _row_px(rows))  # rows from one name to the next, so that names do not touch
    boxes.grid(figure, {-float(y): name for y, (name, _) in enumerate(rows) if y % every == 0}, len(rows) - 1)
    figure.update_xaxes(range=[-0.3, max(len(ops) for _, ops in rows)])
