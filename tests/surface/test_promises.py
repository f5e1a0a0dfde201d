"""What the docs promise of tokens, templates, padding, checkpoints, signals and ranks, and the tests that hold it.

A promise stands here word for word as on its page, so that who changes the sentence meets the test, and who removes the
test meets the sentence.
"""

import ast
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
DOCS = TESTS.parent / "docs"

PROMISES = {
    "data.md": {
        "A tokenizer's directory means what it means to transformers.": [
            "core/tokenizer/test_tokenizer_files.py::test_drawn_directories_mean_what_they_mean_to_transformers",
            "core/tokenizer/test_tokenizer_files.py::test_names_are_found_in_whichever_file_has_them",
        ],
        "Nothing is fetched, and no code of a checkpoint runs.": [
            "core/tokenizer/test_tokenizer_files.py::test_nothing_leaves_the_machine",
            "core/tokenizer/test_tokenizer_files.py::test_code_of_a_checkpoint_is_refused_and_never_runs",
        ],
        "tokenizer.json decides whether that is bos, not `add_bos_token`": [
            "core/tokenizer/test_tokenizer_files.py::test_a_text_begins_as_transformers_begins_it_whatever_add_bos_token_says"
        ],
        "a named token that no file gives an id": [
            "core/tokenizer/test_tokenizer_files.py::test_a_name_without_an_id_is_an_error_that_names_file_and_token"
        ],
        "Without an eos a line says that texts and completions end without one.": [
            "core/tokenizer/test_tokenizer_files.py::test_no_eos_at_all_is_said",
            "cli/test_data.py::test_what_is_odd_about_the_tokenizer_is_said",
        ],
        "A SentencePiece or tiktoken file without a tokenizer.json needs the packages that the error names": [
            "core/tokenizer/test_tokenizer_files.py::test_a_vocabulary_that_needs_a_package_names_it"
        ],
        "Templates run in transformers' sandbox and see what it gives them": [
            "core/tokenizer/test_template.py::test_a_template_sees_what_transformers_gives_it",
            "core/tokenizer/test_template.py::test_the_template_is_the_one_that_transformers_takes",
        ],
        "the same data is the same tokens tomorrow": [
            "core/tokenizer/test_template.py::test_the_day_is_always_the_same"
        ],
        "each turn from where generation would begin to its end-of-turn token; white space after that token is not": [
            "plugins/test_chat_templates.py::test_a_conversation_is_what_transformers_makes_of_it",
            "plugins/test_chat_templates.py::"
            "test_the_newline_after_a_turn_is_not_trained_whatever_the_tokens_are_flagged",
        ],
        "What others say is trained with `--loss-on all` only.": [
            "plugins/test_data_conversations.py::"
            "test_what_others_say_is_never_trained_and_all_that_is_written_of_answers_is"
        ],
        "A token in which a header and an answer merge is trained.": [
            "plugins/test_data_conversations.py::test_a_token_that_holds_a_character_of_an_answer_is_trained"
        ],
        "A sample with nothing trained is an error that names it.": [
            "core/data/test_rows.py::test_a_sample_with_nothing_trained_is_an_error_that_names_it"
        ],
        'A message with `"weight": 0` or `"train": false` is not trained, with no `--loss-on`': [
            "plugins/test_data_conversations.py::test_a_turn_of_weight_0_is_not_trained",
            "plugins/test_data_conversations.py::test_a_weight_says_yes_or_no",
        ],
        "are named in a warning.": [
            "plugins/test_data_conversations.py::test_roles_that_are_never_trained_are_warned_about_by_name"
        ],
        "**What writers leave in files** is read": [
            "plugins/test_data_conversations.py::test_what_tables_and_exports_leave_in_is_read",
            "plugins/test_data_conversations.py::test_arguments_may_be_an_object_or_json_text",
            "plugins/test_data_conversations.py::test_parts_of_text_are_joined_where_the_template_would_print_the_list",
        ],
        "are refused with what to rename": [
            "plugins/test_data_conversations.py::test_what_is_not_read_is_refused_in_a_sentence"
        ],
        "These are counted and named with their first places before the first step, at the end of a run, and by "
        "`zoo data check`": [
            "cli/test_data.py::test_what_is_odd_is_a_warning_with_its_first_places_and_status_0",
            "cli/test_finetune.py::test_what_is_odd_about_the_data_is_said_before_the_first_step",
            "core/data/test_rows.py::test_remarks_are_counted_with_their_first_places_through_a_resume",
        ],
        "the chat template leaves out or changes": [
            "plugins/test_data_conversations.py::test_reasoning_that_the_template_drops_is_named",
            "plugins/test_data_conversations.py::test_content_and_tools_that_the_template_drops_are_named",
        ],
        "a chat template that writes markers which the vocabulary lacks": [
            "plugins/test_data_conversations.py::test_a_template_whose_markers_the_vocabulary_lacks_is_said"
        ],
        "texts and messages that spell out special tokens": [
            "plugins/test_data_conversations.py::test_texts_that_spell_out_special_tokens_are_said"
        ],
        "**Special tokens in somebody's text stay text.**": [
            "core/tokenizer/test_tokenizer.py::test_special_tokens_in_text_stay_text",
            "core/tokenizer/test_tokenizer.py::test_special_tokens_in_messages_stay_text",
            "core/tokenizer/test_guard.py::test_turn_tokens_that_somebody_typed_stay_text",
        ],
        "A piece of a split sample in which nothing is trained (a long prompt's first pieces) is left out": [
            "core/data/test_rows.py::test_pieces_without_a_label_are_left_out_and_counted"
        ],
    },
    "training.md": {
        "every number and every weight agrees to 1e-12": [
            "core/run/test_independent_loop.py::test_every_number_and_weight_is_the_independent_loops"
        ],
        "Padding goes to no expert": [
            "models/test_moe.py::test_padding_goes_to_no_expert_and_counts_nowhere",
            "models/test_mixtral.py::test_padding_counts_in_no_number_as_with_transformers_mask",
            "distributed/test_layout_matrix.py::test_padding_on_some_ranks_only_equals_one_process",
        ],
        "A row of nothing but padding has the loss 0.": [
            "models/test_moe.py::test_a_row_of_padding_alone_has_no_balancing_loss"
        ],
        "Such a step changes nothing": [
            "core/run/test_empty_steps.py::test_weights_and_moments_stay_the_loss_is_null_and_it_is_said"
        ],
        "A run that trained no token in all its steps ends with an error (status 5) and saves nothing.": [
            "core/run/test_empty_steps.py::test_a_run_that_trains_nothing_at_all_is_an_error_and_saves_nothing"
        ],
        "What a command says anew takes effect from there on": [
            "core/run/test_independent_loop.py::test_a_resumed_run_uses_what_its_command_says",
            "core/run/test_resume.py::test_every_setting_is_known_to_take_effect_or_to_be_refused",
        ],
        "What cannot change within a run is refused in a line that says what it was": [
            "core/run/test_resume.py::test_what_cannot_change_is_one_line_and_leaves_the_run_as_it_was",
            "core/run/test_resume.py::test_the_docs_name_every_setting_that_cannot_change",
        ],
        "refuse a number that is out of range, NaN or infinite, in one line with status 2": [
            "core/job/test_ranges.py::test_what_is_out_of_range_is_one_line_of_the_plan",
            "core/job/test_ranges.py::test_the_table_in_the_docs_is_what_is_checked",
        ],
    },
    "checkpoints.md": {
        "is ignored; a line at the start of a run names it": [
            "core/run/test_checkpoint.py::test_a_folder_that_is_not_whole_is_no_checkpoint_and_costs_no_other",
            "conversion/test_checksums.py::test_an_empty_folder_of_a_later_step_is_neither_done_nor_in_the_way",
        ],
        "all ranks, each a share; each byte is read once": [
            "distributed/test_saver.py::test_ranks_read_every_byte_once_between_them_and_hear_the_same"
        ],
        "a disk that is full just then makes a failed save like any other": [
            "conversion/test_checksums.py::test_a_disk_that_is_full_when_checksums_are_written_is_a_failed_save"
        ],
        "so every changed byte": ["conversion/test_checksums.py::test_every_single_byte_that_changes_is_found"],
        "and the newest checkpoint of the run that is intact": [
            "conversion/test_checksums.py::test_a_damaged_newest_checkpoint_is_one_line_and_what_it_advises_works"
        ],
        "If one of them is intact, `--resume` of an older one is refused": [
            "conversion/test_checksums.py::test_an_older_checkpoint_is_not_resumed_beside_newer_ones_that_are_intact"
        ],
        "a line says that it was not compared": [
            "conversion/test_checksums.py::test_a_run_of_an_older_zoo_is_read_and_a_line_says_that_it_was_not_compared"
        ],
        "remove `zoo-checksums.txt`, and the directory is one like any other": [
            "conversion/test_checksums.py::test_a_directory_that_was_edited_on_purpose_is_refused_with_a_way_on"
        ],
        "A run may be moved, copied with links kept or followed": [
            "conversion/test_checksums.py::test_a_copy_of_a_run_resumes_and_saves_as_the_run_itself"
        ],
    },
    "conversion.md": {
        "**Files beside the weights** go along byte for byte": [
            "conversion/test_published_runs.py::test_licences_and_tokenizer_are_published_byte_for_byte",
            "core/storage/test_published.py::test_all_that_belongs_to_a_checkpoint_is_there_and_nothing_else",
        ],
        "no other template is left that a loader could take instead": [
            "core/storage/test_published.py::test_a_given_template_is_the_one_that_transformers_takes",
            "conversion/test_published_runs.py::test_the_template_that_was_given_is_published",
        ],
        "and is never below the length of a row": [
            "core/storage/test_published.py::test_the_longest_text_of_a_tokenizer_follows_the_model",
            "conversion/test_published_runs.py::test_longer_rows_make_the_tokenizers_limit_longer",
        ],
        "a base model trained on chats stops at the end of its turns": [
            "conversion/test_published_runs.py::test_generation_stops_at_the_end_of_the_turn_that_was_trained",
            "core/storage/test_published.py::test_the_ends_that_were_trained_are_among_those_of_generation",
        ],
        "or warn that the template ends turns with no special token": [
            "core/tokenizer/test_turn_end.py::test_a_template_that_ends_turns_with_no_token_says_why",
            "conversion/test_published_runs.py::test_the_start_of_a_run_says_where_its_model_will_stop",
        ],
    },
    "launch.md": {
        "so no host name is looked up": ["distributed/test_stopping.py::test_ranks_of_one_machine_ask_for_no_name"],
        "one line, the same on all ranks, says who differs in what": [
            "distributed/test_agreement.py::test_ranks_with_other_settings_are_told_which",
            "distributed/test_agreement.py::test_ranks_with_other_plugins_are_told_which",
        ],
        "which all the others must see": [
            "distributed/test_agreement.py::test_a_run_directory_that_is_not_shared_is_refused_and_not_left_behind"
        ],
        "Paths may be spelt in another way on each host": [
            "distributed/test_agreement.py::test_paths_may_be_spelt_otherwise",
            "distributed/test_agreement.py::test_other_content_of_the_data_is_noticed_and_another_spelling_is_not",
        ],
        "all ranks refuse, with the same line and status": [
            "distributed/test_agreement.py::test_what_one_rank_must_refuse_all_refuse"
        ],
        "`RANK=0 WORLD_SIZE=1` trains alone and needs no place to meet.": [
            "distributed/test_agreement.py::test_one_rank_without_a_place_to_meet_trains_alone"
        ],
        "end with one line that names the variable and status 2": [
            "core/machine/test_launcher_env.py::test_what_makes_no_sense_is_one_sentence_with_a_way_out",
            "distributed/test_agreement.py::test_variables_that_make_no_sense_are_one_line",
        ],
        "Ranks that zoo starts import what their command imports": [
            "distributed/test_calls.py::test_ranks_import_what_a_program_imports_and_nothing_of_the_working_directory"
        ],
        "the error quotes its last words": [
            "core/launch/test_launch.py::test_a_rank_that_could_not_start_is_quoted_and_its_peers_are_not_blamed"
        ],
        "`zoo.finetune` works in any thread, in a notebook, and beside an event loop.": [
            "core/test_api.py::test_any_caller_gets_the_same_run"
        ],
        "It may be called again": [
            "core/test_api.py::test_a_call_after_one_that_failed_is_as_the_first",
            "distributed/test_calls.py::test_ranks_of_an_outer_launcher_train_again_in_the_same_processes",
        ],
        "a second one beside it is refused": [
            "core/test_api.py::test_a_second_run_beside_the_first_is_refused_and_does_not_disturb_it"
        ],
        "So is a run in a process that has a process group of torch already.": [
            "core/test_api.py::test_a_process_that_has_a_process_group_is_told_so"
        ],
        "the step ends, the run saves; the same command goes on": [
            "distributed/test_survival.py::test_a_signal_saves_and_the_same_command_goes_on",
            "distributed/test_stopping.py::test_a_signal_at_every_moment_of_a_run_saves_or_finds_it_done",
        ],
        "`nothing to save yet; the same command starts it`": [
            "distributed/test_stopping.py::test_a_signal_while_modules_are_imported_ends_the_start",
            "distributed/test_stopping.py::test_ranks_that_wait_for_each_other_end_at_once_and_none_is_started_again",
        ],
        "SIGHUP under `nohup`": ["distributed/test_stopping.py::test_under_nohup_a_terminal_that_goes_away_is_no_wish"],
        "ranks stop too; continued, they go on, and nobody counts as hung": [
            "distributed/test_stopping.py::test_a_terminal_that_suspends_a_run_and_then_goes_away",
            "core/launch/test_watchdog.py::test_a_job_that_was_suspended_has_not_hung",
        ],
        "a rank that finds it when it starts ends at once, with 75": [
            "distributed/test_stopping.py::test_a_start_after_a_stop_was_asked_for_does_not_begin"
        ],
        "is dropped; it ends neither run nor save": [
            "core/launch/test_lasting_output.py::test_a_process_goes_on_when_nobody_reads_what_it_writes"
        ],
        "The start is no step": [
            "core/launch/test_watchdog.py::test_a_start_is_not_measured_by_the_timeout_of_a_step",
            "core/launch/test_watchdog.py::test_a_start_has_a_limit_of_its_own_and_the_verdict_says_how_far_each_rank_came",
        ],
        "`zoo doctor` says how that goes": ["cli/test_doctor.py::test_the_hosts_own_name_is_looked_up"],
    },
}
CASES = [
    pytest.param(page, sentence, tests, id=f"{page} {sentence[:40]}")
    for page, promises in PROMISES.items()
    for sentence, tests in promises.items()
]


@cache
def functions_of(file):
    tree = ast.parse((TESTS / file).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize(("page", "sentence", "tests"), CASES)
def test_a_promise_is_on_its_page_and_held_by_tests_that_exist(page, sentence, tests):
    assert sentence in " ".join((DOCS / page).read_text().split())
    for file, _, name in (test.partition("::") for test in tests):
        assert name in functions_of(file), file
