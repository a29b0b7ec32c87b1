"""Controls that run a model live and show each token as it comes.

Never imports torch: a process of its own measures.
"""

from __future__ import annotations

import html
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import anywidget
import ipywidgets
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import traitlets

from hybridlab import liveviews, looks
from hybridlab.config import ARMS, COMPILING, POLICIES, REPLAYING
from hybridlab.errors import HybridlabError, MeasureError
from hybridlab.names import KNOWN
from hybridlab.session import Row, Session, checked
from hybridlab.stats import Estimate

EVERY_S = 0.25     # between two changes of the page, at least
RESTS = 4          # times as long as the last change took, at least: a long run must not cost its machine a core
SETTLE_S = 0.5     # for a browser to draw what it was told, before a round that is left alone begins
LONGEST_S = 86400  # that a run may last
PATIENCE_S = 30.0  # that a stop waits for the page to follow
UNSAID = "Controls for a live run: they need a running notebook. Nothing was run by showing them."
DEFAULTS: dict[str, Any] = {
    "model": "tiny", "arms": ["eager", "hybrid"], "policy": "whole", "kernels": "torch", "new_tokens": 32,
    "repeats": 10, "temperature": 0.0, "seed": 0, "prompt": "The for statement", "length": 16, "floor": True}


class TokenStream(anywidget.AnyWidget):
    """Lanes of tokens in the page, each `{"arm", "request", "tokens": [[text, path], ...]}`; `chosen` is the token that
    was clicked last, as [arm, request, index]."""

    _esm = Path(__file__).with_name("tokenstream.js")
    lanes: Any = traitlets.List().tag(sync=True)
    chosen: Any = traitlets.List().tag(sync=True)
    colours = traitlets.Dict({path: looks.COLOURS[path] for path in ("graph", "jit", "eager")}).tag(sync=True)


