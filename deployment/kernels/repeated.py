"""What every layer does alike with a chunk of a prompt: recorded for one layer, repeated for the others.

Of a layer's attention to a chunk, only what unpacks its own pages is its own. Everything else, the library's attention among it, goes from the same
memory to the same memory, if only the chunk's queries, keys and values are (step/reading.py), and is as long for each layer: the host, which
takes ten times longer to launch it than to launch a graph of it, need do so for two layers only. The first does everything as it is, so that what
libraries make once is made; the second is recorded.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

Recorder = Callable[[Callable[[], Any]], tuple[Callable[[], object], Any]]
_Result = TypeVar("_Result")

_current: ContextVar["Repeated | None"] = ContextVar("repeated", default=None)


class Repeated:
    """The work of one chunk after another.

    Args:
        recorder: makes of work that has been done before (what does it again, its result, the same tensors every time); None if
            there is none.
    """

    def __init__(self, recorder: Recorder | None = None) -> None:
        self.replays = 0
        self._recorder = recorder
        self._key: object = None
        self._operands: tuple[object, ...] = ()
        self._layers = self._next = 0
        self._done: list[tuple[Callable[[], object], Any]] = []
        self._kept: list[Any] = []
        self._before: object = None  # a chunk's graphs keep the memory that those of the next are to use

    @contextmanager
    def chunk(self) -> Iterator[None]:
        """Within the block the layers of one chunk are attended to."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)
            self._start(None, ())

    def _start(self, key: object, operands: tuple[object, ...]) -> None:
        self._before = [replay for replay, _ in self._done] or self._before
        self._key, self._operands, self._layers, self._done, self._kept = key, operands, 0, [], []

    def layer(self, key: object, operands: tuple[object, ...]) -> None:
        """A layer begins. Its work is that of the layer before if its key is equal, and its operands are the same objects."""
        same = len(operands) == len(self._operands) and all(
            a is b for a, b in zip(operands, self._operands, strict=True)
        )
        if key != self._key or not same:
            self._start(key, operands)
        self._layers += 1
        self._next = 0

    def kept(self, make: Callable[[], _Result]) -> _Result:
        """What `make` has made for the first layer."""
        if not self._kept:
            self._kept.append(make())
        return self._kept[0]

    def do(self, work: Callable[[], _Result]) -> _Result:
        """The next part of a layer's work; what it returns is overwritten by the next layer's."""
        number, self._next = self._next, self._next + 1
        if number < len(self._done):
            replay, result = self._done[number]
            self.replays += 1
        elif self._recorder is None or self._layers < 2 or number > len(self._done):
            return work()
        else:
            try:
                replay, result = self._recorder(work)
            except RuntimeError:  # nothing of it has been done; what comes after it needs what came before it
                self._recorder, self._before, self._done = None, self._done, []
                return work()
            self._done.append((replay, result))
        replay()
        return result


def repeated() -> Repeated | None:
    """What the layers of the chunk that is being read share, if they do."""
    return _current.get()
