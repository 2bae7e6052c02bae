"""Knowledge graphs: triples, models that score them, training and exact evaluation."""

from tnlayers.kg.answers import Answers as Answers
from tnlayers.kg.describe import Description as Description
from tnlayers.kg.foreign import PyKEENModel as PyKEENModel
from tnlayers.kg.foreign import as_model as as_model
from tnlayers.kg.metrics import Metrics as Metrics
from tnlayers.kg.metrics import Ranks as Ranks
from tnlayers.kg.model import KGModel as KGModel
from tnlayers.kg.r_tucker import RTuckER as RTuckER
from tnlayers.kg.r_tucker import r_tucker_optimizer as r_tucker_optimizer
from tnlayers.kg.ranking import evaluate as evaluate
from tnlayers.kg.ranking import rank as rank
from tnlayers.kg.triples import Triples as Triples
from tnlayers.kg.triples import load_triples as load_triples
