"""What all families ask of their inputs. Each family's own tests feed it pads, packed rows and bad input."""

import pytest
import torch
from torch import nn

from modeling_heptapod import StaticRecurrentCache
from modeling_heptapod.common.model_inputs import count_positions, mask_of_new_tokens, token_mask
from modeling_heptapod.common.transformers_versions import CACHE
from modeling_heptapod.leap import focus_cpu
from tests.tiny import a_loop_of_ones_own, mostly_slow, random_ids
from tests.tiny_heptapod import VARIANTS as GRID
from tests.tiny_heptapod import tiny_heptapod
from tests.tiny_hierarchical_lm import VARIANTS as HIERARCHICAL
from tests.tiny_hierarchical_lm import tiny_hierarchical_lm
from tests.tiny_leap import VARIANTS as LEAP
from tests.tiny_leap import tiny_leap
from tests.tiny_multigrid import VARIANTS as MULTIGRID
from tests.tiny_multigrid import tiny_multigrid


# Causal models of all families, text alone: which of a family's ways to tell places apart matter here.
MODELS = {
    "leap": tiny_leap,
    "leap learned": lambda **more: tiny_leap(**LEAP["absolute"], **more),
    "leap decay": lambda **more: tiny_leap(**LEAP["alibi"], **more),
    "leap additive": lambda **more: tiny_leap(**LEAP["additive-alibi"], **more),
    "leap wide": lambda **more: tiny_leap(**LEAP["plain-scale"], **more),
    "hierarchical": lambda **more: tiny_hierarchical_lm(**HIERARCHICAL["stride"], **more),
    "hierarchical plain": lambda **more: tiny_hierarchical_lm(**HIERARCHICAL["plain"], **more),
    "multigrid": tiny_multigrid,
    "multigrid leap": lambda **more: tiny_multigrid(core="leap", window_sizes=[5, None], **more),
    "multigrid lstm": lambda **more: tiny_multigrid(core="lstm", **more),
}
GO_ON = [name for name in MODELS if not name.startswith("hierarchical") and name != "multigrid"]


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
    assert mask_of_new_tokens(token_mask(whole, embeds, 2), 3) is None  # the only pad is an old token
    new = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert torch.equal(mask_of_new_tokens(token_mask(new, embeds, 2), 3), new.bool())
    joined = torch.cat((whole[:, :2], new), dim=1)
    assert torch.equal(mask_of_new_tokens(token_mask(joined, embeds, 2), 3), new.bool())
    for wrong in (torch.ones(2, 4), torch.ones(1, 3), torch.ones(2, 1, 3)):
        with pytest.raises(ValueError, match="`attention_mask` must"):
            token_mask(wrong, embeds, 2)


@pytest.mark.parametrize("past", [2, torch.tensor(2)])
def test_positions_count_what_is_real(past):
    embeds = torch.zeros(2, 3, 4)
    assert count_positions(embeds, None, None, past).tolist() == [[2, 3, 4]]
    mask = torch.tensor([[1, 0, 1], [1, 1, 1]]).bool()
    assert count_positions(embeds, mask, None, past).tolist() == [[2, 2, 3], [2, 3, 4]]
    assert count_positions(embeds, mask, None, torch.tensor([1, past])).tolist() == [[1, 1, 2], [2, 3, 4]]
    packed = torch.tensor([[5, 5, 3], [1, 5, 1]])
    assert count_positions(embeds, None, packed, 0).tolist() == [[0, 1, 0], [0, 0, 0]]
    packed = torch.tensor([[0, 0, 0, 1, 1, 2, 2]])
    mask = torch.tensor([[0, 1, 1, 0, 1, 1, 0]]).bool()
    assert count_positions(embeds[:1], mask, packed, 0)[mask].tolist() == [0, 1, 0, 0]


# --- packed rows, with and without pads --------------------------------------------------------------------------------

