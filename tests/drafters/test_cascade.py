"""CASCADE-R: exact when off, within its caps, and nothing computed where nothing can be relaxed."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_speculation import Toy, chi_square

from fastgen.drafters import cascade
from fastgen.drafters.acceptance import Exact, Neighbours
from fastgen.drafters.cascade import Cascade, CascadeConfig, form_classes
from fastgen.drafters.redundancy import convergence, sensitivity, sibling_states
from fastgen.drafters.tree import chain, named_tree, static_tree
from fastgen.drafters.verify import Drafted, Noise, strict, walk

LOOSE = CascadeConfig(delta=1.0, horizon=0, breadth=0.99)
IMAGES = 40_000


def verifier(rule: Any) -> Any:
    return lambda drafted, noise: rule.verify(drafted, noise, torch.zeros(len(drafted.tokens)))


def of_classes(toy: Toy) -> torch.Tensor:
    """Joint distribution of the first three classes."""
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


@pytest.mark.parametrize("sampled", [True, False], ids=["sampled", "top-k"])
def test_off_is_the_exact_rule_bit_for_bit(sampled: bool) -> None:
    toy = Toy.twins(4, seed=2)
    drafted, noise = draft_of(toy, named_tree("3-4-2"), 500, sampled)
    spent = torch.zeros(500)
    left = torch.full((500,), 9)
    exact = walk(drafted, Exact().verify(drafted, noise, spent), noise, left)
    rule = Cascade(CascadeConfig.off(), Neighbours.of(codebook(4), 2))
    for ours in (
        walk(drafted, rule.verify(drafted, noise, spent), noise, left),
        rule.walk(drafted, noise, spent, left),
    ):
        assert torch.equal(exact.nodes, ours.nodes)
        assert torch.equal(exact.length, ours.length) and torch.equal(exact.bonus, ours.bonus)
        assert float(ours.counts["stolen"].sum()) == 0


def test_nothing_is_computed_where_nothing_can_be_relaxed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Descendants are compared only below a threshold that they can reach, hidden states only where one is asked; and
    nothing at all in a chain of unknown sensitivity, or where a class may lend nothing."""
    called: list[str] = []
    for name in ("similarity", "node_similarity", "convergence", "sensitivity"):
        real = getattr(cascade, name)
        monkeypatch.setattr(cascade, name, lambda *args, real=real, name=name: called.append(name) or real(*args))
    drafted, noise = draft_of(Toy.twins(4, seed=2), named_tree("3-4-2"), 10, True)
    near, spent, left = Neighbours.of(codebook(4), 2), torch.zeros(10), torch.full((10,), 9)
    for config, wanted in (
        (CascadeConfig.off(), []),
        (CascadeConfig(depth=2.0), ["similarity"]),
        (CascadeConfig(breadth=2.0), ["node_similarity", "convergence"]),
        (CascadeConfig(breadth=2.0, horizon=0), []),
        (replace(CascadeConfig.off(), radius=0.1), ["sensitivity"]),
    ):
        called.clear()
        rule = Cascade(config, near)
        rule.walk(drafted, noise, spent, left)
        assert called == wanted and rule.needs_hidden == bool(wanted)
    called.clear()
    for config, tree in ((CascadeConfig(radius=0.1), chain(4)), (CascadeConfig(delta=0.0), named_tree("3-4-2"))):
        rule, (drafted, noise) = Cascade(config, near), draft_of(Toy.twins(4, seed=2), tree, 10, True)
        bare = replace(drafted, hidden=None)
        assert torch.equal(rule.verify(bare, noise, spent).child, strict(bare, noise).child)
        rule.walk(bare, noise, spent, left)
        assert not called and not rule.reads_hidden(tree)


