"""Wrong implementations of the method, at least one a trap, each of which its own test must refuse (docs/method.md 13).

The source of a copy of the project is changed at one place and only the named test is run on it, in a process of its
own. That the unchanged copy passes all of these tests is checked too, so that a red test means the change.
"""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

COPIED = ("nextvid", "storage", "tests")
FAILED = 1  # pytest's exit code when tests ran and failed; 2 to 5 mean that they did not run


class Mutation(NamedTuple):
    """`old` stands exactly once in the file; `new` is the mistake that trap `test` warns of."""

    file: str
    old: str
    new: str
    test: str


MODEL, TRAIN = "nextvid/model", "nextvid/train"
ON_MODEL, ON_TRAIN = "tests/nextvid/model", "tests/nextvid/train"
TESTS = {  # by trap
    "01": f"{ON_MODEL}/test_predictor.py::test_trap_01_a_query_sees_strictly_earlier_tubelets",
    "02": f"{ON_MODEL}/test_predictor.py::test_trap_02_packed_context_equals_masks_from_ids",
    "03": f"{ON_MODEL}/test_encoder.py::test_trap_03_positions_come_with_ids_not_with_order",
    "04": f"{ON_MODEL}/test_predictor.py::test_trap_04_both_sides_of_cross_attention_turn_by_their_own_ids",
    "05": f"{ON_MODEL}/test_rope.py::test_trap_05_scores_depend_on_relative_positions_alone",
    "06": f"{ON_MODEL}/test_decoder.py::test_trap_06_a_thousand_timesteps_are_told_apart_under_autocast",
    "07": f"{ON_MODEL}/test_nextvid.py::test_trap_07_flow_alone_moves_the_encoder_once_gates_are_open",
    "08": f"{ON_MODEL}/test_predictor.py::test_trap_08_context_is_read_and_never_written",
    "09": f"{ON_MODEL}/test_reference.py::test_trap_09_targets_do_not_know_the_future",
    "10": f"{ON_MODEL}/test_reference.py::test_trap_10_at_init_the_reference_is_the_online_encoder_on_all_tokens",
    "11": f"{ON_MODEL}/test_reference.py::test_trap_11_average_of_constant_weights_has_the_closed_form",
    "12": f"{ON_MODEL}/test_reference.py::test_trap_12_parameters_pair_by_name_through_wrappers",
    "12b": f"{ON_MODEL}/test_reference.py::test_trap_12_other_names_are_refused",
    "13": f"{ON_TRAIN}/test_step.py::test_trap_13_the_average_moves_once_a_step_after_the_optimiser",
    "14": f"{ON_TRAIN}/test_optim.py::test_trap_14_groups_hold_every_trained_parameter_once_and_nothing_else",
    "14b": f"{ON_TRAIN}/test_optim.py::test_trap_14_biases_and_norms_do_not_decay_but_the_query_does",
    "15": f"{ON_MODEL}/test_tokens.py::test_trap_15_channels_run_frame_by_frame_and_cells_row_by_row",
    "16": f"{ON_MODEL}/test_nextvid.py::test_trap_16_predictions_features_and_targets_stand_at_the_same_ids",
    "17": f"{ON_TRAIN}/test_loader.py::test_trap_17_drawn_latents_have_mean_0_and_deviation_1_by_channel",
    "18": "tests/nextvid/encode/test_autoencoders.py::TestRefusals::test_trap_18_a_missing_tensor",
    "19": "tests/nextvid/encode/test_roundtrip.py::test_trap_19_decoded_pixels_alone_catch_what_they_are_for",
    "20": f"{ON_MODEL}/test_flow.py::test_trap_20_euler_recovers_a_gaussian",
    "20b": f"{ON_MODEL}/test_flow.py::test_trap_20_model_input_tends_to_data_and_starts_as_noise",
    "21": f"{ON_MODEL}/test_flow.py::test_trap_21_every_copy_strategy_step_seed_and_clip_has_its_own_draws",
    "22": f"{ON_MODEL}/test_decoder.py::test_trap_22_a_sequence_is_one_tubelet_of_one_clip_and_copy",
    "23": f"{ON_MODEL}/test_nextvid.py::test_trap_23_every_position_of_tubelets_1_on_counts_and_one_cell_suffices",
    "24": f"{ON_MODEL}/test_nextvid.py::test_trap_24_tubes_that_are_no_tubes_are_refused",
    "25": f"{ON_TRAIN}/test_loader.py::test_trap_25_neighbouring_clips_and_ranks_see_different_cells",
    "26": f"{ON_MODEL}/test_masks.py::test_trap_26_raw_sampler_reproduces_the_table",
    "27": f"{ON_TRAIN}/test_optim.py::test_trap_27_rates_of_the_paper",
    "28": f"{ON_TRAIN}/test_step.py::test_trap_28_micro_batches_give_the_gradient_of_the_whole",
    "29": f"{ON_MODEL}/test_flow.py::test_trap_29_loss_is_a_mean_over_every_element",
    "30": f"{ON_TRAIN}/test_pixel_rows.py::test_trap_30_an_image_is_one_view_in_every_frame",
    "31": "tests/nextvid/evaluate/test_stream.py::test_trap_31_segments_follow_one_another",
    "32": f"{ON_MODEL}/test_nextvid.py::test_trap_32_copies_cost_a_decoder_pass_and_nothing_else",
}

