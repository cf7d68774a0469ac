"""Heads of face recognition, against their formulas in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from gdfast.losses import ArcFaceHead, SoftmaxHead
from gdfast.losses.arcface import add_margin

EMBEDDINGS = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 2, 1, 1, 0, 3])


def by_angles(head: ArcFaceHead, embeddings: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
    """The paper's formula, with the angle itself."""
    x, w = embeddings.detach().numpy(), head.weight.detach().numpy()
    cos = (x / np.linalg.norm(x, axis=1)[:, None]) @ (w / np.linalg.norm(w, axis=1)[:, None]).T
    for row, label in enumerate(labels.tolist()):
        angle = math.acos(cos[row, label])
        if head.easy:
            cos[row, label] = (
                math.cos(angle + head.margin) if angle < math.pi / 2 else cos[row, label]
            )
        elif angle < math.pi - head.margin:
            cos[row, label] = math.cos(angle + head.margin)
        else:
            cos[row, label] -= head.margin * math.sin(head.margin)
    return head.scale * cos


@pytest.mark.parametrize("easy", [False, True])
@pytest.mark.parametrize("margin", [0.0, 0.5, 1.2])
def test_arcface_is_the_papers_formula(margin: float, easy: bool) -> None:
    head = ArcFaceHead(5, 4, scale=7.0, margin=margin, easy=easy).double()
    found = head(EMBEDDINGS, LABELS).detach().numpy()
    np.testing.assert_allclose(found, by_angles(head, EMBEDDINGS, LABELS), rtol=1e-9)


@pytest.mark.parametrize("easy", [False, True])
def test_arcface_gradients(easy: bool) -> None:
    head = ArcFaceHead(5, 4, scale=3.0, margin=0.4, easy=easy).double()

    def loss(embeddings: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        logits = torch.func.functional_call(head, {"weight": weight}, (embeddings, LABELS))
        return F.cross_entropy(logits, LABELS)

    weight = head.weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, (EMBEDDINGS.clone().requires_grad_(), weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_no_gradient_is_infinite_where_the_angle_is_0_or_pi(
    sign: float, dtype: torch.dtype
) -> None:
    head = ArcFaceHead(5, 4, margin=0.5).to(dtype)
    embeddings = (sign * head.weight.detach()[LABELS]).requires_grad_()
    logits = head(embeddings, LABELS)
    F.cross_entropy(logits, LABELS).backward()
    own = logits.gather(1, LABELS[:, None]) / head.scale
    expected = math.cos(0.5) if sign > 0 else -1 - 0.5 * math.sin(0.5)
    torch.testing.assert_close(own, torch.full_like(own, expected), rtol=0, atol=1e-3)
    assert embeddings.grad is not None and embeddings.grad.isfinite().all()
    assert head.weight.grad is not None and head.weight.grad.isfinite().all()


def test_the_margin_never_rewards_a_larger_angle() -> None:
    cos = torch.cos(torch.linspace(0.01, math.pi - 0.01, 500, dtype=torch.float64))
    shifted = add_margin(cos, 0.5)
    assert (shifted.diff() < 0).all()
    assert (shifted < cos).all()
    easy = add_margin(cos, 0.5, easy=True)
    assert torch.equal(easy[cos <= 0], cos[cos <= 0])
    assert torch.equal(easy[cos > 0], shifted[cos > 0])


def test_the_margin_grows_in_training_and_is_whole_in_eval() -> None:
    head = ArcFaceHead(5, 4, scale=1.0, margin=0.4, warmup=4).double()
    whole = head.eval()(EMBEDDINGS, LABELS)
    plain = SoftmaxHead(5, 4, scale=1.0).double()
    plain.load_state_dict({"weight": head.weight})
    own = LABELS[:, None]
    before = plain(EMBEDDINGS, LABELS).gather(1, own)
    head.train()
    for step in range(1, 7):
        found = head(EMBEDDINGS, LABELS).gather(1, own)
        expected = add_margin(before, 0.4 * min(1.0, step / 4))
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(head(EMBEDDINGS, LABELS), whole)
    again = ArcFaceHead(5, 4, scale=1.0, margin=0.4, warmup=4).double()
    again.load_state_dict(head.state_dict())
    torch.testing.assert_close(again(EMBEDDINGS, LABELS), whole)


def test_softmax_heads() -> None:
    cosine = SoftmaxHead(5, 4, scale=9.0).double()
    expected = 9 * F.cosine_similarity(EMBEDDINGS[:, None], cosine.weight[None], dim=2)
    torch.testing.assert_close(cosine(EMBEDDINGS, LABELS), expected)
    plain = SoftmaxHead(5, 4, scale=9.0, cosine=False).double()
    assert plain.bias is not None
    torch.nn.init.normal_(plain.bias)
    expected = (9 * EMBEDDINGS) @ plain.weight.t() + plain.bias
    torch.testing.assert_close(plain(EMBEDDINGS, LABELS), expected)


@pytest.mark.parametrize(
    "head", [ArcFaceHead(5, 4), SoftmaxHead(5, 4), SoftmaxHead(5, 4, cosine=False)], ids=repr
)
def test_heads_compute_in_float32_under_autocast(head: torch.nn.Module) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = head(EMBEDDINGS.bfloat16(), LABELS)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, head(EMBEDDINGS.bfloat16().float(), LABELS))


@pytest.mark.parametrize("margin", [-0.1, 1.6, math.nan])
def test_a_margin_out_of_range_is_refused(margin: float) -> None:
    with pytest.raises(ValueError, match="expected 0 to pi/2 radians"):
        ArcFaceHead(5, 4, margin=margin)
