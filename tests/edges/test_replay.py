"""Replay, advice and reports on loads whose right answers are known."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from swiftbalancer.dispatch import DispatchForm
from swiftbalancer.errors import ConfigError, RecordingError, TopologyError, UnknownPolicy
from swiftbalancer_worker import trace as trace_module
from swiftbalancer_worker.advise import Option, Sweep, advise, recommend, sentence, settings_to_try
from swiftbalancer_worker.initial import initial_placement, totals
from swiftbalancer_worker.replay import ReplaySettings, fold, replay, unbalanced
from swiftbalancer_worker.replay_summary import summary
from swiftbalancer_worker.report import write_report
from swiftbalancer_worker.report_data import layer_loads
from swiftbalancer_worker.trace import Trace, open_trace

LAYERS, EXPERTS, RANKS = 2, 8, 4
TRACES = Path(os.environ.get("SWIFTBALANCER_TRACES", Path(__file__).resolve().parents[3] / "shared" / "traces"))


def steady(steps: int) -> NDArray[np.float64]:
    """Experts 0 and 1, both on rank 0, take 30 % of the tokens each; the others share the rest."""
    loads = np.full((steps, LAYERS, EXPERTS), 400.0 / 6)
    loads[:, :, :2] = 300.0
    return loads


def trace(loads: NDArray[np.float64]) -> Trace:
    return Trace("test", [loads])


def settings(**changes: object) -> ReplaySettings:
    known: dict[str, object] = {"num_ranks": RANKS, "num_redundant": 4, "window": 4}
    return ReplaySettings(**(known | changes))  # type: ignore[arg-type]


def test_a_steady_skew_is_gone_after_the_first_window() -> None:
    result = replay(trace(steady(12)), settings(dispatch=DispatchForm("exact")), policies=["swift"])
    figures = summary(result)
    assert figures["without"]["imbalance_live"] == pytest.approx(600 / 250)
    (swift,) = figures["policies"]
    assert swift["imbalance_live"] < 1.1
    assert swift["imbalance_bound"] <= swift["imbalance_live"] + 1e-6
    assert swift["bytes_moved"] == sum(result.runs[0].moves) * settings().expert_bytes
    assert result.runs[0].imbalance[0].mean() > 1.3, "nothing is planned before there is a past"


def test_time_is_that_of_the_slowest_ranks_over_that_in_blocks() -> None:
    figures = summary(replay(trace(steady(12)), settings(dispatch=DispatchForm("exact")), policies=["swift"]))
    (swift,) = figures["policies"]
    assert swift["time_live"] == pytest.approx(swift["imbalance_live"] / figures["without"]["imbalance_live"])


def test_where_reads_of_weights_count_no_expert_is_read_twice() -> None:
    """Eight experts in twelve slots of two ranks: six slots each are read at first, then four."""
    given = settings(num_ranks=2, tokens_per_activation=2000.0)
    result = replay(trace(steady(12)), given, policies=["swift"])
    (run,) = result.runs
    assert run.time[0] == pytest.approx(6 * 2000 + 500, rel=0.02)
    assert run.time[-1] == pytest.approx(4 * 2000 + 500, rel=0.02)
    assert result.unbalanced.time[0] == pytest.approx(4 * 2000 + 600 + 2 * 400 / 6)
    assert summary(result)["recording"]["tokens_per_activation"] == 2000.0


def test_the_policy_none_moves_nothing() -> None:
    (run,) = replay(trace(steady(12)), settings(), policies=["none"]).runs
    assert sum(run.moves) == 0
    assert len(run.plan_ms) == 3
    assert len(run.refresh_ms) == 9


def test_the_busiest_copy_carries_an_experts_tokens_over_its_replicas() -> None:
    (run,) = replay(trace(steady(12)), settings(), policies=["none"]).runs
    np.testing.assert_allclose(run.busiest_copy[0, :4], [150, 150, 100 / 3, 100 / 3], rtol=1e-5)
    np.testing.assert_allclose(run.busiest_copy[0, 4:], 200 / 3, rtol=1e-5)


def test_several_policies_run_side_by_side_each_from_the_start() -> None:
    both = replay(trace(steady(12)), settings(), policies=["none", "swift"])
    alone = replay(trace(steady(12)), settings(), policies=["swift"])
    np.testing.assert_array_equal(both.runs[1].imbalance, alone.runs[0].imbalance)


def test_the_future_is_not_used() -> None:
    loads = np.random.default_rng(0).gamma(0.5, 100.0, (16, LAYERS, EXPERTS))
    whole = replay(trace(loads), settings(), policies=["swift"]).runs[0]
    other = loads.copy()
    other[11:] = other[11:, :, ::-1]
    changed = replay(trace(other), settings(), policies=["swift"]).runs[0]
    np.testing.assert_array_equal(whole.imbalance[:11], changed.imbalance[:11])
    assert not np.array_equal(whole.imbalance[11:], changed.imbalance[11:])


def test_windows_and_refreshes_come_as_often_as_asked() -> None:
    (run,) = replay(trace(steady(24)), settings(window=6, refresh=2), policies=["swift"]).runs
    assert run.plan_steps == [5, 11, 17, 23]
    assert len(run.refresh_ms) == 8
    (still,) = replay(trace(steady(24)), settings(window=6, refresh=0), policies=["swift"]).runs
    assert still.refresh_ms == []


def test_the_budget_bounds_moves_per_layer() -> None:
    loads = np.random.default_rng(1).gamma(0.3, 100.0, (12, LAYERS, EXPERTS))
    for budget in (0, 1, 3):
        (run,) = replay(trace(loads), settings(budget=budget), policies=["swift"]).runs
        assert max(run.moves) <= budget * LAYERS


def test_idle_steps_and_layers_do_not_disturb() -> None:
    loads = steady(12)
    loads[5] = 0
    loads[:, 1] = 0
    result = replay(trace(loads), settings(), policies=["swift"])
    assert np.isfinite(result.runs[0].imbalance).all()
    assert (result.runs[0].imbalance[:, 1] == 1.0).all()


def test_blocks_of_experts_need_not_be_equal() -> None:
    loads = np.ones((2, 1, 10))
    assert unbalanced(trace(loads), 4).imbalance[0, 0] == pytest.approx(3 / 2.5)


def test_folding_keeps_every_token() -> None:
    loads = np.random.default_rng(2).random((130, 2, 3))
    folded = fold(loads, 64)
    assert len(folded) == 64
    np.testing.assert_allclose(folded.sum(0), loads.sum(0))
    np.testing.assert_array_equal(fold(loads[:5], 64), loads[:5])
    np.testing.assert_allclose(totals(trace(loads), 7).sum(0), loads.sum(0))


def test_a_replay_with_no_step_after_its_first_window_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"has 8 recorded steps and the first plan comes after 8.* give --window 2"):
        replay(trace(steady(8)), settings(window=8), policies=["none"])
    with pytest.raises(RecordingError, match=r"1 recorded step; .* needs 2 at least"):
        replay(trace(steady(1)), settings(window=1), policies=["none"])
    result = replay(trace(steady(8)), settings(window=7), policies=["none"])
    assert len(result.without[result.judged]) == 1


def test_advice_says_so_where_the_busiest_rank_carries_more_but_reads_less() -> None:
    chosen = Option(4, 4, "swift", 4, 1.10, 1.30, 0.1, 10.0, 1.0)
    assert "carries 1.300 times the mean, 1.100 without, but reads less: up to 10.0 %" in sentence(
        4, chosen, [chosen]
    )


def test_advice_claims_no_saving_where_every_option_is_worse() -> None:
    worse = Option(4, 0, "swift", 4, 1.10, 1.12, -0.019, 0.0, 1.0)
    assert sentence(4, None, [worse]).endswith("1.100 times the mean; the one option tried is no better.")
    assert sentence(4, None, [worse, worse]).endswith("all 2 options tried are no better.")
    little = Option(4, 0, "swift", 4, 1.10, 1.09, 0.009, 0.0, 1.0)
    assert "the best option saves 0.9 % of" in sentence(4, None, [worse, little])


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(TopologyError, match="do not divide over 4 ranks; 4 redundant"):
        replay(trace(steady(8)), settings(num_redundant=1), policies=["swift"])
    with pytest.raises(UnknownPolicy, match="known:"):
        replay(trace(steady(8)), settings(), policies=["swifft"])
    with pytest.raises(ConfigError, match="window=0"):
        settings(window=0)


def test_hundreds_of_windows_are_judged_without_being_loaded(tmp_path: Path) -> None:
    """600 windows of 58 x 288 are 40 MB on disk; only figures and one window at a time are held."""
    import tracemalloc

    path = tmp_path / "long.npy"
    shape = (600, 58, 288)
    mapped = np.lib.format.open_memmap(path, "w+", np.float32, shape)
    mapped[:] = np.random.default_rng(3).gamma(1.0, 10.0, shape[1:]).astype(np.float32)
    mapped.flush()
    del mapped
    tracemalloc.start()
    spread = unbalanced(open_trace(path), 32)
    least_even = layer_loads(open_trace(path), spread.focus)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert least_even.shape == (600, 288)
    assert spread.imbalance.shape == (600, 58)
    assert peak < 10 << 20


def mapped_kib() -> int:
    """Resident pages of mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssFile"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_pages_that_were_read_are_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "loads.npy", np.ones((600, 58, 288), np.float32))
    grown = []
    for limit in (1 << 40, 1 << 20):
        monkeypatch.setattr(trace_module, "RELEASE_EVERY_BYTES", limit)
        long, before = open_trace(tmp_path / "loads.npy"), mapped_kib()
        assert sum(1 for _ in long) == 600
        grown.append(mapped_kib() - before)
    assert grown[0] > 30 << 10, "the file was not mapped at all"
    assert grown[1] < 5 << 10


