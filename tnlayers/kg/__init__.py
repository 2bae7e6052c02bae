"""Knowledge graphs: triples, models that score them, training and exact evaluation."""

from tnlayers.kg.meim import MEIM as MEIM
from tnlayers.kg.mixed import LPITF as LPITF
from tnlayers.kg.mixed import MIGTF as MIGTF
from tnlayers.kg.mixed import StoredScores as StoredScores
from tnlayers.kg.model import KGModel as KGModel
from tnlayers.kg.relation_maps import RelationMaps as RelationMaps
from tnlayers.kg.rotations import AttE as AttE
from tnlayers.kg.rotations import AttH as AttH
from tnlayers.kg.rotations import RefE as RefE
from tnlayers.kg.rotations import RefH as RefH
from tnlayers.kg.rotations import RotE as RotE
from tnlayers.kg.rotations import RotH as RotH
from tnlayers.kg.score_tensor import ScoreTensor as ScoreTensor
from tnlayers.kg.special import CP as CP
from tnlayers.kg.special import RESCAL as RESCAL
from tnlayers.kg.special import ComplEx as ComplEx
from tnlayers.kg.special import DistMult as DistMult
from tnlayers.kg.special import SimplE as SimplE
from tnlayers.kg.tucker import TTER as TTER
from tnlayers.kg.tucker import TuckER as TuckER
