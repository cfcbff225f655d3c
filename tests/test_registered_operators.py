"""Registration of operators without gradients."""

import torch

from modeling_heptapod.common.registered_operators import register_for_cpu


def add(x: torch.Tensor, states: list[torch.Tensor], number: int) -> torch.Tensor:
    for state in states:
        state += number
    return x + number


def add_twice(x: torch.Tensor, states: list[torch.Tensor], number: int) -> torch.Tensor:
    return add(x, states, 2 * number)


def without_memory(x, *_):
    return torch.empty_like(x)


def test_an_operator_that_is_registered_again_is_the_new_one():
    """As by a module that is loaded a second time."""
    for function, factor in ((add, 1), (add_twice, 2)):
        operator = register_for_cpu("heptapod_tests::add", function, without_memory, ("states",))
        x, states = torch.ones(3), [torch.zeros(2), torch.zeros(1)]
        assert torch.equal(operator(x, states, 4), x + 4 * factor)
        assert all((state == 4 * factor).all() for state in states)
        torch.library.opcheck(operator, (x, states, 4))


def test_graphs_see_what_changes():
    operator = register_for_cpu("heptapod_tests::add", add, without_memory, ("states",))

    def twice(x, states):
        return operator(x, states, 1) + operator(x, states, 1) + states[0]

    x, states = torch.ones(2), [torch.zeros(2), torch.zeros(1)]
    with torch.no_grad():
        out = torch.compile(twice, fullgraph=True, backend="aot_eager")(x, states)
    assert torch.equal(out, torch.full((2,), 6.0)) and states[1].item() == 2
