"""Linear probes: logistic regression on frozen features, CLIP's search included (Florence 3.2).

The objective is that of scikit-learn's `LogisticRegression`: for an inverse strength C of the
regularisation,

    1/2 ||weight||^2  +  C * sum over the images of the cross-entropy

with an intercept that is not penalised. Images with several labels have one logistic regression
per class, as in `OneVsRestClassifier`.
"""

from unicl.evaluation.linear_probe.probe import LinearProbe as LinearProbe
from unicl.evaluation.linear_probe.regularisation import Search as Search
from unicl.evaluation.linear_probe.regularisation import search as search
from unicl.evaluation.linear_probe.solver import fit as fit