# Of each row: length and sequence of each stretch, where None is pads.
PACKED = {
    "pads as a sequence of their own": [[(7, 0), (9, 1), (4, None)], [(5, 0), (2, 1), (10, 2), (3, None)]],
    "pads in the last sequence": [[(7, 0), (9, 1), (4, "1 pads")], [(20, 0)]],
    "pads in front": [[(4, "0 pads"), (7, 0), (9, 1)], [(3, None), (8, 0), (9, 1)]],
    "pads everywhere": [
        [(3, "0 pads"), (4, 0), (2, "0 pads"), (2, 0), (3, 1), (2, "1 pads"), (1, 1), (3, None)],
        [(1, 0), (3, "0 pads"), (5, 0), (2, None), (6, 1), (1, "1 pads"), (2, 1)],
    ],
    "no pads": [[(7, 0), (13, 1)], [(5, 0), (2, 1), (13, 2)]],
}


def packing(case, how):
    """`ids [batch, 20]`, what says how they are packed, and of each row where its sequences are."""
    ids = random_ids(2, 20)
    mask, seq_idx, positions = (torch.zeros(2, 20, dtype=torch.long) for _ in range(3))
    places = []
    for row, stretches in enumerate(PACKED[case]):
        at, sequences, number = 0, {}, -1
        for length, name in stretches:
            sequence = int(name.split()[0]) if isinstance(name, str) else name
            number = number + 1 if sequence is None or sequence not in sequences else number
            if sequence is not None:
                sequences.setdefault(sequence, [])
            seq_idx[row, at : at + length] = number
            if isinstance(name, int):
                mask[row, at : at + length] = 1
                sequences[name].extend(range(at, at + length))
            at += length
        for place in sequences.values():
            positions[row, place] = torch.arange(len(place))
        places.append(list(sequences.values()))
    given = {} if case == "no pads" else {"attention_mask": mask}
    if how == "cu_seq_lens_q":  # is for one row
        changes = (seq_idx[0].diff() != 0).nonzero().flatten() + 1
        bounds = torch.tensor([0, *changes.tolist(), 20])
        given = {name: x[:1] for name, x in given.items()}
        return ids[:1], {"cu_seq_lens_q": bounds, **given}, places[:1]
    return ids, {how: {"seq_idx": seq_idx, "position_ids": positions}[how], **given}, places


@pytest.mark.parametrize("how", ["seq_idx", "cu_seq_lens_q", "position_ids"])
@pytest.mark.parametrize("case", mostly_slow(PACKED, ("pads in the last sequence", "pads everywhere")))
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_packed_rows_with_pads_equal_separate_sequences(name, case, how):
    model = MODELS[name]().double()
    ids, given, places = packing(case, how)
    use_cache = how == "seq_idx"  # what is kept for later changes nothing now
    logits = model(ids, use_cache=use_cache, **given).logits
    for row, sequences in enumerate(places):
        for place in sequences:
            alone = model(ids[row : row + 1, place], use_cache=False).logits[0]
            torch.testing.assert_close(logits[row, place], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["seq_idx", "position_ids"])
@pytest.mark.parametrize("case", ["pads as a sequence of their own", "pads everywhere", "no pads"])
@pytest.mark.parametrize("name", GO_ON)
@torch.no_grad()
def test_the_last_packed_sequence_of_each_row_goes_on(name, case, how):
    model = MODELS[name]().double()
    ids, given, places = packing(case, how)
    more = random_ids(2, 9, seed=5)
    cache = model(ids, use_cache=True, **given).past_key_values
    mask = torch.tensor([[1, 0, 1, 1], [0, 1, 1, 1]])
    logits = [model(more[:, :4], attention_mask=mask, past_key_values=cache).logits]
    for at in (4, 5):
        logits.append(model(more[:, at : at + 1], past_key_values=cache).logits)
    cache.reorder_cache(torch.tensor([1, 0]))
    logits.append(model(more[[1, 0], 6:], past_key_values=cache).logits[[1, 0]])
    logits = torch.cat(logits, dim=1)
    real = torch.cat((mask.bool(), torch.ones(2, 5, dtype=torch.bool)), dim=1)
    for row, sequences in enumerate(places):
        last = torch.cat((ids[row, sequences[-1]], more[row, real[row]]))
        alone = model(last[None], use_cache=False).logits[0, len(sequences[-1]) :]
        torch.testing.assert_close(logits[row, real[row]], alone, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=f"`{CACHE}` holds packed sequences"):
        model.generate(more, past_key_values=cache, max_new_tokens=2, pad_token_id=0)
    cache.reset()
    how = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 50, "eos_token_id": None}
    assert torch.equal(model.generate(more, past_key_values=cache, **how), model.generate(more, **how))
    assert cache.next_positions is None and not cache.packed


