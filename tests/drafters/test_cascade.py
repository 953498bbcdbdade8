"""CASCADE-R: exact when off, exact up to classes in modes S and Q, and within its caps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_speculation import Toy, chi_square

from fastgen.drafters.acceptance import Exact, Neighbours
from fastgen.drafters.cascade import Cascade, CascadeConfig, form_classes
from fastgen.drafters.redundancy import convergence, law_distance_bound, similarity, total_variation
from fastgen.drafters.tree import chain, named_tree, static_tree
from fastgen.drafters.verify import Drafted, Noise, Rejection, expected_length, reject_in_turn, strict, walk

LOOSE = CascadeConfig("substitute", delta=1.0, horizon=0, breadth=0.99)
IMAGES = 40_000


def verifier(rule: Any) -> Any:
    return lambda drafted, noise: rule.verify(drafted, noise, torch.zeros(len(drafted.tokens)))


def of_classes(toy: Toy) -> torch.Tensor:
    """Joint law of the first three classes."""
    law = toy.law_of_three((0, 1))
    count = toy.vocabulary // 2
    return law.view(count, 2, count, 2, count, 2).sum(dim=(1, 3, 5))


def codebook(classes: int) -> torch.Tensor:
    """Twins lie 0.01 apart, classes one unit."""
    spots = torch.arange(2 * classes, dtype=torch.float32)
    return torch.stack([spots.div(2, rounding_mode="floor") + 0.01 * (spots % 2), torch.zeros_like(spots)], dim=1)


def draft_of(toy: Toy, tree: Any, batch: int, sampled: bool, seed: int = 1) -> tuple[Drafted, Noise]:
    generator = torch.Generator().manual_seed(seed)
    context = torch.randint(toy.vocabulary, (batch, 2), generator=generator)
    return toy.draft(tree, context, sampled, generator), toy.noise(batch, tree, generator)


@pytest.mark.parametrize("mode", ["substitute", "quotient", "lantern", "scale"])
@pytest.mark.parametrize("sampled", [True, False], ids=["sampled", "top-k"])
def test_off_is_the_exact_rule_bit_for_bit(mode: Any, sampled: bool) -> None:
    toy = Toy.twins(4, seed=2)
    drafted, noise = draft_of(toy, named_tree("3-4-2"), 500, sampled)
    spent = torch.zeros(500)
    exact = walk(drafted, Exact().verify(drafted, noise, spent), noise, torch.full((500,), 9))
    rule = Cascade(replace(CascadeConfig.off(), mode=mode), Neighbours.of(codebook(4), 2))
    ours = walk(drafted, rule.verify(drafted, noise, spent), noise, torch.full((500,), 9))
    assert torch.equal(exact.nodes, ours.nodes)
    assert torch.equal(exact.length, ours.length) and torch.equal(exact.bonus, ours.bonus)
    assert float(ours.counts["stolen"].sum()) == 0


@pytest.mark.parametrize("radius", [0.0, 0.05], ids=["in the tree", "extended"])
@pytest.mark.parametrize("sampled", [True, False], ids=["sampled", "top-k"])
@pytest.mark.parametrize("mode", ["substitute", "quotient"])
def test_the_law_over_classes_is_exact(mode: Any, sampled: bool, radius: float) -> None:
    """Planted twins: class triples against their exact law, 40,000 images, level 1e-5; tokens inside a class are
    free, and it is seen that they do move."""
    toy = Toy.twins(3, seed=5)
    rule = Cascade(replace(LOOSE, mode=mode, radius=radius), Neighbours.of(codebook(3), 2))
    tokens, length = toy.first_three(named_tree("3-4-2"), sampled, verifier(rule), IMAGES, seed=8)
    if mode == "quotient" and sampled:
        # Twins form a class only if both were drawn, and how far classes reach is read off what was drawn: which
        # classes there are tells something of the draws, and the draft's law given the classes is no longer q. In a
        # tree of most likely tokens nothing is drawn.
        assert chi_square(tokens // 2, of_classes(toy)) < 1e-6
        return
    assert chi_square(tokens // 2, of_classes(toy)) > 1e-5
    _, before = toy.first_three(named_tree("3-4-2"), sampled, strict, IMAGES, seed=8)
    if radius and mode == "substitute":
        assert length > before + 0.1, "undrafted twins must raise acceptance"
    if radius or mode == "quotient":
        assert chi_square(tokens, toy.law_of_three((0, 1))) < 1e-9, "the test would not notice a lossy rule"


def test_modes_l_and_w_are_lossy() -> None:
    toy = Toy.twins(3, seed=5)
    uneven = Toy(toy.p, toy.q, features=torch.ones(6, 3) + 0.01 * torch.eye(6)[:, :3])
    wide = replace(LOOSE, breadth=-1.0)
    for config in (replace(wide, mode="lantern"), replace(wide, mode="scale", boost=9.0)):
        rule = Cascade(config)
        tokens, _ = uneven.first_three(named_tree("3-4-2"), True, verifier(rule), IMAGES, seed=8)
        assert chi_square(tokens // 2, of_classes(toy)) < 1e-5, config.mode


@given(seed=st.integers(0, 999), sampled=st.booleans(), tree=st.sampled_from(["3-4-2", "2-2-1", "4-2"]))
@settings(max_examples=25, deadline=None)
def test_substitution_accepts_wherever_the_exact_rule_does(seed: int, sampled: bool, tree: str) -> None:
    """Shared coins, routing off: node by node."""
    toy = Toy.twins(4, seed)
    drafted, noise = draft_of(toy, named_tree(tree), 40, sampled, seed)
    rule = Cascade(replace(LOOSE, routing=False, radius=0.05), Neighbours.of(codebook(4), 3))
    ours, exact = rule.verify(drafted, noise, torch.zeros(40)).child, strict(drafted, noise).child
    assert torch.equal(ours[exact >= 0], exact[exact >= 0])
    assert (ours >= 0).sum() >= (exact >= 0).sum()


def test_classes_of_siblings_alone_raise_no_acceptance() -> None:
    """Section 6.4: in a tree of most likely tokens level acceptance is the children's mass, whatever the classes."""
    toy = Toy.twins(4, seed=3)
    drafted, _ = draft_of(toy, named_tree("4"), 20_000, False)
    noise = toy.noise(20_000, named_tree("4"), torch.Generator().manual_seed(7))
    accepted = [
        float((verifier(rule)(drafted, noise).child[:, 0] >= 0).double().mean())
        for rule in (Exact(), Cascade(LOOSE), Cascade(replace(LOOSE, mode="quotient")))
    ]
    assert max(accepted) - min(accepted) < 5 * (0.5 / 20_000) ** 0.5


