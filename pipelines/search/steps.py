"""The loop of policies that search transition by transition: it asks a policy how often to try and what to accept."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Generator
from dataclasses import dataclass, field

from fastgen.pipelines.search.engine import Ask, Chain, Effort, Node, Program, better, rank
from fastgen.pipelines.search.policy import Policy

__all__ = ["State", "StepPolicy"]


@dataclass
class State:
    """What the loop knows of a chain."""

    chain: Chain
    scores: list[float] = field(default_factory=list)
    best: Node | None = None
    accepted: float = -math.inf
    trajectory: int = 0  # that it is at
    taken: list[int] = field(default_factory=list)  # of its transitions: which try the search continued with

    def see(self, node: Node) -> float:
        """Take a node in; the best score before it."""
        before = -math.inf if self.best is None else self.best.score
        self.scores.append(node.score)
        self.best = better(self.best, node)
        return before


@dataclass(frozen=True)
class _Draft:
    """A trajectory that was explored, with what it takes to draw it again."""

    end: Node
    trajectory: int
    taken: list[int]


class StepPolicy(Policy):
    """The loop over transitions (section 3.2 of our specification).

    Attributes:
        starts: noises that are drawn and scored before the first transition; the search continues with the best.
        wave: candidates that are tried together. It changes what a search costs, not which way it takes: what comes
            behind the accepted one of a wave is paid for and not followed. A finished picture among them still counts.
        reserve: a trajectory that was begun can always be finished.
        previews: the returned node may be another one than the last of the trajectory.
    """

    starts: int = 1
    wave: int = 1
    reserve: bool = True

    @property
    def previews(self) -> bool:
        return False

    def least(self, transitions: int) -> int:
        return self.chains * (self.starts + transitions)

    def anew(self, transitions: int) -> int | None:
        return self.chains * ((self.starts > 1) + self.previews) if transitions else 0

    @abstractmethod
    def may_try(self, step: int, tries: int, left: float, memory: dict[str, float]) -> bool:
        """Whether transition `step` may be tried once more after `tries`, with so many evaluations left beyond what
        finishing takes."""

    @abstractmethod
    def accept(self, step: int, score: float, before: float, state: State) -> bool:
        """Whether the search continues with a candidate; `before` is the best score before it."""

    def on_advance(self, step: int, tries: int, accepted: bool, memory: dict[str, float]) -> None:
        """After a transition."""

    def enough(self, score: float, state: State) -> bool:
        """Whether no further start is drawn after one of that score."""
        return False

    def end(self, best: Node, step_best: Node) -> Node:
        """What is returned of the best node of all and the best one at the last time that was reached."""
        return step_best

    def again(self, end: Node, state: State) -> bool:
        """Whether another trajectory is begun after one that came to `end`, if the budget pays for it."""
        return False

    def hopeless(self, node: Node, state: State) -> bool:
        """Whether another trajectory is begun rather than going on from a candidate, if the budget pays for it."""
        return False

    def looks(self, index: int, state: State) -> bool:
        """Whether what is evaluated at a time before the last is scored; if not, the first candidate is gone on
        with."""
        return True

    def remember(self, chain: Chain) -> dict[str, float]:
        """What the policy keeps of a chain from transition to transition."""
        return {}

    def wholly(self, chain: Chain) -> bool:
        """Whether trajectories are explored from start to end, and only the good ones are drawn again."""
        return False

    def promising(self, end: Node, state: State) -> bool:
        """Whether the explored end of a trajectory is drawn again at once."""
        return False

    def program(self, chain: Chain) -> Program:
        state, found, draft = State(chain), None, None
        while True:
            state.taken = []
            end = yield from self._trajectory(state)
            if end is None:  # given up for another one
                state.trajectory += 1
                continue
            if self.wholly(chain) and end.last and end.explored:
                drawn = _Draft(end, state.trajectory, state.taken)
                if self.promising(end, state):
                    end = yield from self._anew(drawn, chain)
                elif draft is None or end.score > draft.end.score:
                    draft = drawn
            if found is None or rank(end) > rank(found):
                found = end
            if not (self.again(end, state) and self._another(chain)):
                break
            state.trajectory += 1
        if (
            draft is not None
            and not chain.pool.done
            and not draft.end.score < (-math.inf if found.explored else found.score)
        ):
            end = yield from self._anew(draft, chain)
            found = end if rank(end) > rank(found) else found
        chain.pool.owed.pop(chain.number, None)
        return found

    def _anew(self, draft: _Draft, chain: Chain) -> Program:
        """A trajectory at full effort: the same start, the same noise."""
        start = draft.end
        while start.parent is not None:
            start = start.parent
        last, owed = chain.sampler.transitions, chain.pool.owed
        owed[chain.number] = last
        (node,) = yield chain.ask([start.latents], 0, scored=not last, effort="anew")
        for step, number in enumerate(draft.taken):
            owed[chain.number] = last - step - 1
            latents = node.step(chain.noise(step, number, draft.trajectory))
            (node,) = yield chain.ask([latents], step + 1, [node], scored=step + 1 == last, effort="anew")
        return node

    def _another(self, chain: Chain) -> bool:
        """Whether the budget pays for one more whole trajectory, after what other chains need."""
        transitions, pool = chain.sampler.transitions, chain.pool
        anew = (self.anew(transitions) or 0) // self.chains if chain.explore else 0
        left = pool.left(chain.number)
        return left > 0 and left + pool.owed.get(chain.number, 0) >= self.starts + transitions + anew

    def _trajectory(self, state: State) -> Generator[Ask, list[Node], Node | None]:
        """From a start to its end; None: it was given up."""
        chain, memory, pool = state.chain, self.remember(state.chain), state.chain.pool
        last = chain.sampler.transitions
        node = yield from self._start(state)
        step_best = node
        for step in range(last):
            if chain.pool.done:  # another chain's picture is good enough
                break
            if step + 1 < last and not self.looks(step + 1, state):
                self._owe(chain, last - step - 1)
                blind: Effort = "exploring" if self.wholly(chain) else "full"
                latents = node.step(chain.noise(step, 0, state.trajectory))
                (node,) = yield chain.ask([latents], step + 1, [node], scored=False, effort=blind)
                step_best = node
                state.taken.append(0)
                chain.tries.append((1, True))
                continue
            found: Node | None = None
            tries, accepted, taken = 0, False, 0
            effort = self._effort(step, chain, memory)
            while not accepted and (width := self._width(step, tries, chain, memory, effort)) > 0:
                proposals = [node.step(chain.noise(step, tries + i, state.trajectory)) for i in range(width)]
                self._owe(chain, last - step - 1, effort)
                answers = yield chain.ask(proposals, step + 1, [node] * width, effort=effort)
                for candidate in answers:
                    before = state.see(candidate)
                    accepted = self.accept(step, candidate.score, before, state)
                    if self._good(candidate, chain) or accepted or better(found, candidate) is candidate:
                        found, taken = candidate, tries
                    tries += 1
                    if accepted or pool.done:
                        break
                if pool.done:
                    break
            if found is None and pool.done:
                break
            if found is None and (self.reserve or (pool.late and pool.affords(1))):  # what finishing takes
                latents = node.step(chain.noise(step, 0, state.trajectory))
                (found,) = yield chain.ask(
                    [latents], step + 1, [node], effort=effort if self.wholly(chain) else "full"
                )
                state.see(found)
                tries = 1
            if found is None:
                break
            state.taken.append(taken)
            chain.tries.append((tries, accepted))
            self.on_advance(step, tries, accepted, memory)
            state.accepted = found.score
            if not (found.last or pool.done) and self.hopeless(found, state) and self._another(chain):
                return None
            node = step_best = found if pool.done or self.wholly(chain) else (yield from chain.anew(found))
        pool.owed.pop(chain.number, None)
        end = self.end(state.best or node, step_best)
        if not end.explored or pool.done or self.wholly(chain):
            return end
        # Without a reserve the budget may end here, and then the last node of the trajectory is the picture.
        return (yield from chain.anew(end, scored=True)) if pool.affords(1) else node

    def _start(self, state: State) -> Generator[Ask, list[Node], Node]:
        chain, last = state.chain, state.chain.sampler.transitions
        wholly = self.wholly(chain)
        effort: Effort = "exploring" if wholly or (chain.explore and last and self.starts > 1) else "full"
        self._owe(chain, last, effort)
        drawn, best = state.trajectory * self.starts, None
        for first in range(0, self.starts, self.wave):
            count = min(self.wave, self.starts - first)
            if first and chain.pool.left(chain.number) < count:
                break
            scored = not last or self.starts > 1 or self.looks(0, state)
            latents = [chain.first(drawn + first + i) for i in range(count)]
            for node in (yield chain.ask(latents, 0, scored=scored, effort=effort)):
                if not scored:
                    return node
                state.see(node)
                best = better(best, node)
                if self.enough(node.score, state):
                    break
            else:
                continue
            break
        kept = best or node
        state.accepted = kept.score
        return kept if wholly else (yield from chain.anew(kept))

    def _effort(self, step: int, chain: Chain, memory: dict[str, float]) -> Effort:
        """Of a transition's candidates, with what they owe kept back: ends of trajectories are pictures and evaluated
        in full, and so is a candidate that has no rival, which would only be evaluated twice."""
        last = chain.sampler.transitions
        self._owe(chain, last - step)
        if self.wholly(chain):
            return "exploring"
        left = chain.pool.left(chain.number) + (1 if self.reserve else 0)
        if not chain.explore or step + 1 == last or left < 3 or not self.may_try(step, 1, left - 1, memory):
            return "full"
        self._owe(chain, last - step - 1, "exploring")
        return "exploring"

    def _width(self, step: int, tries: int, chain: Chain, memory: dict[str, float], effort: Effort) -> int:
        """How many candidates to try now: as many of a wave as may be tried one after the other."""
        # Of what the chain keeps back for itself, one evaluation is for this transition, or for its kept one.
        own = self.reserve and tries == 0 and (effort == "full" or self.wholly(chain))
        left = chain.pool.left(chain.number) + (1 if own else 0)
        width = 0
        while width < self.wave and left - width >= 1 and self.may_try(step, tries + width, left - width, memory):
            width += 1
        return width

    def _owe(self, chain: Chain, transitions: int, effort: Effort = "full") -> None:
        """Keep back what finishing takes, and what evaluating explored nodes again takes."""
        again = (effort == "exploring") + (bool(chain.explore) and self.previews)
        if self.wholly(chain):
            again = chain.sampler.transitions + 1
        chain.pool.owed[chain.number] = (transitions if self.reserve else 0) + again

    def _good(self, node: Node, chain: Chain) -> bool:
        """Whether a finished picture is good enough: then all chains of the prompt are done."""
        if node.last and not node.explored and chain.pool.budget.met_by(node.score):
            chain.pool.done = True
        return chain.pool.done
