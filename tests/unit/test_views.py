"""Views of plans: every operation is drawn, text from outside stays text, and the switch shows one policy at a time."""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pandas as pd
import pytest

from hybridlab import looks, static, times, views
from hybridlab.boxes import KIND_LOOKS, PATH_LOOKS
from hybridlab.config import Policy, policy
from hybridlab.errors import HybridlabError, PlanError, StatisticsError
from hybridlab.plan import Op, Plan
from hybridlab.policies import assign

HOSTILE = '<script>alert(1)</script> $x$ <a href="javascript:alert(2)">'
INSIDE = [("input_layernorm", "rsqrt", 1), ("self_attn.q_proj", "t", 0), ("self_attn.q_proj", "mm", 1),
          ("self_attn", "cat", 1), ("self_attn", "cat", 1), ("self_attn", "_scaled_dot_product_attention", 1),
          ("self_attn.o_proj", "mm", 1), ("mlp.act_fn", "silu", 1), ("mlp", "mul", 1), ("", "add", 1)]


def op(number, module, name, layer, launches=1, kind="static", reason="same shapes"):
    full = f"{'hybridlab' if name in ('advance', 'attend', 'sample') else 'aten'}.{name}.default"
    return Op(f"{name}_{number}", full, layer, module, kind, reason, "[1, 8]", 16, 64, launches)


def stock(layers=2, model="tiny", extra=0):
    """A stock step: two operations before the layers, ten in each, two behind; `extra` more in each layer's mlp."""
    made = [("embed_tokens", "embedding", None, 1), ("rotary_emb", "cos", None, 1)]
    made += [(f"model.layers.{n}.{inside}".rstrip("."), name, n, launches) for n in range(layers)
             for inside, name, launches in [*INSIDE, *[("mlp", "relu", 1)] * extra]]
    made += [("norm", "mul", None, 1), ("lm_head", "mm", None, 1)]
    ops = []
    for number, (module, name, layer, launches) in enumerate(made):
        dynamic = name == "cat" or "attention" in name
        ops.append(op(number, module, name, layer, launches, "host-dynamic" if dynamic else "static",
                      "shape holds S" if dynamic else "same shapes"))
    return Plan(model, "decode", None, 64, tuple(replace(o, segment="step") for o in ops), ())


def lowered(name="whole", layers=2, model="tiny", extra=0):
    """The same step lowered: one `attend` for cat, cat and attention, and operations before and behind."""
    ops = [op("x", "", "advance", None, kind="device-dynamic")]
    for o in stock(layers, model, extra).ops:
        if o.short == "mul" and o.layer is not None:
            o = replace(o, kind="device-dynamic")
        if o.kind != "host-dynamic":
            ops.append(replace(o, segment="", path="eager"))
        elif o.short != "cat":
            ops.append(op(o.name, o.module, "attend", o.layer, kind="device-dynamic", reason="reads the position"))
    ops.append(op("y", "", "sample", None, kind="device-dynamic"))
    wanted = policy(name)
    return Plan(model, "decode", wanted, 64, *assign(ops, wanted))


def bars(figure, shown_only=True):
    return [t for t in figure.data if t.type == "bar" and (t.visible is not False or not shown_only)]


def hovers(figure):
    return [text for trace in bars(figure, shown_only=False) for text in trace.customdata]


def table(**changes):
    """Times of four arms under three policies; eager and jit count for each."""
    cells = (("eager", [None]), ("graph", ["whole", "full"]), ("jit", [""]), ("hybrid", ["piecewise", "whole", "full"]))
    rows = pd.DataFrame([{"arm": arm, "policy": name} for arm, names in cells for name in names])
    return rows.assign(**{"launches": 3, "predicted_ms": 1.0, "measured_ms": 1.1, "low": 1.0, "high": 1.2, "n": 90}
                       | changes)


PLANS = {name: lowered(name) for name in ("piecewise", "whole", "full")}


# ---- one layer ------------------------------------------------------------------------------------------------------

def test_a_layer_shows_each_of_its_operations_once_in_order_by_kind():
    """An operation that is missing, or coloured as another kind, is a wrong answer to the one question of the view."""
    plan = stock()
    figure = views.layer(plan, layer=1)
    drawn = [(-y, x, trace.name, text) for trace in bars(figure)
             for x, y, text in zip(trace.base, trace.y, trace.customdata, strict=True)]
    mine = [o for o in plan.ops if o.layer == 1]
    assert [(kind, text.split("<br>")[0]) for _, _, kind, text in sorted(drawn)] == [
        (o.kind, f"<b>{o.op}</b>") for o in mine]
    assert {t.name: (t.marker.color, t.marker.pattern.shape) for t in bars(figure)} == {
        kind: KIND_LOOKS[kind][:2] for kind in ("static", "host-dynamic")}