def test_the_initial_placement_evens_out_the_whole_recording() -> None:
    chosen = initial_placement(trace(steady(6)), settings(dispatch=DispatchForm("exact")), policy="greedy")
    chosen.placement.validate()
    assert chosen.imbalance_before == pytest.approx(2.4)
    assert chosen.imbalance_after < 1.1


# -- advice -----------------------------------------------------------------------------------------------------


def option(gain: float, memory_mib: float, moves: float = 1.0) -> Option:
    return Option(8, 8, "swift", 4, 1.5, 1.5 * (1 - gain), gain, memory_mib, moves)


def test_the_cheapest_of_nearly_the_best_is_recommended() -> None:
    cheap, best = option(0.185, 100), option(0.2, 400)
    assert recommend([option(0.1, 0), cheap, best]) is cheap
    assert recommend([option(0.1, 0), option(0.17, 100), best]) is best
    assert recommend([option(0.2, 100, moves=9), cheap]) is cheap


def test_the_advice_names_gain_memory_and_where_returns_diminish() -> None:
    cheap, best = option(0.185, 100, moves=2.0), option(0.2, 400, moves=3.0)
    words = sentence(8, cheap, [cheap, best])
    assert "falls from 1.500 to 1.222 times the mean: up to 18.5 %" in words
    assert "for 100 MiB per rank. Returns diminish from there" in words
    assert "would save 1.5 % more, for 300 MiB more per rank and 3.0 instead of 2.0 moves" in words
    assert sentence(8, best, [cheap, best]).endswith("Nothing else that was tried does better.")


