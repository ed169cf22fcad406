"""The layout of a pyramid: its bands, rows, columns and lanes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..genotype import FPN_OPS, NUM_INPUTS, Genotype, node_names
from ..models.heads.locations import STRIDES as LEVEL_STRIDES
from .canvas import EXTRA, MARGIN, WIRE, operation_color

BACKBONE_STRIDES = (LEVEL_STRIDES[0] // 2, *LEVEL_STRIDES[:3])
"""Strides of C2..C5 in pixels: P3..P5 are as large as C3..C5."""

# All lengths are in inches.
C_SIZE = (0.95, 0.42)
CELL_SIZE = (1.66, 0.72)
P_SIZE = (0.95, 0.56)
_LABEL = 0.68  # room for the resolution of a band
_ROW_GAP = 0.2
_BAND_GAP = 0.1
_LANE = 0.17
_PORT = 0.16  # distance of a box's two inputs from its middle


def node_strides(genotype: Genotype) -> list[int]:
    """Stride of every node, C2 first; a cell's output is as large as its larger input."""
    strides = list(BACKBONE_STRIDES)
    for cell in genotype.cells:
        strides.append(min(strides[node] for node in cell.inputs))
    return strides


@dataclass
class Net:
    """A vertical line that connects nodes on its left with inputs of boxes on its right.

    Attributes:
        sources: nodes whose wires lead to the line.
        source_heights: heights of these wires.
        ports: (height, colour) of the inputs.
        extra: whether the sources are unused cell outputs, which are added to P3, P4 and P5.
        x: position of the line's lane.
    """

    sources: list[int]
    source_heights: list[float]
    ports: list[tuple[float, str]]
    extra: bool = False
    x: float = 0.0

    @property
    def heights(self) -> list[float]:
        """Heights of all sources and ports."""
        return self.source_heights + [height for height, _ in self.ports]

    @property
    def straight(self) -> bool:
        """Whether a single horizontal line makes the connection."""
        return max(self.heights) - min(self.heights) < 1e-6