MUTATIONS = {
    "01 a block of queries also sees its own tubelet": Mutation(
        f"{MODEL}/attention.py",
        "k, v = k[:, :, : (t + 1) * keys], v[:, :, : (t + 1) * keys]",
        "k, v = k[:, :, : (t + 2) * keys], v[:, :, : (t + 2) * keys]",
        "01",
    ),
    "02 <= in place of <": Mutation(
        f"{MODEL}/attention.py", "key < query if strict", "key <= query if strict", "02"
    ),
    "03 positions from the packed index": Mutation(
        f"{MODEL}/encoder.py", "table = rotary(ids, model", "table = rotary(all_ids(1, ids.shape[1]), model", "03"
    ),
    "04 keys of the context are not rotated": Mutation(
        f"{MODEL}/attention.py", "q, k = rotate(q, query_table), rotate(k, key_table)",
        "q, k = rotate(q, query_table), k", "04",
    ),
    "05 a rotation that is no rotation": Mutation(
        f"{MODEL}/attention.py", "torch.polar(torch.ones_like(angles), angles)", "torch.polar(angles.cos(), angles)",
        "05",
    ),
    "06 timesteps embedded in bf16": Mutation(
        f"{MODEL}/decoder.py", "torch.autocast(tau.device.type, enabled=False)",
        "torch.autocast(tau.device.type, torch.bfloat16)", "06",
    ),
    "07 isolation by detaching the context": Mutation(
        f"{MODEL}/predictor.py", "embedded = self.embed(context)", "embedded = self.embed(context.detach())", "07"
    ),
    "08 the context is updated in the predictor": Mutation(
        f"{MODEL}/predictor.py", "                hidden = block(hidden, embedded",
        "                context.data.add_(0.1)\n                hidden = block(hidden, embedded", "08",
    ),
    "08 a block updates the context it reads": Mutation(
        f"{MODEL}/predictor.py", "        x = x + self.attn(normed(self.norm1, x), normed(",
        "        context.data.add_(0.1)\n        x = x + self.attn(normed(self.norm1, x), normed(", "08",
    ),
    "09 the reference attends both ways": Mutation(
        f"{MODEL}/reference.py", "reference(tokens, tokens.shape[1] // cells)",
        "reference(tokens, None, torch.arange(tokens.shape[1])[None] % cells)", "09",
    ),
    "10 the reference sees another view": Mutation(
        f"{MODEL}/reference.py", "reference(tokens, tokens", "reference(tokens.roll(1, 1), tokens", "10"
    ),
    "11 momentum and its rest exchanged": Mutation(f"{MODEL}/reference.py", "1.0 - momentum", "momentum", "11"),
    "12 names of wrappers are not taken off": Mutation(
        f"{MODEL}/reference.py", 'name.replace("_orig_mod.", "").removeprefix("module.")', "name", "12"
    ),
    "12 whatever has other names is averaged too": Mutation(
        f"{MODEL}/reference.py", "assert averaged.keys() == current.keys()", "assert True", "12b"
    ),
    "13 the average before the optimiser": Mutation(
        f"{TRAIN}/step.py",
        "    optimizer.step()\n    ema_update(trained.reference, trained.model.encoder, recipe.optim.ema, taken)",
        "    ema_update(trained.reference, trained.model.encoder, recipe.optim.ema, taken)\n    optimizer.step()",
        "13",
    ),
    "14 the reference takes gradients": Mutation(f"{MODEL}/reference.py", ".requires_grad_(False)", "", "14"),
    "14 biases and norms decay": Mutation(
        f"{TRAIN}/optim.py", 'parameter.ndim > 1 and not name.endswith("bias")', "True", "14b"
    ),
    "15 channels before frames in a token": Mutation(
        f"{MODEL}/tokens.py", "b (t u) c h w -> b t (h w) (u c)", "b (t u) c h w -> b t (h w) (c u)", "15"
    ),
    "15 height and width exchanged": Mutation(
        f"{MODEL}/tokens.py", "b (t u) c h w -> b t (h w) (u c)", "b (t u) c h w -> b t (w h) (u c)", "15"
    ),
    "16 predictions paired with the tubelet before": Mutation(
        f"{MODEL}/nextvid.py", "channels), targets[:, 1:], None", "channels), targets[:, :-1], None", "16"
    ),
    "17 latents as they are stored": Mutation(
        f"{TRAIN}/rows.py", "out.sub_(self._means).div_(self._stds)", "pass", "17"
    ),
    "18 a partial checkpoint": Mutation(
        "nextvid/encode/autoencoders.py", "if missing or unknown:", "if False:", "18"
    ),
    "19 what other frames resemble more passes": Mutation(
        "nextvid/encode/roundtrip.py",
        "if (can_lose and other_db - true_db > LOSS_DB) or (must_win and not true_db > other_db):",
        "if False:", "19",
    ),
    "20 the sampler runs the other way": Mutation(
        f"{MODEL}/flow.py", "h = h + velocity(h, index / steps) / steps",
        "h = h - velocity(h, index / steps) / steps", "20",
    ),
    "20 noise and data exchanged on the path": Mutation(
        f"{MODEL}/flow.py", "(1.0 - tau) * draws.noise + tau * target", "tau * draws.noise + (1.0 - tau) * target",
        "20b",
    ),
    "21 the copies share their draws": Mutation(
        f"{MODEL}/flow.py", "{draw},{strategy},{copy}", "{draw},{strategy},0", "21"
    ),
    "22 tubelets meet in the decoder": Mutation(
        f"{MODEL}/decoder.py", '"k b f n d -> (k b f) n d")', '"k b f n d -> (b f k) n d")', "22"
    ),
    "23 tubelet 0 is predicted too": Mutation(
        f"{MODEL}/nextvid.py", "queries = all_ids(tubelets - 1, cells", "queries = all_ids(tubelets, cells", "23"
    ),
    "24 tubelets keep unequally many cells": Mutation(
        f"{MODEL}/nextvid.py", "assert ids.shape[1] % tubelets == 0", "assert True", "24"
    ),
    "25 every clip takes one mask": Mutation(
        "nextvid/trainset/order.py", "strategy, draws.start, len(draws),",
        "strategy, 0 * draws.start, len(draws),", "25",
    ),
    "26 the scale read as a range": Mutation(
        f"{MODEL}/masks.py", "area = int(height * width * strategy.scale)",
        "area = (height * width * (0.15 + 0.55 * uniform[:, 0])).astype(int)", "26",
    ),
    "27 a stage's edge one step late": Mutation(
        "nextvid/config/stages.py", "if step < first + stage.steps:", "if step <= first + stage.steps:", "27"
    ),
    "28 micro-batches are summed": Mutation(f"{TRAIN}/step.py", "1.0 / len(parts)", "1.0", "28"),
    "29 the loss is summed over channels": Mutation(
        f"{MODEL}/flow.py", "draws.noise)).square().mean()", "draws.noise)).square().sum(-1).mean()", "29"
    ),
    "30 an image is mirrored from its second frame on": Mutation(
        f"{TRAIN}/rows.py", "memory[drawn.of_frames(IMAGE)] = memory[drawn.of_frames(IMAGE), :1]",
        "memory[drawn.of_frames(IMAGE), 1:] = memory[drawn.of_frames(IMAGE), :1].flip(3)", "30",
    ),
    "31 segments are averaged": Mutation(
        "nextvid/evaluate/stream.py", 'rearrange(torch.cat(encoded), "(n g) l d -> n (g l) d", g=segments)',
        'rearrange(torch.cat(encoded), "(n g) l d -> n g l d", g=segments).mean(1)', "31",
    ),
    "32 the predictor runs once a copy": Mutation(
        f"{MODEL}/nextvid.py", "seen, query_ids = self._encode_and_predict(tokens, ids)",
        "seen, query_ids = [self._encode_and_predict(tokens, ids) for _ in range(copies)][0]", "32",
    ),
}  # fmt: skip