def test_boxes_of_a_line_do_not_overlap():
    """A box that hides another would make an operation unseen though it is in the data."""
    for figure in (views.layer(stock(extra=40)), views.before_after(stock(extra=40), lowered(extra=3))):
        lines = {}
        for trace in bars(figure):
            for x, width, y in zip(trace.base, trace.x, trace.y, strict=True):
                lines.setdefault(y, []).append((x, x + width))
        for spans in lines.values():
            ordered = sorted(spans)
            assert all(end <= start + 1e-9 for (_, end), (start, _) in pairwise(ordered))
            assert ordered[-1][1] <= figure.layout.xaxis.range[1] + 1e-9
        assert min(lines) > figure.layout.yaxis.range[0]
        assert max(lines) < figure.layout.yaxis.range[1]


def test_kinds_and_paths_read_without_colour():
    """Colour alone leaves out who cannot tell these apart, and a print in grey; arms keep their own colours."""
    for kinds in (KIND_LOOKS, PATH_LOOKS):
        assert len({look.pattern for look in kinds.values()}) == len(kinds)
        assert len({look.colour for look in kinds.values()}) == len(kinds)
    assert not {look.colour for look in KIND_LOOKS.values()} & set(looks.COLOURS.values())


def test_a_layer_that_is_not_there_is_refused():
    """An empty picture would say that the layer has no operations."""
    with pytest.raises(PlanError, match="no layer 7"):
        views.layer(stock(), layer=7)


# ---- before and after -----------------------------------------------------------------------------------------------

def test_before_and_after_shows_what_the_diff_says():
    """A picture of the difference that disagrees with plan.diff() would be a second, wrong result."""
    before, after = stock(), lowered()
    figure = views.before_after(before, after)
    shown = {lane: Counter(text.split("<br>")[0][3:-4] for trace in bars(figure) if trace.name in KIND_LOOKS
                           for y, text in zip(trace.y, trace.customdata, strict=True) if -y % 3 == lane)
             for lane in (0, 1)}
    assert shown[0] == {"aten.cat.default": 2, "aten._scaled_dot_product_attention.default": 1, "aten.mul.default": 1}
    assert shown[1] == {"hybridlab.attend.default": 1, "aten.mul.default": 1}
    assert set(before.diff(after).query("layer == 0")["op"]) == set(shown[0] + shown[1])
    assert "operations: 3 vanish, 1 appear, 1 change kind" in figure.layout.annotations[0].text


def test_before_and_after_counts_every_operation():
    """Runs of equals are one box; none may fall out between two boxes."""
    before, after = stock(), lowered()
    figure = views.before_after(before, after)
    for lane, plan in ((0, before), (1, after)):
        count = 0
        for trace in bars(figure):
            for y, text in zip(trace.y, trace.text, strict=True):
                if -y % 3 == lane:
                    count += int(text.split()[0]) if trace.name == "unchanged" else 1
        assert count == sum(o.layer == 0 for o in plan.ops)


def test_a_plan_has_no_difference_from_itself():
    """A difference that is always there would not be one."""
    figure = views.before_after(stock(), stock())
    assert {trace.name for trace in bars(figure)} == {"unchanged"}
    assert "none differ" in figure.layout.annotations[0].text


def test_plans_of_two_steps_are_not_compared():
    """Two models side by side would be drawn as if lowering had made one from the other."""
    for other in (lowered(model="other"), replace(lowered(), length=65), replace(lowered(), phase="prefill")):
        with pytest.raises(PlanError, match="not of one step"):
            views.before_after(stock(), other)
        with pytest.raises(PlanError, match="not of one step"):
            views.policies({"a": lowered(), "b": other})
    with pytest.raises(PlanError, match="there are none"):
        views.policies({})


# ---- the whole step -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("plan", [stock(), *PLANS.values(), lowered().for_arm("jit")], ids=lambda plan: "")
def test_a_step_holds_every_operation_under_the_path_that_runs_it(plan):
    """A strip of the wrong length or colour would credit a graph with work that is launched from Python."""
    figure = views.step(plan)
    drawn = {trace.name: sum(trace.x) for trace in bars(figure) if trace.name in PATH_LOOKS}
    assert drawn == Counter(o.path for o in plan.ops)
    assert {t.name: t.marker.color for t in bars(figure) if t.name in PATH_LOOKS} == {
        path: PATH_LOOKS[path].colour for path in drawn}
    blocked = [trace for trace in bars(figure) if trace.name == "host-dynamic"]
    assert sum(len(trace.x) for trace in blocked) == plan.counts["host-dynamic"]
    (edges,) = [trace for trace in figure.data if trace.type == "scatter"]
    assert len(edges.x) == 3 * max(len(plan.segments), 1)


