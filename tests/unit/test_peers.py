"""Other engines under our protocol: what runs is real, what is absent is empty, what dies is named, one at a time."""

import json
import re
import sys
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from hybridlab import committed, enginepeers, engines, measure, models, peerlab, peers, peerwords, records
from hybridlab.conversation import Conversation
from hybridlab.engines import Engine, PeersConfig
from hybridlab.errors import ConfigError, MeasureError, PromptError

LENGTHS, ROUNDS, DIES = (5, 20), 6, 2
CONFIG = {"systems": ["hf-generate", "hf-compile", "mortal", "vllm", "tensorrt-llm"], "arms": ["graph"],
          "lengths": LENGTHS, "new_tokens": 4, "repeats": ROUNDS, "itl_repeats": 1, "warmup": 1, "device": "cpu"}
# What every process of the run below executes: the module itself, with one more system, which dies in a timed request.
DOUBLES = f'''
import sys
from hybridlab import hfpeers, peers

class Mortal(hfpeers.Generate):
    def generate(self, *arguments, **settings):
        timed = settings.get("each") is not None
        self.left = getattr(self, "left", {DIES * len(LENGTHS)}) - timed
        if self.left < 0:
            print("this goes nowhere near the answers")
            sys.exit("no room on device")
        return super().generate(*arguments, **settings)

peers.main(lambda system: Mortal if system == "mortal" else peers.adapter(system))
'''


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """One run: two systems that work, one that dies in its third round, two that are not installed."""
    root = tmp_path_factory.mktemp("peers")
    script = root / "doubles.py"
    script.write_text(DOUBLES)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(records.RUN_VARIABLE, raising=False)
        patch.setenv("PYTHONPATH", str(Path(peers.__file__).parents[1]))
        patch.setitem(engines.ENGINES, "mortal", Engine("transformers", "a double that dies", "nowhere:None", ""))
        patch.setattr(peerlab, "COMMAND", (sys.executable, str(script)))
        patch.setattr(peerlab, "version", lambda name: None if name in ("vllm", "tensorrt-llm") else "1")
        found = peerlab.run(CONFIG, root=root / "runs", progress=False)
        assert psutil.Process().children(recursive=True) == []
        yield found


def test_real_systems_answer_every_round_with_our_tokens(result):
    """Times of a system that answers something else, or less often, compare nothing."""
    assert result.status == "complete"
    counts = result.rows.groupby(["arm", "metric", "prompt_tokens"]).size()
    for name in ("graph", "hf-generate", "hf-compile"):
        assert result.systems[name]["state"] == "measured"
        for length in LENGTHS:
            assert (counts[name, "ttft", length], counts[name, "itl", length]) == (ROUNDS, 3)
    assert result.systems["hf-generate"]["tokens"] == result.systems["hf-compile"]["tokens"] == peerwords.EQUAL
    assert result.systems["hf-compile"]["versions"]["transformers"]


def test_rows_name_the_path_that_ran_and_count_compilations(result):
    """A compiled step that fell back to eager would be timed as what it is not."""
    paths = result.rows.groupby(["arm", "metric"])["path"].agg(lambda own: ",".join(sorted(set(own)))).to_dict()
    assert paths["hf-generate", "itl"] == "eager"
    assert (paths["hf-compile", "ttft"], paths["hf-compile", "itl"]) == ("eager", "jit")
    assert paths["graph", "itl"] == "graph"
    assert "a CPU has none" in result.systems["hf-compile"]["reason"]
    assert not result.rows[["captures", "compiles"]].to_numpy().any()
    assert (result.rows.loc[result.rows["arm"] != "graph", "policy"] == "").all()


def test_a_system_that_dies_is_named_with_its_words_and_the_others_go_on(result):
    """One engine out of memory must not cost the rows of all, nor pass as measured."""
    found = result.systems["mortal"]
    assert found["state"] == "failed"
    assert re.search(r"round \d+: it died · exit code 1: .*no room on device", found["why"])
    own = result.rows[result.rows["arm"] == "mortal"]
    assert own.groupby("request").ngroups == DIES * len(LENGTHS)
    assert set(result.rows.loc[result.rows["arm"] == "graph", "round"]) == set(range(ROUNDS))
    assert "no room on device" in result.reading()


