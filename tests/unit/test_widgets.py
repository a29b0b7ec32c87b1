"""The explorer's controls: what they ask for is a valid experiment, and no end of a run leaves them stuck."""

from types import SimpleNamespace

import pytest

from hybridlab import widgets
from hybridlab.config import CacheConfig, RuntimeConfig, build
from hybridlab.errors import RunError

SETTINGS = {"model": "tiny", "device": "cpu", "trace": "zipf", "cost_lengths": [16], "disturb": ["thread"]}


@pytest.fixture
def asked():
    return []


@pytest.fixture
def explorer(asked, cache_rows):
    def run(config):
        asked.append(config)
        rows = cache_rows({"capture=sync": ("sync", None)}, requests=10)
        return SimpleNamespace(rows=rows, caption="run r1 <b>", table=lambda: rows[["setting"]].iloc[:1])

    return widgets.CacheExplorer(run, SETTINGS)


def test_showing_it_runs_nothing(explorer, asked):
    """A notebook that is executed without a person must not measure what nobody asked for."""
    bundle = explorer._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert bundle["text/plain"] == widgets.UNSAID
    assert asked == []


def test_it_needs_no_arguments():
    """Controls whose defaults are no valid experiment fail at the press of their button."""
    assert build(CacheConfig, widgets.CacheExplorer().config()).trace == "zipf"


@pytest.mark.parametrize("ladder", widgets.LADDERS)
@pytest.mark.parametrize("capture", ["ahead", "sync", "async", "never"])
def test_every_choice_is_a_valid_experiment(explorer, ladder, capture):
    """A control that makes a config which is refused can only be found by pressing it."""
    for name, value in {"ladder": ladder, "capture": capture, "budget": 5, "admission": "pays"}.items():
        explorer.controls[name].value = value
    config = build(CacheConfig, explorer.config())
    runtime = build(RuntimeConfig, config.compare[0])
    assert (runtime.capture, runtime.cache_graphs, runtime.admission) == (capture, 5, "pays")
    assert config.cost_lengths == config.disturb == ()
    assert config.model == "tiny"


def test_the_button_runs_once_and_keeps_the_result(explorer, asked):
    """Earlier runs are there to be compared with; a run that replaces them makes the explorer a slot machine."""
    explorer.button.click()
    explorer.controls["budget"].value = 7
    explorer.button.click()
    assert [config["compare"][0].get("cache_graphs") for config in asked] == [None, 7]
    assert len(explorer.results) == 2
    assert explorer.table().index.tolist() == [1, 2]
    assert "&lt;b&gt;" in explorer.status.value


@pytest.mark.parametrize(("error", "says"), [(KeyboardInterrupt(), "interrupted"), (RunError("tokens <i> differ"),
                                                                                     "tokens &lt;i&gt; differ")])
def test_a_run_that_ends_early_leaves_the_controls_ready(error, says, explorer, monkeypatch):
    """After an interrupt the button must work again, and say what happened."""
    def fail(config):
        raise error

    good = explorer._run
    monkeypatch.setattr(explorer, "_run", fail)
    assert explorer.start() is False
    assert says in explorer.status.value
    assert not explorer.button.disabled
    assert explorer.results == []
    monkeypatch.setattr(explorer, "_run", good)
    assert explorer.start() is True
