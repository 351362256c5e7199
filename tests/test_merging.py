"""Token matching, merging and unmerging against their definitions."""

from __future__ import annotations

from fractions import Fraction

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

import atsnn.functional as F
import atsnn.nn as ann
from atsnn import reference
from atsnn.checks import InvalidType, InvalidValue


@st.composite
def cases(draw):
    """Counts with many ties and silent tokens, lifetimes with several groups."""
    B, N, C = draw(st.integers(1, 3)), draw(st.integers(0, 9)), draw(st.integers(1, 3))
    top = draw(st.sampled_from([1, 2, 4]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    counts = torch.randint(0, top + 1, (B, N, C), generator=g).float()
    lifetimes = torch.randint(0, draw(st.integers(1, 4)), (B, N), generator=g)
    sizes = torch.randint(1, 5, (B, N), generator=g).float()
    return counts, lifetimes, sizes


def match_by_definition(counts, lifetimes, r, threshold):
    """Targets of one image, read off docs/method.md."""
    N = len(counts)
    groups: dict[int, list[int]] = {}
    for k in range(N):
        groups.setdefault(int(lifetimes[k]), []).append(k)
    pairs = []
    for n, members in groups.items():
        for a in members[::2] if n > 0 else ():
            best = None
            for b in members[1::2]:
                dot = sum(int(x) * int(y) for x, y in zip(counts[a], counts[b], strict=True))
                aa, bb = (sum(int(x) ** 2 for x in counts[i]) for i in (a, b))
                cosine = Fraction(dot * dot, aa * bb) if aa and bb else Fraction(aa == bb)
                if best is None or cosine > best[0]:
                    best = (cosine, b)
            if best is not None:
                pairs.append((best[0], a, best[1]))
    pairs.sort(key=lambda p: (-p[0], p[1]))
    if threshold is None:
        chosen = pairs[:r]
    else:  # the cosines are kept squared
        chosen = [p for p in pairs if threshold < 0 or p[0] > Fraction(threshold) ** 2]
    target = list(range(N))
    for _, a, b in chosen:
        target[a] = b
    return target


@given(cases(), st.integers(0, 5))
def test_matching_by_number_is_its_definition(case, r):
    counts, lifetimes, _ = case
    plan = F.match_tokens(counts, r=r, active_steps=lifetimes)
    for b in range(len(counts)):
        assert plan.target[b].tolist() == match_by_definition(counts[b], lifetimes[b], r, None)


@given(cases(), st.sampled_from([-0.5, 0.0, 0.5, 0.99]))
def test_matching_by_threshold_is_its_definition(case, threshold):
    counts, lifetimes, _ = case
    plan = F.match_tokens(counts, threshold=threshold, active_steps=lifetimes)
    for b in range(len(counts)):
        want = match_by_definition(counts[b], lifetimes[b], None, threshold)
        assert plan.target[b].tolist() == want


@given(cases(), st.integers(0, 5), st.sampled_from(reference.MATCHES))
def test_properties_of_merging(case, r, match):
    counts, lifetimes, sizes = case
    B, N, _ = counts.shape
    plan = F.match_tokens(counts, r=r, active_steps=lifetimes, match=match)
    ids = torch.arange(N).expand(B, N)
    assert torch.equal(plan.merged, plan.target != ids)
    held = plan.target.gather(1, plan.target)
    assert torch.equal(held, plan.target), "a target stays where it is"
    assert (lifetimes.gather(1, plan.target) == lifetimes).all(), "lifetimes are equal"
    assert (plan.merged.sum(1) <= r).all()
    after = reference.merged_sizes(sizes, plan)
    assert torch.equal(after.sum(1), sizes.sum(1)), "the total of the sizes is kept"
    assert (after[plan.merged] == 0).all()

    x = torch.randint(0, 6, (3, B, N, 2)).float()
    y = F.merge_tokens(x, plan, sizes=sizes)
    assert y.isfinite().all()
    for b in range(B):
        for k in range(N):
            members = [i for i in range(N) if plan.target[b, i] == k]
            if not members:
                want = torch.zeros(3, 2)
            elif members == [k]:
                want = x[:, b, k]
            else:
                weights = torch.stack([x[:, b, i].double() * sizes[b, i] for i in members]).sum(0)
                mean = weights / sizes[b, members].sum().double()
                want = ((mean * 256).round() / 256).float()
            assert torch.equal(y[:, b, k], want)

    back = F.unmerge_tokens(y, plan)
    for k in range(N):
        at = plan.target[:, k]
        assert torch.equal(back[:, :, k], y[:, torch.arange(B), at])
    kept = ~plan.merged & (after == sizes)
    assert torch.equal(back[:, kept], x[:, kept]), "tokens that nothing joined come back"


def test_silent_tokens_are_alike_and_like_no_other():
    counts = torch.tensor([[[0, 0], [2, 1], [1, 2], [0, 0], [0, 0], [0, 0]]]).float()
    similarity = reference.firing_similarity(counts)[0]
    silent = torch.tensor([True, False, False, True, True, True])
    assert torch.equal(similarity[silent][:, silent], torch.ones(4, 4).double())
    assert not similarity[silent][:, ~silent].any() and not similarity[~silent][:, silent].any()
    # They merge before tokens that fired nearly alike, and above any threshold below 1.
    for backend in ("reference", "native"):
        plan = F.match_tokens(counts, r=2, backend=backend)
        assert plan.target.tolist() == [[3, 1, 2, 3, 3, 5]], backend
        plan = F.match_tokens(counts, threshold=0.99, backend=backend)
        assert plan.target.tolist() == [[3, 1, 2, 3, 3, 5]], backend


def test_random_matching_is_seeded():
    counts = torch.ones(2, 16, 3)
    plans = [
        F.match_tokens(counts, r=4, match="random", generator=torch.Generator().manual_seed(s))
        for s in (0, 0, 1)
    ]
    assert torch.equal(plans[0].target, plans[1].target)
    assert not torch.equal(plans[0].target, plans[2].target)


def test_merge_gradients_go_to_members_by_their_size():
    plan = F.match_tokens(torch.ones(1, 2, 1), r=1)
    x = torch.tensor([3.0, 7.0]).view(1, 1, 2, 1).requires_grad_()
    sizes = torch.tensor([[1.0, 3.0]])
    y = F.merge_tokens(x, plan, sizes=sizes)
    assert y.flatten().tolist() == [0.0, 6.0]
    y.sum().backward()
    assert x.grad.flatten().tolist() == [0.25, 0.75]


def test_module():
    x = torch.randint(0, 3, (4, 2, 8, 5)).float()
    merge = ann.TokenMerge(r=2)
    y, sizes, plan = merge(x, x.sum(0))
    assert y.shape == x.shape and sizes.sum(1).tolist() == [8.0, 8.0]
    assert plan.merged.sum(1).tolist() == [2, 2]
    with pytest.raises(InvalidValue, match="at most one of r and threshold"):
        ann.TokenMerge(r=2, threshold=0.5)
    with pytest.raises(InvalidValue, match="r must be a number >= 0, got -1"):
        ann.TokenMerge(r=-1)


def test_bad_input_is_refused():
    counts = torch.ones(2, 4, 3)
    with pytest.raises(InvalidValue, match="exactly one of r and threshold"):
        F.match_tokens(counts)
    with pytest.raises(InvalidValue, match="exactly one of r and threshold"):
        F.match_tokens(counts, r=1, threshold=0.5)
    with pytest.raises(InvalidType, match="r must be an integer, got 1.5"):
        F.match_tokens(counts, r=1.5)
    with pytest.raises(InvalidValue, match="threshold must be a number finite, got nan"):
        F.match_tokens(counts, threshold=float("nan"))
    with pytest.raises(InvalidValue, match="counts must be non-negative integers, got -1"):
        F.match_tokens(-counts, r=1)
    with pytest.raises(InvalidValue, match="counts must be non-negative integers, got 0.5"):
        F.match_tokens(counts * 0.5, r=1)
    with pytest.raises(InvalidValue, match=r"active_steps must have shape \(B, N\) = \(2, 4\)"):
        F.match_tokens(counts, r=1, active_steps=torch.ones(2, 3))
    with pytest.raises(InvalidType, match="active_steps must be an integer tensor"):
        F.match_tokens(counts, r=1, active_steps=torch.ones(2, 4))
    with pytest.raises(InvalidValue, match="counts must be finite"):
        F.match_tokens(counts * float("inf"), r=1)
    plan = F.match_tokens(counts, r=1)
    small = F.merge_tokens(torch.ones(1, 2, 4, 1), plan, sizes=torch.full((2, 4), 0.25))
    assert set(small.unique().tolist()) == {0.0, 1.0}, "a mean whatever the sizes add up to"
    with pytest.raises(InvalidValue, match=r"plan's \(B, N\) = \(2, 4\), got \(3, 2, 5, 6\)"):
        F.merge_tokens(torch.zeros(3, 2, 5, 6), plan)
    with pytest.raises(InvalidValue, match=r"plan's \(B, N\)"):
        F.unmerge_tokens(torch.zeros(3, 1, 4, 6), plan)
    with pytest.raises(InvalidValue, match=r"sizes must have shape"):
        F.merge_tokens(torch.zeros(3, 2, 4, 6), plan, sizes=torch.ones(2, 5))