def test_what_is_not_installed_is_an_empty_line_that_says_how_to_get_it(result):
    """A system is named with numbers only if it ran."""
    grid = result.grid()
    lines = {line[0]: line[1:] for line in grid.rows}
    for name in ("vllm", "tensorrt-llm"):
        assert set(lines[name]) == {"–"}
        assert f"{name}: not installed: pip install {name}" in grid.note
        assert name not in set(result.rows["arm"])
    assert all(cell != "–" for cell in [lines["hf-generate"][0], lines["hf-generate"][2]])


def test_the_order_is_drawn_from_the_seed_over_all_systems(result):
    """Systems in a fixed order meet each other's caches, and drift, unlike."""
    config = result.config
    names = dict.fromkeys(["graph", "hf-generate", "hf-compile", "mortal"])
    asked = [[(arm, length, metric) for _, arm, length, metric in own[
        ["request", "arm", "prompt_tokens", "metric"]].drop_duplicates("request").itertuples(index=False)]
        for _, own in result.rows[result.rows["arm"] != "mortal"].groupby("round")]
    for number in range(2):  # until the one that dies has, the same systems are asked in each round
        drawn = [(arm, length, protocol.metric) for arm, length, protocol in measure.shuffled(
            names, dict.fromkeys(LENGTHS), config, round_=number, itl=number < config.itl_repeats) if arm != "mortal"]
        assert asked[number] == drawn
    assert asked[1] != asked[2]


def test_one_request_is_served_at_a_time(result):
    """Two systems that work at once time each other: the stamps are of one clock, so an overlap would show."""
    rows = result.rows.assign(start=result.rows["ended_ns"] - result.rows["ms"] * 1e6)
    spans = rows.groupby("request").agg(start=("start", "min"), end=("ended_ns", "max")).sort_index()
    assert (spans["start"].to_numpy()[1:] >= spans["end"].to_numpy()[:-1]).all()
    assert rows.groupby("arm")["process"].nunique().eq(1).all()
    assert rows.groupby("process")["arm"].nunique().eq(1).all()


# ---- what is said of a run ------------------------------------------------------------------------------------------

def synthetic(root, **systems):
    """A committed run: ours takes 2 ms, hf-generate 6 ms and in every other round 9, in each of eight rounds."""
    config = PeersConfig(systems=("hf-generate", "vllm"), arms=("hybrid",), lengths=(10,), device="cpu")
    run = records.Run.create(config, root)
    run.append([{
        "round": number, "request": 2 * number + place, "arm": arm, "policy": "", "prompt_tokens": 10, "bucket": None,
        "index": index, "position": 10 + index, "metric": "itl" if index else "ttft",
        "ms": ms * (1 + number / 100) * (1.5 if place and number % 2 else 1),
        "path": "eager", "reason": "", "captures": 0, "compiles": 0, "process": place, "device_ms": None,
        "client_ms": None, "ended_ns": number, "happened": "", "happened_ms": 0.0, "profiled": False}
        for number in range(8) for index in range(2) for place, (arm, ms) in enumerate(
            (("hybrid", 2.0), ("hf-generate", 6.0)))])
    base = {"state": "measured", "why": "", "versions": {"torch": "2"}, "reason": "by itself", "tokens": "ours"}
    run.finish("complete", extra={"systems": {"hybrid": base, "hf-generate": base | {"tokens": peerwords.EQUAL},
                                              **systems}})
    return run.path


