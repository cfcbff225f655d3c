"""`generate` with axis ids predicted, annotated or forced: with a cache what the parallel forward gives, in every mode."""

from types import SimpleNamespace

import pytest
import torch
from corpora import build_tokenizer
from transformers.generation import GenerateDecoderOnlyOutput, GenerationConfig
from transformers.generation.streamers import BaseStreamer

from modeling_heptapod import MultiGridCache, MultiGridProcessor
from modeling_heptapod.multigrid.configuration_multigrid import AXIS_ORDERS
from tests.tiny import a_loop_of_ones_own, mostly_slow
from tests.tiny_multigrid import TWO_AXES, VARIANTS, random_grid, random_ids, tiny_multigrid


# No token is a pad by its id: `generate` would mask it in a prompt, and beam search wants an id.
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 50}
WITH_TRACKS = {"return_dict_in_generate": True, **GREEDY}
WITH_AXES = [name for name, options in VARIANTS.items() if "axis_names" in options]
# For what takes longer: one of a kind, the others among the slow tests.
ONE_OF_A_KIND = mostly_slow(WITH_AXES, ("light", "factored", "leap", "lstm-factored"))
BOTH_ORDERS = pytest.mark.parametrize("order", AXIS_ORDERS)


def two_axes(order="parallel", **overrides):
    return tiny_multigrid(axis_order=order, **{**TWO_AXES, **overrides})


def left_padded(model, lengths):
    rows = [random_grid(model, 1, n, seed=n) for n in lengths]
    width = max(lengths)

    def joined(name):
        return torch.cat([torch.nn.functional.pad(row[name], (width - n, 0)) for row, n in zip(rows, lengths)])

    batch = {name: joined(name) for name in ("input_ids", "axis_ids")}
    place = torch.arange(width)
    return rows, {**batch, "attention_mask": torch.stack([(place >= width - n).long() for n in lengths])}


def in_chunks(model, batch, sizes, mask=None):
    """Logits of all axes of the chunks one after the other, and the cache after the last."""
    cache, logits, at = None, [], 0
    with torch.no_grad():
        for size in sizes:
            out = model(
                batch["input_ids"][:, at : at + size],
                axis_ids=batch["axis_ids"][..., at : at + size],
                attention_mask=None if mask is None else mask[:, : at + size],
                next_axis_ids=following(model, batch, at + size),
                past_key_values=cache,
                use_cache=True,
            )
            cache, at = out.past_key_values, at + size
            logits.append(torch.cat((out.logits, *out.axis_logits), dim=-1))
    assert at == batch["input_ids"].shape[1] == cache.get_seq_length()
    return torch.cat(logits, dim=1), cache


def following(model, batch, length):
    """The axis ids after the first `length`, for models that want to know them."""
    known = model.config.axis_order == "factored" and length < batch["axis_ids"].shape[2]
    return batch["axis_ids"][..., length] if known else None


def parallel(model, batch, **kwargs):
    with torch.no_grad():
        return model(batch["input_ids"], axis_ids=batch["axis_ids"], use_cache=False, **kwargs)


def parallel_logits(model, batch):
    """Main and axis logits side by side."""
    out = parallel(model, batch)
    return torch.cat((out.logits, *out.axis_logits), dim=-1)


