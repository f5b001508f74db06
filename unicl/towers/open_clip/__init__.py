"""Any model of open_clip as our two towers: an architecture, its published weights, or a file."""

from unicl.towers.open_clip.inputs import OpenClipTokenizer as OpenClipTokenizer
from unicl.towers.open_clip.inputs import PixelTransform as PixelTransform
from unicl.towers.open_clip.loading import load_open_clip as load_open_clip
from unicl.towers.open_clip.messages import quiet as quiet
from unicl.towers.open_clip.names import CONFIG as CONFIG
from unicl.towers.open_clip.names import LOCAL as LOCAL
from unicl.towers.open_clip.names import absolute_name as absolute_name
from unicl.towers.open_clip.names import parse_name as parse_name
from unicl.towers.open_clip.towers import OpenClipImageTower as OpenClipImageTower
from unicl.towers.open_clip.towers import OpenClipTextTower as OpenClipTextTower