def test_ratios_say_how_many_times_as_long_as_ours(tmp_path):
    """A ratio turned round makes the slower system the faster one."""
    found = peerlab.PeersResult.open(synthetic(tmp_path))
    line = found.table().set_index(["arm", "prompt_tokens", "metric"]).loc[("hf-generate", "all", "itl")]
    medians = found.rows[found.rows["metric"] == "itl"].groupby("arm")["ms"].median()
    assert line["slower"] == pytest.approx(medians["hf-generate"] / medians["hybrid"])
    assert 2.8 < line["slower_low"] < line["slower"] < line["slower_high"] < 4.8
    text = f"{line['slower']:.2f} [{line['slower_low']:.2f}, {line['slower_high']:.2f}]"
    assert [row[3] for row in found.grid().rows] == ["1", text]
    assert f"{text} times as long in hf-generate" in found.reading()


def test_tokens_that_are_not_ours_are_told(tmp_path):
    """Times of other weights, or of other tokens, must not stand there without a word."""
    measured = {"state": "measured", "why": "", "versions": {"vllm": "9"}, "reason": "graphs"}
    found = peerlab.PeersResult.open(synthetic(tmp_path, vllm=measured | {
        "tokens": "not compared: its weights are random ones of its own"}))
    for text in (found.grid().note, found.reading()):
        assert "vllm: graphs; vllm 9; tokens not compared: its weights are random ones of its own." in text


def test_readme_can_hold_the_table_and_figures_are_drawn(tmp_path):
    """A table that the check does not know could be typed by hand."""
    path = synthetic(tmp_path / "data" / "runs")
    name = path.relative_to(tmp_path / "data" / "runs").as_posix()
    (tmp_path / "README.md").write_text("".join(f"<!-- table: {kind} run={name} -->\n<!-- /table -->\n"
                                                for kind in ("peers", "quantiles")))
    assert len(committed.check(tmp_path, write=True).written) == 2
    assert committed.check(tmp_path).wrong == []
    assert re.search(r"\n\| hf-generate \| \d\.\d\d \[", (tmp_path / "README.md").read_text())
    drawn = {file.name for file in committed.redraw(tmp_path)}
    assert {"peers_ablation.svg", "peers_itl_by_arm.png"} <= drawn
    assert "hf-generate" in (tmp_path / "figures" / path.parent.name / "peers_ablation.svg").read_text()


# ---- tokens and processes -------------------------------------------------------------------------------------------

class Said:
    """A living process, as far as questions about tokens go."""

    def __init__(self, ids, judgement=None):
        self.ids, self.judgement, self.closed = ids, judgement, False

    def ask(self, question, within_s):
        return {"tokens": {"ids": self.ids}, "judgement": self.judgement}[question["asked"]]

    def close(self):
        self.closed = True


def compared(dtype, ours, theirs, judgement=None, comparable=True):
    config = PeersConfig(systems=("hf-generate",), lengths=(3,))
    comparison = peerlab.Comparison(config, {3: [1, 2, 3]}, 64, Path(), print)
    notes = {"state": "measured", "why": "", "comparable": comparable, "weights": "others", "dtype": dtype}
    comparison.systems |= {"hybrid": dict(notes), "hf-generate": dict(notes)}
    comparison.running |= {"hybrid": Said(ours, judgement), "hf-generate": Said(theirs)}
    comparison._compare("hf-generate")
    return comparison


def test_other_tokens_in_float32_end_a_comparison():
    """In float32 nothing excuses a different token: the system computes something else."""
    found = compared("float32", [5, 6], [5, 7], {"near_tie": False, "words": "token 1 is 7"})
    assert found.systems["hf-generate"]["state"] == "failed"
    assert "its tokens are not ours" in found.systems["hf-generate"]["why"]
    assert list(found.running) == ["hybrid"]


@pytest.mark.parametrize(("near_tie", "words"), [(True, "apart at a near-tie: why"), (False, "apart: why")])
def test_other_tokens_in_half_precision_are_judged_and_told(near_tie, words):
    """Rounding may decide a near-tie; whether it did is said, and nothing is claimed equal."""
    found = compared("float16", [5, 6], [5, 7], {"near_tie": near_tie, "words": "why"})
    assert found.systems["hf-generate"] | {"tokens": words, "state": "measured"} == found.systems["hf-generate"]
    assert compared("float16", [5], [5]).systems["hf-generate"]["tokens"] == peerwords.EQUAL
    other = compared("float16", [5], [6], comparable=False).systems["hf-generate"]["tokens"]
    assert other == "not compared: its weights are others"


