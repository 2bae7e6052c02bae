"""Knowledge graphs: triples, models that score them, training and exact evaluation."""

from tnlayers.kg.model import KGModel as KGModel
