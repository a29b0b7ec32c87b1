"""Controls for exploring live, in a notebook: of a model's tokens, and of the graph cache, which the caller runs.

Never imports torch.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import ipywidgets
import pandas as pd
from IPython.display import display

from hybridlab import timeline
from hybridlab.config import BEHINDS, CAPTURES
from hybridlab.errors import HybridlabError
from hybridlab.explorer import Explorer
from hybridlab.workload import KINDS

__all__ = ["CacheExplorer", "Explorer"]

LADDERS: dict[str, str | list[int] | None] = {"roofline": None, "exact": "exact",
                                              "16, 64, 256, 1024": [16, 64, 256, 1024]}
ADMISSIONS = {"every miss": "every", "once it pays": "pays"}
UNSAID = "Controls for the graph cache: they need a running notebook. Nothing was run by showing them."


class CacheExplorer:
    """Sliders and menus for one setting of the graph cache, and a button that serves a small trace with it.

    `run` takes the settings of an experiment as a dict and returns what `cachelab.run`, the default, does.
    `settings` are fields of `CacheConfig` that the controls do not set, such as model, device and new_tokens.
    Nothing runs until the button is pressed. `results` keeps what was run, for comparing.
    """

    def __init__(self, run: Callable[[dict[str, Any]], Any] | None = None,
                 settings: Mapping[str, Any] = MappingProxyType({})) -> None:
        self.results: list[Any] = []
        self.running = False
        self._run, self._settings = run or _run, dict(settings)
        kinds = list(dict.fromkeys([str(settings.get("trace", "zipf")), *KINDS]))
        self.controls: dict[str, Any] = {
            "trace": _menu("trace", [(html.escape(kind), kind) for kind in kinds]),
            "requests": _slider("requests", 60, 10, 500, 10),
            "budget": _slider("most graphs (0: any)", 0, 0, 64, 1),
            "ladder": _menu("ladder", [(name, name) for name in LADDERS]),
            "capture": _menu("capture", [(name, name) for name in CAPTURES], "async"),
            "behind": _menu("behind", [(name, name) for name in BEHINDS]),
            "admission": _menu("admission", list(ADMISSIONS.items()))}
        self.button = ipywidgets.Button(description="Run", button_style="primary", tooltip="serve the trace now")
        self.button.on_click(self._pressed)
        self.status, self.output = ipywidgets.HTML(), ipywidgets.Output()
        pairs = [self.controls[name] for name in self.controls]
        self.box = ipywidgets.VBox([ipywidgets.HBox([ipywidgets.VBox(pairs[:4]), ipywidgets.VBox(pairs[4:])]),
                                    ipywidgets.HBox([self.button, self.status]), self.output])
        self._say("ready")

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        """The controls, and a sentence where a page has nothing to show controls with."""
        return {**self.box._repr_mimebundle_(**options), "text/plain": UNSAID}

    def config(self) -> dict[str, Any]:
        """The experiment that the button would run: the given settings, and what the controls say to compare."""
        chosen = {name: control.value for name, control in self.controls.items()}
        entry: dict[str, Any] = {"capture": chosen["capture"], "admission": chosen["admission"]}
        if chosen["capture"] == "async":
            entry["behind"] = chosen["behind"]
        if LADDERS[chosen["ladder"]] is not None:
            entry["buckets"] = LADDERS[chosen["ladder"]]
        if chosen["budget"]:
            entry["cache_graphs"] = chosen["budget"]
        return {**self._settings, "trace": chosen["trace"], "requests": chosen["requests"], "repeats": 1,
                "compare": [entry], "cost_lengths": [], "disturb": []}

    def table(self) -> pd.DataFrame:
        """A row a run so far, numbered from 1, as their own tables have it."""
        tables = [result.table().assign(run=number) for number, result in enumerate(self.results, 1)]
        return pd.concat(tables).set_index("run") if tables else pd.DataFrame()

    def start(self) -> bool:
        """Run what the controls say and show it; False if it failed or was interrupted, and says why."""
        if self.running:
            return False
        self.running, self.button.disabled = True, True
        self._say("running; the kernel's interrupt button stops it")
        self.output.clear_output()
        try:
            with self.output:
                self.results.append(self._run(self.config()))
                self._show(self.results[-1])
        except KeyboardInterrupt:
            self._say("interrupted; what was measured until then is kept in its run directory")
            return False
        except HybridlabError as error:
            self._say(str(error))
            return False
        finally:
            self.running, self.button.disabled = False, False
        self._say(f"done: {self.results[-1].caption}")
        return True

    def _pressed(self, button: object) -> None:
        self.start()

    def _show(self, result: Any) -> None:
        display(timeline.stream(result.rows, result.caption))
        display(self.table())  # as pandas shows it: its HTML escapes what the cells hold

    def _say(self, text: str) -> None:
        self.status.value = html.escape(text)


def _run(settings: dict[str, Any]) -> Any:
    from hybridlab import cachelab  # imports torch: when a button is pressed, not when controls are shown

    return cachelab.run(settings)


def _menu(name: str, options: list[tuple[str, Any]], value: Any = None) -> Any:
    return ipywidgets.Dropdown(options=options, value=value if value is not None else options[0][1], description=name,
                               style={"description_width": "9em"})


def _slider(name: str, value: int, least: int, most: int, step: int) -> Any:
    return ipywidgets.IntSlider(value=value, min=least, max=most, step=step, description=name, continuous_update=False,
                                style={"description_width": "9em"})
