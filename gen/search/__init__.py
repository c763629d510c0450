"""Which pictures go on: a search decides that, and never what a picture's pixels are.

`field` is what a search sees and may ask for, `rules` are the searches, `choice` says which of the painted pictures
are kept. All this knows how candidates stand, not how they got there.
"""

from gen.search.choice import best_first, diverse_first, drawing_order
from gen.search.field import Field, Go, Move, Moves, Scout, Search, SearchContext
from gen.search.rules import SEARCHES, BestOf, Draft, FeynmanKac, Halving, Racing, ZeroOrder, by_name, in_rounds

__all__ = [
    "SEARCHES",
    "BestOf",
    "Draft",
    "FeynmanKac",
    "Field",
    "Go",
    "Halving",
    "Move",
    "Moves",
    "Racing",
    "Scout",
    "Search",
    "SearchContext",
    "ZeroOrder",
    "best_first",
    "by_name",
    "diverse_first",
    "drawing_order",
    "in_rounds",
]
