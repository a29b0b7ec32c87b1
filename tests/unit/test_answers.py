"""Answers come from the rows: numbers are recomputed here, and what was not measured is said to be missing."""

import re

import pandas as pd
import pytest

from hybridlab import answers, stats, tallies
from hybridlab.errors import StatisticsError


def test_every_question_is_answered_once(cache_rows):
    """A question without an answer, or an answer under another question, would not be noticed in a long notebook."""
    table = answers.table(cache_rows(requests=30))
    assert table["number"].tolist() == [3, 4, 5, 6, 7, 8]
    assert not table["answer"].str.contains("Not in these rows").any()
    assert (table["rows"] > 0).all()
    assert not table["answer"].str.contains(r"\bnan\b|\binf\b", regex=True).any()


@pytest.mark.parametrize(("part", "numbers", "remedy"), [
    ("stream", [5, 8], "settings"), ("cost", [6, 7], "cost_lengths"), ("disturb", [3], "disturb")])
def test_what_was_not_measured_is_said_with_its_remedy(part, numbers, remedy, cache_rows):
    """An answer from rows that are not there would be invented."""
    rows = cache_rows(requests=10)
    table = answers.table(rows[rows["part"] != part]).set_index("number")["answer"]
    missing = table[table.str.startswith("Not in these rows")]
    assert missing.index.tolist() == numbers
    assert missing.str.contains(remedy).all()


def test_the_disturbance_is_the_ratio_to_quiet(cache_rows):
    """The factor is what people will quote."""
    rows = cache_rows()
    gaps = rows[(rows["part"] == "disturb") & (rows["metric"] == "itl")]
    busy = gaps.loc[(gaps["setting"] == "sync") & gaps["capturing"], "ms"]
    quiet = gaps.loc[gaps["setting"] == "quiet", "ms"]
    found = re.search(r"sync: .*?, ([\d.]+) times as long", answers.capture_on_the_foreground(rows))
    assert found is not None
    assert float(found[1]) == pytest.approx(busy.median() / quiet.median(), rel=0.01)
    assert stats.ratio(quiet, busy).value == pytest.approx(busy.median() / quiet.median())


def test_failures_are_counted_with_their_reason(cache_rows):
    """A failure that vanishes in a rate of zero hides the one thing that question is about."""
    rows = cache_rows(failing_way="thread")
    said = answers.failure_rate(rows)
    assert "thread: 3 of 60 failed" in said
    assert "operation not permitted" in said
    assert "cooperative: 0 of 60 failed (0 to 5.96 %)" in said  # the exact interval of none in 60


def test_memory_is_extrapolated_on_the_line_of_its_bytes(cache_rows):
    """The sum over lengths is compared with a published one, so it must be the sum of the fitted line."""
    rows = cache_rows(cost=("private",))
    expected = sum(2 + length / 8 for length in range(1, answers.PUBLISHED + 1)) / 1024  # GiB, as rows are built
    assert f"one of each length to 406: {expected:.3g} GiB" in answers.graph_memory(rows)


def test_cold_and_warm_hits_are_those_of_the_requests(cache_rows):
    """Hit rates of the wrong half would turn a cold start into steady state."""
    rows = cache_rows(requests=60)
    table = tallies.requests(rows)
    own = table[(table["setting"] == "capture=async") & (table["request"] >= 30)]
    assert f"{100 * own['hit'].mean():.3g} % and " in answers.trace_dependence(rows)


def test_the_cold_start_and_the_second_half_share_no_request(cache_rows):
    """Of 30 requests the first 20 and the last 15 overlap: five would be cold and warm at once."""
    assert "in the first 15, " in answers.trace_dependence(cache_rows(requests=30))
    assert "in the first 20, " in answers.trace_dependence(cache_rows(requests=60))


def test_several_runs_are_refused(cache_rows):
    """Numbers of two machines in one sentence compare nothing."""
    rows = cache_rows(requests=10)
    with pytest.raises(StatisticsError, match="2 runs"):
        answers.table(pd.concat([rows, rows.assign(run_id="r2")]))


def test_exact_replays_are_compared_length_by_length():
    """Medians over whole streams compared instead: half of the exact ones are misses, and buckets would look faster."""
    def hits(setting, times):
        return pd.DataFrame([{"setting": setting, "prompt_tokens": n, "ms": ms, "hit": hit} for n, ms, hit in times])

    exact = hits("capture=sync, buckets=exact", [(5, 9.0, True), (8, 4.0, True), (8, 90.0, False), (9, 70.0, False)])
    padded = hits("capture=sync", [(5, 10.0, True), (8, 5.0, True), (9, 5.0, True)])
    said = answers._same_lengths(pd.concat([exact, padded]))
    assert said == (" Of the 2 lengths replayed both ways, an exact replay took 0.85 times as long as one of its "
                    "bucket (0.80 to 0.90).")
    assert "No length was replayed" in answers._same_lengths(exact)
