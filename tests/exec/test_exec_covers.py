"""Which groups, and which blocks of them, live where."""

from __future__ import annotations

from exec_toys import pipeline
from hypothesis import given as hypothesis_given
from hypothesis import strategies as st

from hetis_exec.covers import Cover, Covers, Journey, extents, journeys
from hetis_exec.groups import GroupMap, Holders
from hetis_sim.control.placement import PlacementShapes
from hetis_sim.policies.plan import Placement
from hetis_sim.policies.ranges import AnyPlacement, group_blocks, split_fault, token_split

BLOCK = 4

RANKS = pipeline([[0, 1]], [4], [2, 3], owned=[[2, 2]]).instances[0]


def counts(holders: Holders, positions: int) -> list[int]:
    """Groups at every position."""
    return [sum(stage.count(p) for stage in holders) for p in range(positions)]


def test_ranks_keep_the_first_of_their_own_groups() -> None:
    """Attention workers take the others in the order of the ranks, as the control plane's pushes do."""
    assert GroupMap(RANKS).initial((1, 1, 1, 1)) == ((0, 2, 1, 3),)
    assert GroupMap(RANKS).initial((2, 0, 0, 2)) == ((0, 0, 3, 3),)


def ways(before: Placement, after: Placement) -> list[Journey]:
    """How a request of two blocks gets from one placement to another."""
    shapes, covers = PlacementShapes(RANKS, 4, BLOCK), Covers(RANKS, BLOCK)
    old = covers.initial(shapes.shape(before))
    new = covers.rearranged(old, shapes.shape(after), 8)
    changes = covers.changes(old, new, 2)
    return journeys(old, new, changes, changes.__getitem__)


def test_groups_that_can_stay_do() -> None:
    """A move of one group by count is a move of one group."""
    assert ways((0, 2, 2, 0), (0, 2, 1, 1)) == [Journey(0, 2, 3, (0,), 0, 2, early=True)]


def test_a_rank_gets_its_own_group_even_from_somebody_who_has_none_to_spare() -> None:
    """The worker that gives it up gets another for it, for which there is no room before the switch."""
    groups = GroupMap(RANKS)
    assert groups.rearranged(groups.initial((1, 1, 1, 1)), (2, 1, 1, 0)) == ((0, 0, 1, 2),)
    assert ways((1, 1, 1, 1), (2, 1, 1, 0)) == [Journey(0, 2, 0, (1,), 0, 2, early=True),
                                                Journey(0, 3, 2, (3,), 0, 2, early=False)]


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    """Any valid placement on RANKS."""
    kept = [draw(st.integers(0, 2)), draw(st.integers(0, 2))]
    rest = 4 - sum(kept)
    first = draw(st.integers(0, rest))
    return (*kept, first, rest - first)


@hypothesis_given(st.lists(placements(), min_size=1, max_size=8))
def test_maps_follow_any_sequence_of_placements(sequence: list[Placement]) -> None:
    """Counts are always those of the placement, and ranks hold their own only."""
    groups = GroupMap(RANKS)
    holders = groups.initial(sequence[0])
    assert counts(holders, 4) == list(sequence[0])
    for placement in sequence[1:]:
        holders = groups.rearranged(holders, placement)
        assert counts(holders, 4) == list(placement)
        assert all(g in groups.owned(p) for g, p in enumerate(holders[0]) if p < 2)


@st.composite
def divisions(draw: st.DrawFn) -> AnyPlacement:
    """Any valid placement on RANKS of a request with six whole blocks, with token ranges or without."""
    tail = draw(st.sampled_from([(2, 2, 0, 0), (0, 0, 4, 0), (0, 0, 0, 4)]))
    home, first, second = (draw(st.integers(0, 3)) for _ in range(3))
    blocks = [0 if groups else n for groups, n in zip(tail, (home, home, first, second), strict=True)]
    found = token_split(tail, blocks)
    assert isinstance(found, tuple) or not split_fault(RANKS, found)
    return draw(placements()) if isinstance(found, tuple) else found


def held(cover: Cover, blocks: int) -> list[int]:
    """Blocks of groups at every position."""
    found = [0] * 4
    for part in extents(cover, blocks):
        found[part.position] += len(part.groups) * (part.blocks - len(part.absent))
    return found


@hypothesis_given(st.lists(divisions(), min_size=2, max_size=8))
def test_covers_follow_any_sequence_of_divisions(sequence: list[AnyPlacement]) -> None:
    """Positions hold what is booked, early gains are net gains, and a block in the making is the tail's."""
    shapes, covers = PlacementShapes(RANKS, 4, BLOCK), Covers(RANKS, BLOCK)
    cover, tokens = covers.initial(shapes.shape(sequence[0])), 26
    assert held(cover, 7) == group_blocks(RANKS, sequence[0], 7)
    for placement in sequence[1:]:
        before, cover = cover, covers.rearranged(cover, shapes.shape(placement), tokens)
        blocks = -(-tokens // BLOCK)
        assert held(cover, blocks) == group_blocks(RANKS, placement, blocks)
        assert tokens % BLOCK == 0 or cover.places(0, blocks - 1) == cover.holders[0]
        changes = covers.changes(before, cover, blocks)
        gain = [a - b for a, b in zip(held(cover, blocks), held(before, blocks), strict=True)]
        targets = [cover.places(0, b)[g] for (_, g, b), early in changes.items() if early]
        assert [targets.count(p) for p in range(4)] == [max(0, n) for n in gain]
        moved = journeys(before, cover, changes, changes.__getitem__)
        assert sum(len(j.groups) * (j.last - j.first) for j in moved) == len(changes)
        tokens += 1