def test_policies_look_different():
    """The reason for the view: piecewise, whole and full are told apart by their segments."""
    texts = {name: [text for trace in bars(views.step(plan)) for text in trace.text] for name, plan in PLANS.items()}
    assert {"graph 0", "graph 1", "↳ graph 1", "graph 2"} <= set(texts["piecewise"])
    assert {"prepare", "graph", "↳ graph", "sample"} == set(texts["whole"])
    assert {"graph", "↳ graph"} == set(texts["full"])


def test_thirty_two_layers_stay_small_and_readable():
    """A page of tens of megabytes does not open; names of rows that touch cannot be read."""
    plans = {name: lowered(name, layers=32, extra=60) for name in PLANS}
    assert len(plans["full"].ops) > 2000
    figure = views.policies(plans, table())
    assert len(figure.to_json()) < 500_000
    assert len(views.layer(plans["full"]).to_json()) < 100_000
    assert len(figure.data) < 100
    assert figure.layout.height < 900
    deep = views.step(lowered(layers=120))
    rows = -min(y for trace in bars(deep) for y in trace.y) + 1
    plot = deep.layout.height - deep.layout.margin.t - deep.layout.margin.b
    assert plot / rows * (deep.layout.yaxis.tickvals[0] - deep.layout.yaxis.tickvals[1]) >= 12


# ---- the switch -----------------------------------------------------------------------------------------------------

def test_each_button_shows_its_policy_and_no_other():
    """A trace of another policy left on would show segments that this one has not."""
    figure = views.policies(PLANS, table())
    (menu,) = figure.layout.updatemenus
    assert [button.label for button in menu.buttons] == list(PLANS)
    masks = [button.args[0]["visible"] for button in menu.buttons]
    assert [list(mask) for mask in zip(*masks, strict=True)] == [
        [i == owner for i in range(3)] for owner in (next(n for n, on in enumerate(column) if on)
                                                     for column in zip(*masks, strict=True))]
    assert [trace.visible for trace in figure.data] == list(masks[0])
    for (name, plan), mask in zip(PLANS.items(), masks, strict=True):
        own = [trace for trace, on in zip(figure.data, mask, strict=True) if on and trace.type == "bar"]
        assert {trace.name: sum(trace.x) for trace in own} == Counter(o.path for o in plan.ops)
        subtitle = menu.buttons[list(PLANS).index(name)].args[1]["title.subtitle.text"]
        assert subtitle.endswith(f"policy {name}")


def test_the_panel_shows_the_table():
    """A point at another arm, or a policy's time under another policy's button, misleads where it matters most."""
    given = table()
    given["measured_ms"] = [float(i) for i in range(1, len(given) + 1)]
    given["launches"] = range(10, 10 + len(given))
    figure = views.policies(PLANS, given)
    (menu,) = figure.layout.updatemenus
    for name, button in zip(PLANS, menu.buttons, strict=True):
        own = given[(given["policy"] == name) | given["policy"].isin([None, ""])]
        points = {figure.layout.xaxis2.ticktext[trace.x[0]].split("<br>")[0]: trace.y[0]
                  for trace, on in zip(figure.data, button.args[0]["visible"], strict=True)
                  if on and trace.xaxis == "x2" and trace.error_y.array is not None}
        assert points == dict(zip(own["arm"], own["measured_ms"], strict=True))
        launches = dict(zip(own["arm"], own["launches"], strict=True))
        assert [text.split("<br>") for text in button.args[1]["xaxis2.ticktext"]] == [
            [arm, str(launches[arm])] if arm in launches else [arm] for arm in ("eager", "graph", "jit", "hybrid")]
    assert figure.layout.yaxis2.range[1] > given["measured_ms"].max()
    assert "(ms)" in figure.layout.yaxis2.title.text


@pytest.mark.parametrize("given", [table()[["arm", "policy"]], table(measured_ms=None, low=None, high=None, n=None),
                                   table(low=None, high=None), table().iloc[:0]])
def test_a_partial_table_is_drawn_as_far_as_it_goes(given):
    """Predictions alone, or a sample too small for an interval, are no reason for no figure, nor for invented bars."""
    figure = views.policies(PLANS, given)
    json.loads(figure.to_json())
    assert all(trace.error_y.array is None for trace in figure.data if trace.xaxis == "x2")