def copied(repository: Path, folder: Path) -> Path:
    """The packages that these tests import, without caches."""
    for name in COPIED:
        shutil.copytree(repository / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(repository / "pyproject.toml", folder)
    return folder


def outcome(folder: Path, *tests: str) -> subprocess.CompletedProcess[str]:
    """Run the tests of a copy in a process of its own, whose first import path is that copy."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=250)


def test_each_change_fits_one_place_and_names_a_test(repository: Path) -> None:
    for name, change in MUTATIONS.items():
        assert (repository / change.file).read_text().count(change.old) == 1, name
        assert change.test.startswith(name[:2]), name
        path, *_, function = TESTS[change.test].split("::")
        assert f"def {function}(" in (repository / path).read_text(), name
    assert {change.test for change in MUTATIONS.values()} == set(TESTS)
    assert sorted({int(name[:2]) for name in TESTS}) == list(range(1, 33))


@pytest.mark.faults
def test_the_unchanged_copy_passes(repository: Path, tmp_path: Path) -> None:
    found = outcome(copied(repository, tmp_path), *TESTS.values())
    assert found.returncode == 0, found.stdout


@pytest.mark.faults
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_implementation_fails_the_test_of_its_trap(repository: Path, tmp_path: Path, name: str) -> None:
    change, folder = MUTATIONS[name], copied(repository, tmp_path)
    source = (folder / change.file).read_text()
    (folder / change.file).write_text(source.replace(change.old, change.new))
    found = outcome(folder, TESTS[change.test])
    assert found.returncode == FAILED, f"{found.stdout}\n{found.stderr}"
    assert "1 failed" in found.stdout
