"""Which tests hold each fault case and each promise; that they exist, and that none is forgotten.

The cases are faults, each with the behaviour that is wanted; the promises are those of README. A test is named by its
file under tests/ and its function.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
README = TESTS.parent / "README.md"

CASES: dict[int, tuple[str, str]] = {
    1: ("a step reads a value on the host inside a capture", """
        faults/test_engine: test_case_01_a_host_read_in_a_step_costs_its_graph_only
            test_case_01_without_the_guard_a_tape_keeps_the_value_it_read
        unit/test_cache: test_a_failed_capture_leaves_the_cache_as_it_was
        unit/test_runtime: test_failed_capture_falls_back_and_says_why
        gpu/test_cache: test_failed_captures_cost_no_memory"""),
    2: ("memory runs out in a capture", """
        unit/test_cache: test_room_is_made_when_memory_runs_out
        gpu/test_cache: test_running_out_of_memory_is_one_failed_capture"""),
    # The process is not started anew: it warns, and its run says so, which is what unit/test_experiment holds.
    3: ("fifty captures that fail", """
        unit/test_cache: test_a_failed_capture_leaves_the_cache_as_it_was
        faults/test_engine: test_case_03_memory_that_failed_captures_keep_is_reported
        unit/test_experiment: test_memory_that_failed_captures_keep_is_told
        faults/test_gpu_cases: test_case_03_failed_captures_leave_no_memory_that_cannot_be_had_back
        gpu/test_cache: test_failed_captures_cost_no_memory"""),
    4: ("a kernel is first used inside a capture", """
        unit/test_cache: test_a_kernel_compiled_during_capture_is_named
        faults/test_engine: test_case_04_the_kernel_that_was_compiled_is_named
        faults/test_gpu_cases: test_case_04_a_kernel_first_used_inside_a_capture_is_named
        gpu/test_cuda: test_warm_hybrid_captures_and_compiles_nothing"""),
    5: ("a kernel or another graph is dropped during a capture", """
        faults/test_engine: test_case_05_no_collection_happens_during_a_capture
        faults/test_gpu_cases: test_case_05_what_is_dropped_during_a_capture_does_not_end_it"""),
    6: ("capture or replay from a second thread", """
        faults/test_engine: test_case_06_a_second_thread_is_refused
            test_case_06_without_the_guard_a_second_thread_gets_in
            test_case_06_a_request_belongs_to_one_thread_and_the_next_to_any"""),
    7: ("another thread works on the GPU during a capture", """
        unit/test_behind: test_a_disturbed_capture_is_tried_again
        faults/test_gpu_cases: test_case_07_work_of_another_thread_ends_a_global_capture_loudly"""),
    8: ("a capture is asked for while captures are closed", """
        unit/test_cache: test_captures_can_be_closed
        unit/test_behind: test_a_sealed_runtime_captures_nothing
        unit/test_experiment: test_a_capture_inside_a_timed_request_fails_the_run"""),
    9: ("a buffer moves between capture and replay", """
        unit/test_cache: test_a_moved_buffer_is_refused
        unit/test_runtime: test_replaced_weights_are_noticed
        faults/test_gpu_cases: test_case_09_a_buffer_that_moved_is_refused_before_the_device_reads_it"""),
    10: ("a graph is evicted while its replay is on the device", """
        unit/test_cache: test_nothing_leased_is_evicted test_all_stay_while_one_is_in_flight
        gpu/test_cache: test_a_graph_is_evicted_only_when_its_replay_is_over"""),
    11: ("a graph reset under others that share its stream", """
        unit/test_selftest: test_a_graph_that_loses_memory_to_another_is_noticed
            test_it_is_asked_where_graphs_will_be_dropped
        unit/test_cache: test_all_go_where_one_by_one_is_not_safe
        gpu/test_cache: test_the_self_test_and_what_follows_from_it"""),
    # An output that is read after the next replay holds that one's values, and nothing refuses it: no caller can, as
    # buffers are the engine's, which reads each before it replays again.
    12: ("graphs of one pool replayed in every order", """
        unit/test_cache: test_graphs_of_one_pool_give_equal_results_in_every_order
        gpu/test_cache: test_graphs_of_one_pool_replay_in_every_order"""),
    13: ("lengths around every bucket, and bad ladders", """
        faults/test_engine: test_case_13_every_length_around_a_bucket_is_exact
            test_case_13_lengths_outside_are_refused_with_the_limit
        unit/test_buckets: test_a_bad_ladder_is_refused test_a_prompt_gets_the_smallest_bucket_that_holds_it"""),
    14: ("two callers decode at once", """
        unit/test_runtime: test_one_request_at_a_time
        faults/test_engine: test_case_14_a_second_caller_on_another_thread_is_refused"""),
    15: ("a replay against the same kernels launched one by one", """
        unit/test_runtime: test_replay_is_bit_equal_to_its_program test_arms_draw_the_same_tokens
        gpu/test_cuda: test_replay_is_bit_equal_to_its_kernels test_arms_draw_the_same_tokens
        faults/test_gpu_cases: test_case_15_replays_are_bit_equal_in_every_bucket"""),
    16: ("a kernel that is wrong by one element", """
        faults/test_engine: test_case_16_a_kernel_that_is_wrong_in_one_place_is_seen
        unit/test_lowering: test_a_broken_lowering_gives_other_tokens test_a_broken_lowering_is_refused
        unit/test_fused_random: test_a_wrong_operation_is_no_near_tie"""),
    17: ("NaN or infinity in weights or logits", """
        faults/test_engine: test_case_17_numbers_that_are_none_are_traced_to_their_place
            test_case_17_a_run_keeps_the_rounds_before
        unit/test_runtime: test_broken_weights_raise
        unit/test_policy_runs: test_broken_logits_are_raised_and_not_fed_back
        gpu/test_cuda: test_broken_logits_do_not_end_the_process"""),
    18: ("the worker is killed", """
        faults/test_processes: test_case_18_a_killed_worker_fails_the_run_with_its_rows_and_the_next_run_works
            test_case_18_a_device_that_is_broken_for_good_is_a_death
        faults/test_soak: test_a_worker_is_stopped_and_killed_and_every_canary_stays_right
            test_a_leak_that_each_kill_hides_is_named
        faults/test_compiled: test_half_a_compiled_kernel_is_compiled_again"""),
    19: ("the notebook's kernel or the parent is killed", """
        faults/test_processes: test_case_19_a_worker_is_gone_ten_seconds_after_its_parent
            test_case_19_gpu_memory_is_back_after_the_parent"""),
    # Nothing tells a device that hangs from a first step that captures and compiles: that has step_timeout_s, 120 s.
    20: ("the worker is stopped: an error within two seconds; it hangs: within step_timeout_s", """
        faults/test_processes: test_case_20_a_worker_that_is_stopped_is_ended_and_what_wakes_it_later_does_no_harm
        unit/test_link: test_a_worker_that_hangs_is_ended_by_its_deadline"""),
    21: ("frames that are none", """
        faults/test_processes: test_case_21_a_pickle_for_a_frame_is_refused_and_ends_the_worker
        unit/test_frames: test_what_is_no_frame_is_refused test_random_bytes_end_in_a_refusal_or_a_frame"""),
    22: ("malformed safetensors, tensors that do not fit", """
        unit/test_models: test_truncated_weights_name_the_file test_malformed_weights_name_the_file
            test_huge_header_length test_truncated_shard_is_named test_missing_extra_and_wrong_tensors_are_all_listed
            test_tied_weights_need_no_second_copy"""),
    23: ("other formats, and files outside the checkpoint", """
        unit/test_models: test_only_safetensors_are_read test_index_cannot_name_files_elsewhere
            test_link_out_of_the_directory_is_refused
        faults/test_files: test_case_23_a_link_that_leaves_the_checkpoint_is_refused
            test_case_23_a_link_inside_the_checkpoint_is_followed"""),
    24: ("hostile configs", """
        unit/test_models: test_config_field_is_refused_by_name test_all_fields_are_listed_at_once
            test_config_that_is_no_plain_json test_code_beside_the_weights_never_runs
        faults/test_files: test_case_24_a_config_of_fifty_megabytes_is_not_read
            test_case_24_a_hostile_config_imports_and_fetches_nothing
            test_case_24_a_name_of_any_kind_is_refused_as_one"""),
    25: ("prompts that are none", """
        unit/test_runtime: test_bad_prompts_are_refused
        faults/test_engine: test_case_25_a_prompt_beyond_all_bounds_is_refused_unread
            test_case_25_settings_of_any_type_and_size_are_refused"""),
    26: ("parameters that a notebook does not take", """
        notebooks/test_run: test_a_bad_parameter_is_refused_before_anything_is_written
            test_a_notebook_that_would_lose_its_parameters_is_refused"""),
    27: ("a kernel dies, a cell times out, sys.exit()", """
        notebooks/test_run: test_an_end_that_is_no_end_leaves_a_failed_run_with_its_rows
            test_a_cell_that_takes_too_long_fails_the_run test_an_old_execution_in_the_file_is_no_evidence"""),
    28: ("a full disk or a kill at any write", """
        faults/test_files: test_case_28_a_full_disk_at_every_call_in_turn_loses_nothing_finished
        faults/test_kills: test_promise_3_no_finished_row_is_lost_or_doubled_in_200_kills
        unit/test_records: test_a_crash_between_merging_and_removing_parts_counts_no_row_twice
        notebooks/test_run: test_a_full_disk_fails_the_run_and_keeps_the_others"""),
    29: ("two runs in one place, edited rows, mixed rows, too small a sample", """
        faults/test_files: test_case_29_two_runs_never_share_a_directory test_case_29_rows_of_two_machines_make_no_table
        unit/test_records: test_a_changed_or_missing_file_is_named test_a_manifest_that_lies_is_refused
        unit/test_plots: test_rows_that_cannot_be_one_figure_are_refused
            test_no_figure_shows_a_p99_without_the_sample_for_it"""),
    30: ("hostile text in names, prompts and reasons", """
        faults/test_files: test_case_30_a_table_shows_hostile_text_as_text
            test_case_30_a_terminal_and_an_error_stay_in_hand
            test_case_30_a_setting_of_a_megabyte_is_refused_in_a_line
            test_case_30_jupyterlab_is_told_to_run_no_command_for_a_page
        unit/test_plots: test_hostile_text_adds_no_element_and_no_formula
        unit/test_traceviews: test_a_page_with_hostile_names_can_be_written
        unit/test_repository: test_committed_notebooks_are_clean"""),
}

PROMISES: dict[int, str] = {
    1: """unit/test_runtime: test_greedy_tokens_equal_generate test_broken_weights_raise
          unit/test_cache: test_a_moved_buffer_is_refused
          faults/test_engine: test_case_13_every_length_around_a_bucket_is_exact""",
    2: """unit/test_runtime: test_paths_and_counters_prove_what_ran test_failed_capture_falls_back_and_says_why
          faults/test_engine: test_case_01_a_host_read_in_a_step_costs_its_graph_only""",
    3: """faults/test_kills: test_promise_3_no_finished_row_is_lost_or_doubled_in_200_kills
          faults/test_files: test_case_28_a_full_disk_at_every_call_in_turn_loses_nothing_finished
          notebooks/test_run: test_a_second_run_leaves_the_first_alone""",
    4: """faults/test_processes: test_case_19_a_worker_is_gone_ten_seconds_after_its_parent
          unit/test_restarts: test_nothing_is_left_when_the_parent_gives_up
          unit/test_records: test_a_full_disk_leaves_the_old_file
          notebooks/test_run: test_an_interrupt_leaves_a_verdict_and_no_kernel
          gpu/test_cache: test_memory_comes_back test_failed_captures_cost_no_memory""",
    5: """unit/test_repository: test_nothing_can_execute_data test_a_banned_name_is_seen
          faults/test_files: test_a_file_without_an_end_is_refused_at_once test_a_file_of_a_run_is_not_one_elsewhere
          unit/test_models: test_code_beside_the_weights_never_runs
          faults/test_files: test_case_24_a_hostile_config_imports_and_fetches_nothing""",
    6: """unit/test_runtime: test_bad_prompts_are_refused test_bad_settings_are_refused
          unit/test_models: test_all_fields_are_listed_at_once
          notebooks/test_run: test_a_bad_parameter_is_refused_before_anything_is_written""",
    7: """unit/test_cli: test_check_finds_writes_and_accepts test_check_notices_a_changed_run
          unit/test_peers: test_what_is_not_installed_is_an_empty_line_that_says_how_to_get_it
          unit/test_published: test_every_table_is_there_with_its_sources
              test_every_claim_fits_its_judge_and_cites_cells_that_are_known
          unit/test_repository: test_committed_notebooks_are_clean""",
}


def listed(text: str) -> list[tuple[str, str]]:
    """(file, test) of each name in `file: test test …` lines."""
    found, file = [], ""
    for word in text.split():
        if word.endswith(":"):
            file = word[:-1]
        else:
            found.append((file, word))
    return found


@cache
def defined(file: str) -> set[str]:
    path = TESTS / f"{file}.py"
    tree = ast.parse(path.read_text()) if path.is_file() else ast.Module([], [])
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def absent(text: str) -> list[str]:
    return [f"{file}::{name}" for file, name in listed(text) if name not in defined(file)]


def test_every_case_has_a_test() -> None:
    """A case that nobody tests, among thirty that look complete."""
    assert list(CASES) == list(range(1, 31))
    assert all(listed(text) for _, text in CASES.values())


@pytest.mark.parametrize("case", CASES)
def test_the_tests_of_a_case_exist(case: int) -> None:
    """A test renamed or removed, and the case left without."""
    assert not absent(CASES[case][1])


def test_every_numbered_test_is_listed() -> None:
    """A test of a case that the table does not know, under a number that is not its own."""
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        for name in defined(f"faults/{path.stem}"):
            if match := re.match(r"test_case_(\d\d)_", name):
                number = int(match[1])
                assert (f"faults/{path.stem}", name) in listed(CASES[number][1]), name


@pytest.mark.parametrize("promise", PROMISES)
def test_every_promise_has_tests_that_exist(promise: int) -> None:
    """A promise in README that nothing holds the code to."""
    assert listed(PROMISES[promise])
    assert not absent(PROMISES[promise])


def test_the_promises_are_those_of_the_readme() -> None:
    """A promise added to README, or taken away, without its tests."""
    section = README.read_text().split("\n## Promises\n", 1)[1].split("\n## ", 1)[0]
    assert [int(number) for number in re.findall(r"^(\d)\. ", section, flags=re.MULTILINE)] == list(PROMISES)


def test_a_test_that_is_not_there_is_noticed() -> None:
    """The table believed whatever it says."""
    assert absent("unit/test_cache: test_a_moved_buffer_is_refused test_nothing unit/test_none: test_x") == [
        "unit/test_cache::test_nothing", "unit/test_none::test_x"]