class PyramidLayout:
    """The positions of everything in a pyramid; heights start at the lower edge of the lowest band.

    Attributes:
        rows: height of the middle of each node.
        bands: (low, high) of the band of each stride.
        level_y, level_ports: middles of P3..P7, and the heights of the inputs of P3..P5.
        channels: for each gap between two columns, the nets in it, in the order of their lanes.
        c_x, column_x, level_x: middles of the columns, after `place_columns`.
    """

    def __init__(self, genotype: Genotype) -> None:
        self.genotype = genotype
        self.names = node_names(len(genotype.cells))
        self.strides = node_strides(genotype)
        self.depth = [0] * NUM_INPUTS
        for cell in genotype.cells:
            self.depth.append(1 + max(self.depth[node] for node in cell.inputs))
        self.columns = max(self.depth)
        self._place_rows()
        self._place_levels()
        self.channels = [self._input_nets(d) for d in range(1, self.columns + 1)]
        self.channels.append(self._output_nets())
        self.channels = [_improve(nets, _crossings) for nets in self.channels]

    # ----- heights

    def _place_rows(self) -> None:
        """Give each node a row in the band of its stride, near the nodes it is connected to."""
        order = {stride: self._share_rows(stride) for stride in BACKBONE_STRIDES}
        edges = [
            (NUM_INPUTS + k, node)
            for k, cell in enumerate(self.genotype.cells)
            for node in cell.inputs
        ]

        def length(order: dict[int, list[list[int]]]) -> float:
            rows, bands = self._stack(order)
            vertical = sum(abs(rows[a] - rows[b]) for a, b in edges)
            for node, stride in zip(self.genotype.pyramid_nodes, LEVEL_STRIDES, strict=False):
                vertical += abs(rows[node] - sum(bands[stride]) / 2)
            return vertical

        for stride in BACKBONE_STRIDES:
            order[stride] = _improve(
                order[stride], lambda band, stride=stride: length({**order, stride: band})
            )
        self.rows, self.bands = self._stack(order)
        self.height = max(high for _, high in self.bands.values())

    def _share_rows(self, stride: int) -> list[list[int]]:
        """The nodes of a stride by rows; a node may follow one whose wire has ended before it."""
        taken_by: dict[int, list[int]] = {}
        for k, cell in enumerate(self.genotype.cells):
            for node in cell.inputs:
                taken_by.setdefault(node, []).append(NUM_INPUTS + k)
        nodes = [n for n, other in enumerate(self.strides) if other == stride]
        rows: list[list[int]] = []
        for node in sorted(nodes, key=lambda n: self.depth[n]):
            free = [
                row
                for row in rows
                if row[-1] in taken_by
                and max(self.depth[taker] for taker in taken_by[row[-1]]) <= self.depth[node]
            ]
            if free:
                max(free, key=lambda row: node in taken_by[row[-1]]).append(node)
            else:
                rows.append([node])
        return rows

    def _stack(
        self, order: dict[int, list[list[int]]]
    ) -> tuple[dict[int, float], dict[int, tuple[float, float]]]:
        """Heights of the nodes and (low, high) of the bands, with the rows stacked in `order`."""
        heights, bands, y = {}, {}, 0.0
        for stride in BACKBONE_STRIDES:
            rows = [
                (C_SIZE if max(row) < NUM_INPUTS else CELL_SIZE)[1] + _ROW_GAP
                for row in order[stride]
            ]
            band = sum(rows)
            if stride in LEVEL_STRIDES:
                band = max(band, P_SIZE[1] + 0.3)
            bottom = y + (band - sum(rows)) / 2
            for nodes, height in zip(order[stride], rows, strict=True):
                heights.update((node, bottom + height / 2) for node in nodes)
                bottom += height
            bands[stride] = (y, y + band)
            y += band + _BAND_GAP
        for stride in LEVEL_STRIDES[3:]:
            bands[stride] = (y, y + P_SIZE[1] + 0.2)
            y = bands[stride][1] + _BAND_GAP
        return heights, bands

    def _place_levels(self) -> None:
        """Place P3..P5 inside their bands so that their inputs are on no other output's wire."""
        wires = {node: self.rows[node] for node in self.genotype.unconsumed}
        self.level_y, self.level_ports = [], []
        for node, stride in zip(self.genotype.pyramid_nodes, BACKBONE_STRIDES[1:], strict=True):
            low, high = (
                edge + sign * (P_SIZE[1] / 2 + 0.05)
                for edge, sign in zip(self.bands[stride], (1, -1), strict=True)
            )
            offsets = (_PORT, -_PORT) if self.genotype.extra_nodes else (0.0,)
            wanted = min(max(wires[node] - offsets[0], low), high)

            def cost(y: float, node=node, offsets=offsets, wanted=wanted) -> float:
                own = abs(y + offsets[0] - wires[node])
                clashes = 0 < own < 0.1
                for other, height in wires.items():
                    clashes += sum(
                        abs(y + offset - height) < 0.1
                        for offset in offsets
                        if (other, offset) != (node, offsets[0])
                    )
                return 100 * clashes + abs(y - wanted)

            steps = [low + (high - low) * i / 40 for i in range(41)]
            self.level_y.append(min([wanted, *steps], key=cost))
            self.level_ports.append([self.level_y[-1] + offset for offset in offsets])
        for stride in LEVEL_STRIDES[3:]:
            self.level_y.append(sum(self.bands[stride]) / 2)

    # ----- lanes

    def cell_ports(self, k: int) -> list[tuple[int, int, float]]:
        """(input node, operation, height) of a cell's two inputs; the higher wire is on top."""
        cell, middle = self.genotype.cells[k], self.rows[NUM_INPUTS + k]
        inputs = sorted(zip(cell.inputs, cell.ops, strict=True), key=lambda i: -self.rows[i[0]])
        return [(*i, middle + port) for i, port in zip(inputs, (_PORT, -_PORT), strict=True)]

    def _input_nets(self, depth: int) -> list[Net]:
        ports: dict[int, list[tuple[float, str]]] = {}
        for k in range(len(self.genotype.cells)):
            if self.depth[NUM_INPUTS + k] == depth:
                for node, op, height in self.cell_ports(k):
                    ports.setdefault(node, []).append((height, operation_color(FPN_OPS[op])))
        return [
            Net([node], [self.rows[node]], own_ports) for node, own_ports in sorted(ports.items())
        ]

    def _output_nets(self) -> list[Net]:
        nets = [
            Net([node], [self.rows[node]], [(ports[0], WIRE)])
            for node, ports in zip(self.genotype.pyramid_nodes, self.level_ports, strict=True)
        ]
        extra = list(self.genotype.extra_nodes)
        if extra:
            ports = [(ports[1], EXTRA) for ports in self.level_ports]
            nets.append(Net(extra, [self.rows[node] for node in extra], ports, extra=True))
        return nets

    # ----- columns

    def _channel_width(self, nets: Sequence[Net]) -> float:
        return 0.34 + _LANE * max(0, len(nets) - 1) + 0.12

    @property
    def min_width(self) -> float:
        """Width without any spare space."""
        return (
            2 * MARGIN + _LABEL + C_SIZE[0] + self.columns * CELL_SIZE[0] + P_SIZE[0]
            + sum(map(self._channel_width, self.channels)) + 0.15
        )  # fmt: skip

    def place_columns(self, width: float) -> None:
        """Place the columns and lanes; spare width goes to the channels between the columns."""
        self.width = width
        spare = (width - self.min_width) / len(self.channels)
        self.c_x = MARGIN + _LABEL + C_SIZE[0] / 2
        x = MARGIN + _LABEL + C_SIZE[0]
        self.column_x = []
        for nets in self.channels:
            channel = self._channel_width(nets) + spare
            # Lanes are in the right part of the channel, so that the end of a line that has the
            # colour of its operation is short.
            lane = x + channel - 0.29 - _LANE * max(0, len(nets) - 1)
            for i, net in enumerate(nets):
                net.x = lane + i * _LANE
            x += channel
            if len(self.column_x) < self.columns:
                self.column_x.append(x + CELL_SIZE[0] / 2)
                x += CELL_SIZE[0]
        self.level_x = x + P_SIZE[0] / 2

    def wire_ends(self) -> dict[int, float]:
        """Position of the lane at which each node's wire ends."""
        ends: dict[int, float] = {}
        for nets in self.channels:
            for net in nets:
                for node in net.sources:
                    ends[node] = max(ends.get(node, 0.0), net.x)
        return ends


def _improve(order: Sequence, cost: Callable[[list], float]) -> list:
    """Swap pairs of items as long as that lowers the cost, and return the order reached."""
    order = list(order)
    best = cost(order)
    improved = True
    while improved:
        improved = False
        for i in range(len(order)):
            for j in range(i):
                order[i], order[j] = order[j], order[i]
                value = cost(order)
                if value < best - 1e-6:
                    best, improved = value, True
                else:
                    order[i], order[j] = order[j], order[i]
    return order


def _crossings(nets: Sequence[Net]) -> int:
    """Number of crossings between horizontal and vertical lines of nets in the same channel."""

    def inside(height: float, net: Net) -> bool:
        return min(net.heights) < height < max(net.heights)

    return sum(
        sum(inside(height, right) for height, _ in left.ports)
        + sum(inside(height, left) for height in right.source_heights)
        for j, right in enumerate(nets)
        for left in nets[:j]
    )