def test_little_gain_is_not_worth_it_and_said_plainly() -> None:
    options = [option(0.01, 0), option(0.015, 100)]
    assert recommend(options) is None
    assert "balancing is not worth it" in sentence(8, None, options)


def test_an_even_load_needs_no_balancing() -> None:
    even = trace(np.ones((16, LAYERS, EXPERTS)) * 100)
    tries = settings_to_try(even, settings(), Sweep(ranks=[4], policies=["swift"], budgets=[4]))
    assert advise(even, tries).recommended == {4: None}


def test_a_skewed_load_needs_some_and_every_option_is_told() -> None:
    loads = trace(steady(16))
    tries = settings_to_try(loads, settings(), Sweep(ranks=[2, 4], policies=["swift", "none"], budgets=[4]))
    calls = []
    advice = advise(loads, tries, progress=lambda: calls.append(1))
    assert len(calls) == len(tries) == len(advice.options)
    chosen = advice.recommended[4]
    assert chosen is not None
    assert chosen.gain > 0.3
    assert sentence(4, chosen, advice.options).startswith(f"4 ranks: use {chosen.policy}")


def test_a_sweep_that_fits_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing to try: 8 experts"):
        settings_to_try(trace(steady(4)), settings(), Sweep(ranks=[4], redundant=[1, 2]))


# -- reports ----------------------------------------------------------------------------------------------------


def test_a_report_is_one_page_that_needs_no_network(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    pytest.importorskip("matplotlib")
    loads = np.random.default_rng(4).gamma(0.5, 100.0, (12, LAYERS, EXPERTS))
    named = Trace("<script>alert(1)</script>", [loads])
    result = replay(named, settings(), policies=["swift", "none"])
    pictures = write_report(result, tmp_path / "out" / "report.html")
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count('class="plotly-graph-div"') == 6
    assert page.count("<h2>") == 6
    assert "<script>alert(1)" not in page
    assert '<script src="http' not in page
    assert "<link" not in page
    assert f"{summary(result)['policies'][0]['imbalance_live']:.3f}" in page
    for picture in pictures:
        assert picture.read_bytes().startswith(b"\x89PNG")
    assert len(pictures) == 2


def test_a_report_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    (tmp_path / "file").write_text("")
    result = replay(trace(steady(8)), settings(), policies=["none"])
    with pytest.raises(RecordingError, match="cannot be written"):
        write_report(result, tmp_path / "file" / "report.html")


# -- real loads -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not TRACES.exists(), reason="no recorded traces here")
def test_a_real_steady_load_is_balanced_better_than_without() -> None:
    real = open_trace(TRACES / "dsv2lite_esft_translation.npy")
    result = replay(real, ReplaySettings(8, num_redundant=8, bound=False), policies=["swift"])
    figures = summary(result)
    assert figures["without"]["imbalance_live"] > 1.5
    assert figures["policies"][0]["imbalance_live"] < 1.3


def test_tables_are_renewed_the_less_often_the_more_it_has_to_gain() -> None:
    loads = np.random.default_rng(4).poisson(steady(24) * 5).astype(np.float64)
    always, sometimes, never = (
        replay(trace(loads), settings(refresh=1, min_refresh_gain=gain), policies=["swift"]).runs[0].dispatch_updates
        for gain in (0.0, 0.002, 10.0)
    )
    assert always > sometimes > never