@torch.no_grad()
def test_packed_rows_that_cannot_go_on_say_so():
    ids, given, _ = packing("no pads", "seq_idx")
    model = tiny_multigrid()
    cache = model(ids, use_cache=True, **given).past_key_values
    with pytest.raises(ValueError, match=f"`{CACHE}` holds packed sequences"):
        model(ids[:, :1], past_key_values=cache)
    assert tiny_hierarchical_lm()(ids, use_cache=True, **given).past_key_values is None


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_packed_rows_do_not_continue_a_cache(name):
    model = MODELS[name]()
    ids = random_ids(1, 16)
    for given in (
        {"seq_idx": torch.tensor([[0] * 11 + [1] * 5])},
        {"cu_seq_lens_q": torch.tensor([0, 11, 16])},
        {"position_ids": torch.tensor([[*range(9, 20), *range(5)]])},
        {"position_ids": torch.arange(16)[None]},  # a restart at once
        {"seq_idx": torch.tensor([[0] * 5 + [3] * 2 + [1] * 9]), "attention_mask": torch.ones(1, 25)},
    ):
        cache = model(ids[:, :9], use_cache=True).past_key_values
        argument = next(iter(given))
        with pytest.raises(ValueError, match=f"`{argument}`.*continues `{CACHE}`"):
            model(ids, past_key_values=cache, **given)
    cache = model(ids[:, :9], use_cache=True).past_key_values
    one = {"seq_idx": torch.full((1, 16), 4), "position_ids": torch.arange(9, 25)[None]}
    expected = model(torch.cat((ids[:, :9], ids), dim=1), use_cache=False).logits[:, 9:]
    torch.testing.assert_close(model(ids, past_key_values=cache, **one).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_mask_of_ones_is_no_mask(name):
    model, ids = MODELS[name](), random_ids(2, 20)
    positions = (torch.arange(20) % 13)[None]
    for ones in (torch.ones(2, 20), torch.ones(2, 20, dtype=torch.bool), torch.ones(2, 20, dtype=torch.long)):
        for given in ({}, {"position_ids": positions}):
            assert torch.equal(model(ids, attention_mask=ones, **given).logits, model(ids, **given).logits)
    assert not torch.allclose(model(ids, position_ids=positions).logits, model(ids).logits)


# --- pads anywhere -----------------------------------------------------------------------------------------------------


def scattered(batch, seq, seed=3):
    """A mask `[batch, seq]` with pads anywhere: one row without any, one that begins late, one with few tokens."""
    mask = torch.rand(batch, seq, generator=torch.Generator().manual_seed(seed)) < 0.6
    mask[0], mask[1, : seq // 2], mask[2, 4:] = True, False, mask[2, 4:] & (torch.arange(4, seq) % 7 == 0)
    return mask


WITH_A_KERNEL = [name for name in MODELS if "leap" in name]


@pytest.mark.parametrize("sizes", [[30], [12, 1, 1, 5, 1, 2, 1, 1, 6], [1] * 30], ids=["whole", "chunks", "steps"])
@pytest.mark.parametrize(
    "name, compiled", [*((name, True) for name in MODELS), *((name, False) for name in WITH_A_KERNEL)]
)
@torch.no_grad()
def test_pads_anywhere_take_no_place(name, compiled, sizes, monkeypatch):
    if not compiled:
        monkeypatch.setattr(focus_cpu, "_library", lambda head_dim: None)
    model = MODELS[name](pad_token_id=3)
    model.get_input_embeddings().weight[3].normal_()
    ids, mask = random_ids(4, 30), scattered(4, 30)
    ids[~mask] = 3
    for how in ("of all", "of the new ones"):
        cache, logits, at = None, [], 0
        if name.startswith("leap") and how == "of all":
            cache = StaticRecurrentCache(model.config)
        for size in sizes:
            seen = mask[:, (0 if how == "of all" else at) : at + size]
            out = model(ids[:, at : at + size], attention_mask=seen, past_key_values=cache, use_cache=True)
            cache, at = out.past_key_values, at + size
            logits.append(out.logits)
        more = model(ids[:, :3], past_key_values=cache).logits  # without a mask: all real
        for row in range(4):
            alone = model(torch.cat((ids[row, mask[row]], ids[row, :3]))[None], use_cache=False).logits[0]
            got = torch.cat((torch.cat(logits, dim=1)[row, mask[row]], more[row]))
            torch.testing.assert_close(got, alone, rtol=1e-4, atol=1e-4)
        if sizes == [30]:
            parallel = model(ids, attention_mask=mask, use_cache=False).logits
            torch.testing.assert_close(parallel[mask], logits[0][mask], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_pads_between_tokens_get_no_gradient_and_change_none(name):
    model, mask = MODELS[name]().double(), scattered(3, 30)
    ids = random_ids(3, 30, vocab_size=49).masked_fill(~mask, 49)  # which occurs at pads only
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    weight = torch.randn(3, 30, 50, dtype=torch.float64)
    (model(inputs_embeds=embeds, attention_mask=mask).logits * weight)[mask].sum().backward()
    assert not embeds.grad[~mask].any()
    for row in range(3):
        alone = embeds.detach()[row : row + 1, mask[row]].requires_grad_()
        (model(inputs_embeds=alone).logits[0] * weight[row, mask[row]]).sum().backward()
        torch.testing.assert_close(embeds.grad[row, mask[row]], alone.grad[0], rtol=1e-5, atol=1e-5)


EVERY_HEAD = {
    **MODELS,
    "leap masked": lambda **more: tiny_leap("LeapForMaskedLM", **LEAP["alibi"], **more),
    "multigrid axes": lambda **more: tiny_multigrid(**MULTIGRID["factored"], **more),
    "multigrid leap axes": lambda **more: tiny_multigrid(**MULTIGRID["leap"], **more),
    "multigrid lstm axes": lambda **more: tiny_multigrid(**MULTIGRID["lstm"], **more),
    "grid": lambda **more: tiny_heptapod(grid_size=(5, 6), **more),
    "grid global": lambda **more: tiny_heptapod(grid_size=(5, 6), **GRID["global"], **more),
}


@pytest.mark.parametrize("pads", ["behind", "anywhere"])
@pytest.mark.parametrize("name", EVERY_HEAD)
def test_what_pads_hold_is_not_looked_at(name, pads):
    """NaN in embeddings of pads is in no output of real tokens, no gradient, and nothing that follows from a cache."""
    model, ids = EVERY_HEAD[name](), random_ids(3, 30, vocab_size=18)
    mask = scattered(3, 30) if pads == "anywhere" else torch.arange(30) < torch.tensor([[30], [17], [3]])
    axes = getattr(model.config, "num_axes", 0)
    meta = {"axis_ids": torch.zeros(3, axes, 30, dtype=torch.long)} if axes else {}
    results = []
    for filling in (0.5, torch.nan, torch.inf):
        model.zero_grad()
        embeds = model.get_input_embeddings()(ids).masked_fill(~mask.unsqueeze(-1), filling)
        out = model(inputs_embeds=embeds, attention_mask=mask, labels=ids.masked_fill(~mask, -100), **meta)
        out.loss.backward()
        result = [out.loss.detach(), out.logits[mask].detach()]
        result += [x.grad for x in model.parameters() if x.grad is not None]
        if model.can_generate() and not axes and not name.startswith("grid"):
            with torch.no_grad():
                cache = model(inputs_embeds=embeds, attention_mask=mask, use_cache=True)[CACHE]
                result += [model(ids[:, at : at + 1], **{CACHE: cache}).logits for at in range(2)]
        results.append(result)
    for result in results[1:]:
        for got, expected in zip(result, results[0], strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"use_cache": False}, {"prefill_chunk_size": 7}], ids=str)
@pytest.mark.parametrize(
    "name", mostly_slow(MODELS, ("leap", "leap additive", "hierarchical", "multigrid", "multigrid lstm"))
)
def test_generation_after_pads_anywhere(name, how):
    """As after virtual tokens in front of left pads, or a template's pads between turns."""
    model, ids = MODELS[name](), random_ids(3, 16)
    mask = torch.ones(3, 16, dtype=torch.long)
    mask[0, 3:9], mask[1, :2], mask[1, 5] = 0, 0, 0
    greedy = {"do_sample": False, "eos_token_id": None, "pad_token_id": 50, "max_new_tokens": 12, **how}
    tokens = model.generate(ids, attention_mask=mask, **greedy)[:, 16:]
    for row in range(3):
        alone = ids[row : row + 1, mask[row].bool()]
        assert torch.equal(tokens[row], model.generate(alone, **greedy)[0, alone.shape[1] :])


@pytest.mark.parametrize("name", ["leap", "hierarchical", "multigrid", "multigrid lstm"])
@pytest.mark.parametrize("how", [{}, {"num_beams": 2}, {"use_cache": False}], ids=str)
def test_prompts_are_not_padded_on_the_right(name, how):
    """Their last place is that of a pad; GPT-2 goes on from it, with a warning at best."""
    model, ids = MODELS[name](), random_ids(3, 9)
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, 6:] = mask[2, :4] = 0
    for given in ({"input_ids": ids}, {"inputs_embeds": model.get_input_embeddings()(ids).detach()}):
        with pytest.raises(ValueError, match="`attention_mask` must end with 1 in every row.*on the left"):
            model.generate(**given, attention_mask=mask, max_new_tokens=2, pad_token_id=50, **how)


