"""How the workers of a run are joined: what each is told of the others, and how they come together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hetis_exec.crew import WorkerSpec
from hetis_exec.errors import ExecutorError
from hetis_exec.net.cards import Card, card_at, have_own
from hetis_exec.net.endpoint import EAGER_BYTES, Channel, NetworkEndpoint
from hetis_exec.net.frames import FrameSocket
from hetis_exec.net.handshake import Hello
from hetis_exec.net.listener import Listener, connect
from hetis_exec.net.meeting import WORKER_FIELDS, Meeting
from hetis_exec.net.reducers import make_reducer
from hetis_exec.net.tensor_wires import make_tensor_wire
from hetis_exec.net.wires import GlooWire, Reaper, gloo_group
from hetis_exec.places import CPU, stages_of
from hetis_exec.shaping import Shapes
from hetis_exec.sums import Reducer


@dataclass(frozen=True, slots=True)
class NetSettings:
    """How parties of a run talk to each other; the same for all of them.

    Attributes:
        eager_bytes: see :class:`NetworkEndpoint`.
        shapes: links to emulate.
        collectives, device_links: see :class:`hetis_exec.config.ExecutorConfig`. Links may also be ``gloo``,
            which takes tensors of processors the way that NCCL takes those of cards.
        digest: of what is to be run, behind the type of its numbers and a colon: a worker that was given
            something else is refused.
    """

    eager_bytes: int = EAGER_BYTES
    shapes: Shapes = field(default_factory=dict)
    digest: str = ""
    collectives: str = "auto"
    device_links: str = "auto"


@dataclass(frozen=True, slots=True)
class Seat:
    """The place of one worker among the others.

    Attributes:
        teams: the devices of each instance.
        timeout_s: how long large arrays may take on a wire.
        ranks: devices of its stage, in the order of their tensor-parallel ranks; none of an attention worker.
    """

    device: int
    teams: tuple[tuple[int, ...], ...]
    settings: NetSettings
    timeout_s: float
    ranks: tuple[int, ...] = ()

    def links(self) -> list[tuple[int, int, Channel]]:
        """(lower device, higher device, channel) of its connections, in the order of all of them.

        Cache may go from any worker to any other one, everything else stays within an instance.
        """
        team = next((team for team in self.teams if self.device in team), ())
        everyone = [device for team in self.teams for device in team]
        pairs = [(min(self.device, other), max(self.device, other), channel) for other in everyone
                 for channel in (Channel.DATA, Channel.CACHE)
                 if other != self.device and (channel == Channel.CACHE or other in team)]
        return sorted(pairs) if team else []


def seats(specs: Sequence[WorkerSpec], settings: NetSettings) -> dict[int, Seat]:
    """A seat for each of the workers."""
    teams = tuple(dict.fromkeys(spec.plan.devices for spec in specs))
    return {spec.device: Seat(spec.device, teams, settings, spec.timeout_s,
                              stages_of(spec.plan)[spec.stage].devices if spec.stage >= 0 else ())
            for spec in specs}


def meet(meeting: Meeting, seat: Seat, endpoint: NetworkEndpoint, token: bytes, control: int = 1,
         where: str = CPU) -> Reducer | None:
    """Connect a worker with the others: the higher device of a pair calls the lower one.

    Args:
        control: connections that the endpoint has already.
        where: torch device of the worker.

    Returns:
        What adds up over the ranks of its stage; None where that is left to messages.

    Raises:
        ExecutorError: another one does not come, or cannot be reached in the way that it should be.
    """
    links, place = seat.links(), meeting.place

    def connected(hello: Hello, frames: FrameSocket) -> None:
        endpoint.add(hello.sender, Channel(hello.channel), frames)

    listener = Listener(place.bind, seat.device, token, connected)
    meeting.announce(f"worker/{seat.device}", {"host": listener.place[0], "port": listener.place[1],
                                               **card_at(where)._asdict()})
    for lower, higher, channel in links:
        if higher == seat.device:
            record = meeting.look_up(f"worker/{lower}", WORKER_FIELDS)
            endpoint.add(lower, channel, connect((record["host"], record["port"]), token,
                                                 Hello(higher, lower, channel)))
    if not endpoint.await_links(control + len(links), place.start_s):
        raise ExecutorError(f"not all of the others have called device {seat.device} in {place.start_s:g} s; "
                            f"it knows {endpoint.peers}")
    listener.close()
    cards = {device: _card_of(meeting, device) for team in seat.teams for device in team}
    _lay_wires(meeting, seat, endpoint, cards, where)
    return make_reducer(meeting.store, {device: cards[device] for device in seat.ranks}, seat.device,
                        seat.settings.collectives, place, seat.timeout_s, where)


def _card_of(meeting: Meeting, device: int) -> Card:
    record = meeting.look_up(f"worker/{device}", WORKER_FIELDS)
    return Card(*(record[key] for key in Card._fields))


def _lay_wires(meeting: Meeting, seat: Seat, endpoint: NetworkEndpoint, cards: Mapping[int, Card],
               where: str) -> None:
    """Give each link what carries its large arrays, and its tensors where it can have that.

    Both ends go through all links in the same order, so that nobody waits for someone who waits.
    """
    place, reaper = meeting.place, Reaper()
    for lower, higher, channel in seat.links():
        rank = int(higher == seat.device)
        peer, name = (higher, lower)[rank], f"{lower}-{higher}-{channel}"
        group = gloo_group(meeting.store, f"wire/{name}", rank, place.gloo_bind, place.start_s)
        endpoint.add_wire(peer, channel, GlooWire(group, 1 - rank, seat.timeout_s), reaper)
        library = library_of_link(seat.settings.device_links, lower, higher, cards)
        if not library:
            continue
        try:
            wire = make_tensor_wire(meeting.store, f"tensors/{name}", rank, library, place, seat.timeout_s,
                                    where, urgent=channel == Channel.DATA)
        except RuntimeError as error:
            raise ExecutorError(f"{library} carries no tensors between devices {lower} and {higher} "
                                f"({error}); executor.device_links=host does without it") from error
        endpoint.add_tensors(peer, channel, wire)


def library_of_link(wish: str, lower: int, higher: int, cards: Mapping[int, Card]) -> str:
    """What takes tensors from one worker to another: ``nccl``, ``gloo``, or nothing.

    Both need cards that no other worker of the run has a share in.
    """
    if wish != "auto":
        return wish if wish == "gloo" else ""
    uuids = [card.uuid for card in cards.values()]
    pair = [cards[lower], cards[higher]]
    return "nccl" if have_own(pair) and all(uuids.count(card.uuid) == 1 for card in pair) else ""
