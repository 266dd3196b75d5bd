"""Searches choose which channels a rewrite removes. Importing this package registers all of them.

search = build_search("greedy", SearchSettings(shortlist=8)) decision = search.choose(situation)
"""

from pruning.search.global_ranking import GlobalSearch
from pruning.search.greedy import GreedySearch
from pruning.search.rates import RateSearch
from pruning.search.search import (
    Candidate,
    Decision,
    Search,
    SearchSettings,
    Situation,
    build_search,
    register_search,
    search_names,
)
from pruning.search.sensitivity import SensitivitySearch
from pruning.search.uniform import UniformSearch

#: Searches that work step by step and stop once the targets are met.
STEPWISE = (GlobalSearch, GreedySearch, SensitivitySearch, UniformSearch)

__all__ = [
    "STEPWISE",
    "Candidate",
    "Decision",
    "GlobalSearch",
    "GreedySearch",
    "RateSearch",
    "Search",
    "SearchSettings",
    "SensitivitySearch",
    "Situation",
    "UniformSearch",
    "build_search",
    "register_search",
    "search_names",
]