def test_a_table_that_is_none_is_refused():
    """Columns misspelt or an arm that there is not would give an empty panel."""
    with pytest.raises(HybridlabError, match="policy"):
        views.policies(PLANS, table().rename(columns={"policy": "polcy"}))
    with pytest.raises(HybridlabError, match="unknown"):
        views.policies(PLANS, table(arm=HOSTILE))


def test_the_limit_is_a_line_under_the_times_of_the_policy_shown():
    """Without it a time is near to nothing; that of another policy would not move with the button."""
    limit = [0.2, 0.3, 0.4, 0.2, 0.5, 0.3, 0.4]
    figure = views.policies(PLANS, table(limit_ms=limit))
    assert [list(y) for y in dotted(figure)] == [[0.2, 0.2, 0.5]]  # piecewise: eager, jit, hybrid
    assert "dotted: the least" in json.dumps(figure.to_dict()["layout"], default=list)
    assert not any(dotted(views.policies(PLANS, table())))


def dotted(figure):
    return [trace.y for trace in figure.data
            if trace.type == "scatter" and trace.line.dash == "dot" and trace.visible is not False]


# ---- prediction beside measurement ----------------------------------------------------------------------------------

def measured(gaps=31):
    """Rows of one run: eager, and hybrid under two policies, by the names that a run of several policies gives."""
    cells = (("eager", "whole", 2.0), ("hybrid whole", "whole", 1.0), ("hybrid full", "full", 0.5))
    return pd.DataFrame([{"run_id": "r", "arm": arm, "policy": name, "metric": metric, "ms": ms + i / 1000}
                         for arm, name, ms in cells for metric, count in (("ttft", 3), ("itl", gaps))
                         for i in range(count)])


PREDICTED = pd.DataFrame({"arm": ["eager", "hybrid", "hybrid"], "policy": ["", "whole", "full"],
                          "launches": [170, 3, 1], "predicted_ms": [1.0, 1.015, 0.6], "floor_ms": [0.2, 0.2, 0.2]})


def test_a_prediction_stands_beside_the_measurement_of_its_arm_and_policy():
    """Joined by the arm alone, each policy would get the times of all."""
    found = times.side_by_side(PREDICTED, measured())
    assert found["measured_ms"].tolist() == pytest.approx([2.015, 1.015, 0.515])
    assert found["error"].tolist() == pytest.approx([1.0 / 2.015 - 1, 0.0, 0.6 / 0.515 - 1])
    assert found["n"].tolist() == [31, 31, 31]
    assert found["limit_ms"].tolist() == [0.2, 0.2, 0.2]
    assert found["of_limit"].tolist() == pytest.approx([0.2 / 2.015, 0.2 / 1.015, 0.2 / 0.515])
    assert (found["low"] < found["measured_ms"]).all()
    one = measured().query("arm != 'hybrid full'").replace({"arm": {"hybrid whole": "hybrid"}})  # a run of one policy
    assert times.side_by_side(PREDICTED, one)["measured_ms"].tolist()[:2] == pytest.approx([2.015, 1.015])
    assert times.side_by_side(PREDICTED, one)["measured_ms"].isna().tolist() == [False, False, True]
    assert times.side_by_side(PREDICTED, measured(gaps=3))["low"].isna().all()
    with pytest.raises(StatisticsError, match="2 runs"):
        times.side_by_side(PREDICTED, pd.concat([measured(), measured().assign(run_id="s")]))


def test_the_reading_is_computed_from_the_table():
    """Words that do not follow the numbers would stay right by accident only."""
    said = times.reading(times.side_by_side(PREDICTED, measured()))
    assert "shortest step was hybrid full at 0.515 ms" in said
    assert "longest eager at 2.02 ms" in said
    assert "50 % at the worst: 1 ms predicted, 2.02 ms measured for eager" in said
    assert "17 % at the median" in said
    assert "shortest step predicted was that of hybrid full too" in said
    assert "told apart" not in said
    level = measured()
    level.loc[level["arm"] == "hybrid whole", "ms"] = level.loc[level["arm"] == "hybrid full", "ms"].tolist()
    assert "(not told apart from it: hybrid full)" in times.reading(times.side_by_side(PREDICTED, level))
    other = PREDICTED.assign(predicted_ms=[0.1, 1.0, 1.0])
    assert "that of eager and not hybrid full" in times.reading(times.side_by_side(other, measured()))
    assert times.reading(times.side_by_side(PREDICTED, measured(gaps=0))) == "Nothing was measured."


# ---- what a stranger's plan may hold --------------------------------------------------------------------------------

