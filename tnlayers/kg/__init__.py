"""Knowledge graphs: triples, models that score them, training and exact evaluation."""

from tnlayers.kg.answers import Answers as Answers
from tnlayers.kg.describe import Description as Description
from tnlayers.kg.foreign import PyKEENModel as PyKEENModel
from tnlayers.kg.foreign import as_model as as_model
from tnlayers.kg.meim import MEIM as MEIM
from tnlayers.kg.metrics import Metrics as Metrics
from tnlayers.kg.metrics import Ranks as Ranks
from tnlayers.kg.model import KGModel as KGModel
from tnlayers.kg.ranking import evaluate as evaluate
from tnlayers.kg.ranking import rank as rank
from tnlayers.kg.relation_maps import RelationMaps as RelationMaps
from tnlayers.kg.score_tensor import ScoreTensor as ScoreTensor
from tnlayers.kg.special import CP as CP
from tnlayers.kg.special import RESCAL as RESCAL
from tnlayers.kg.special import ComplEx as ComplEx
from tnlayers.kg.special import DistMult as DistMult
from tnlayers.kg.special import SimplE as SimplE
from tnlayers.kg.triples import Triples as Triples
from tnlayers.kg.triples import load_triples as load_triples
from tnlayers.kg.tucker import TTER as TTER
from tnlayers.kg.tucker import TuckER as TuckER
