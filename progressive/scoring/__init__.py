"""Quality as a number: scorers of pictures, distances between sets of them, and how sure a difference is.

    scorer = named("clip:weights/clip")               # or judge, things, module:function
    before = score_rows(scorer, pictures, prompts)    # float64, one a row, higher is better
    paired_difference(after, before)                  # mean, low, high

How near a picture is to another one is fidelity: `overtone.progressive.quality`.
"""

from __future__ import annotations

from overtone.progressive.scoring.bootstrap import Difference, paired_difference, paired_distance_difference
from overtone.progressive.scoring.distances import frechet_distance
from overtone.progressive.scoring.measures import Scorer, SetDistance, features_of_rows, score_rows
from overtone.progressive.scoring.names import named

__all__ = [
    "Difference",
    "Scorer",
    "SetDistance",
    "features_of_rows",
    "frechet_distance",
    "named",
    "paired_difference",
    "paired_distance_difference",
    "score_rows",
]
