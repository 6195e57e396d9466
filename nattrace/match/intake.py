"""Intake: captures read in step with each other and handed to the matcher, window by window.

The capture that is furthest behind in time is read next, so that packets of one instant meet in one window
however different the captures' rates are.
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

import numpy as np

from nattrace.match.clock.sample import samples
from nattrace.match.prepare import FIRST_LAYER, Layer, Preparation
from nattrace.match.workers import Worker, worthwhile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from nattrace.ingest.source import Capture, PointInfo, ReadOptions
    from nattrace.match.clock.compare import Clocks
    from nattrace.match.clock.corrected import Corrected
    from nattrace.match.prepare import Prepared
    from nattrace.match.windows import Matcher


@dataclass(frozen=True, slots=True)
class LayerInfo:
    """What a layer that was matched is: whose packets, and which of them. `home` is the point's first layer."""

    info: PointInfo
    home: int  #: its number among the layers
    layer: Layer
    #: packets that matching cannot use, by reason; a point's are all at its first layer
    set_aside: Counter[str]
    carrier: NDArray[np.int64] | None = (
        None  #: of a layer in tunnels, by packet number; see `prepare.carriers`
    )


@dataclass(slots=True)
class _Reading:
    """One capture while it is read."""

    capture: int  #: its number among the captures
    source: Preparation | Worker
    chunks: Iterator[Prepared]
    numbers: dict[tuple[int, Layer], int] = field(default_factory=dict)  #: its layers' numbers among all
    newest_ns: int = -(2**62)  #: all packets up to then have been given to the matcher
    reached_ns: int = -(2**62)  #: as far as some layer has come
    carriers: dict[int, list[NDArray[np.int64]]] = field(default_factory=dict)  #: by layer number


class Intake:
    """Captures being read. Large files are read by workers from the moment this is made.

    `sizes_bytes` are the sizes of the captures' files, 0 where unknown, `clocks` names of the clocks that
    they are known to be taken on, None where not known. Use as a context manager: leaving it ends the
    workers. With `corrected`, captures of other clocks are read on the reference clock's time; without, a
    sample is kept by which `compare_clocks` can tell whether there are any.
    """

    def __init__(
        self,
        captures: Sequence[Capture],
        sizes_bytes: Sequence[int],
        options: ReadOptions,
        clocks: Sequence[str | None],
        corrected: Corrected | None = None,
    ) -> None:
        self._corrected = corrected
        self._clocks = clocks
        one_clock = len(set(clocks)) == 1 and clocks[0] is not None
        self._samples = samples(sizes_bytes) if corrected is None and not one_clock else []
        self._stack = ExitStack()
        self._readings: list[_Reading] = []
        self._layers: list[tuple[_Reading, int, Layer]] = []
        try:
            for number, (capture, size_bytes) in enumerate(zip(captures, sizes_bytes, strict=True)):
                source: Preparation | Worker
                if len(captures) > 1 and worthwhile(size_bytes):
                    source = self._stack.enter_context(closing(Worker(capture, options)))
                else:
                    source = Preparation(capture, options)
                self._readings.append(_Reading(number, source, source.chunks()))
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Self:
        """Return self."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the workers."""
        self._stack.close()

    def run(self, matcher: Matcher, progress: Callable[[int], None] | None) -> list[LayerInfo]:
        """Read all captures to their ends and match them; `progress` is told the bytes of every chunk.

        Returns the layers in the order of the matcher's numbers.
        """
        active = list(self._readings)
        while active:
            reading = min(active, key=lambda r: r.newest_ns)
            chunk = next(reading.chunks, None)
            if chunk is None:
                active.remove(reading)
                continue
            number = self._number(reading, chunk.point, chunk.layer, matcher)
            if self._corrected is not None:
                self._corrected.apply(reading.capture, number, chunk)
            elif self._samples:
                self._samples[reading.capture].add(number, chunk.rows)
            reading.reached_ns = max(reading.reached_ns, int(chunk.rows.table.time_ns.max()))
            if chunk.last:
                reading.newest_ns = reading.reached_ns
            if chunk.carrier is not None:
                reading.carriers.setdefault(number, []).append(chunk.carrier)
            matcher.add(number, chunk.rows)
            if progress is not None:
                progress(chunk.size_bytes)
            if matcher.full():
                matcher.advance(min((r.newest_ns for r in active), default=None))
        outcomes = {id(reading): reading.source.outcome() for reading in self._readings}
        for reading in self._readings:
            # points without a usable packet are points all the same, and so are errors
            for local, by_depth in enumerate(outcomes[id(reading)].errors):
                for depth, own in enumerate(by_depth):
                    if not depth or len(own):
                        self._number(reading, local, Layer(depth), matcher)
        for number, (reading, local, layer) in enumerate(self._layers):
            flows = outcomes[id(reading)].flows.get((local, layer))
            if flows is not None:
                if self._corrected is not None:
                    self._corrected.apply_to_flows(number, flows)
                matcher.points[number].flows = flows
            if not layer.turn:
                outcome = outcomes[id(reading)]
                errors, unread = outcome.errors[local][layer.depth], outcome.unread[local][layer.depth]
                if self._corrected is not None:
                    for packets in (errors.packets, unread.packets):
                        self._corrected.apply_to_errors(reading.capture, number, packets)
                matcher.points[number].errors = errors
                matcher.points[number].unread = unread
        matcher.finish()
        return [
            LayerInfo(
                info=outcomes[id(reading)].points[local],
                home=reading.numbers[local, FIRST_LAYER],
                layer=layer,
                set_aside=outcomes[id(reading)].set_aside[local] if layer == FIRST_LAYER else Counter(),
                carrier=np.concatenate(reading.carriers[number]) if number in reading.carriers else None,
            )
            for number, (reading, local, layer) in enumerate(self._layers)
        ]

    @property
    def capture_of_layer(self) -> list[int]:
        """The number of the capture that each layer belongs to."""
        return [reading.capture for reading, _, _ in self._layers]

    def compare_clocks(self, matcher: Matcher, names: Sequence[str]) -> Clocks | None:
        """Return how the captures' clocks differ, None when nothing says they do. To be called after `run`.

        `names` are those of the layers; the capture with the smallest is the measure for the others.
        """
        if not self._samples:
            return None
        from nattrace.match.clock.compare import compare  # noqa: PLC0415 - needs several captures

        def matched(layer: int, other: int, numbers: NDArray[np.int64]) -> NDArray[np.bool_]:
            return matcher.points[layer].found_at(other)[numbers]

        by_name = sorted(zip(names, self.capture_of_layer, strict=True))
        order = list(dict.fromkeys(capture for _, capture in by_name))
        return compare(self._samples, self._clocks, order, matched)

    def _number(self, reading: _Reading, local: int, layer: Layer, matcher: Matcher) -> int:
        """Return the number of a layer of a capture's point among all layers, giving it one when it is new."""
        number = reading.numbers.get((local, layer))
        if number is None:
            if layer != FIRST_LAYER:
                self._number(reading, local, FIRST_LAYER, matcher)
            number = reading.numbers[local, layer] = len(self._layers)
            self._layers.append((reading, local, layer))
            matcher.add_point(reading.capture)
        return number
