"""Experts on many processes compute, balance and learn as on one."""

import pytest

from .mixtures import expert_parallel_errors, muon_error, refusal, thin_muon_error


@pytest.mark.parametrize("lopsided", [False, True])
@pytest.mark.parametrize("processes", [2, 4])
def test_expert_parallelism_gives_the_results_and_gradients_of_one_process(world, processes, lopsided):
    for errors in world(processes).run(expert_parallel_errors, processes, lopsided):
        assert max(errors.values()) < 1e-10, errors


def test_experts_that_do_not_divide_are_refused(world):
    assert (
        world(2).run(refusal, 2, 7)
        == ["num_experts must be a multiple of the processes that share them: 7 over 2 leaves 1 over"] * 2
    )


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_muon_of_split_experts_is_that_of_whole_ones(world, dim):
    assert max(world(2).run(muon_error, 2, dim)) < 1e-3  # of steps of 0.02 to 0.06; the iteration is in bfloat16


@pytest.mark.parametrize(("shape", "dim"), [((2, 12), 0), ((12, 3), 1), ((8, 12), 0)])
def test_muon_takes_matrices_of_fewer_rows_than_processes(world, shape, dim):
    assert max(world(4).run(thin_muon_error, 4, shape, dim)) < 1e-3