def test_routing_takes_the_mate_with_the_longer_path() -> None:
    """Tokens 0 and 1 are twins; only 1 has children."""
    tree = static_tree([[0], [1], [1, 0], [1, 1]])
    p = torch.full((1, tree.n, 4), 0.25)
    drafted = Drafted(tree, torch.tensor([[3, 0, 1, 0, 1]]), p, None, torch.eye(4)[None, [3, 0, 0, 1, 2]])
    noise = Noise(torch.zeros(1, tree.n), torch.zeros(1, 3, 4))
    decisions = Cascade(LOOSE).verify(drafted, noise, torch.zeros(1))
    assert decisions.child[0, 0] == 2 and strict(drafted, noise).child[0, 0] == 1
    assert decisions.counts["rerouted"][0, 0] == 1
    assert decisions.counts["stolen"][0, 0] == 0.25
    unrouted = Cascade(replace(LOOSE, routing=False)).verify(drafted, noise, torch.zeros(1))
    assert unrouted.child[0, 0] == 1


def test_a_spent_budget_and_a_certain_node_relax_nothing() -> None:
    toy = Toy.twins(4, seed=2)
    drafted, noise = draft_of(toy, named_tree("3-4-2"), 300, True)
    exact = strict(drafted, noise).child
    near = Neighbours.of(codebook(4), 3)
    for config, spent in ((replace(LOOSE, image_budget=1.0), 1.5), (replace(LOOSE, min_entropy=99.0), 0.0)):
        rule = Cascade(replace(config, radius=0.05), near)
        assert torch.equal(rule.verify(drafted, noise, torch.full((300,), spent)).child, exact)
    assert not torch.equal(
        Cascade(replace(LOOSE, radius=0.05), near).verify(drafted, noise, torch.zeros(300)).child, exact
    )


