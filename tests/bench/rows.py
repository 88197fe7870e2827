"""The rows of the benchmark: what is done, and the figures that it is held against.

A row's words name the program that does the work (`load` by its modes, wrk, pgbench) and its amounts. Rows of the kind
`open` have a fixed rate: a fraction of the peak that a target reached in the same round, the plain network or itself.
"""

from dataclasses import dataclass, replace

LOAD_PORT, HTTP_PORT, POSTGRES_PORT = 7100, 7180, 7132
PORTS = (LOAD_PORT, HTTP_PORT, POSTGRES_PORT)
PLACES = ("across", "local")
OF_FLOOR = 0.85  # across nodes this much of the floor's share is as good as the figure


@dataclass(frozen=True, slots=True)
class Row:
    """One kind of work. `words` go to the program before address, port and time; `share` is the least share of the
    rate without a mesh, `p50` the most times its median latency, across nodes; None where there is no such target.
    `of` names the target whose peak an open loop's rate is a fraction of, "" for each target's own."""

    name: str
    words: tuple[str, ...]
    share: float | None = None
    p50: float | None = None
    of: str = ""

    @property
    def kind(self) -> str:
        """rr, crr, bulk, open, wrk or pgbench."""
        return self.words[0]

    @property
    def bulk(self) -> bool:
        """The rate is bytes, not operations."""
        return self.kind == "bulk"

    @property
    def port(self) -> int:
        """Where its server listens in a pod."""
        return {"wrk": HTTP_PORT, "pgbench": POSTGRES_PORT}.get(self.kind, LOAD_PORT)

    @property
    def connections(self) -> int:
        """How many it has open at once."""
        return int(self.words[-1])

    def at(self, peak: float) -> "Row":
        """An open loop with its fraction of a peak (operations per second) for a rate; any other row as it is."""
        if self.kind != "open":
            return self
        return replace(self, words=("open", f"{max(1.0, float(self.words[1]) * peak):.1f}", *self.words[2:]))


ROWS = (
    Row("64 B round trips, 1 connection", ("rr", "64", "1"), p50=2.65),
    Row("64 B round trips, 16 connections", ("rr", "64", "16"), share=0.21),
    Row("16 KiB round trips, 4 connections", ("rr", "16384", "4"), share=0.12),
    Row("bulk, 1 connection", ("bulk", "1"), share=0.23),
    Row("bulk, 4 connections", ("bulk", "4"), share=0.16),
    Row("connect-request-close, 1 at a time", ("crr", "1"), share=0.20),
    Row("connect-request-close, 16 at a time", ("crr", "16"), share=0.20),
)
PEAK = ROWS[1]  # what open loops are fractions of; runs before them in every round
# "Half of the peak rate" is half of what the target itself carries: whoever carries less than half of the plain
# network's peak is saturated at half of that, by arithmetic and not by fault. Who is ahead is told by a rate that all
# of them carry.
FIXED = (
    Row("64 B at 1/8 of the plain peak rate", ("open", "0.125", "64", "16"), of="plain"),
    Row("64 B at half of its own peak rate", ("open", "0.5", "64", "16")),
)
REAL = (
    Row("HTTP, wrk and nginx, 1 KiB, 16 connections", ("wrk", "16")),
    Row("PostgreSQL, pgbench -S, 4 connections", ("pgbench", "4")),
)
ALL = (*ROWS, *FIXED, *REAL)


@dataclass(frozen=True, slots=True)
class Aim:
    """A figure to reach and the one that is hoped for. `of`: share, p50, p99 or cpu, each against the plain network; a
    share is to be at least that, the others at most. `issue` is who asks for it."""

    of: str
    reach: float
    stretch: float | None = None
    issue: int = 5

    @property
    def most(self) -> bool:
        """The smaller the better."""
        return self.of != "share"

    def _holds(self, value: float, figure: float) -> bool:
        return value <= figure if self.most else value >= figure

    def verdict(self, value: float, floor: float | None) -> str:
        """`stretch`, `reached`, `floor` (only OF_FLOOR of what the floor does in the same run) or `short`."""
        if self.stretch is not None and self._holds(value, self.stretch):
            return "stretch"
        if self._holds(value, self.reach):
            return "reached"
        if floor and self._holds(value, floor / OF_FLOOR if self.most else floor * OF_FLOOR):
            return "floor"
        return "short"


# What the issue of speed asks for. The column of one node has no stretch but in one row, and no floor.
_SPEED: dict[tuple[str, str], tuple[Aim, ...]] = {
    ("across", ROWS[0].name): (Aim("p50", 2.3, 2.0),),
    ("across", ROWS[1].name): (Aim("share", 0.30, 0.40), Aim("cpu", 3.2, 2.5)),
    ("across", ROWS[2].name): (Aim("share", 0.20, 0.25),),
    ("across", ROWS[3].name): (Aim("share", 0.28, 0.35), Aim("cpu", 4.3, 3.5)),
    ("across", ROWS[4].name): (Aim("share", 0.22, 0.28), Aim("cpu", 4.3, 3.5)),
    ("across", ROWS[5].name): (Aim("share", 0.35, 0.45),),
    ("across", ROWS[6].name): (Aim("share", 0.45, 0.50),),
    ("across", FIXED[1].name): (Aim("p99", 2.3, 2.0),),
    ("local", ROWS[0].name): (Aim("p50", 1.1),),
    ("local", ROWS[1].name): (Aim("share", 0.92, 0.97),),
    ("local", ROWS[2].name): (Aim("share", 0.95),),
    ("local", ROWS[3].name): (Aim("share", 0.95),),
    ("local", ROWS[4].name): (Aim("share", 0.95),),
    ("local", ROWS[5].name): (Aim("share", 0.90),),
    ("local", ROWS[6].name): (Aim("share", 0.90),),
    ("local", FIXED[1].name): (Aim("p99", 1.4),),
}


def aims(place: str, row: Row) -> tuple[Aim, ...]:
    """What is asked for in a row: by the first path (without the floor's clause), then by the issue of speed."""
    first = []
    if place == "across" and row.share is not None:
        first.append(Aim("share", row.share, issue=3))
    if place == "across" and row.p50 is not None:
        first.append(Aim("p50", row.p50, issue=3))
    return (*first, *_SPEED.get((place, row.name), ()))