def test_it_is_lossy() -> None:
    toy = Toy.twins(3, seed=5)
    uneven = Toy(toy.p, toy.q, features=torch.ones(6, 3) + 0.01 * torch.eye(6)[:, :3])
    rule = Cascade(replace(LOOSE, breadth=-1.0))
    tokens, _ = uneven.first_three(named_tree("3-4-2"), True, verifier(rule), IMAGES, seed=8)
    assert chi_square(tokens // 2, of_classes(toy)) < 1e-5


def test_an_exhausted_budget_relaxes_nothing() -> None:
    toy = Toy.twins(4, seed=2)
    drafted, noise = draft_of(toy, named_tree("3-4-2"), 300, True)
    exact = strict(drafted, noise).child
    rule = Cascade(replace(LOOSE, image_budget=1.0, radius=0.05), Neighbours.of(codebook(4), 3))
    assert torch.equal(rule.verify(drafted, noise, torch.full((300,), 1.5)).child, exact)
    assert not torch.equal(rule.verify(drafted, noise, torch.zeros(300)).child, exact)


@given(seed=st.integers(0, 10_000), count=st.integers(1, 6), cap=st.floats(0, 1))
@settings(max_examples=80, deadline=None)
def test_classes_are_those_of_greedy_complete_linkage(seed: int, count: int, cap: float) -> None:
    """A child joins the first class that it is linked to all of and that has room; node by node in plain Python."""
    generator = torch.Generator().manual_seed(seed)
    link = torch.rand(2, 2, count, count, generator=generator) < 0.6
    link = link | link.mT
    mass = torch.rand(2, 2, count, generator=generator, dtype=torch.float64) / count
    first, lent = form_classes(link, mass, torch.full_like(mass, cap))
    for image, node in itertools.product(range(2), range(2)):
        weights = mass[image, node].tolist()
        groups: dict[int, list[int]] = {}
        for slot in range(count):
            for members in groups.values():
                room = cap - sum(weights[member] for member in members[1:])
                if all(link[image, node, slot, member] for member in members) and weights[slot] <= room:
                    members.append(slot)
                    break
            else:
                groups[slot] = [slot]
        heads = {slot: head for head, members in groups.items() for slot in members}
        assert first[image, node].tolist() == [heads[slot] for slot in range(count)]
        wanted = [sum(weights[member] for member in groups.get(slot, [])[1:]) for slot in range(count)]
        assert lent[image, node].tolist() == pytest.approx(wanted)


def test_siblings_of_one_code_take_the_sensitivity_of_the_calibration() -> None:
    """As in a chain, no pair tells how far the hidden state moves with the code."""
    toy = Toy.twins(4, seed=2)
    drafted, _ = draft_of(toy, named_tree("3-4-2"), 20, True)
    alone = replace(drafted, tokens=torch.zeros_like(drafted.tokens))
    near, config = Neighbours.of(codebook(4), 3), CascadeConfig(breadth=2.0, depth=2.0, delta=1.0, radius=0.05)
    children = drafted.inner_children().shape[-1]
    for moved, joined in ((float("inf"), children), (1.0, 0), (9.0, children)):  # code 1 is 0.01 away
        rule = Cascade(replace(config, sensitivity=moved), near)
        assert (rule.classes(alone, torch.zeros(20)).of_token[..., 1] == joined).all()


@given(seed=st.integers(0, 10_000), delta=st.floats(0.01, 0.5), radius=st.floats(0.05, 3.0))
@settings(max_examples=25, deadline=None)
def test_codes_join_the_nearest_child_while_its_class_has_room(seed: int, delta: float, radius: float) -> None:
    """The classes of all nodes at once, against a loop over nodes, children and codes."""
    toy = Toy.twins(4, seed=seed % 50)
    near = Neighbours.of(torch.randn(8, 2, generator=torch.Generator().manual_seed(seed)), 7)
    drafted, _ = draft_of(toy, named_tree("3-4-2"), 3, True, seed)
    rule = Cascade(CascadeConfig(breadth=0.5, depth=2.0, delta=delta, radius=radius), near)
    made, p, tokens = rule.classes(drafted, torch.zeros(3)), drafted.inner_target(), drafted.child_tokens()
    reach, exists = (
        radius / sensitivity(drafted, sibling_states(drafted), near.codebook[tokens]),
        drafted.inner_children() >= 0,
    )
    apart = torch.cdist(near.codebook, near.codebook)
    for image, node in itertools.product(range(3), range(tokens.shape[1])):
        slots = [slot for slot in range(tokens.shape[2]) if exists[image, node, slot]]
        children = [int(tokens[image, node, slot]) for slot in slots]
        firsts, law = made.of_slot[image, node].tolist(), p[image, node].double()
        wanted = [tokens.shape[2]] * 8
        lent = {head: sum(float(law[children[s]]) for s in slots if firsts[s] == head != s) for head in slots}
        for slot, child in zip(slots, children, strict=True):
            run, taken, head = 0.0, 0.0, firsts[slot]
            for code in near.codes[child].tolist():
                nearest = min(
                    range(len(children)), key=lambda i: (float(apart[code, children[i]].round(decimals=4)), i)
                )
                if nearest == slot and float(apart[child, code]) <= float(reach[image, node]):
                    run += float(law[code])
                    if run <= delta - lent[head] + 1e-7:
                        wanted[code], taken = head, taken + float(law[code])
            lent[head] += taken
        for slot, child in zip(slots, children, strict=True):
            wanted[child] = firsts[slot]
        assert made.of_token[image, node].tolist() == wanted


@given(seed=st.integers(0, 10_000), breadth=st.sampled_from([0.2, 0.7, 2.0]), depth=st.sampled_from([0.6, 2.0]))
@settings(max_examples=25, deadline=None)
def test_similar_or_converging_siblings_share_a_class(seed: int, breadth: float, depth: float) -> None:
    """Against a loop over pairs: centred cosines, or those of descendants at equal depth; budgets bind by image."""
    toy = Toy.twins(4, seed=seed % 50)
    drafted, _ = draft_of(toy, named_tree("3-4-2"), 3, True, seed)
    rule = Cascade(CascadeConfig(breadth=breadth, depth=depth, delta=0.4, horizon=1, image_budget=1.0))
    made, p, spent = rule.classes(drafted, torch.tensor([0.0, 2.0, 0.5])), drafted.inner_target(), (0.0, 2.0, 0.5)
    children, all_children = drafted.inner_children(), drafted.tree.children[0]
    assert drafted.hidden is not None
    for image, node in itertools.product(range(3), range(children.shape[1])):
        states = drafted.hidden[image] - drafted.hidden[image].mean(dim=0)

        def alike(u: int, w: int, states: torch.Tensor = states) -> float:
            return float(torch.nn.functional.cosine_similarity(states[u], states[w], dim=0))

        def related(u: int, w: int) -> bool:
            below = itertools.product(*([x for x in all_children[v].tolist() if x >= 0] for v in (u, w)))
            return alike(u, w) >= breadth or any(alike(x, y) >= depth for x, y in below)

        slots = [slot for slot in range(children.shape[2]) if children[image, node, slot] >= 0]
        groups: list[list[int]] = []
        for slot in slots:
            weight = {
                other: float(p[image, node, drafted.tokens[image, children[image, node, other]]]) for other in slots
            }
            for group in groups:
                fits = sum(weight[member] for member in group[1:]) + weight[slot] <= 0.4 and spent[image] <= 1
                if fits and all(related(*children[image, node, [member, slot]].tolist()) for member in group):
                    group.append(slot)
                    break
            else:
                groups.append([slot])
        heads = {slot: group[0] for group in groups for slot in group}
        assert made.of_slot[image, node, : len(slots)].tolist() == [heads[slot] for slot in slots]


@pytest.mark.parametrize("tree", ["2-2-1", "3-4-2"])
def test_sensitivity_is_the_median_over_a_nodes_pairs(tree: str) -> None:
    """By a loop over nodes and pairs; two codes are the same, so that some pairs do not count."""
    drafted, _ = draft_of(Toy.twins(4, seed=3), named_tree(tree), 20, True)
    book = torch.randn(8, 2, generator=torch.Generator().manual_seed(4))
    book[1] = book[0]
    children, tokens = drafted.inner_children(), drafted.child_tokens()
    made = sensitivity(drafted, sibling_states(drafted), book[tokens])
    assert drafted.hidden is not None
    for image in range(20):
        states = drafted.hidden[image]
        scale, of_node = float(states.norm(dim=-1).mean()), []
        for node in range(children.shape[1]):
            slots = [slot for slot in range(children.shape[2]) if int(children[image, node, slot]) >= 0]
            pairs = [
                (states[children[image, node, i]] - states[children[image, node, j]], book[a] - book[b])
                for i, j in itertools.combinations(slots, 2)
                for a, b in [(tokens[image, node, i], tokens[image, node, j])]
            ]
            of_node.append(
                [float(moved.norm()) / scale / float(apart.norm()) for moved, apart in pairs if apart.any()]
            )
        everywhere = sorted(itertools.chain(*of_node))
        for node, own in enumerate(of_node):
            ratios = sorted(own) or everywhere
            wanted = ratios[(len(ratios) - 1) // 2] if ratios else float("inf")
            assert float(made[image, node]) == pytest.approx(wanted, rel=1e-4)


def test_an_extended_class_keeps_its_cap() -> None:
    toy = Toy.twins(4, seed=1)
    drafted, _ = draft_of(toy, named_tree("3-2"), 200, True)
    for delta in (0.05, 0.3):
        rule = Cascade(replace(LOOSE, delta=delta, radius=5.0), Neighbours.of(codebook(4), 7))
        classes = rule.classes(drafted, torch.zeros(200))
        p = drafted.target.index_select(1, drafted.tree.internal)
        heads = drafted.child_tokens().gather(-1, classes.of_slot)
        mates = classes.of_token[:, :, None] == classes.of_slot[..., None]
        lent = (p[:, :, None] * mates).sum(dim=-1) - p.gather(-1, heads)
        exists = drafted.inner_children() >= 0
        assert float(lent[exists].max()) <= delta + 1e-5
        assert float(lent[exists].max()) > 0


def test_convergence_looks_at_equal_depth_below() -> None:
    """1 and 2 differ, their children 3 and 4 are equal, their grandchildren differ again."""
    tree = static_tree([[0, 0, 0], [1, 0, 0]])
    alike = torch.eye(tree.n)[None]
    alike[0, 3, 4] = alike[0, 4, 3] = 0.8
    assert convergence(alike, tree, 0)[0, 1, 2] == -torch.inf
    for horizon in (1, 2, 9):
        assert convergence(alike, tree, horizon)[0, 1, 2] == pytest.approx(0.8)
    assert convergence(alike, tree, 2)[0, 3, 4] == 0.0


def test_a_chain_of_unknown_sensitivity_is_exact() -> None:
    toy = Toy.twins(3, seed=1)
    drafted, noise = draft_of(toy, chain(3), 50, True)
    near = Neighbours.of(codebook(3), 3)
    for config in (replace(LOOSE, radius=0.5), replace(LOOSE, sensitivity=1.0)):
        rule = Cascade(config, near)
        assert torch.equal(rule.verify(drafted, noise, torch.zeros(50)).child, strict(drafted, noise).child)


@given(
    seed=st.integers(0, 10_000),
    delta=st.floats(0.01, 0.5),
    radius=st.floats(0.05, 3.0),
    sensitivity=st.floats(0.2, 5.0),
)
@settings(max_examples=25, deadline=None)
def test_a_chain_takes_the_sensitivity_of_the_calibration(
    seed: int, delta: float, radius: float, sensitivity: float
) -> None:
    """Without hidden states: nearer codes first, while the class has room; against a loop over nodes and codes."""
    toy = Toy.twins(4, seed=seed % 50)
    near = Neighbours.of(torch.randn(8, 2, generator=torch.Generator().manual_seed(seed)), 7)
    drafted, noise = draft_of(toy, chain(4), 5, True, seed)
    bare, spent = replace(drafted, hidden=None), torch.zeros(5)
    rule = Cascade(CascadeConfig(delta=delta, radius=radius, sensitivity=sensitivity), near)
    assert not rule.reads_hidden(drafted.tree)
    made, p = rule.classes(bare, spent).of_token, drafted.inner_target().double()
    for image, node in itertools.product(range(5), range(made.shape[1])):
        child = int(drafted.child_tokens()[image, node, 0])
        wanted, lent = [1] * 8, 0.0
        wanted[child] = 0
        for code, apart in zip(near.codes[child].tolist(), near.distances[child].tolist(), strict=True):
            lent += float(p[image, node, code])
            if apart * sensitivity <= radius and lent <= delta:
                wanted[code] = 0
        assert made[image, node].tolist() == wanted
    left = torch.full((5,), 9)
    relaxed, stepwise = rule.walk(bare, noise, spent, left), walk(bare, rule.verify(bare, noise, spent), noise, left)
    assert torch.equal(relaxed.nodes, stepwise.nodes) and torch.equal(relaxed.bonus, stepwise.bonus)
    assert (relaxed.length >= walk(bare, strict(bare, noise), noise, left).length).all()
    exhausted = Cascade(replace(rule.config, image_budget=1.0), near)
    assert torch.equal(exhausted.verify(bare, noise, spent + 1.5).child, strict(bare, noise).child)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"breadth": "x"}, "breadth"),
        ({"horizon": -1}, "horizon"),
        ({"delta": -1}, "delta"),
        ({"near": 0}, "near"),
        ({"sensitivity": 0}, "sensitivity"),
        ({"sensitivity": float("nan")}, "sensitivity"),
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


def test_chi_square_helper_detects_a_wrong_distribution() -> None:
    toy = Toy.random(4, seed=1)
    tokens, _ = toy.first_three(chain(2), True, strict, 5000, seed=3)
    assert chi_square(tokens, toy.law_of_three((0, 1))) > 1e-5 > chi_square(tokens, toy.law_of_three((1, 0)))
