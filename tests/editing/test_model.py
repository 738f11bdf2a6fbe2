"""The network: how h enters the UNet, what is not h, and what training minimises and draws."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reasonpix.editing.config import ConnectorConfig, ConnectorKind
from reasonpix.editing.connectors import CONNECTORS, build_connector, pad
from reasonpix.editing.model import EditingModel, expand_input_channels
from reasonpix.errors import WeightsError
from reasonpix.training.loss import Batch, DiffusionLoss
from reasonpix.training.randomness import StepSampler
from tests.support.tiny_model import (
    H_WIDTH,
    TOKENS,
    WIDTH,
    tiny_model,
    tiny_scheduler,
    tiny_text,
    tiny_unet,
)

KINDS: tuple[ConnectorKind, ...] = get_args(ConnectorKind)
WORDS = ["make it rain", "what if it were night by the sea"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def states(kind: ConnectorKind, *lengths: int) -> list[Tensor]:
    """h of instructions that long."""
    width = WIDTH if kind == "identity" else H_WIDTH
    return [torch.randn(length, width) for length in lengths]


def latents(count: int = 2) -> Tensor:
    return torch.randn(count, 4, 8, 8)


def same(one: Tensor, other: Tensor) -> bool:
    """But for the order of sums, which is another one for each processor and batch size."""
    return bool((one - other).abs().max() <= 3e-6 * other.abs().max())


def test_a_codebook_takes_the_mean_of_many_large_states_in_half_precision() -> None:
    config = ConnectorConfig(kind="codebook", h_width=H_WIDTH, width=WIDTH, tokens=TOKENS)
    h, mask = torch.full((1, 640, H_WIDTH), 150.0).half(), torch.ones(1, 640, dtype=torch.bool)
    given = build_connector(config).half().eval()(h, mask, None)
    assert given.states.isfinite().all() and given.states.dtype == torch.float16


def test_a_codebook_reads_every_dimension_alike_and_pads_nothing_in() -> None:
    h = [torch.randn(length, H_WIDTH) * torch.logspace(-1, 2, H_WIDTH) for length in (3, 5, 4, 9)]
    config = ConnectorConfig(kind="codebook", h_width=H_WIDTH, width=WIDTH, tokens=TOKENS)
    codebook = build_connector(config).eval()
    codebook.calibrate(*pad(h))
    read = torch.stack([torch.cat([one[-1], one.mean(0)]) for one in h])
    assert torch.allclose(codebook.location, read.mean(0), atol=1e-4)
    scaled = (read - codebook.location) / codebook.scale
    assert torch.allclose(scaled.std(0, correction=0), torch.ones(2 * H_WIDTH), atol=0.1)
    chosen = codebook.choose(scaled).unflatten(1, (8, 32)).softmax(2)
    said = sum(chosen[:, group] @ codebook.words[group] for group in range(8))
    wanted = codebook.out(said).unflatten(1, (TOKENS, WIDTH))
    assert same(codebook(*pad(h), None).states, wanted)


# -- the 8-channel UNet --------------------------------------------------------------------------


def test_the_widened_unet_gives_what_the_narrow_one_gave() -> None:
    narrow = tiny_unet(4)
    with torch.no_grad():
        narrow.conv_in.bias.normal_()  # a bias that was forgotten shall be missed
    noisy, image = latents(), 30 * latents()
    given = {
        "timestep": torch.tensor([3, 900]),
        "encoder_hidden_states": torch.randn(2, TOKENS, WIDTH),
    }
    with torch.no_grad():
        expected = narrow(noisy, **given).sample
        wide = expand_input_channels(narrow)
        found = [wide(torch.cat([noisy, it], 1), **given).sample for it in (image, 0 * image)]
    assert torch.equal(found[0], found[1])
    assert same(found[0], expected)
    assert wide.config.in_channels == 8 and expected.std() > 0.1


def test_the_widened_unet_learns_to_see_the_image() -> None:
    wide = expand_input_channels(tiny_unet(4))
    wide(
        torch.cat([latents(), latents()], 1),
        torch.tensor(5),
        encoder_hidden_states=torch.randn(2, TOKENS, WIDTH),
    ).sample.square().sum().backward()
    assert wide.conv_in.weight.grad[:, 4:].abs().max() > 0


# -- connectors ----------------------------------------------------------------------------------


def test_every_kind_has_its_connector() -> None:
    assert set(CONNECTORS) == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_shapes(kind: ConnectorKind) -> None:
    model = tiny_model(kind).model.eval()
    short, long = 3, TOKENS + 5
    found = model.condition(states(kind, short, long), WORDS)
    tokens = long if kind in ("full_sequence", "identity") else TOKENS
    assert found.states.shape == (2, tokens, WIDTH)
    if kind in ("query_resampler", "clip_residual", "codebook"):
        assert found.mask is None
    else:
        assert found.mask is not None
        assert found.mask.sum(1).tolist() == [short, min(long, tokens)]
        assert found.mask[0, :short].all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_neighbour_and_its_padding_have_no_influence(kind: ConnectorKind) -> None:
    model = tiny_model(kind).model.eval()
    h = states(kind, 4, 9)
    noisy, image, timesteps = latents(1), latents(1), torch.tensor([500])
    with torch.no_grad():
        alone = model(noisy, image, timesteps, model.condition(h[:1], WORDS[:1]))
        both = model.condition(h, WORDS)
        among = model(*(it.repeat_interleave(2, 0) for it in (noisy, image, timesteps)), both)
        other = model(noisy, image, timesteps, model.condition(h[1:], WORDS[1:]))
    assert same(alone, among[:1])
    assert not same(alone, other)


def test_what_is_too_long_is_cut() -> None:
    model = tiny_model("text_tokens").model
    (h,) = states("text_tokens", 2 * TOKENS)
    whole, cut = (model.condition([one], WORDS[:1]) for one in (h, h[:TOKENS]))
    assert torch.equal(whole.states, cut.states)
    assert whole.mask is not None and whole.mask.all() and whole.mask.shape == (1, TOKENS)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_weight(kind: ConnectorKind) -> None:
    model = tiny_model(kind).model.eval()
    given = model.condition(states(kind, 4, 9), WORDS, [False, False])
    model(latents(), latents(), torch.tensor([5, 900]), given).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert model.text is not None
    assert all(weight.grad is None for weight in model.text.encoder.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "identity", "h_width": 8}, "passes states of width 8 to a UNet that reads 16"),
        ({"kind": "query_resampler", "heads": 3}, "3 heads do not divide the width 16"),
        ({"kind": "clip_residual", "inner": 10, "heads": 4}, "4 heads do not divide the width 10"),
    ],
)
def test_connectors_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_connector(ConnectorConfig(**{"h_width": 8, "width": 16, "tokens": TOKENS} | options))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": TOKENS - 1}, f"has {TOKENS - 1} tokens, and CLIP's text {TOKENS}"),
        ({"width": 24}, "states of width 24 to a UNet that reads 16"),
    ],
)
def test_connectors_that_do_not_fit_the_model(changes: dict[str, int], message: str) -> None:
    config = {"kind": "clip_residual", "h_width": 8, "width": WIDTH, "tokens": TOKENS} | changes
    connector = build_connector(ConnectorConfig(**config))
    with pytest.raises(ValueError, match=message):
        EditingModel(tiny_unet(), connector, torch.zeros(TOKENS, WIDTH), tiny_text())


def test_clip_residual_needs_a_text_encoder() -> None:
    connector = tiny_model("clip_residual").model.connector
    with pytest.raises(ValueError, match="needs a CLIP text encoder"):
        EditingModel(tiny_unet(), connector, torch.zeros(TOKENS, WIDTH))


# -- no instruction ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("longest", [3, TOKENS, TOKENS + 4])
def test_dropped_rows_are_the_null_states(kind: ConnectorKind, longest: int) -> None:
    model = tiny_model(kind).model.eval()
    h = states(kind, 2, longest)
    given = model.condition(h, WORDS, [True, False])
    kept = model.condition(h, WORDS)
    assert torch.equal(given.states[0, : len(model.uncond_states)], model.uncond_states)
    mask = given.mask if given.mask is not None else torch.ones(given.states.shape[:2]) > 0
    assert mask[0].tolist() == [place < len(model.uncond_states) for place in range(mask.shape[1])]
    before = kept.mask if kept.mask is not None else torch.ones(kept.states.shape[:2]) > 0
    count = before.shape[1]
    assert torch.equal(given.states[1, :count], kept.states[1])
    assert torch.equal(mask[1, :count], before[1]) and not mask[1, count:].any()


@pytest.mark.parametrize("kind", KINDS)
def test_the_branches_of_an_edit_share_one_pass_of_the_connector(kind: ConnectorKind) -> None:
    model = tiny_model(kind).model.eval()
    (h,) = states(kind, TOKENS)
    rows: list[int] = []
    model.connector.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    with torch.no_grad():
        found = model.branch(h, WORDS[0], [True, False, False])
        assert rows == [1]
        expected = model.condition([h] * 3, [WORDS[0]] * 3, [False, True, True])
    assert same(found.states, expected.states)
    assert (found.mask is None) == (expected.mask is None)
    assert found.mask is None or torch.equal(found.mask, expected.mask)


@pytest.mark.parametrize("kind", ["text_tokens", "full_sequence", "clip_residual"])
def test_without_instruction_nothing_of_h_is_left(kind: ConnectorKind) -> None:
    """h has seen the image: all of it has to go."""
    model = tiny_model(kind).model.eval()
    noisy, image, timesteps = latents(1), latents(1), torch.tensor([500])
    with torch.no_grad():
        found = [
            model(noisy, image, timesteps, model.condition(states(kind, n), [words], [True]))
            for n, words in ((4, WORDS[0]), (7, WORDS[1]))
        ]
    assert same(*found)


def test_the_null_states_are_those_of_the_empty_text() -> None:
    model = tiny_model().model
    assert model.text is not None
    empty = model.text.tokenizer("", padding="max_length", max_length=TOKENS, return_tensors="pt")
    with torch.no_grad():
        expected = model.text.encoder(empty.input_ids).last_hidden_state[0]
    assert torch.equal(model.uncond_states, expected)
    assert "null" not in dict(model.named_parameters())


def test_texts_are_cut_where_clip_ends() -> None:
    text = tiny_text()
    assert torch.equal(text(["a b c d e f g h i j"]), text(["a b c d e f g h i j and on"]))
    assert text(["", WORDS[0]]).shape == (2, TOKENS, WIDTH)


# -- what training minimises ---------------------------------------------------------------------


def batch(kind: ConnectorKind = "text_tokens") -> Batch:
    return Batch(
        h=states(kind, 4, 9, 2),
        instructions=[*WORDS, "third"],
        source=latents(3),
        target=latents(3),
        noise=latents(3),
        timesteps=torch.tensor([20, 500, 999]),
        drop_text=[False, True, False],
        drop_image=torch.tensor([False, False, True]),
        align_text=["rain", "night", "third"],
    )


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_loss_is_the_equation(kind: str) -> None:
    made = tiny_model(scheduler=tiny_scheduler(prediction_type=kind))
    it = batch()
    loss = DiffusionLoss(made.model, made.scheduler)(it, aligning=False)
    # Stable Diffusion's noise: betas linear in their square roots.
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    a = (1 - betas).cumprod(0)[it.timesteps][:, None, None, None]
    noisy = a.sqrt() * it.target + (1 - a).sqrt() * it.noise
    wanted = it.noise if kind == "epsilon" else a.sqrt() * it.noise - (1 - a).sqrt() * it.target
    total = torch.zeros(())
    for i in range(3):
        image = torch.zeros_like(it.source[i]) if it.drop_image[i] else it.source[i]
        if it.drop_text[i]:
            read, mask = made.model.uncond_states[None], None
        else:
            read, mask = made.model.condition([it.h[i]], [it.instructions[i]])
        predicted = made.model.unet(
            torch.cat([noisy[i], image])[None],
            it.timesteps[i],
            encoder_hidden_states=read,
            encoder_attention_mask=mask,
        ).sample[0]
        total += (predicted - wanted[i]).square().mean() / 3
    assert torch.allclose(loss, total, rtol=1e-5)


def test_the_loss_of_alignment_is_the_distance_to_clip() -> None:
    """All the padding of a text counts as one token."""
    made = tiny_model("query_resampler")
    it = batch()
    objective = DiffusionLoss(made.model, made.scheduler)
    loss = objective(it, aligning=True)
    text = made.model.text
    assert text is not None
    expected = torch.zeros(())
    for i, words in enumerate(it.align_text):
        (found,) = made.model.condition([it.h[i]], [it.instructions[i]]).states
        error = (found - text([words])[0]).square().mean(1)
        count = len(words) + 2  # its letters, the start and the end
        own = [*error[:count], *([error[count:].mean()] if count < TOKENS else [])]
        expected += torch.stack(own).mean() / 3
    assert torch.allclose(loss, expected, rtol=1e-5)
    loss.backward()
    assert all(weight.grad is None for weight in made.model.unet.parameters())
    assert all(weight.grad is not None for weight in made.model.connector.parameters())


def test_other_predictions_are_refused() -> None:
    made = tiny_model(scheduler=tiny_scheduler(prediction_type="sample"))
    with pytest.raises(WeightsError, match="predicts 'sample'; epsilon or v_prediction"):
        DiffusionLoss(made.model, made.scheduler)(batch(), aligning=False)


# -- what training draws -------------------------------------------------------------------------


def draws(count: int = 7, size: int = 4, seed: int = 0, **options: Any) -> StepSampler:
    examples = range(100, 100 + count)
    views = {example: (0, 1) for example in examples}
    given = {"views": views, "shape": (1, 1, 1), "timesteps": 1000, "dropout": 0.05} | options
    return StepSampler(seed, examples, batch_size=size, **given)


def test_each_example_is_seen_in_its_own_views() -> None:
    views = {100: [0, 2], 101: [1], 102: [0, 1, 2]}
    sampler = draws(3, 3, views=views)
    seen = [sampler.draw(step, place) for step in range(40) for place in range(3)]
    for example, own in views.items():
        assert {draw.view for draw in seen if draw.example == example} == set(own)


@settings(max_examples=25)
@given(count=st.integers(1, 30), size=st.integers(1, 40), seed=st.integers(0, 2**70))
def test_each_epoch_shows_every_example_once(count: int, size: int, seed: int) -> None:
    it = draws(count, size, seed)
    steps = -(-3 * count // size)
    shown = [it.draw(step, place).example for step in range(steps) for place in range(size)]
    epochs = [shown[first : first + count] for first in range(0, 3 * count, count)]
    assert all(sorted(epoch) == list(range(100, 100 + count)) for epoch in epochs)
    if count > 12:
        assert all(one != other for one, other in pairwise(epochs))


@settings(max_examples=20)
@given(step=st.integers(0, 10**9), place=st.integers(0, 3), seed=st.integers(0, 2**63))
def test_a_draw_depends_on_seed_step_and_place_alone(step: int, place: int, seed: int) -> None:
    one = draws(seed=seed).draw(step, place)
    later = draws(seed=seed)
    later.draw(step + 1, 0)
    torch.manual_seed(step % 1000)
    other = later.draw(step, place)
    assert one[:2] == other[:2] and one[4:] == other[4:]
    assert torch.equal(one.noise, other.noise) and torch.equal(one.posterior, other.posterior)
    assert one.noise != one.posterior
    assert one.noise != draws(seed=seed + 1).draw(step, place).noise
    assert one.noise != later.draw(step, place + 1).noise


def test_shares_are_those_of_instruct_pix2pix() -> None:
    it = draws(size=100)
    drawn = [it.draw(step, place) for step in range(200) for place in range(100)]
    shares = Counter((one.drop_text, one.drop_image) for one in drawn)
    # Five standard deviations of a share of 5 % in 20,000 are 0.8 %.
    for both in ((True, False), (True, True), (False, True)):
        assert abs(shares[both] / len(drawn) - 0.05) < 0.008, both
    assert abs(sum(one.view for one in drawn) / len(drawn) - 0.5) < 0.02
    assert {one.timestep for one in drawn} == set(range(1000))
    noise = torch.stack([one.noise for one in drawn])
    assert abs(noise.mean()) < 0.04 and abs(noise.std() - 1) < 0.03
    # Neighbours have nothing to do with each other.
    assert abs((noise[1:] * noise[:-1]).mean()) < 0.04


@pytest.mark.parametrize("dropout", [0.0, 1 / 3])
def test_the_ends_of_dropout(dropout: float) -> None:
    drawn = [draws(dropout=dropout).draw(step, 0) for step in range(200)]
    assert all(one.drop_text or one.drop_image for one in drawn) == (dropout > 0)
    assert any(one.drop_text or one.drop_image for one in drawn) == (dropout > 0)