@given(seed=st.integers(0, 10_000), count=st.integers(1, 6), cap=st.floats(0, 1))
@settings(max_examples=80, deadline=None)
def test_classes_are_cliques_within_their_caps(seed: int, count: int, cap: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    link = torch.rand(1, 2, count, count, generator=generator) < 0.6
    link = link | link.mT
    mass = torch.rand(1, 2, count, generator=generator) / count
    first, lent = form_classes(link, mass, torch.full_like(mass, cap))
    for node in range(2):
        groups: dict[int, list[int]] = {}
        for slot, head in enumerate(first[0, node].tolist()):
            groups.setdefault(head, []).append(slot)
        for head, members in groups.items():
            assert head == members[0]
            assert all(link[0, node, a, b] for a in members for b in members if a != b)
            others = sum(float(mass[0, node, slot]) for slot in members[1:])
            assert others <= cap + 1e-6 and abs(others - float(lent[0, node, head])) < 1e-6


def test_an_extended_class_keeps_its_cap() -> None:
    toy = Toy.twins(4, seed=1)
    drafted, _ = draft_of(toy, named_tree("3-2"), 200, True)
    for delta in (0.05, 0.3):
        rule = Cascade(replace(LOOSE, delta=delta, radius=5.0), Neighbours.of(codebook(4), 7))
        classes = rule.classes(drafted, similarity(drafted, "cosine"), torch.zeros(200))
        p = drafted.target.index_select(1, drafted.tree.internal)
        heads = drafted.child_tokens().gather(-1, classes.of_slot)
        lent = classes.mass(p).gather(-1, heads) - p.gather(-1, heads)
        exists = drafted.inner_children() >= 0
        assert float(lent[exists].max()) <= delta + 1e-5
        assert float(lent[exists].max()) > 0


@given(seed=st.integers(0, 10_000), scale=st.floats(0.01, 5.0))
@settings(max_examples=50, deadline=None)
def test_the_certified_distance_bounds_total_variation(seed: int, scale: float) -> None:
    logits = scale * torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert (total_variation(logits.softmax(-1)) <= law_distance_bound(logits) + 1e-12).all()


def test_the_bound_is_met_by_two_tokens() -> None:
    logits = torch.tensor([[[0.5, -0.5], [-0.5, 0.5]]], dtype=torch.float64)
    assert torch.allclose(total_variation(logits.softmax(-1)), law_distance_bound(logits))


def test_convergence_looks_at_equal_depth_below() -> None:
    """1 and 2 differ, their children 3 and 4 are equal, their grandchildren differ again."""
    tree = static_tree([[0, 0, 0], [1, 0, 0]])
    alike = torch.eye(tree.n)[None]
    alike[0, 3, 4] = alike[0, 4, 3] = 0.8
    assert convergence(alike, tree, 0)[0, 1, 2] == -torch.inf
    for horizon in (1, 2, 9):
        assert convergence(alike, tree, horizon)[0, 1, 2] == pytest.approx(0.8)
    assert convergence(alike, tree, 2)[0, 3, 4] == 0.0


@pytest.mark.parametrize("sampled", [True, False], ids=["sampled", "top-k"])
def test_expected_length_is_the_mean_length(sampled: bool) -> None:
    """20,000 verifications of the same trees, within five standard errors."""
    toy = Toy.random(6, seed=4)
    tree, batch = named_tree("3-4-2"), 20_000
    drafted, noise = draft_of(toy, tree, batch, sampled)
    outcome = reject_in_turn(drafted, noise.coins, Rejection())
    promised = expected_length(drafted, outcome.chance)[:, 0].double()
    got = walk(drafted, strict(drafted, noise), noise, torch.full((batch,), 99)).length.double()
    assert abs(float((promised - got).mean())) < 5 * float((promised - got).std()) / batch**0.5


def test_a_chain_has_no_siblings_and_nothing_breaks() -> None:
    toy = Toy.twins(3, seed=1)
    drafted, noise = draft_of(toy, chain(3), 50, True)
    rule = Cascade(replace(LOOSE, radius=0.5), Neighbours.of(codebook(3), 3))
    assert torch.equal(rule.verify(drafted, noise, torch.zeros(50)).child, strict(drafted, noise).child)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"mode": "x"}, "mode"),
        ({"similarity": "x"}, "similarity"),
        ({"delta": -1}, "delta"),
        ({"factor": 0.5}, "factor"),
    ],
)
def test_bad_thresholds(change: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        CascadeConfig(**change)
    with pytest.raises(ValueError, match="neighbours"):
        Cascade(CascadeConfig(radius=1.0))


def test_neighbours_by_brute_force() -> None:
    book = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    near = Neighbours.of(book, 5)
    for code in range(40):
        apart = (book - book[code]).norm(dim=1)
        apart[code] = torch.inf
        assert near.codes[code].tolist() == apart.argsort()[:5].tolist()
    with pytest.raises(ValueError, match="k"):
        Neighbours.of(book, 40)


def test_chi_square_helper_sees_a_wrong_law() -> None:
    toy = Toy.random(4, seed=1)
    tokens, _ = toy.first_three(chain(2), True, strict, 5000, seed=3)
    assert chi_square(tokens, toy.law_of_three((0, 1))) > 1e-5 > chi_square(tokens, toy.law_of_three((1, 0)))
