"""The baseline is softmax attention over the tokens read, and differs in nothing else."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.heinsen.config import ModelConfig
from model.heinsen.network import LanguageModel
from model.training.softmax import SoftmaxModel, rotate
from model.training.train import Trainer
from tests.model.training.test_train import RECIPE

VOCAB, TOLERANCE = 40, 1e-5
IDS = torch.randint(VOCAB, (3, 50), generator=torch.Generator().manual_seed(1))


def network(context: int = 64, **options: Any) -> SoftmaxModel:
    torch.manual_seed(0)
    chosen: dict[str, Any] = {"values": "linear", "token_shift": True, "output_gate": True}
    config = ModelConfig(
        vocab_sz=VOCAB, d_emb=16, n_layers=2, n_heads=2, d_key=8, d_val=6, **chosen | options
    )
    return SoftmaxModel(config, context)


def by_hand(made: SoftmaxModel, token_ids: Tensor, window: int) -> Tensor:
    """Logits of one sequence: every token attends to itself and at most `window` tokens before
    it."""
    emb = made.embed(token_ids)[None]
    x = emb + made.embed_pos(emb, torch.zeros(1, 16).double(), None)[0]
    for layer in made.blocks:
        p = layer.project(x, torch.zeros(1, 16))
        places = torch.arange(len(token_ids)) + 1000
        q, k = rotate(p.q, places)[0], rotate(p.k, places)[0]
        y = torch.zeros(len(token_ids), 2, 6)
        for t in range(len(token_ids)):
            part = slice(max(0, t - window), t + 1)
            weights = (torch.einsum("hk,thk->th", q[t], k[part]) / 8**0.5).softmax(0)
            y[t] = torch.einsum("th,thv->hv", weights, p.v[0, part])
        x = layer.merge(x, y[None], p.gate)
    return F.linear(made.lnorm(x), made.embed.weight)[0]


def test_it_is_the_definition_however_a_sequence_is_cut() -> None:
    made = network()
    expected = by_hand(made, IDS[0], 1000)
    for cuts in ([50], [1] * 50, [20, 1, 29]):
        state, found = made.empty_state(1), []
        for piece in torch.split(IDS[:1], cuts, 1):
            logits, state = made.unroll(piece, state)
            found.append(logits[0])
        torch.testing.assert_close(torch.cat(found), expected, rtol=0, atol=TOLERANCE)


def test_it_forgets_what_is_further_back_than_its_context() -> None:
    made = network(context=7)
    expected = by_hand(made, IDS[0], 7)
    state = made.empty_state(1)
    for place, token_id in enumerate(IDS[0]):
        logits, state = made.unroll(token_id.view(1, 1), state)
        torch.testing.assert_close(logits[0, 0], expected[place], rtol=0, atol=TOLERANCE)


def test_rotated_products_depend_on_the_distance_alone() -> None:
    q, k = torch.randn(1, 1, 1, 9), torch.randn(1, 1, 1, 9)
    products = [
        (rotate(q, torch.tensor([at + 5])) * rotate(k, torch.tensor([at]))).sum()
        for at in (0, 3, 200)
    ]
    torch.testing.assert_close(torch.stack(products), products[0].expand(3), rtol=1e-4, atol=1e-4)
    assert not torch.equal(rotate(q, torch.tensor([5])), q)


def test_it_has_the_parameters_of_the_network_that_it_is_compared_with() -> None:
    made = network()
    latent = LanguageModel(made.config)
    shapes = [{n: p.shape for n, p in x.named_parameters()} for x in (made, latent)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("options", [{"values": "log"}, {"decay": True}], ids=str)
def test_what_it_cannot_do_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="linear values and no decay"):
        network(**options)


def test_each_lane_has_its_own_state_and_a_new_document_none() -> None:
    made = network()
    _, state = made.unroll(IDS, made.empty_state(3))
    mixed = state.replace(torch.tensor([False, True, False]), made.empty_state(3))
    again, _ = made.unroll(IDS[:, :10], mixed)
    fresh, _ = made.unroll(IDS[:, :10], made.empty_state(3))
    goes_on, _ = made.unroll(IDS[:, :10], state)
    torch.testing.assert_close(again[1], fresh[1], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(again[0], goes_on[0], rtol=0, atol=TOLERANCE)
    assert (fresh[0] - goes_on[0]).abs().max() > 100 * TOLERANCE
    assert not any(x.requires_grad for x in vars(state.detach()).values())


@pytest.mark.long
def test_it_is_trained_as_the_others_are() -> None:
    counting = [torch.arange(place, place + 60) % 10 for place in range(7)]
    recipe = dataclasses.replace(RECIPE, tokens=2000)
    trainer = Trainer(network(), counting, recipe)
    losses = [trainer.step() for _ in range(60)]
    assert losses[0] > 3
    assert max(losses[-5:]) < 0.5
