"""Faults that were found in published code for these methods (methods.md 1.2-1.4, 2.5, 3-5, 7-9, 11), each with the
test that shows that ours has none of it, or that it is kept on purpose: id -> (what went wrong there, file::test).
"""

FAULTS: dict[str, tuple[str, str]] = {
    # -- steps of several passes ----------------------------------------------------------------------------------
    "step/zero-grad": (
        "A probe clears `.grad` inside the step and with it the gradients of earlier micro-batches.",
        "train/test_probes.py::test_a_probe_touches_no_gradient_no_hook_no_flag_and_no_random_state",
    ),
    "step/accumulation": (
        "The same rows in more micro-batches give another step.",
        "train/test_equalities.py::test_1x8_equals_2x4_equals_8x1",
    ),
    "step/regulariser-scale": (
        "An auxiliary term is not divided by the accumulation while the loss is.",
        "train/test_equalities.py::test_the_auxiliary_batch_is_divided_over_the_step",
    ),
    "step/num-items": (
        "A step ignores the trainer's count of items, so that its scale is off by the accumulation.",
        "train/test_equalities.py::test_the_normaliser_counts_the_whole_step",
    ),
    "step/restore-by-adding": (
        "Shifted weights come back by adding the shift again, which drifts in half precision.",
        "train/test_temporary_changes.py::test_perturbed_brings_the_saved_bytes_back",
    ),
    "step/dropout-masks": (
        "Passes that are compared draw different dropout masks.",
        "train/test_temporary_changes.py::test_paired_passes_draw_the_same_dropout_masks",
    ),
    "step/norm-precision": (
        "A norm is taken in half precision.",
        "train/test_known_faults.py::test_a_norm_over_half_precision_tensors_is_taken_in_fp32",
    ),
    "step/reduced-probe": (
        "Inner passes trigger a reduction over processes, or processes perturb in different directions.",
        "train/test_processes.py::test_two_processes_equal_one",
    ),
    "step/frozen-by-zero-gradient": (
        "Layers are frozen by zero gradients, and weight decay and momentum still move them.",
        "train/test_context.py::test_excluded_parameters_do_not_move_under_weight_decay",
    ),
    "step/invisible-gradients": (
        "Gradients are written to where the optimiser does not look, so that the method is plain SFT.",
        "train/test_known_faults.py::test_what_a_step_accumulates_is_what_the_optimiser_sees",
    ),
    "step/double-backward": (
        "A second derivative is asked of a fused attention kernel that has none.",
        "train/test_simulated_attack.py::test_attention_without_second_derivative_is_refused",
    ),
    "step/auxiliary-order": (
        "The auxiliary loader is rebuilt at every request and replays its first batch, or is cut to the shorter set.",
        "train/test_known_faults.py::test_auxiliary_rows_go_round_however_long_the_training",
    ),
    "step/nan": (
        "A batch without labels gives NaN, and training goes on.",
        "train/test_refusals.py::test_a_nan_stops_the_run_and_names_its_rows",
    ),
    # -- models and adapters --------------------------------------------------------------------------------------
    "model/attention-by-class": (
        "Attention is found by the classes of two families; in others the list is empty.",
        "models/test_anatomy.py::test_every_layer_has_one_attention_and_one_mlp_block",
    ),
    "model/names-under-adapters": (
        "Module names are hard-coded and break under an adapter's prefixes.",
        "models/test_anatomy.py::test_adapters_do_not_hide_the_blocks",
    ),
    "model/resized-embedding": (
        "A new pad token resizes the embedding, which is then saved with the adapter.",
        "models/test_load.py::test_a_missing_pad_token_is_taken_from_what_exists",
    ),
    "adapters/thawed": (
        "Activating several adapters makes all of them trainable.",
        "models/test_adapters.py::test_a_second_adapter_does_not_thaw_the_first",
    ),
    "adapters/zero-b": (
        "At initialisation B is zero, A has no gradient, and gradient scores are half blind.",
        "train/test_known_faults.py::test_fresh_adapters_have_no_gradient_for_a_until_a_warm_up",
    ),
    "adapters/scale": (
        "Learning rates are compared although alpha / rank differs 16-fold.",
        "train/test_known_faults.py::test_an_adapters_weight_change_is_alpha_over_rank",
    ),
    "adapters/single-or-double": (
        "Pipelines with one adapter and with two are reported under one name.",
        "pipeline/test_single.py::test_single_goes_on_with_the_adapter",
    ),
    "adapters/foreign-tensors": (
        "What is saved for the customer holds tensors of the defence.",
        "models/test_adapters.py::test_a_saved_adapter_holds_nothing_of_another",
    ),
    # -- rows and tokens ------------------------------------------------------------------------------------------
    "data/boundary": (
        "The prompt's length is used as a mask although tokens merge across the boundary.",
        "data/test_chat.py::test_no_merge_crosses_the_boundary",
    ),
    "data/lost-eos": (
        "The end token is cut off or not supervised.",
        "data/test_chat.py::test_response_and_eos_are_supervised",
    ),
    "data/pad-is-eos": (
        "Lengths are counted as ids unlike the pad token, which is the end token.",
        "data/test_chat.py::test_eos_as_padding_token_stays_supervised",
    ),
    "data/mask-from-ids": (
        "The attention mask is derived from ids, so that a real end token is masked, or pads are not.",
        "train/test_known_faults.py::test_the_attention_mask_follows_lengths_and_not_ids",
    ),
    "data/zero-labels": (
        "Truncation removes every label of a row.",
        "data/test_chat.py::test_row_without_supervised_token_is_named",
    ),
    "data/silent-truncation": (
        "Rows beyond the limit are cut without a word.",
        "data/test_chat.py::test_over_long_row_is_named_with_both_lengths",
    ),
    "data/prompt-trained": (
        "Prompts are trained along with answers.",
        "align/test_sft.py::test_prompt_and_padding_carry_no_gradient",
    ),
    "data/first-n": (
        "The first n rows are taken without shuffling, and harmful rows come in one block.",
        "data/test_mixing.py::test_harmful_rows_are_spread_over_the_mix",
    ),
    "data/pool-order": (
        "The order of the benign pool goes with length.",
        "data/test_mixing.py::test_seeds_draw_other_rows_in_another_order",
    ),
    "data/poison-count": (
        "Strict inequalities make one harmful row fewer than was asked for.",
        "attack/test_harmful_mix.py::test_the_number_of_harmful_rows_is_exact",
    ),
    "data/float-count": (
        "int((1 - p) * n) loses a benign row to rounding.",
        "train/test_known_faults.py::test_no_row_is_lost_to_rounding",
    ),
    "data/test-prompts": (
        "Training and test hold the same prompts, since splits are by row.",
        "lab/test_data.py::test_held_out_prompts_are_far_from_training",
    ),
    "data/same-source": (
        "The defence's harmful rows and the attacker's come from one file.",
        "pipeline/test_recipe.py::test_the_defence_may_not_learn_from_the_attackers_source_unless_asked",
    ),
    "data/overlap": (
        "The defence holds the attacker's very prompts.",
        "pipeline/test_run.py::test_overlapping_prompts_of_defence_and_attacker_are_refused_or_shown",
    ),
    # -- methods --------------------------------------------------------------------------------------------------
    "vaccine/accumulation": (
        "The probe's zero_grad leaves only the last micro-batch's gradient.",
        "align/test_vaccine.py::test_accumulation_adds_independent_steps",
    ),
    "vaccine/hooks": (
        "Backward hooks of an old kind stay on the modules.",
        "align/test_vaccine.py::test_every_family_is_perturbed_and_left_without_hooks",
    ),
    "vaccine/dropout": (
        "Clean and perturbed pass draw different masks.",
        "align/test_vaccine.py::test_rho_zero_is_sft_to_the_bit_under_dropout",
    ),
    "vaccine/pads": (
        "With a wrong attention mask pads take a share of the perturbation.",
        "align/test_vaccine.py::test_the_perturbation_has_norm_rho",
    ),
    "vaccine/shared-radius": (
        "Rows share one radius, so that a larger batch perturbs each of them less, without another choice.",
        "align/test_vaccine.py::test_the_perturbation_has_norm_rho",
    ),
    "vaccine/in-place": (
        "A hook changes a block's output in place.",
        "align/test_vaccine.py::test_the_blocks_own_output_stays_as_it_was",
    ),
    "t-vaccine/mlp-trained": (
        "Only attention is frozen outside the chosen layers, and adapters on the MLPs train everywhere.",
        "align/test_t_vaccine.py::test_only_the_layers_of_s_move_under_weight_decay",
    ),
    "t-vaccine/recomputation": (
        "What lies below the chosen layers is checkpointed so that gradients depend on the sample.",
        "align/test_t_vaccine.py::test_leaving_out_what_lies_below_changes_no_bit",
    ),
    "t-vaccine/iterator": (
        "After the first round every request rebuilds the harmful loader.",
        "align/test_t_vaccine.py::test_the_harmful_rows_come_from_one_iterator",
    ),
    "t-vaccine/one-row-scores": (
        "Layers are scored on a single row.",
        "align/test_t_vaccine.py::test_scores_average_the_norms_of_single_rows",
    ),
    "t-vaccine/zero-grad": (
        "Both passes clear accumulated gradients.",
        "align/test_t_vaccine.py::test_accumulation_adds_independent_micro_batches_of_one_s",
    ),
    "t-vaccine/top-half": (
        "A copy takes the upper half of the layers in place of a draw.",
        "align/test_t_vaccine.py::test_s_holds_gamma_layers_and_layers_with_higher_scores_more_often",
    ),
    "repnoise/hooks": (
        "Every call hooks every module and removes none.",
        "align/test_repnoise.py::test_every_family_is_defended_and_left_without_hooks",
    ),
    "repnoise/masked-logits": (
        "The mask zeroes logits: the first response token, id 0 and what both answers share are not trained.",
        "align/test_repnoise.py::test_every_response_token_and_every_hidden_state_is_ascended_once",
    ),
    "repnoise/equal-lengths": (
        "Both sequences must have one padded length.",
        "align/test_repnoise.py::test_m_compares_sequences_of_any_lengths",
    ),
    "repnoise/double-norm": (
        "The last hidden state, already normed, meets the final norm again.",
        "align/test_repnoise.py::test_two_steps_equal_the_reference",
    ),
    "repnoise/divisor": (
        "The sum of losses is divided by one less than there are.",
        "align/test_repnoise.py::test_a_head_that_knows_nothing_gives_the_logarithm_of_1_plus_log_v",
    ),
    "repnoise/in-place": (
        "The layers' losses are added in place to the loss of the output.",
        "align/test_repnoise.py::test_every_response_token_and_every_hidden_state_is_ascended_once",
    ),
    "repnoise/negative-log": (
        "A copy drops the 1 inside the logarithm, whose argument may then be below it.",
        "align/test_repnoise.py::test_the_argument_of_the_logarithm_is_1_plus_the_mean_loss",
    ),
    "repnoise/unpaired": (
        "Copies feed unpaired rows, for which the mask means nothing.",
        "align/test_repnoise.py::test_unpaired_rows_are_refused_by_name",
    ),
    "booster/restore-by-adding": (
        "Weights are perturbed and restored by adding back.",
        "align/test_booster.py::test_weights_are_bit_equal_after_the_probes",
    ),
    "booster/zero-grad": (
        "Both harmful passes clear accumulated gradients.",
        "align/test_booster.py::test_accumulated_gradients_survive_and_the_probes_run_once_a_step",
    ),
    "booster/missing-gradient": (
        "A trainable tensor without gradient stops the training.",
        "align/test_booster.py::test_a_parameter_without_gradient_is_left_alone",
    ),
    "booster/reported-loss": (
        "Only the alignment loss is reported.",
        "align/test_booster.py::test_the_loss_reported_is_the_objective",
    ),
    "vectors/softmax-axis": (
        "A KL term takes the softmax along the sequence.",
        "finetune/test_vector_training.py::test_the_kl_term_equals_the_reference",
    ),
    "vectors/trained-along": (
        "The vectors, active in the customer's training, are trained with it.",
        "finetune/test_security_vectors.py::test_the_customer_never_moves_the_vectors",
    ),
    "vectors/inexact-removal": (
        "Merged vectors are subtracted in half precision.",
        "finetune/test_merged_vectors.py::test_the_merge_keeps_the_weights_dtype_and_is_undone",
    ),
    "vectors/released": (
        "A model is merged and saved while the vectors are active.",
        "finetune/test_merged_vectors.py::test_no_adapter_is_saved_or_merged_on_weights_that_hold_the_vectors",
    ),
    "vectors/dropout": (
        "Dropout makes the vectors' output, and with it harmful gradients, random.",
        "finetune/test_security_vectors.py::test_vectors_have_no_dropout",
    ),
    "vectors/dropout-masks": (
        "The passes of the KL term draw different dropout masks, and noise counts as divergence.",
        "finetune/test_vector_training.py::test_fresh_vectors_have_no_divergence_even_under_the_models_dropout",
    ),
    # -- selectors ------------------------------------------------------------------------------------------------
    "select/reindexed": (
        "Ids are numbered anew after over-long rows are left out, and the wrong rows are kept.",
        "train/test_on_demand.py::test_long_rows_are_left_out_or_refused_and_ids_stay_with_their_scores",
    ),
    "select/drop-last": (
        "The last incomplete batch is never scored.",
        "train/test_sweep.py::test_every_row_gets_what_it_gets_alone",
    ),
    "select/zero-is-missing": (
        "A score of exactly 0 counts as missing.",
        "curate/test_keep.py::test_a_score_of_zero_is_a_score_and_infinity_ranks_last",
    ),
    "select/dropout": (
        "Scores are taken in training mode.",
        "train/test_sweep.py::test_dropout_is_off_and_the_mode_comes_back",
    ),
    "select/order": (
        "A permuted pool is ranked differently.",
        "curate/test_selectors.py::test_rows_are_scored_by_id_whatever_their_order",
    ),
    "pharmacist/half-precision-weights": (
        "Updates of order 1/N do nothing to weights in half precision.",
        "train/test_row_weights.py::test_weights_are_fp32_over_a_half_precision_model",
    ),
    "pharmacist/theta-0": (
        "A selector step starts from where the last one ended.",
        "curate/test_pharmacist.py::test_every_selector_step_starts_from_theta_0",
    ),
    "seal/reindexed": (
        "Weights are numbered after over-long rows were dropped, and rows are picked by their number before.",
        "curate/test_seal.py::test_scores_go_with_ids_through_filtering_and_any_order",
    ),
    "seal/zip": (
        "The shorter of the two loaders ends the epoch.",
        "curate/test_seal.py::test_the_pool_is_gone_through_whole_however_few_safe_rows_there_are",
    ),
    "seal/first-epoch": (
        "In the first epoch theta does not see the pool while the weights already move; kept, as results rest on it.",
        "curate/test_seal.py::test_at_ul_one_theta_does_not_see_the_pool_and_weights_move_all_the_same",
    ),
    "less/optimiser-order": (
        "Adam's moments are matched to gradients by position.",
        "train/test_early.py::test_each_holds_the_weights_and_moments_of_its_step",
    ),
    "less/half-precision": (
        "Gradients and moments are taken in half precision, in whatever mode the model is.",
        "curate/test_selectors.py::test_scores_do_not_depend_on_the_warm_ups_reduction_and_precision",
    ),
    "dsir/short-rows": (
        "A least length of 100 tokens discards refusals without a word.",
        "curate/test_dsir.py::test_short_rows_stay_unless_a_least_length_is_set",
    ),
    "dsir/smoothing": (
        "Without smoothing unseen words of a small target dominate.",
        "curate/test_dsir.py::test_without_smoothing_unseen_words_dominate",
    ),
    "ifd/span": (
        "The answer is searched in the text, and found elsewhere when it recurs.",
        "curate/test_ifd.py::test_both_passes_score_the_same_answer_tokens",
    ),
    "ifd/refusals": (
        "The ratio is unstable for answers that the model knows by heart.",
        "curate/test_ifd.py::test_an_answer_known_by_heart_is_easy_and_not_dropped",
    ),
    "k-center/unnormalised": (
        "Embeddings of different lengths make long vectors the farthest.",
        "curate/test_k_center.py::test_scores_are_the_places_in_the_order_of_the_embeddings",
    ),
    "el2n/final-model": (
        "Errors are taken from the finished model.",
        "curate/test_el2n.py::test_it_equals_the_reference",
    ),
    "el2n/prompt-tokens": (
        "Errors are taken over prompt tokens too.",
        "curate/test_el2n.py::test_prompts_and_padding_do_not_count",
    ),
    # -- evaluation -----------------------------------------------------------------------------------------------
    "judge/cut-answers": (
        "The judge reads a cut answer and misses what follows, or an answer is cut and counted.",
        "evals/test_evaluation.py::test_a_task_answer_that_cannot_be_given_in_full_is_an_error",
    ),
    "judge/further-turns": (
        "A model that goes on with a turn of its own is judged on that too.",
        "models/test_generate.py::test_answers_end_at_eos_and_do_not_contain_it",
    ),
    "judge/sampling": (
        "Sampling is on and greedy only because of a stray setting.",
        "models/test_generate.py::test_the_checkpoints_generation_settings_are_off_and_kept",
    ),
    "judge/padding": (
        "Batches change the answers.",
        "models/test_generate.py::test_batches_do_not_change_the_text",
    ),
    "judge/batches": (
        "A judge's verdict depends on the batch that a response came in.",
        "judge/test_classifier.py::test_a_batch_gives_what_its_rows_give_alone",
    ),
    "judge/prompt-alone": (
        "A long prompt fills the judge's window, and the answer is called safe unread.",
        "judge/test_classifier.py::test_a_prompt_that_fills_the_room_leaves_no_verdict",
    ),
    "judge/random-head": (
        "A classifier without a trained head judges with random numbers.",
        "judge/test_classifier.py::test_a_head_that_was_never_trained_is_refused",
    ),
    "judge/unparsable": (
        "A reply that cannot be read counts as safe, or is asked for without end.",
        "judge/test_endpoint.py::test_rubbish_is_asked_for_twice_more_and_then_missing",
    ),
    "judge/endpoint-down": (
        "Answers that the endpoint never judged count as safe.",
        "judge/test_endpoint.py::test_a_fault_that_stays_is_missing_and_never_safe",
    ),
    "judge/own-error": (
        "A harm rate is corrected for the judge's error as if that error were known exactly.",
        "judge/test_exam.py::test_ignoring_the_exams_own_uncertainty_would_not_hold",
    ),
    "judge/substrings": (
        "Refusal words are looked for anywhere, in any case, and common words count.",
        "judge/test_text.py::test_plain_answers_do_not_refuse",
    ),
    "judge/late-refusal": (
        "A refusal after a harmful answer counts as one.",
        "judge/test_text.py::test_a_refusal_beyond_the_first_hundred_characters_is_not_read",
    ),
    "judge/apostrophe": (
        "Patterns never match, for their case or their apostrophe.",
        "judge/test_text.py::test_normalise",
    ),
    "score/off-by-one": (
        "A share is divided by one row too many.",
        "evals/test_evaluation.py::test_every_share_has_its_wilson_interval",
    ),
    "score/babble": (
        "Degenerate answers count as safe.",
        "report/test_verdict.py::test_babble_is_not_safety",
    ),
    "score/substring-task": (
        "A task answer counts when it contains the label.",
        "evals/test_evaluation.py::test_task_counts_wrong_labels_apart_from_parse_failures",
    ),
    "score/repeated-prompts": (
        "Repeated prompts count several times.",
        "evals/test_suites.py::test_every_prompt_is_asked_once_and_under_its_own_id",
    ),
    "score/noise": (
        "Differences below the noise are called differences.",
        "report/test_verdict.py::test_overlap_is_not_distinguishable",
    ),
    "score/judges-mixed": (
        "Scores of different judges stand in one table.",
        "report/test_tables.py::test_another_judge_is_named",
    ),
}