def hostile(plan):
    """The same plan with markup wherever a file may hold text of its own."""
    ops = tuple(replace(o, segment=HOSTILE if o.segment else "", reason=HOSTILE * 50, shape=HOSTILE,
                        module=o.module.replace("self_attn", HOSTILE), op=o.op if o.role else f"aten.{HOSTILE}.default")
                for o in plan.ops)
    segments = tuple(replace(s, name=HOSTILE, reason=HOSTILE * 50) for s in plan.segments)
    return replace(plan, model=HOSTILE, ops=ops, segments=segments)


def test_text_from_a_plan_stays_text():
    """A model or module name from a stranger's checkpoint ends up in a page that is opened from disk."""
    before, after = hostile(stock()), hostile(lowered("piecewise"))
    for figure in (views.layer(before, HOSTILE), views.before_after(before, after, HOSTILE), views.step(after, HOSTILE),
                   views.policies({HOSTILE: after}, table(policy=HOSTILE), HOSTILE)):
        text = json.dumps(figure.to_dict(), default=list)
        assert "<script" not in text
        assert "<a " not in text
        assert "$" not in text
        assert "&lt;script&gt;" in text
        assert all(len(hover) < 2000 for hover in hovers(figure))
    assert any("&lt;script&gt;" in hover and "host-dynamic" in hover for hover in hovers(views.layer(before)))


@pytest.mark.parametrize("draw", [
    views.layer, views.step, lambda plan, caption: views.before_after(stock(), plan, caption),
    lambda plan, caption: views.policies({"a": plan}, None, caption)])
def test_each_figure_says_what_it_shows(draw):
    """A picture without model, phase, policy and length cannot be judged by who sees it alone."""
    plan = replace(lowered(), policy=Policy(("lm_head",)))
    figure = draw(plan, "run r1")
    assert figure.layout.title.subtitle.text == "tiny · decode at 64 tokens · policy outside lm_head · run r1"
    assert figure.layout.title.text
    assert figure.layout.annotations[0].text
    assert any("in " in hover and "FLOP" in hover and "launch" in hover for hover in hovers(figure))


def test_a_hover_says_why():
    """The reason is what the view is for."""
    (cat, *_) = [hover for hover in hovers(views.layer(stock())) if "cat" in hover]
    assert cat == ("<b>aten.cat.default</b><br>model.layers.0.self_attn [1, 8]<br>host-dynamic:<br>shape holds S<br>"
                   "1 launch when eager · 16 FLOP · 64 B read and written<br>in segment step, runs eager")
    plan = lowered("piecewise")
    reasons = {segment.name: segment.reason for segment in plan.segments}
    (first, *_) = [hover for hover in hovers(views.step(plan)) if "<b>graph 1</b>" in hover]
    assert first.split("<br>")[0] == "<b>graph 1</b>, runs graph"
    assert reasons["graph 1"] in first.replace("<br>", " ")
    assert "layer 0: 4 of its 7 operations" in first


@pytest.mark.parametrize("change", [{"kind": HOSTILE}, {"path": HOSTILE}])
def test_a_plan_with_a_kind_or_path_of_its_own_is_refused(change):
    """Left out for want of a colour, such an operation would be missing without a word."""
    plan = stock()
    plan = Plan.from_json(replace(plan, ops=(*plan.ops[:-1], replace(plan.ops[5], **change))).to_json())
    with pytest.raises(HybridlabError, match="kind or path"):
        (views.layer if "kind" in change else views.step)(plan)


def test_figures_of_plans_need_no_torch():
    """A plan saved as JSON must be shown where torch is not installed."""
    subprocess.run([sys.executable, "-c", "import sys, hybridlab.views; sys.exit('torch' in sys.modules)"], check=True)


@pytest.mark.parametrize("figure", [views.layer(stock()), views.before_after(stock(), lowered()), views.step(stock()),
                                    views.policies(PLANS, table())], ids=["layer", "before_after", "step", "policies"])
def test_the_static_view_draws_every_box(figure):
    """A picture in the README that lacks an operation, or shows two policies at once, would be another plan."""
    drawn = static.render(figure).axes[0]
    boxes = [box for trace in bars(figure) for box in zip(trace.base, trace.x, trace.y, strict=True)]
    found = [(box.get_x(), box.get_width(), box.get_y() + box.get_height() / 2)
             for box in drawn.patches if box.get_fill()]
    assert [value for box in found for value in box] == pytest.approx([value for box in boxes for value in box])
    assert [text.get_text() for text in drawn.texts if text.get_ha() == "center"] == [
        text for trace in bars(figure) for text in trace.text]
    assert static.svg(figure) == static.svg(figure)
