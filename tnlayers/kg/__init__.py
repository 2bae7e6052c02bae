"""Knowledge graphs: triples, models that score them, training and exact evaluation."""

from tnlayers.kg.answers import Answers as Answers
from tnlayers.kg.describe import Description as Description
from tnlayers.kg.foreign import PyKEENModel as PyKEENModel
from tnlayers.kg.foreign import as_model as as_model
from tnlayers.kg.history import Epoch as Epoch
from tnlayers.kg.history import History as History
from tnlayers.kg.losses import Batch as Batch
from tnlayers.kg.losses import Loss as Loss
from tnlayers.kg.losses import NegativeSampling as NegativeSampling
from tnlayers.kg.losses import OneToN as OneToN
from tnlayers.kg.losses import Softmax as Softmax
from tnlayers.kg.losses import negative_loss as negative_loss
from tnlayers.kg.losses import one_to_n_loss as one_to_n_loss
from tnlayers.kg.losses import softmax_loss as softmax_loss
from tnlayers.kg.metrics import Metrics as Metrics
from tnlayers.kg.metrics import Ranks as Ranks
from tnlayers.kg.model import KGModel as KGModel
from tnlayers.kg.ranking import evaluate as evaluate
from tnlayers.kg.ranking import rank as rank
from tnlayers.kg.train import train as train
from tnlayers.kg.triples import Triples as Triples
from tnlayers.kg.triples import load_triples as load_triples
