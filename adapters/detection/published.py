"""The sets that Florence's paper measures detection on, as it counts them.

Its figures are in `unicl.evaluation.published`.
"""

from unicl.evaluation.published import ROBOFLOW

NUM_IMAGES = dict(
    zip(ROBOFLOW, (638, 364, 292, 149, 3680, 26, 2986, 12416, 665, 203, 737), strict=True)
)
"""Images that the paper counts in each, all parts together."""
NUM_CLASSES = dict(zip(ROBOFLOW, (7, 3, 12, 2, 37, 1, 1, 2, 1, 2, 1), strict=True))
"""Classes that the paper counts in each."""
