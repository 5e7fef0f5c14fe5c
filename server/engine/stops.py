"""Stop strings in a text that comes piece by piece.

Each is followed by the automaton of Knuth, Morris and Pratt (1977): what a character costs depends
neither on how long the strings are nor on how long the text is.
"""

from collections.abc import Sequence


class StopFinder:
    """Finds the string that is complete first, wherever the pieces begin."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._automata = [_Automaton(stop) for stop in stops]

    @property
    def num_held(self) -> int:
        """Characters at the end of the text that may be the beginning of a stop string."""
        return max((each.matched for each in self._automata), default=0)

    def push(self, piece: str, *, may_stop: bool) -> tuple[int, str] | None:
        """Go on with a piece of the text. The stop string that is complete first, and up to where
        the piece belongs to it; of two that end there, the longer one. None if there is none.

        A string that ends where it may not is ordinary text. After a string was found nothing may
        follow.
        """
        found: tuple[int, int, str] | None = None
        for each in self._automata:
            end = each.push(piece, may_stop=may_stop)
            if end is not None:
                candidate = (end, -len(each.stop), each.stop)
                found = candidate if found is None else min(found, candidate)
        return None if found is None else (found[0], found[2])


class _Automaton:
    """Of one string."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.matched = 0
        """Characters of the string that the text ends with; all of it is never among them."""

        self._shorter = [0]
        """After so many characters and one: the next shorter beginning of the string that ends
        there. It grows with what has matched, so that a long string costs nothing in advance."""

    def push(self, piece: str, *, may_stop: bool) -> int | None:
        """Where in the piece the string is complete, if it may be."""
        stop, shorter, matched, place = self.stop, self._shorter, self.matched, 0
        while place < len(piece):
            if not matched:
                place = piece.find(stop[0], place)
                if place < 0:
                    break
            character = piece[place]
            while matched and stop[matched] != character:
                matched = shorter[matched - 1]
            if stop[matched] == character:
                matched += 1
                if matched > len(shorter):
                    self._extend()
            place += 1
            if matched == len(stop):
                if may_stop:
                    return place
                matched = shorter[matched - 1]
        self.matched = matched
        return None

    def _extend(self) -> None:
        stop, shorter = self.stop, self._shorter
        character, matched = stop[len(shorter)], shorter[-1]
        while matched and stop[matched] != character:
            matched = shorter[matched - 1]
        shorter.append(matched + (stop[matched] == character))
