"""Rationale texts to step graphs, agreement between teachers, and consensus scores."""

from compact_fast.graphs.explain import explain
from compact_fast.graphs.matching import MatchResult, assign, match, match_matrices
from compact_fast.graphs.native import NativeMissingWarning, backend_name
from compact_fast.graphs.options import GraphOptions
from compact_fast.graphs.parsing import answer_keys, parse_rationales
from compact_fast.graphs.scoring import ConsensusResult, agreement, consensus, score_graphs
from compact_fast.graphs.structure import StepGraphs

__all__ = [
    "ConsensusResult",
    "GraphOptions",
    "MatchResult",
    "NativeMissingWarning",
    "StepGraphs",
    "agreement",
    "answer_keys",
    "assign",
    "backend_name",
    "consensus",
    "explain",
    "match",
    "match_matrices",
    "parse_rationales",
    "score_graphs",
]
