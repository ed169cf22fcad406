import pytest

from nasfcos.benchmark.detectors import THEIR_FCOS, our_step, their_step
from nasfcos.benchmark.inputs import random_target, smooth_image


@pytest.mark.parametrize(
    ("build", "name"), [(our_step, "Mobile_NAS_head"), (their_step, THEIR_FCOS)]
)
def test_a_step_of_both_sides_needs_memory_for_all_its_gradients(build, name):
    """Gradients left over from the step before would not be counted."""
    size = (64, 96)
    model, optimizer, step = build(name, size, [smooth_image(*size)], [random_target(*size)])
    for _ in range(2):
        step()
        assert all(parameter.grad is None for parameter in model.parameters())
    momenta = [state["momentum_buffer"] for state in optimizer.state.values()]
    assert len(momenta) == sum(len(group["params"]) for group in optimizer.param_groups)
