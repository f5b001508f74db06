"""Sets of images to evaluate on, with classes or captions (Florence, sections 3.1, 3.2, 3.5)."""

from unicl.data.image_sets.image_set import CaptionSet as CaptionSet
from unicl.data.image_sets.image_set import ClassificationSet as ClassificationSet
from unicl.data.image_sets.image_set import ImageSet as ImageSet
from unicl.data.image_sets.image_set import Metric as Metric
from unicl.data.image_sets.image_set import MissingSetError as MissingSetError
from unicl.data.image_sets.opening import KNOWN_SETS as KNOWN_SETS
from unicl.data.image_sets.opening import open_image_set as open_image_set
from unicl.data.image_sets.opening import open_images as open_images
from unicl.data.image_sets.public import LINEAR_PROBE_SETS as LINEAR_PROBE_SETS
from unicl.data.image_sets.public import ZERO_SHOT_SETS as ZERO_SHOT_SETS