class Explorer:
    """Pick a model, arms and a prompt; press Run; watch tokens, the path of each, and their times as they come.

    `settings` are values of the controls, and fields of `RunConfig` that have none (device, dtype, top_k, ...);
    `theme` is of the figure, "light" or "dark". Nothing runs until the button is pressed. `rows` are those of the last
    run.
    """

    def __init__(self, settings: Mapping[str, Any] = MappingProxyType({}), theme: str = "light") -> None:
        given = DEFAULTS | dict(settings)
        self._more = {name: value for name, value in given.items() if name not in DEFAULTS}
        self.controls, self.arms = _controls(given), _boxes(given["arms"])
        self.run_button = ipywidgets.Button(description="Run", button_style="primary", icon="play")
        self.stop_button = ipywidgets.Button(description="Stop", icon="stop", disabled=True)
        self.bar = ipywidgets.FloatProgress(min=0, max=1, layout={"width": "220px"})
        self.percentile = ipywidgets.IntSlider(value=90, min=50, max=99, description="percentile (%)",
                                               style={"description_width": "8em"})
        self.status, self.detail, self.table = (ipywidgets.HTML() for _ in range(3))
        self.stream = TokenStream()
        self.session: Session | None = None
        self._lock = threading.RLock()
        self._painter: threading.Thread | None = None
        self._ratios: dict[str, Estimate] = {}
        self._arms, self._theme = list(given["arms"]), theme
        # Traces of all arms from the start: a page that is still loading loses what is added or removed meanwhile.
        self.figure = go.FigureWidget(liveviews.figure(Session.nothing(), self.caption, ARMS, theme=theme))
        for trace in self.figure.data:
            if trace.mode == "lines+markers":
                trace.on_click(self._point_chosen)
        self.run_button.on_click(lambda _: self.start())
        self.stop_button.on_click(lambda _: self.stop())
        self.stream.observe(self._token_chosen, "chosen")
        self.percentile.observe(lambda _: self._paint(self.session), "value")
        for box in self.arms.values():
            box.observe(lambda _: self._matters(), "value")
        self._matters()
        self.box = self._arranged()
        self._say("ready")

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        """The controls, and a sentence where a page has nothing to show controls with."""
        return {**self.box._repr_mimebundle_(**options), "text/plain": UNSAID}

    @property
    def rows(self) -> pd.DataFrame:
        """A row a token of the last run, first tokens as "ttft", gaps as "itl"; empty before the first."""
        return self.session.frame() if self.session is not None else Session.nothing()

    @property
    def caption(self) -> str:
        """Model, machine and sample sizes of the last run, which is live: no directory keeps it."""
        if self.session is None:
            return "press Run"
        rows, config = self.session.rows, self.session.asked.config
        first = sum(row.index == 0 for row in rows)
        parts = ["live, not recorded", self.session.machine, config.model, f"policy {config.policy}",
                 f"n = {first:,} first tokens, {len(rows) - first:,} gaps"]
        return " · ".join(filter(None, parts))

    def settings(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the controls say: fields of `RunConfig`, and what else a session is asked."""
        chosen = {name: control.value for name, control in self.controls.items()}
        beside = {name: chosen.pop(name) for name in ("prompt", "length", "floor")}
        return {**self._more, **chosen, "arms": [arm for arm, box in self.arms.items() if box.value]}, beside

    def start(self, held: Sequence[int] = ()) -> bool:
        """Begin what the controls say; False, and why in the status, if it makes no sense. `held`: as in `Asked`."""
        config, beside = self.settings()
        try:
            asked = checked(config, **beside, rates=self._rates(config), held=tuple(held))
        except HybridlabError as error:
            self._say(str(error))
            return False
        self.stop()
        with self._lock:
            self._fresh(config["arms"])
            self.session = Session(asked, followed=True)
            self.run_button.disabled, self.stop_button.disabled = True, False
            self._painter = threading.Thread(target=self._follow, args=[self.session], daemon=True,
                                             name="hybridlab-explorer")
            self._painter.start()
        return True

    def stop(self) -> None:
        """End the run; its process is gone when this returns, and its rows are kept. The page has followed by then, or
        follows when it can: this raises nothing, as nobody would see it in a callback."""
        if self.session is not None:
            self.session.stop()
        if self._painter is not None:
            self._painter.join(PATIENCE_S)

    def wait(self, timeout_s: float = LONGEST_S) -> None:
        """Return when the run is over and painted. Raises `MeasureError` if it is not after `timeout_s` seconds."""
        if self._painter is not None:
            self._painter.join(timeout_s)
            if self._painter.is_alive():
                raise MeasureError(f"the run is not over after {timeout_s:g} s", self.status.value,
                                   "press Stop, or wait longer")

    def close(self) -> None:
        """Stop, and take the controls out of the page."""
        self.stop()
        for widget in (self.figure, self.stream, *self.controls.values(), *self.arms.values(), self.box):
            widget.close()

    def _follow(self, session: Session) -> None:
        """Paints what is new until the run is over, and then all of it."""
        try:
            self._keep_up(session)
            found = liveviews.ratios(session.frame(), list(session.asked.config.arms))  # unlocked: it takes longest
            with self._lock:
                self._ratios = found if session is self.session else self._ratios
            self._paint(session)
        finally:
            session.stop()  # it is over, unless painting failed
            with self._lock:
                if session is self.session:
                    self.run_button.disabled, self.stop_button.disabled = False, True

    def _keep_up(self, session: Session) -> None:
        rng, seen, took, pause = np.random.default_rng(session.asked.config.seed), None, 0.0, EVERY_S
        while True:
            waits = session.called(pause)
            if session.over.is_set():
                return
            now = (len(session.rows), session.progress)
            if now != seen:
                seen, began = now, time.monotonic()
                self._paint(session)
                took = time.monotonic() - began
            pause = max(EVERY_S, RESTS * took)
            if waits and not session.wait(SETTLE_S):
                session.attended()
                pause *= rng.random()  # else each round would meet its first change of the page at the same token

    def _paint(self, session: Session | None) -> None:
        """All that the page shows of a session, unless another one has taken its place."""
        with self._lock:
            if session is None or session is not self.session:
                return
            rows, floors, percentile = session.frame(), session.floor_table(), float(self.percentile.value)
            liveviews.refresh(self.figure, rows, self.caption, ARMS, floors, percentile, self._theme)
            self.table.value = liveviews.table(rows, self._arms, floors, percentile, self._ratios)
            self.stream.lanes = self._lanes(session)
            self.bar.value = len(session.rows) / session.total
            self._say(_word(session))
            if session.over.is_set():
                self.bar.bar_style = "danger" if session.failure else "warning" if session.stopped else "success"

    def _lanes(self, session: Session) -> list[dict[str, Any]]:
        latest: dict[str, list[Row]] = {arm: [] for arm in self._arms}
        for row in session.rows:
            if not row.index:
                latest[row.arm] = []
            latest[row.arm].append(row)
        return [{"arm": arm, "request": rows[0].request, "tokens": [
            [session.text(row) or f"#{row.id} ", row.path] for row in rows]} for arm, rows in latest.items() if rows]

    def _fresh(self, arms: list[str]) -> None:
        """An empty page for these arms."""
        self._arms, self._ratios = list(arms), {}
        liveviews.refresh(self.figure, Session.nothing(), "", ARMS, None, float(self.percentile.value), self._theme)
        self.stream.lanes, self.table.value, self.detail.value, self.bar.bar_style = [], "", "", ""

    def _point_chosen(self, trace: Any, points: Any, state: Any) -> None:
        if points.point_inds and self.session is not None:
            self._about(self.session.rows[trace.customdata[points.point_inds[0]]])

    def _token_chosen(self, change: Any) -> None:
        wanted = tuple(change["new"])
        rows = self.session.rows if self.session is not None else []
        found = [row for row in rows if (row.arm, row.request, row.index) == wanted]
        if found:
            self._about(found[0])

    def _about(self, row: Row) -> None:
        assert self.session is not None
        self.detail.value = liveviews.about(row, self.session.text(row))

    def _rates(self, config: dict[str, Any]) -> dict[str, Any] | None:
        """Those that an earlier run of the same model measured."""
        before = self.session
        if before is None or before.floors is None:
            return None
        same = all(getattr(before.asked.config, name) == config.get(name, default)
                   for name, default in (("model", "tiny"), ("device", "auto"), ("dtype", None)))
        return before.floors.rates if same else None

    def _matters(self) -> None:
        """Greys out what changes nothing for the arms that are chosen."""
        chosen = {arm for arm, box in self.arms.items() if box.value}
        self.controls["policy"].disabled = not chosen & set(REPLAYING)
        self.controls["kernels"].disabled = not chosen & set(COMPILING)

    def _say(self, text: str) -> None:
        self.status.value = html.escape(text)

    def _arranged(self) -> Any:
        own = self.controls
        left = ipywidgets.VBox([own[name] for name in ("model", "policy", "kernels", "prompt", "length")])
        right = ipywidgets.VBox([own[name] for name in ("new_tokens", "repeats", "temperature", "seed", "floor")])
        buttons = ipywidgets.HBox([self.run_button, self.stop_button, self.bar, self.status])
        return ipywidgets.VBox([ipywidgets.HBox([ipywidgets.VBox(list(self.arms.values())), left, right]), buttons,
                                self.stream, self.detail, self.figure, self.percentile, self.table])


def _word(session: Session) -> str:
    if session.failure:
        return session.failure
    done = f"{len(session.rows):,} of {session.total:,} tokens"
    if session.stopped:
        return f"stopped; {done} are kept"
    if session.over.is_set():
        return f"done: {done}"
    if session.rows:
        return f"measuring: {done}"
    step = session.progress
    return step.what + (f", {step.done} of {step.total}" if step.total > 1 else "")


def _boxes(chosen: list[str]) -> dict[str, Any]:
    return {arm: ipywidgets.Checkbox(value=arm in chosen, description=arm, indent=False, layout={"width": "7em"})
            for arm in ARMS}


def _controls(given: Mapping[str, Any]) -> dict[str, Any]:
    common: dict[str, Any] = {"style": {"description_width": "13em"}, "layout": {"width": "30em"}}
    return {
        "model": ipywidgets.Combobox(value=str(given["model"]), options=KNOWN, description="model", ensure_option=False,
                                     continuous_update=False, **common),
        "policy": ipywidgets.Dropdown(value=given["policy"], options=list(POLICIES), description="policy", **common),
        "kernels": ipywidgets.Dropdown(value=given["kernels"], options=["torch", "fused"], description="kernels",
                                       **common),
        "prompt": ipywidgets.Textarea(value=str(given["prompt"]), description="prompt", rows=2, **common),
        "length": _slider("prompt length (0: as typed)", given["length"], 0, 512, common),
        "new_tokens": _slider("new tokens", given["new_tokens"], 1, 256, common),
        "repeats": _slider("requests an arm", given["repeats"], 1, 200, common),
        "temperature": ipywidgets.FloatSlider(value=given["temperature"], min=0, max=2, step=0.1,
                                              description="temperature", **common),
        "seed": ipywidgets.BoundedIntText(value=given["seed"], min=0, max=2**53, description="seed", **common),
        "floor": ipywidgets.Checkbox(value=given["floor"], description="show the limit of this machine",
                                     **{**common, "style": {"description_width": "initial"}}),
    }


def _slider(name: str, value: int, least: int, most: int, common: dict[str, Any]) -> Any:
    return ipywidgets.IntSlider(value=value, min=least, max=max(most, value), description=name, **common)
