"""What all families ask of their inputs. Each family's own tests feed it pads, packed rows and bad input."""

import pytest
import torch
from torch import nn

from modeling_heptapod.model_inputs import count_positions, of_new_tokens, token_mask
from tests.tiny_hierarchical_lm import tiny_hierarchical_lm
from tests.tiny_leap import tiny_leap
from tests.tiny_multigrid import tiny_multigrid


class Adapter(nn.Module):
    """As PEFT's: of the table's attributes it has the weight."""

    def __init__(self, table):
        super().__init__()
        self.base_layer, self.weight = table, table.weight

    def forward(self, ids):
        return self.base_layer(ids)


@pytest.mark.parametrize("make", [tiny_leap, tiny_hierarchical_lm, tiny_multigrid])
def test_ids_are_named_where_an_adapter_stands_for_a_table(make):
    model = make()
    model.model.embed_tokens = Adapter(model.model.embed_tokens)
    with pytest.raises(ValueError, match=r"`input_ids` must be in \[0, 50\), got values from 3 to 50"):
        model(torch.tensor([[3, 50, 7]]))


@pytest.mark.parametrize("make", [tiny_leap, tiny_hierarchical_lm, tiny_multigrid])
def test_what_is_no_tensor_of_ids_is_named(make):
    with pytest.raises(TypeError, match="`input_ids` must be torch.long or torch.int, got list"):
        make()([[1, 2, 3]])


@pytest.mark.parametrize("make", [tiny_leap, tiny_hierarchical_lm, tiny_multigrid])
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (3,)])
def test_nothing_is_no_input(make, shape):
    with pytest.raises(ValueError, match=r"`input_ids` must be \[batch >= 1, seq >= 1\], got"):
        make()(torch.zeros(shape, dtype=torch.long))


def test_masks_are_of_what_they_cover():
    embeds = torch.zeros(2, 3, 4)
    whole = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    assert token_mask(None, embeds, 2) is None and token_mask(torch.ones(2, 5), embeds, 2) is None
    assert torch.equal(token_mask(whole, embeds, 2), whole.bool())
    assert of_new_tokens(token_mask(whole, embeds, 2), 3) is None  # the only pad is an old token
    new = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert torch.equal(of_new_tokens(token_mask(new, embeds, 2), 3), new.bool())
    joined = torch.cat((whole[:, :2], new), dim=1)
    assert torch.equal(of_new_tokens(token_mask(joined, embeds, 2), 3), new.bool())
    for wrong in (torch.ones(2, 4), torch.ones(1, 3), torch.ones(2, 1, 3)):
        with pytest.raises(ValueError, match="`attention_mask` must"):
            token_mask(wrong, embeds, 2)


@pytest.mark.parametrize("past", [2, torch.tensor(2)])
def test_positions_count_what_is_real(past):
    embeds = torch.zeros(2, 3, 4)
    assert count_positions(embeds, None, None, past).tolist() == [[2, 3, 4]]
    whole = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 1, 1, 1]]).bool()
    assert count_positions(embeds, whole, None, past).tolist() == [[1, 1, 2], [2, 3, 4]]
    assert count_positions(embeds, whole[:, 2:], None, past).tolist() == [[2, 2, 3], [2, 3, 4]]
    packed = torch.tensor([[5, 5, 3], [1, 5, 1]])
    assert count_positions(embeds, None, packed, 0).tolist() == [[0, 1, 0], [0, 0, 0]]