def test_a_difference_is_judged_by_the_model():
    """A judgement that always excuses would call every engine right."""
    ours = object.__new__(peers.Ours)
    ours.model = models.load("tiny", device="cpu", dtype="bfloat16")
    serving = object.__new__(peers.Serving)
    serving.peer = ours
    found = serving.judgement([3, 4, 5], [7], [8])
    assert not found["near_tie"]
    assert "new token 0 is 8 and not 7" in found["words"]


def test_answers_are_not_mixed_with_what_a_library_prints():
    """An engine that greets on standard output must not be taken for one that answers."""
    code = ("from hybridlab import conversation\nimport os\nquestions, answer = conversation.answering()\n"
            "print('hello', flush=True); os.write(1, b'{}\\n')\nfor q in questions: answer({'twice': 2 * q['n']})")
    with Conversation([sys.executable, "-c", code]) as child:
        assert [child.ask({"n": n}, 60)["twice"] for n in (1, 2)] == [2, 4]
    assert child.close() == "exit code 0: hello | {}"


def test_a_process_that_hangs_is_ended_and_named():
    """A comparison must not wait for ever for one of its systems, nor leave it there."""
    code = "import sys; sys.stderr.write('waiting for a lock'); sys.stderr.flush(); sys.stdin.read()"
    with Conversation([sys.executable, "-c", code]) as child:
        with pytest.raises(MeasureError, match=r"no answer within 2 s.*waiting for a lock"):
            child.ask({}, 2)
        assert not psutil.pid_exists(child._child.pid) or child._child.code == -9


# ---- what engines are given -----------------------------------------------------------------------------------------

def asked(folder, **settings):
    return peers.Asked(PeersConfig(device="cpu", **settings), {}, [[1]], 64, folder, False)


def test_an_engine_reads_the_weights_of_the_model_where_it_can(tmp_path, monkeypatch):
    """Tokens of other weights prove nothing: they must be the model's, or be said to be others."""
    folder = models.folder_of("tiny")
    found = enginepeers.Weights(asked(tmp_path))
    assert (found.directory, found.own, found.arguments["load_format"]) == (folder, True, "auto")
    assert list(tmp_path.iterdir()) == []
    written = enginepeers.Weights(asked(tmp_path, model="random:tiny-llama-2", dtype="float32"))
    saved, model = load_file(tmp_path / "model.safetensors"), models.load("random:tiny-llama-2", device="cpu")
    assert written.own
    assert all(saved[name].equal(weight) for name, weight in model.named_parameters())
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    monkeypatch.setattr(enginepeers, "WRITTEN", 0)
    (tmp_path / "large").mkdir()
    large = enginepeers.Weights(asked(tmp_path / "large", model="random:tiny-llama-2", dtype="float16"))
    assert {file.name for file in (tmp_path / "large").iterdir()} == {"config.json"}
    assert (large.own, large.arguments["load_format"], large.arguments["dtype"]) == (False, "dummy", "float16")
    assert "of its own" in large.words
    monkeypatch.setattr(enginepeers, "KV_LEAST", 0)
    assert large.kv_bytes(64) == 2 * 64 * 2 * 2 * 64 * 2  # twice; 2 layers, keys and values of 64, 2 bytes each


def test_bad_input_is_refused_before_anything_is_written(tmp_path):
    """A directory of a run that never began is litter that looks like a run."""
    for config, error, words in (({"systems": ["vlm"]}, ConfigError, "did you mean 'vllm'"),
                                 ({"systems": ["vllm", "vllm"]}, ConfigError, "twice"),
                                 ({"arms": ["graph"], "kernels": "fused"}, ConfigError, "compiles no kernels"),
                                 ({"lengths": [1020]}, PromptError, "context of tiny")):
        with pytest.raises(error, match=words):
            peerlab.run(config, root=tmp_path, progress=False)
    assert not list(tmp_path.iterdir())
