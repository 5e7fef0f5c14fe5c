"""Stop strings in streamed text.

Each is matched by the Knuth-Morris-Pratt automaton (1977): the cost per character depends neither
on the length of the strings nor on that of the text.
"""

from collections.abc import Sequence


class StopFinder:
    """Finds the stop string that is completed first, across pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._automata = [_Automaton(stop) for stop in stops]

    @property
    def num_held(self) -> int:
        """Characters at the end of the text that may begin a stop string."""
        return max((each.matched for each in self._automata), default=0)

    def push(self, piece: str, *, may_stop: bool) -> tuple[int, str] | None:
        """Add a piece of the text. Returns the stop string that is completed first, and the end of
        the text before it in the piece; of two with the same end, the longer one. None if there is
        none.

        A string that ends where stopping is not allowed is ordinary text. Not to be called after a
        match.
        """
        found: tuple[int, int, str] | None = None
        for each in self._automata:
            end = each.push(piece, may_stop=may_stop)
            if end is not None:
                candidate = (end, -len(each.stop), each.stop)
                found = candidate if found is None else min(found, candidate)
        return None if found is None else (found[0], found[2])


class _Automaton:
    """The automaton of one string."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.matched = 0
        """Length of the longest proper prefix of the string that the text ends with."""

        self._shorter = [0]
        """Failure function, by matched length. Extended as the match grows, so that long strings
        cost nothing in advance."""

    def push(self, piece: str, *, may_stop: bool) -> int | None:
        """The index in the piece where the string is complete, if it may stop there."""
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