@pytest.mark.parametrize("name", MODELS)
def test_decoding_loops_of_ones_own(name):
    """`generate(custom_generate=...)`, whose loop prepares inputs and updates arguments itself."""
    model, ids = MODELS[name](), random_ids(2, 9)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    greedy = {
        "attention_mask": mask,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 50,
        "max_new_tokens": 8,
    }
    assert torch.equal(
        model.generate(ids, custom_generate=a_loop_of_ones_own, **greedy), model.generate(ids, **greedy)
    )


@pytest.mark.parametrize("name", MODELS)
def test_a_batched_chat_goes_on_after_pads(name):
    """The second turn of the shorter row begins with pads, and so does the third."""
    model, greedy = MODELS[name](), {"do_sample": False, "eos_token_id": None, "pad_token_id": 50}
    greedy |= {"max_new_tokens": 6, "return_dict_in_generate": True}
    ids, mask, cache = random_ids(2, 0), torch.ones(2, 0, dtype=torch.long), None
    turns = [((8, 8), 1), ((3, 11), 2), ((9, 2), 3)]
    for lengths, seed in turns:
        width = max(lengths)
        said = random_ids(2, width, seed=seed)
        new = torch.arange(width) >= width - torch.tensor(lengths).unsqueeze(1)
        ids, mask = torch.cat((ids, said), dim=1), torch.cat((mask, new.long()), dim=1)
        out = model.generate(ids, attention_mask=mask, past_key_values=cache, **greedy)
        cache = out.past_key_values
        for row in range(2):
            alone = ids[row : row + 1, mask[row].bool()]
            expected = model.generate(alone, **greedy).sequences[0, alone.shape[1] :]
            assert torch.equal(out.sequences[row, ids.shape[1] :], expected)
        ids = out.sequences
        mask = torch.cat((mask, mask.new_ones(2, ids.shape[1] - mask.shape[1])), dim=1)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_right_padded_prompts_go_on(name):
    model, lengths = MODELS[name](), torch.tensor([4, 11, 1])
    ids, more = random_ids(3, 11), random_ids(3, 6, seed=4)
    mask = torch.arange(11) < lengths.unsqueeze(1)
    cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    cache.batch_select_indices(torch.tensor([2, 0, 1]))
    logits = []
    for at in range(6):
        mask = torch.cat((mask, mask.new_ones(3, 1)), dim=1)
        given = {"attention_mask": mask[[2, 0, 1]], "past_key_values": cache}
        logits.append(model(more[[2, 0, 1], at : at + 1], **given).logits[[1, 2, 0]])
    for row, length in enumerate(lengths):
        alone = model(torch.cat((ids[row, :length], more[row]))[None], use_cache=False).logits[:, length:]
        torch.testing.assert_close(torch.cat(logits, dim=1)[row], alone[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_reset_forgets_pads(name):
    model, ids = MODELS[name](), random_ids(3, 12)
    cache = model(ids, attention_mask=scattered(3, 12), use_cache=True).past_key_values
    cache.reset()
    logits = [model(chunk, past_key_values=cache).logits for chunk in ids.split(5, dim=1)]
    torch.testing.assert_close(torch.cat(logits, dim=1), model(ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_what_is_cached_cannot_be_masked_otherwise_later(name):
    model, ids = MODELS[name](), random_ids(2, 9)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :3] = 0
    padded = model(ids[:, :6], attention_mask=mask[:, :6], use_cache=True).past_key_values
    message = "keeps tokens that were pads" if name == "multigrid" else "has .* real tokens"
    with pytest.raises(ValueError, match=f"`attention_mask` {message}"):
        model(ids[:, 6:], attention_mask=torch.ones(2, 9), past_key_values=padded)
    if name != "multigrid":  # whose past can still be left out
        plain = model(ids[:, :6], use_cache=True).past_key_values
        with pytest.raises(ValueError, match="`attention_mask` has .* real tokens"):
            model(ids[:, 6:], attention_mask=mask, past_key_values=plain)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["leap", "leap decay", "multigrid leap"])
def test_pads_anywhere_under_compile(name):
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    model, ids, mask = MODELS[name](), random_ids(3, 24), scattered(3, 24)
    compiled = torch.compile(model.forward, fullgraph=True, backend="eager")
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, use_cache=False).logits[mask]
        logits = compiled(ids, attention_mask=mask, use_cache=False).logits[mask]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


# --- other numbers of rows, other values -------------------------------------------------------------------------------

IDS = torch.ones(4, 6, dtype=torch.long)
BAD = {
    "positions of two rows": (
        {"position_ids": torch.arange(6).expand(2, 6)},
        ValueError,
        r"\[1 or 4, 6\], got \[2, 6\]",
    ),
    "positions of more rows": (
        {"position_ids": torch.arange(6).expand(5, 6)},
        ValueError,
        r"\[1 or 4, 6\], got \[5, 6\]",
    ),
    "positions without rows": ({"position_ids": torch.arange(6)}, ValueError, r"\[1 or 4, 6\], got \[6\]"),
    "positions that are no integers": ({"position_ids": torch.arange(6.0)[None]}, TypeError, "torch.float32"),
    "a mask of one row": ({"attention_mask": IDS[:1]}, ValueError, r"\[4, length\], got \[1, 6\]"),
    "a mask that is added": ({"attention_mask": IDS * -1e9}, ValueError, "1 at tokens and 0 at pads"),
    "a mask of counts": ({"attention_mask": IDS * 2}, ValueError, "1 at tokens and 0 at pads"),
    "a mask of all pairs": ({"attention_mask": torch.ones(4, 1, 6, 6)}, ValueError, r"\[4, 1, 6, 6\]"),
    "a mask as a list": ({"attention_mask": IDS.tolist()}, TypeError, "list"),
    "a mask by other layer types": ({"attention_mask": {"full_attention": IDS}}, (TypeError, ValueError), "dict"),
    "sequences of one row": ({"seq_idx": IDS[:1]}, ValueError, r"\[4, 6\], got \[1, 6\]"),
    "sequences that are no integers": ({"seq_idx": IDS.float()}, TypeError, "torch.float32"),
    "labels of one row": ({"labels": IDS[:1]}, ValueError, r"\[4, 6\].*got \[1, 6\]"),
    "labels the other way round": ({"labels": IDS.T}, ValueError, r"\[4, 6\].*got \[6, 4\]"),
    "labels beyond the vocabulary": ({"labels": IDS + 49}, ValueError, r"\[0, 50\) or -100, got values from 50 to 50"),
    "negative labels": ({"labels": IDS - 4}, ValueError, r"\[0, 50\) or -100, got values from -3"),
    "labels that are no integers": ({"labels": IDS.float()}, TypeError, "torch.float32"),
    "boundaries of several rows": ({"cu_seq_lens_q": torch.tensor([0, 6])}, ValueError, "a batch of one row"),
}
BAD_BOUNDARIES = [[0, 3], [1, 6], [0, 4, 3, 6], [0, 3, 7], [0], [-1, 6], [0, 3, 6, 5]]


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("name", MODELS)
def test_arguments_of_other_rows_or_values_are_named(name, case):
    given, error, match = BAD[case]
    with pytest.raises(error, match=f"`{next(iter(given))}`.*{match}"):
        MODELS[name]()(IDS, **given)


@pytest.mark.parametrize("name", ["leap", "hierarchical", "multigrid"])
def test_boundaries_divide_the_row(name):
    for boundaries in BAD_BOUNDARIES:
        with pytest.raises(ValueError, match="`cu_seq_lens_q` must rise from 0 to 6"):
            MODELS[name]()(IDS[:1], cu_seq_lens_q=torch.tensor(boundaries))
    with pytest.raises(TypeError, match="`cu_seq_lens_q` must be torch.long or torch.int"):
        MODELS[name]()(IDS[:1], cu_seq_lens_q=torch.tensor([0.0, 6.0]))
    contradiction = {"seq_idx": torch.tensor([[0, 0, 0, 1, 1, 1]]), "cu_seq_lens_q": torch.tensor([0, 2, 6])}
    with pytest.raises(ValueError, match="`seq_idx` and `cu_seq_lens_q` must describe the same sequences"):
        MODELS[name]()(IDS[:1], **contradiction)
    logits = MODELS[name]()(IDS[:1], cu_seq_lens_q=torch.tensor([0, 2, 2, 6])).logits  # an empty one is none
    torch.testing.assert_close(logits, MODELS[name]()(IDS[:1], cu_seq_lens_q=torch.tensor([0, 2, 6])).logits)


@pytest.mark.parametrize("name", ["leap learned", "multigrid"])
def test_learned_positions_are_of_the_table(name):
    model = MODELS[name](max_position_embeddings=8)
    for positions in ([-1, 0, 1, 2, 3, 4], [3, 4, 5, 6, 7, 8]):
        with pytest.raises(ValueError, match=r"`position_ids`.*must be in \[0, 8\), got values from"):
            model(IDS, position_ids=torch.tensor([positions]))


@pytest.mark.parametrize("name", MODELS)
def test_targets_given_shifted_are_looked_at(name):
    model = MODELS[name]()
    with pytest.raises(ValueError, match=r"`shift_labels`.*\[4, 6\].*got \[4, 5\]"):
        model(IDS, labels=IDS, shift_labels=IDS[:, 1:])
    with pytest.raises(ValueError, match=r"`shift_labels` must be in \[0, 50\) or -100"):
        model(IDS, labels=IDS, shift_labels=IDS * 50)
