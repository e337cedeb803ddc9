"""Integer handles for Python objects, so that a `torch.library` operator, which takes tensors and numbers only, can name one.

Numbers are never given twice, copies get their own, and nothing is kept alive: the number of an object that is gone
finds nothing.
"""

import itertools
from typing import Any, Self
from weakref import WeakValueDictionary

import torch
from torch import Tensor

_next = itertools.count(1)
_alive: "WeakValueDictionary[int, Numbered]" = WeakValueDictionary()


class Numbered:
    """A class whose objects have a `number`.

    `effects` stands for all that may change about the object. An operator that changes it declares to write there, so that
    a compiler neither drops the call whose output nobody uses, nor takes two calls of equal arguments for one.
    """

    number: int
    effects: Tensor  # one element, never written or read

    def __new__(cls, *arguments: Any, **options: Any) -> Self:
        """Any object, with a number."""
        made = super().__new__(cls)
        made._take_number()
        return made

    def __setstate__(self, state: dict[str, Any]) -> None:
        """How `copy` fills a copy: with everything but the number."""
        self.__dict__.update(state)
        self._take_number()

    def _take_number(self) -> None:
        with torch.inference_mode(False):  # a tensor made within it could not be declared as written outside
            self.effects = torch.zeros(1)
        self.number = next(_next)
        _alive[self.number] = self


def find(number: int, kind: str) -> Any:
    """The object of a number. Raises RuntimeError if it is gone; `kind` is what the message calls it."""
    try:
        return _alive[number]
    except KeyError:
        raise RuntimeError(
            f"the {kind} that this compiled step was made for is gone; keep it as long as the step"
        ) from None