# --- the cache ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", WITH_AXES)
def test_steps_and_chunks_equal_the_parallel_forward(variant):
    model = tiny_multigrid(**VARIANTS[variant]).double()
    batch = random_grid(model, 2, 30)
    expected = parallel_logits(model, batch)
    for sizes in ([1] * 30, [3, 1, 9, 2, 1, 1, 13], [16, 14]):
        logits, _ = in_chunks(model, batch, sizes)
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", ONE_OF_A_KIND)
def test_padded_chunks_equal_rows_alone(variant):
    model = tiny_multigrid(pad_token_id=0, **VARIANTS[variant]).double()
    lengths = (30, 1, 17)
    rows, batch = left_padded(model, lengths)
    for sizes in ([20] + [1] * 10, [12, 1, 1, 14, 2]):
        logits, _ = in_chunks(model, batch, sizes, batch["attention_mask"])
        for i, (row, n) in enumerate(zip(rows, lengths)):
            alone = parallel_logits(model, row)[0]
            torch.testing.assert_close(logits[i, 30 - n :], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("variant", WITH_AXES)
def test_hundreds_of_steps_equal_the_parallel_forward(variant):
    model = tiny_multigrid(max_position_embeddings=520, **VARIANTS[variant])
    batch = random_grid(model, 1, 520)
    logits, _ = in_chunks(model, batch, [5] + [1] * 515)
    torch.testing.assert_close(logits, parallel_logits(model, batch), rtol=1e-4, atol=1e-4)


# --- predicted ---------------------------------------------------------------------------------------------------------


def greedily(model, batch, steps, forced=None, annotate=None):
    """Tokens and tracks by full forward passes: what `generate` means, without a cache or any hook of transformers'.

    `forced [batch, axes, steps]` overrules predictions where it is not negative, `annotate` (from rows of tokens to
    `{axis: ids}`) once the token is known.
    """
    ids, axis_ids = batch["input_ids"], batch["axis_ids"]
    for step in range(steps):
        out = parallel(model, {"input_ids": ids, "axis_ids": axis_ids})
        chosen = torch.stack([logits[:, -1].argmax(-1) for logits in out.axis_logits], dim=1)
        if forced is not None:
            chosen = torch.where(forced[..., step] >= 0, forced[..., step], chosen)
        if model.config.axis_order == "factored":
            out = parallel(model, {"input_ids": ids, "axis_ids": axis_ids}, next_axis_ids=chosen)
        ids = torch.cat((ids, out.logits[:, -1:].argmax(-1)), dim=1)
        axis_ids = torch.cat((axis_ids, chosen.unsqueeze(-1)), dim=-1)
        if annotate is not None:
            for axis, track in annotate(ids).items():
                axis_ids[:, axis, -1] = track
    return ids, axis_ids


@pytest.mark.parametrize("variant", ONE_OF_A_KIND)
def test_every_variant_generates_what_it_computes_without_a_cache(variant):
    model = tiny_multigrid(**VARIANTS[variant])
    batch = random_grid(model, 2, 12)
    expected = greedily(model, batch, 20)
    assert len(expected[0][0].unique()) > 5 and len(expected[1][0, 0].unique()) > 1
    for how in ({}, {"use_cache": False}, {"prefill_chunk_size": 5}):
        out = model.generate(**batch, max_new_tokens=20, **WITH_TRACKS, **how)
        assert torch.equal(out.sequences, expected[0]), how
        assert torch.equal(out.axis_sequences, expected[1]), how
    assert torch.equal(model.generate(**batch, max_new_tokens=20, **GREEDY), expected[0])


@pytest.mark.parametrize("variant", ["axes", "leap-factored", "lstm-factored"])
def test_generation_between_steps_of_training_with_checkpoints(variant):
    """Checkpointed layers are given no cache; without one they must be given the whole text."""
    model = tiny_multigrid(**VARIANTS[variant])
    batch = random_grid(model, 2, 12)
    expected = model.generate(**batch, max_new_tokens=6, **GREEDY)
    model.train().gradient_checkpointing_enable()
    assert torch.equal(model.generate(**batch, max_new_tokens=6, **GREEDY), expected)


def test_nothing_is_left_on_the_module():
    model = two_axes()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    for beams in (1, 2):
        model.generate(**random_grid(model, 2, 12), max_new_tokens=3, num_beams=beams, **GREEDY)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("variant", ONE_OF_A_KIND)
def test_padding_in_every_variant(variant):
    model = tiny_multigrid(pad_token_id=0, **VARIANTS[variant])
    with torch.no_grad():
        model.get_input_embeddings().weight[0].normal_()  # a pad embedding that is not zero
    rows, batch = left_padded(model, (1, 7, 20))
    out = model.generate(**batch, max_new_tokens=10, **WITH_TRACKS)
    for how in ({"use_cache": False}, {"prefill_chunk_size": 8}):
        same = model.generate(**batch, max_new_tokens=10, **WITH_TRACKS, **how)
        assert torch.equal(same.sequences, out.sequences), how
        assert torch.equal(same.axis_sequences, out.axis_sequences), how
    for i, row in enumerate(rows):
        ids, axis_ids = greedily(model, row, 10)
        assert torch.equal(out.sequences[i, 20:], ids[0, -10:]), i
        assert torch.equal(out.axis_sequences[i, :, 20:], axis_ids[0, :, -10:]), i


@pytest.mark.parametrize("variant", ONE_OF_A_KIND)
def test_beam_search(variant):
    model = tiny_multigrid(**{**VARIANTS[variant], "initializer_range": 0.4})
    batch = random_grid(model, 2, 12)
    how = {"num_beams": 4, "max_new_tokens": 15, "num_return_sequences": 3, "output_scores": True, **WITH_TRACKS}
    out = model.generate(**batch, **how)
    assert out.sequences.shape == (6, 27) and out.axis_sequences.shape == (6, model.config.num_axes, 27)
    same = model.generate(**batch, use_cache=False, **how)
    assert torch.equal(same.sequences, out.sequences) and torch.equal(same.axis_sequences, out.axis_sequences)
    check_hypotheses(model, batch, out, prompt=12, lengths=[27] * 6)


def check_hypotheses(model, batch, out, prompt, lengths):
    """Tracks are what the model predicts along each hypothesis, and scores are those of its tokens given the tracks."""
    per_prompt = len(out.sequences) // len(batch["input_ids"])
    for i, length in enumerate(lengths):
        ids, axis_ids = out.sequences[i : i + 1, :length], out.axis_sequences[i : i + 1, :, :length]
        assert torch.equal(ids[0, :prompt], batch["input_ids"][i // per_prompt])
        assert torch.equal(axis_ids[0, :, :prompt], batch["axis_ids"][i // per_prompt])
        forward = parallel(model, {"input_ids": ids, "axis_ids": axis_ids})
        predicted = torch.stack([x[:, prompt - 1 : -1].argmax(-1) for x in forward.axis_logits], dim=1)
        assert torch.equal(axis_ids[..., prompt:], predicted), i
        logs = forward.logits[0, prompt - 1 : -1].log_softmax(-1)
        score = logs.gather(1, ids[0, prompt:, None]).sum() / (length - prompt)
        torch.testing.assert_close(out.sequences_scores[i], score, rtol=1e-4, atol=1e-4)


@BOTH_ORDERS
def test_sampled_beams(order):
    """Scores are those of the tokens given the tracks that are returned, so tracks have moved with their beams."""
    model = two_axes(order, initializer_range=0.4)
    batch = random_grid(model, 2, 12)
    how = {"do_sample": True, "num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 8, "output_scores": True}
    out = model.generate(**batch, return_dict_in_generate=True, pad_token_id=50, **how)
    forward = parallel(model, {"input_ids": out.sequences, "axis_ids": out.axis_sequences})
    logs = forward.logits[:, 11:-1].log_softmax(-1).gather(2, out.sequences[:, 12:, None])
    torch.testing.assert_close(out.sequences_scores, logs.sum((1, 2)) / 8, rtol=1e-4, atol=1e-4)
    predicted = torch.stack([x[:, 11:-1].argmax(-1) for x in forward.axis_logits], dim=1)
    assert not torch.equal(out.axis_sequences[..., 12:], predicted)


@BOTH_ORDERS
def test_beams_that_end(order):
    """Hypotheses of different lengths, some of which have ended long before the search does."""
    model = two_axes(order)
    batch = random_grid(model, 3, 6)
    how = {"num_beams": 5, "max_new_tokens": 20, "num_return_sequences": 5, "output_scores": True}
    out = model.generate(**batch, **how, **until(batch, list(range(0, 50, 7))))
    ends = torch.isin(out.sequences[:, 6:], torch.arange(0, 50, 7))
    lengths = [6 + int(row.nonzero()[0]) + 1 if row.any() else out.sequences.shape[1] for row in ends]
    assert len(set(lengths)) > 2
    check_hypotheses(model, batch, out, 6, lengths)
    for i, length in enumerate(lengths):
        assert not out.axis_sequences[i, :, length:].any()


@BOTH_ORDERS
def test_beam_search_over_a_padded_batch(order):
    model = two_axes(order)
    rows, batch = left_padded(model, (1, 7, 20))
    how = {"num_beams": 4, "max_new_tokens": 15, **WITH_TRACKS}
    out = model.generate(**batch, **how)
    for i, row in enumerate(rows):
        alone = model.generate(**row, **how)
        n = row["input_ids"].shape[1]
        assert torch.equal(out.sequences[i, 20:], alone.sequences[0, n:]), i
        assert torch.equal(out.axis_sequences[i, :, 20:], alone.axis_sequences[0, :, n:]), i


@BOTH_ORDERS
def test_sampling_with_a_seed(order):
    model = two_axes(order)
    batch, how = random_grid(model, 2, 12), {"do_sample": True, "max_new_tokens": 20, "pad_token_id": 50, "top_k": 20}
    how |= {"return_dict_in_generate": True}
    draws = []
    for use_cache in (True, True, False):
        torch.manual_seed(3)
        out = model.generate(**batch, use_cache=use_cache, **how)
        draws.append(torch.cat((out.sequences.unsqueeze(1), out.axis_sequences), dim=1))
    assert torch.equal(draws[0], draws[1]) and torch.equal(draws[0], draws[2])
    torch.manual_seed(4)
    assert not torch.equal(draws[0][:, 1:], model.generate(**batch, **how).axis_sequences)
    torch.manual_seed(3)
    several = model.generate(**batch, num_return_sequences=3, **how)
    assert several.axis_sequences.shape == (6, 2, 32)
    assert not torch.equal(several.axis_sequences[0], several.axis_sequences[1])


def test_meta_tokens_are_drawn_from_the_model_at_the_temperature():
    model = two_axes()
    batch = random_grid(model, 1, 12)
    rows = {name: ids.expand(2000, *ids.shape[1:]) for name, ids in batch.items()}
    out = model.generate(
        **rows,
        do_sample=True,
        temperature=0.5,
        top_k=1,
        max_new_tokens=1,
        pad_token_id=50,
        return_dict_in_generate=True,
    )
    for drawn, logits in zip(out.axis_sequences[..., -1].unbind(1), parallel(model, batch).axis_logits):
        expected = (logits[0, -1] / 0.5).softmax(-1)
        assert 0.05 < expected.max() < 0.999
        shares = torch.bincount(drawn, minlength=len(expected)) / 2000
        torch.testing.assert_close(shares, expected, rtol=0, atol=0.04)


class Collect(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


def test_a_streamer_gets_the_main_tokens():
    model, streamer = two_axes(), Collect()
    tokens = model.generate(**random_grid(model, 1, 12), max_new_tokens=9, streamer=streamer, **GREEDY)
    assert streamer.ended and streamer.tokens == tokens[0].tolist()


def until(batch, eos_token_id):
    """Token 47 is the pad, but none in the prompt. It ends nothing and is no special token: a row that has ended stays so."""
    assert 47 not in eos_token_id
    mask = torch.ones_like(batch["input_ids"])
    return {**WITH_TRACKS, "attention_mask": mask, "eos_token_id": eos_token_id, "pad_token_id": 47}


@BOTH_ORDERS
def test_rows_that_end_are_filled_up(order):
    model = two_axes(order, axis_vocab_sizes=[5, 9], initializer_range=0.5)
    batch, eos = random_grid(model, 8, 6), list(range(0, 50, 7))
    out = model.generate(**batch, max_new_tokens=20, **until(batch, eos))
    ids, axis_ids = greedily(model, batch, out.sequences.shape[1] - 6)
    ends = set()
    for i, row in enumerate(ids):
        end = next((t for t in range(6, len(row)) if int(row[t]) in eos), len(row) - 1) + 1
        ends.add(end)
        assert torch.equal(out.sequences[i, :end], row[:end]) and (out.sequences[i, end:] == 47).all()
        assert torch.equal(out.axis_sequences[i, :, :end], axis_ids[i, :, :end])
        assert not out.axis_sequences[i, :, end:].any()
    assert len(ends) > 3 and axis_ids[..., 6:].any()


@pytest.mark.parametrize("variant", ONE_OF_A_KIND)
def test_generation_goes_on_from_a_returned_cache(variant):
    model = tiny_multigrid(**VARIANTS[variant])
    first = model.generate(**random_grid(model, 2, 9), max_new_tokens=6, **WITH_TRACKS)
    more = random_grid(model, 2, 5, seed=2)
    follow = {
        "input_ids": torch.cat((first.sequences, more["input_ids"]), dim=1),
        "axis_ids": torch.cat((first.axis_sequences, more["axis_ids"]), dim=2),
    }
    out = model.generate(**follow, past_key_values=first.past_key_values, max_new_tokens=10, **WITH_TRACKS)
    expected = model.generate(**follow, max_new_tokens=10, use_cache=False, **WITH_TRACKS)
    assert torch.equal(out.sequences, expected.sequences)
    assert torch.equal(out.axis_sequences, expected.axis_sequences)


def test_only_the_new_tokens_may_be_given_with_a_cache():
    model = two_axes()
    first = model.generate(**random_grid(model, 2, 9), max_new_tokens=6, **WITH_TRACKS)
    more = random_grid(model, 2, 5, seed=2)
    ids = torch.cat((first.sequences, more["input_ids"]), dim=1)
    axis_ids = torch.cat((first.axis_sequences, more["axis_ids"]), dim=2)
    expected = model.generate(ids, axis_ids=axis_ids, max_new_tokens=10, use_cache=False, **WITH_TRACKS)
    out = model.generate(
        ids[:, 14:],
        axis_ids=axis_ids[..., 14:],
        attention_mask=torch.ones_like(ids),
        past_key_values=first.past_key_values,
        max_new_tokens=10,
        **WITH_TRACKS,
    )
    assert torch.equal(out.sequences, expected.sequences[:, 14:])
    assert torch.equal(out.axis_sequences, expected.axis_sequences[..., 14:])


@pytest.mark.parametrize("padded", [False, True])
def test_prompts_of_embeddings(padded):
    model = two_axes()
    _, batch = left_padded(model, (7, 20) if padded else (20, 20))
    out = model.generate(**batch, max_new_tokens=10, **WITH_TRACKS)
    embeds = model.get_input_embeddings()(batch.pop("input_ids")).detach()
    by_embeds = model.generate(inputs_embeds=embeds, **batch, max_new_tokens=10, **WITH_TRACKS)
    assert torch.equal(by_embeds.sequences, out.sequences[:, 20:])
    assert torch.equal(by_embeds.axis_sequences, out.axis_sequences[..., 20:])


def test_a_given_cache_is_used():
    model = two_axes()
    cache = MultiGridCache(model.config)
    out = model.generate(**random_grid(model, 1, 9), past_key_values=cache, max_new_tokens=6, **GREEDY)
    assert cache.get_seq_length() == out.shape[1] - 1


def test_without_axes_generate_is_that_of_transformers():
    model = tiny_multigrid()
    ids = random_ids(2, 12)
    out = model.generate(ids, axis_ids=torch.zeros(2, 0, 12).long(), max_new_tokens=20, **WITH_TRACKS)
    assert type(out) is GenerateDecoderOnlyOutput
    with pytest.raises(ValueError, match=r"\[2, 1, 12\].*no axes"):
        model.generate(ids, axis_ids=torch.zeros(2, 1, 12).long(), max_new_tokens=20)
    with pytest.raises(TypeError, match="`axis_ids` must be .*got list"):
        model.generate(ids, axis_ids=[[[0] * 12]] * 2, max_new_tokens=20)
    with torch.no_grad():
        assert torch.equal(model(out.sequences[:, :-1]).logits[:, 11:].argmax(-1), out.sequences[:, 12:])
    guided = model.generate(ids, guidance_scale=1.5, max_new_tokens=4, **GREEDY)
    assert guided.shape == (2, 16)


# --- forced ------------------------------------------------------------------------------------------------------------


@BOTH_ORDERS
def test_forced_axes_steer_and_others_are_predicted(order):
    model = two_axes(order, initializer_range=0.5)
    names, batch = model.config.axis_names, random_grid(model, 2, 12)
    forced = random_grid(model, 2, 17, seed=5)["axis_ids"]
    source = {names[1]: "forced"}
    wanted = torch.cat((torch.full_like(forced[:, :1], -1), forced[:, 1:]), dim=1)
    expected = greedily(model, batch, 15, forced=wanted)
    assert not torch.equal(expected[0], greedily(model, batch, 15)[0])
    for tracks in (forced, forced[:, 1:]):  # of all axes, or of the forced one alone
        out = model.generate(**batch, axis_source=source, forced_axis_ids=tracks, max_new_tokens=15, **WITH_TRACKS)
        assert torch.equal(out.sequences, expected[0]) and torch.equal(out.axis_sequences, expected[1])
    everything = model.generate(
        **batch, axis_source="forced", forced_axis_ids=forced, max_new_tokens=15, **WITH_TRACKS
    )
    assert torch.equal(everything.axis_sequences[..., 12:], forced[..., :15])
    assert torch.equal(everything.sequences, greedily(model, batch, 15, forced=forced)[0])


def test_forced_axes_with_beams_and_several_rows():
    model = two_axes("factored")
    batch, forced = random_grid(model, 2, 12), random_grid(model, 2, 10, seed=5)["axis_ids"]
    for how in ({"num_beams": 3}, {"num_beams": 3, "use_cache": False}, {"do_sample": True}):
        how = {**WITH_TRACKS, "num_return_sequences": 2, "max_new_tokens": 10, **how}
        out = model.generate(**batch, axis_source="forced", forced_axis_ids=forced, **how)
        assert torch.equal(out.axis_sequences[..., 12:], forced.repeat_interleave(2, dim=0))


def test_one_of_the_tracks_that_are_given_is_forced():
    """Tracks of all axes may be given where not all are forced: each is that of its own axis."""
    model = two_axes()
    batch, forced = random_grid(model, 2, 12), random_grid(model, 2, 8, seed=5)["axis_ids"]
    for place, name in enumerate(model.config.axis_names):
        how = {**WITH_TRACKS, "axis_source": {name: "forced"}, "max_new_tokens": 8}
        out = model.generate(**batch, forced_axis_ids=forced, **how)
        assert torch.equal(out.axis_sequences[:, place, 12:], forced[:, place])
        one = model.generate(**batch, forced_axis_ids=forced[:, place : place + 1], **how)
        assert torch.equal(out.axis_sequences, one.axis_sequences)


def test_without_a_temperature_meta_tokens_are_drawn_as_they_are():
    model = two_axes()
    rows = {name: ids.expand(200, *ids.shape[1:]) for name, ids in random_grid(model, 1, 12).items()}
    how = {"do_sample": True, "max_new_tokens": 1, "pad_token_id": 50, "return_dict_in_generate": True}
    drawn = []
    for temperature in (None, 1.0):
        torch.manual_seed(0)
        drawn.append(model.generate(**rows, **how, temperature=temperature).axis_sequences[..., -1])
    assert torch.equal(*drawn) and len(drawn[0].unique(dim=0)) > 3


# --- annotated ---------------------------------------------------------------------------------------------------------


class Letters:
    """An axis that remembers how many letters there were, modulo the size of its vocabulary."""

    causal, why_not_causal = True, ""

    def __init__(self, name, size, modulus=None):
        self.name, self.vocabulary, self.modulus = name, tuple(map(str, range(size))), modulus or size

    def start(self):
        return 0

    def step(self, state, characters):
        state += len(characters)
        return state % self.modulus, state


class FakeProcessor:
    """Tokens 0 to 9 are halves of a letter, some are special, all others are as many letters as their last digit says."""

    tokenizer = SimpleNamespace(all_special_ids=list(range(12, 50, 4)), added_tokens_decoder={})

    def __init__(self, *axes):
        self.axes = axes

    def new_characters(self, pending, token):
        if token < 10:
            return ("é", ()) if pending else ("", (token,))
        return "x" * (token % 10), ()

    def annotate(self, axis, ids, prompt_pads=0):
        """Ids of the whole row, the slow way."""
        out, state, pending = [], axis.start(), ()
        for token in ids[prompt_pads:].tolist():
            if token in self.tokenizer.all_special_ids:
                out.append(0)
                continue
            characters, pending = self.new_characters(pending, token)
            axis_id, state = axis.step(state, characters)
            out.append(axis_id)
        return torch.tensor(out)


def with_annotator(model):
    """Letters on the second axis."""
    name, size = model.config.axis_names[1], model.config.axis_vocab_sizes[1]
    axis = Letters(name, size)
    return FakeProcessor(axis), axis, {"axis_source": {name: "annotated"}}


@BOTH_ORDERS
def test_annotated_axes_say_what_the_rule_says(order):
    model = two_axes(order)
    processor, axis, how = with_annotator(model)
    batch = random_grid(model, 2, 12)
    batch["input_ids"][0, :3] = torch.tensor([24, 5, 23])

    def annotate(ids):
        return {1: torch.stack([processor.annotate(axis, row)[-1] for row in ids])}

    ids, axis_ids = greedily(model, batch, 20, annotate=annotate)
    assert (ids[:, 12:] < 10).any() and len(axis_ids[:, 1, 12:].unique()) > 2
    for more in ({}, {"use_cache": False}, {"prefill_chunk_size": 5}):
        out = model.generate(**batch, **how, processor=processor, max_new_tokens=20, **WITH_TRACKS, **more)
        assert torch.equal(out.sequences, ids), more
        assert torch.equal(out.axis_sequences, axis_ids), more


@BOTH_ORDERS
def test_annotated_axes_with_beams_that_end_over_a_padded_batch(order):
    model = two_axes(order, initializer_range=0.5)
    processor, axis, how = with_annotator(model)
    lengths = (1, 7, 20)
    _, batch = left_padded(model, lengths)
    search = {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 15, **WITH_TRACKS, "output_scores": True}
    search |= {"eos_token_id": list(range(0, 50, 6)), "pad_token_id": 49, "processor": processor, **how}
    out = model.generate(**batch, **search)
    same = model.generate(**batch, use_cache=False, **search)
    assert torch.equal(out.sequences, same.sequences) and torch.equal(out.axis_sequences, same.axis_sequences)
    ended = 0
    for i, row in enumerate(out.sequences):
        pads = 20 - lengths[i // 4]
        ends = torch.isin(row[20:], torch.tensor(search["eos_token_id"])).nonzero()
        length = 20 + int(ends[0]) + 1 if len(ends) else len(row)
        ended += length < len(row)
        expected = processor.annotate(axis, row[:length], pads)
        assert torch.equal(out.axis_sequences[i, 1, 20:length], expected[20 - pads :])
        assert not out.axis_sequences[i, :, length:].any()
        if order == "parallel":  # in the factored order tokens were scored given what was guessed of the rule
            tracks = {"input_ids": row[None, pads:length], "axis_ids": out.axis_sequences[i : i + 1, :, pads:length]}
            logs = parallel(model, tracks).logits[0, 19 - pads : -1].log_softmax(-1)
            score = logs.gather(1, row[20:length, None]).sum() / (length - 20)
            torch.testing.assert_close(out.sequences_scores[i], score, rtol=1e-4, atol=1e-4)
    assert ended


@BOTH_ORDERS
def test_what_a_processor_annotates_is_what_it_says_of_the_written_text(order):
    """Real axes and bytes; with beams, over a padded batch, and on from a returned cache."""
    processor = MultiGridProcessor(build_tokenizer("byte", []), ["token_kind", "bracket"])
    processor.tokenizer.padding_side = "left"
    model = two_axes(order, vocab_size=len(processor.tokenizer), axis_vocab_sizes=processor.axis_vocab_sizes)
    model.config.axis_names = processor.axis_names
    ascii_ids = processor.tokenizer("ab1 (]'#\n:", add_special_tokens=False)["input_ids"]
    prompts = processor(["def f(a):\n", "x = ['é'"], padding=True, return_tensors="pt")
    how = {"prefix_allowed_tokens_fn": lambda *_: ascii_ids, "processor": processor, "axis_source": "annotated"}
    how |= {"max_new_tokens": 20, **WITH_TRACKS, "pad_token_id": processor.tokenizer.pad_token_id}

    def check(out, batch):
        real = torch.nn.functional.pad(batch["attention_mask"], (0, 20), value=1).bool()
        for ids, axis_ids, here in zip(
            out.sequences, out.axis_sequences, real.repeat_interleave(len(out.sequences) // 2, 0)
        ):
            expected = processor(processor.decode(ids[here]), return_tensors="pt")
            assert torch.equal(expected["input_ids"][0], ids[here])
            assert torch.equal(expected["axis_ids"][0], axis_ids[:, here])

    check(model.generate(**prompts, num_beams=3, num_return_sequences=2, **how), prompts)
    first = model.generate(**prompts, **how)
    check(first, prompts)
    mask = torch.nn.functional.pad(prompts["attention_mask"], (0, 20), value=1)
    more = {"input_ids": first.sequences, "axis_ids": first.axis_sequences, "attention_mask": mask}
    check(model.generate(**more, past_key_values=first.past_key_values, **how), more)
    with pytest.raises(ValueError, match="text from its beginning"):
        cache = model(**prompts, use_cache=True).past_key_values
        new = {name: x[..., -1:] for name, x in prompts.items() if name != "attention_mask"}
        model.generate(
            **new, attention_mask=torch.ones(2, prompts["input_ids"].shape[1] + 1), past_key_values=cache, **how
        )


def test_annotated_axes_when_rows_end():
    model = two_axes()
    processor, axis, how = with_annotator(model)
    batch, eos = random_grid(model, 8, 6), list(range(0, 50, 7))
    out = model.generate(**batch, **how, processor=processor, max_new_tokens=20, **until(batch, eos))
    for i, row in enumerate(out.sequences):
        end = next((t for t in range(6, len(row)) if int(row[t]) in eos), len(row) - 1) + 1
        assert torch.equal(out.axis_sequences[i, 1, 6:end], processor.annotate(axis, row[:end])[6:])
        assert not out.axis_sequences[i, 1, end:].any()


# --- what cannot work --------------------------------------------------------------------------------------------------


def test_bad_input_is_named():
    model = two_axes()
    names = model.config.axis_names
    batch, forced = random_grid(model, 2, 6), random_grid(model, 2, 4)["axis_ids"]
    sizes = model.config.axis_vocab_sizes

    def refused(error, match, **how):
        with pytest.raises(error, match=match):
            model.generate(**{**batch, "max_new_tokens": 4, **GREEDY, **how})

    with pytest.raises(ValueError, match=r"`axis_ids` of shape \[2, 2, 6\] were given, but the model has no axes"):
        tiny_multigrid().generate(**batch, max_new_tokens=4, **GREEDY)

    refused(ValueError, "axis_ids.*None", axis_ids=None)
    refused(ValueError, r"axis_ids.*\[2, 2, 6\].*\[2, 2, 5\]", axis_ids=batch["axis_ids"][..., 1:])
    refused(ValueError, "axis_ids.*repeated for beams", axis_ids=batch["axis_ids"][:, :1], num_beams=2)
    refused(ValueError, "unknown axes.*'syntax'", axis_source={"syntax": "predicted"})
    refused(ValueError, "'forced'.*got 'guessed'", axis_source="guessed")
    refused(ValueError, "'forced'.*got 'guessed'", axis_source={names[0]: "guessed"})
    refused(TypeError, "axis_source.*list", axis_source=["predicted"])
    refused(ValueError, "'forced' and no `forced_axis_ids`", axis_source="forced")
    refused(ValueError, "'predicted' and some `forced_axis_ids`", forced_axis_ids=forced)
    refused(TypeError, "forced_axis_ids.*float32", axis_source="forced", forced_axis_ids=forced.float())
    refused(TypeError, "forced_axis_ids.*list", axis_source="forced", forced_axis_ids=forced.tolist())
    refused(ValueError, "each of the 4 tokens.*got 3", axis_source="forced", forced_axis_ids=forced[..., :3])
    refused(ValueError, r"\[2, 3, 4\]", axis_source="forced", forced_axis_ids=torch.zeros(2, 3, 4).long())
    refused(ValueError, r"\[1, 2, 4\]", axis_source="forced", forced_axis_ids=forced[:1])
    refused(
        ValueError,
        rf"forced_axis_ids. of axis.*\[0, {sizes[1]}\).*{sizes[1]}",
        axis_source="forced",
        forced_axis_ids=forced * 0 + sizes[1],
    )
    refused(ValueError, "processor.*None", axis_source="annotated")
    refused(
        ValueError,
        f"no axis '{names[1]}'.*other",
        axis_source="annotated",
        processor=FakeProcessor(Letters(names[0], sizes[0]), Letters("other", 3)),
    )
    leaks = Letters(names[0], sizes[0])
    leaks.causal, leaks.why_not_causal = False, "it reads to the end of the word"
    refused(
        ValueError,
        f"'{names[0]}'.*not causal: it reads to the end of the word. Use",
        axis_source={names[0]: "annotated"},
        processor=FakeProcessor(leaks),
    )
    wide = FakeProcessor(Letters(names[0], sizes[0] + 1))
    refused(ValueError, f"{sizes[0] + 1}.*{sizes[0]}", axis_source={names[0]: "annotated"}, processor=wide)
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach()
    fits = {"processor": FakeProcessor(Letters(names[0], sizes[0])), "axis_source": {names[0]: "annotated"}}
    refused(ValueError, "text from its beginning", input_ids=None, inputs_embeds=embeds, **fits)
    refused(ValueError, "Assisted decoding", prompt_lookup_num_tokens=2)
    for core in ("leap", "lstm"):  # whose state cannot be taken back
        with pytest.raises(ValueError, match="stateful"):
            tiny_multigrid(core=core).generate(random_ids(1, 6), prompt_lookup_num_tokens=2, max_new_tokens=3)
    refused(ValueError, "`guidance_scale` must be 1 with axes, got 1.5", guidance_scale=1.5)
    config = GenerationConfig(guidance_scale=1.5, max_new_tokens=4)
    refused(ValueError, "`guidance_scale` must be 1", generation_config=config, num_beams=2)
    refused(TypeError, "`axis_ids` must be torch.long or torch.int, got list", axis_ids=batch["axis_ids"].tolist())
    refused(TypeError, "`axis_ids` must be .*got torch.float32", axis_ids=batch["axis_ids"].float())
    assert model.generate(**batch, guidance_scale=1.0, max_new_tokens=4).shape == (2, 10)
    refused(ValueError, "temprature", temprature=3)


RECIPE = """
def generate(model, custom_generate=None, **kwargs):
    return model.generate(**kwargs, max_new_tokens=5)
"""


@pytest.mark.parametrize("variant", ["axes", "factored", "leap", "lstm", "plain"])
def test_decoding_loops_of_ones_own(variant, tmp_path):
    model = tiny_multigrid(**VARIANTS[variant])
    _, batch = left_padded(model, [9, 6])
    expected = model.generate(**batch, do_sample=False, max_new_tokens=5)
    written = model.generate(**batch, do_sample=False, max_new_tokens=5, custom_generate=a_loop_of_ones_own)
    assert torch.equal(written, expected)
    (tmp_path / "custom_generate").mkdir()
    (tmp_path / "custom_generate" / "generate.py").write_text(RECIPE)
    recipe = {"custom_generate": str(tmp_path), "trust_remote_code": True}
    assert torch.equal(model.generate(**batch, do_sample=False, **recipe), expected)


@BOTH_ORDERS
def test_decoding_loops_of_ones_own_with_annotated_and_forced_axes(order, tmp_path):
    model = two_axes(order, initializer_range=0.5)
    processor, _, _ = with_annotator(model)
    kind, letters = model.config.axis_names
    batch = random_grid(model, 2, 8)
    how = {
        "axis_source": {letters: "annotated", kind: "forced"},
        "forced_axis_ids": random_ids(2, 12, 7).unsqueeze(1),
        "processor": processor,
        "do_sample": False,
    }
    expected = model.generate(**batch, **how, max_new_tokens=12)
    assert not torch.equal(expected, model.generate(**batch, do_sample=False, max_new_tokens=12))
    written = model.generate(**batch, **how, max_new_tokens=12, custom_generate=a_loop_of_ones_own)
    assert torch.equal(written, expected)
    (tmp_path / "custom_generate").mkdir()
    (tmp_path / "custom_generate" / "generate.py").write_text(RECIPE.replace("5", "12"))
    assert torch.equal(model.generate(**batch, **how, custom_generate=str(tmp_path), trust_remote_code=True), expected)
