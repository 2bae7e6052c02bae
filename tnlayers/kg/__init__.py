"""Knowledge graphs: triples, models that score them, training and exact evaluation."""

from tnlayers.kg.mixed import LPITF as LPITF
from tnlayers.kg.mixed import MIGTF as MIGTF
from tnlayers.kg.mixed import StoredScores as StoredScores
from tnlayers.kg.model import KGModel as KGModel
